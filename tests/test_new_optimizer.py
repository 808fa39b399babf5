"""docs/new_optimizer.md, applied to a copy of the sources, makes an optimizer."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from metal_simulator.extension import extension

pytestmark = pytest.mark.fused
ROOT = Path(__file__).resolve().parents[1]

STEPS = """
import mlx.core as mx
import numpy as np
from mlx_fused_optimizers.optimizers.signum import Signum

mx.set_default_device(mx.cpu)


def train():
    rng = np.random.default_rng(0)
    p, m = rng.standard_normal((70, 36)), np.zeros((70, 36))
    tree = {"w": mx.array(p.astype(np.float32)), "empty": mx.zeros((0, 3))}
    optimizer = Signum(0.01, beta=0.8, max_grad_norm=1e6, skip_nonfinite=True)
    for step in range(5):
        g = rng.standard_normal((36, 70)).T
        if step == 2:
            g[3, 4] = np.nan
        else:
            m = 0.8 * m + (1 - 0.8) * g
            p = p - 0.01 * np.sign(m)
        given = {"w": mx.array(g.T.astype(np.float32)).T, "empty": tree["empty"]}
        tree = optimizer.apply_gradients(given, tree)
    np.testing.assert_allclose(np.array(tree["w"]), p, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(np.array(optimizer.state["w"]["m"]), m, atol=1e-5)
    assert int(optimizer.skipped_steps) == 1
    loss = lambda w: optimizer.apply_single(w * w, w, {"m": w}).sum()
    assert mx.grad(loss)(mx.ones(3)).tolist() == [1, 1, 1]


"""


def test_the_page_is_all_that_it_takes(tmp_path: Path) -> None:
    if extension() is None:
        pytest.skip("the simulator is not built")
    page = (ROOT / "docs" / "new_optimizer.md").read_text()
    (struct,) = re.findall(r"^```cpp\n(.*?)^```$", page, re.M | re.S)
    (module,) = re.findall(r"^```py\n(.*?)^```$", page, re.M | re.S)
    statements = module[module.index("class") :].strip().splitlines()
    assert len([line for line in statements if line and '"""' not in line]) <= 15

    for name in ("cmake", "csrc", "metal", "python", "tests/metal_simulator"):
        shutil.copytree(ROOT / name, tmp_path / name)
    shutil.copy(ROOT / "CMakeLists.txt", tmp_path)
    with (tmp_path / "metal" / "update_rules.h").open("a") as rules:
        rules.write("\n" + struct)
    package = tmp_path / "python" / "mlx_fused_optimizers"
    (package / "optimizers" / "signum.py").write_text(module)

    builds = {"cpu": ("OFF", "_ext"), "simulator": ("ON", "_ext_simulated")}
    for build, (simulated, target) in builds.items():
        folder = tmp_path / "build" / build
        options = [f"-DMLX_FUSED_SIMULATOR={simulated}", "-DCMAKE_BUILD_TYPE=None"]
        python = f"-DPython_EXECUTABLE={sys.executable}"
        environment = {
            **os.environ,
            "PATH": os.pathsep.join(
                [str(Path(sys.executable).parent), os.environ["PATH"]]
            ),
        }
        for command in (
            ["cmake", "-S", tmp_path, "-B", folder, "-GNinja", python, *options],
            ["cmake", "--build", folder, "--target", target],
        ):
            subprocess.run(
                [str(part) for part in command],
                check=True,
                env=environment,
                stdout=subprocess.DEVNULL,
            )
    for library in (tmp_path / "build" / "cpu").glob("_ext*.so"):
        shutil.copy(library, package)
    for header in ("update_rules.h", "formats.h"):
        shutil.copy(tmp_path / "metal" / header, package)

    simulator = tmp_path / "build/simulator/tests/metal_simulator"
    paths = [tmp_path / "python", tmp_path / "tests"]
    runs = {
        "cpu": "train()",
        "plain": "from mlx_fused_optimizers import _kernels, _plain\n"
        "with _kernels.using(_plain):\n    train()",
        "simulator": "from metal_simulator.extension import simulated\n"
        "with simulated():\n    train()\n    mx.synchronize()",
    }
    for run in runs.values():
        subprocess.run(
            [sys.executable, "-c", STEPS + run],
            check=True,
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join(map(str, paths)),
                "MLX_FUSED_SIMULATOR_LIBRARY": str(simulator / "libmetal_simulator.so"),
            },
        )

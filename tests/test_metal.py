"""The Metal kernels and their host code, in the simulator."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import metal_simulator
import mlx.core as mx
import mlx_fused_optimizers as optim
import numpy as np
import pytest
from conftest import SIMULATOR
from metal_simulator import Out
from metal_simulator.extension import extension
from mlx_fused_optimizers._kernels import kernels
from support import fill, random_array, snapshot, to_numpy

METAL = Path(__file__).resolve().parents[1] / "metal"

pytestmark = pytest.mark.fused
simulated = pytest.mark.parametrize("backend", [SIMULATOR], indirect=True)


def launch_header() -> str:
    return "#include <metal_stdlib>\nusing namespace metal;\n" + "".join(
        (METAL / name).read_text() for name in ("launch.h", "storage.h", "gradients.h")
    )


def test_indices_beyond_32_bits() -> None:
    """A tensor of 2^40 elements, without allocating one."""
    source = (
        launch_header()
        + """
    [[kernel]] void indices(
        constant uint* tiles [[buffer(0)]],
        constant int64_t* elements [[buffer(1)]],
        constant int64_t* walk [[buffer(2)]],
        device int64_t* starts [[buffer(3)]],
        device int64_t* locations [[buffer(4)]],
        uint i [[thread_position_in_grid]]) {
      starts[i] = vector_start(tiles[i], 5, 255, 3);
      locations[i] = locate<int64_t>(elements[i], walk, 3);
    }
    """
    )
    tiles = np.array([5, 6, 1 << 20, 1 << 28], np.uint32)
    elements = np.array([0, (1 << 32) + 7, (1 << 38) + 123456789, (1 << 40) - 1])
    shape, strides = [1 << 10, 1 << 14, 1 << 16], [1 << 31, -3, 1 << 15]
    starts, locations = np.zeros(4, np.int64), np.zeros(4, np.int64)
    metal_simulator.run(
        source,
        "indices",
        [
            tiles,
            elements,
            np.array(shape + strides),
            Out(starts),
            Out(locations),
        ],
        grid=4,
        group=4,
    )
    # 256 threads of four vectors of four elements.
    expected = (tiles.astype(np.int64) - 5) * 4096 + 3 * 1024 + 255 * 4
    np.testing.assert_array_equal(starts, expected)
    positions = np.array(np.unravel_index(elements, shape))
    np.testing.assert_array_equal(locations, np.array(strides) @ positions)
    assert starts.max() > 1 << 39
    assert locations.max() > 1 << 39


def test_the_sources_are_conservative() -> None:
    """What newer versions of the language would refuse or read otherwise."""
    for path in METAL.iterdir():
        text = path.read_text()
        assert text.isascii(), path  # MLX hands it to Metal as ASCII
        # From version 4.1 on, what has no address space is generic.
        assert ") const {" not in text, path
        code = "\n".join(line.split("//")[0] for line in text.splitlines())
        for declaration in re.findall(r"[^;{}(),=]*[A-Za-z0-9_>][*&] ?[a-z]\w*", code):
            if "&&" in declaration or " * " in declaration:
                continue
            assert re.search(r"\b(device|constant|thread|threadgroup)\b", declaration)


@simulated
def test_order_of_threads_does_not_matter(backend: str) -> None:
    rng = np.random.default_rng(0)
    parameters = {str(i): random_array(rng, (i * 611,), mx.float32) for i in range(9)}
    gradients = fill(parameters, rng, mx.float32)
    results = []
    try:
        for seed in (0, 1, 2, 3):
            metal_simulator.set_seed(seed)
            optimizer = optim.AdamW(1e-2, bias_correction=True)
            clipped, norm = optim.clip_grad_norm(gradients, 1.0)
            updated = optimizer.apply_gradients(clipped, parameters)
            results.append(snapshot([updated, norm, optimizer.state]))
    finally:
        metal_simulator.set_seed(0)
    assert all(result == results[0] for result in results)


@simulated
def test_several_tensors_a_launch(backend: str) -> None:
    parameters = {str(i): mx.ones((10 + i,)) for i in range(13)}
    gradients = {key: mx.full(x.shape, 0.5) for key, x in parameters.items()}
    mx.eval(parameters, gradients)
    optimizer = optim.Lion(1e-2)
    optimizer.init(parameters)
    mx.eval(optimizer.state)
    first = optimizer.apply_gradients({"0": gradients["0"]}, parameters)
    mx.eval(first, optimizer.state)  # the kernel is checked at its first use
    metal_simulator.reset()
    parameters = optimizer.apply_gradients(gradients, parameters)
    mx.eval(parameters, optimizer.state)
    updates = [
        launch for launch in metal_simulator.counters() if "Lion" in launch.kernel
    ]
    assert len(updates) == 3  # six, six and one
    elements = sum(x.size for x in parameters.values())
    assert sum(launch.bytes_read for launch in updates) == 12 * elements
    assert sum(launch.bytes_written for launch in updates) == 8 * elements


@simulated
def test_more_strides_than_a_launch_can_describe(backend: str) -> None:
    """24 gradients of 12 dimensions that cannot be merged, with gaps, exceed 4 KiB.

    Some are copied, into memory that MLX must hold until the launch has read it.
    """
    shape, order = (2,) * 12, (0, 2, 1, 4, 3, 6, 5, 8, 7, 10, 9, 11)
    rng = np.random.default_rng(0)
    gradients = {
        str(i): random_array(rng, (*shape[1:], 4), mx.float32)[..., ::2].transpose(
            order
        )
        for i in range(24)
    }
    contiguous = {key: mx.contiguous(x) for key, x in gradients.items()}
    mx.eval(gradients, contiguous)
    metal_simulator.reset()
    norms = [optim.clip_grad_norm(x, 1.0)[1].item() for x in (gradients, contiguous)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-6)
    copies = [x for x in metal_simulator.counters() if "copy_array" in x.kernel]
    assert copies
    results = []
    for given in (gradients, contiguous):
        optimizer = optim.SGD(0.1, momentum=0.9)
        parameters = {key: mx.ones(shape) for key in given}
        results.append(snapshot(optimizer.apply_gradients(given, parameters)))
    assert results[0] == results[1]


@simulated
@pytest.mark.parametrize(
    "rule", ["AdamBiasCorrected", "AdaDelta", "Lion", "AdEMAMix", "Adan", "NAdam"]
)
def test_kernels_agree_in_unkind_arithmetic(backend: str, rule: str) -> None:
    """Contraction on, a power that is off by 2^-22, subnormals flushed."""
    single, half = mx.zeros(1), mx.zeros(1, mx.bfloat16)
    with metal_simulator.unkind():
        assert kernels.check_update(rule, single, single, single) is None
        held = (half, half, single, "24bit", "int8")
        assert kernels.check_update(rule, *held) is None
        assert kernels.check_sums(single) is None


FALLBACK = """
import warnings
import mlx.core as mx, numpy as np
from metal_simulator.extension import extension
import mlx_fused_optimizers as optim
from mlx_fused_optimizers._kernels import using
import metal_simulator, os

kernels = extension()
os.environ["MLX_FUSED_SIMULATOR_PYTHON"] = "false"  # no kernel can be compiled
parameters, gradients = {"w": mx.arange(5.0)}, {"w": mx.ones(5)}
assert "cannot be built" in kernels.check_update("Adam", *[mx.ones(1)] * 3)
name = "fused_update_Adam_float_float_float_float"
assert name in kernels.check_update("Adam", *[mx.ones(1)] * 3)
with using(kernels), warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    optimizer = optim.AdamW(0.1)
    step = mx.compile(lambda p, g: optimizer.apply_gradients(g, p))
    for _ in range(3):
        parameters = optimizer.apply_gradients(gradients, parameters)
        mx.eval(parameters)
    clipped, norm = optim.clip_grad_norm(gradients, 1.0)
print([parameters["w"].tolist(), norm.item(), clipped["w"].tolist()])
for warning in caught:
    print(warning.category.__name__, str(warning.message).splitlines()[0])
"""


def test_a_kernel_that_cannot_be_built_is_replaced_with_one_warning(
    tmp_path: Path,
) -> None:
    result = subprocess.run(
        [sys.executable, "-c", FALLBACK],
        env={
            **os.environ,
            "PYTHONPATH": str(Path(__file__).parent),
            "MLX_FUSED_SIMULATOR_CACHE": str(tmp_path),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    numbers, *messages = result.stdout.splitlines()
    optimizer = optim.AdamW(0.1)
    parameters, gradients = {"w": mx.arange(5.0)}, {"w": mx.ones(5)}
    for _ in range(3):
        parameters = optimizer.apply_gradients(gradients, parameters)
    clipped, norm = optim.clip_grad_norm(gradients, 1.0)
    expected: list[Any] = [
        to_numpy(parameters["w"]),
        float(norm),
        to_numpy(clipped["w"]),
    ]
    values = json.loads(numbers)
    for value, wanted in zip(values, expected, strict=True):
        np.testing.assert_allclose(value, wanted, rtol=1e-6)
    # One for the update, one for each kernel of clipping.
    assert len(messages) == 3
    assert all("RuntimeWarning Metal kernels failed" in text for text in messages)


@simulated
def test_kernels_are_checked_while_a_function_is_traced(backend: str) -> None:
    """The first use of a kernel may be inside of mx.compile, mx.grad or mx.vmap."""
    kernels = extension()
    assert kernels is not None

    def loss(x: mx.array) -> mx.array:
        updated = optim.Adam(0.1).apply_gradients({"w": x * 2}, {"w": x})
        total: mx.array = updated["w"].sum()
        return total

    x = mx.array([1.0, 2.0, 3.0])
    expected = to_numpy(x) - 0.1 / (1e-8 + np.sqrt(0.001)) * 0.1
    for transform in (
        lambda: mx.compile(loss)(x),
        lambda: mx.value_and_grad(loss)(x)[0],
        lambda: mx.vmap(loss)(x[None])[0],
    ):
        kernels.reset_trust()
        np.testing.assert_allclose(float(transform()), expected.sum(), rtol=1e-5)

"""Plain MLX operations in the place of the extension: its numbers, trees and errors."""

import json
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_fused_optimizers as optim
import numpy as np
import pytest
from mlx_fused_optimizers import _ext, _kernels, _plain, _rules
from support import (
    FLOATS,
    MLX_VERSION,
    assert_trees_match,
    fill,
    leaves_of,
    random_array,
    to_numpy,
)

pytestmark = pytest.mark.fused
# Of one element: Adafactor's rules are tested below.
RULES = [rule for rule in _plain.rule_names() if not rule.startswith("Adafactor")]
VALUES = {
    "beta1": 0.8,
    "beta2": 0.95,
    "beta3": 0.99,
    "warmup": 7.0,
    "nesterov": 1.0,
    "eps": 1e-3,
}
SHAPES: list[tuple[int, ...]] = [(), (7,), (5, 3), (2, 3, 4), (0, 3), (1000,)]

Arguments = dict[str, Any]


def test_the_rules_are_those_of_the_header() -> None:
    assert _plain.rule_names() == _ext.rule_names()
    for rule in _ext.rule_names():
        assert _plain.hyperparameters(rule) == _ext.hyperparameters(rule)
        assert _plain.states(rule) == _ext.states(rule)
        assert _plain.written_slots(rule) == _ext.written_slots(rule)


def test_the_copy_of_the_header_is_the_header() -> None:
    root = Path(__file__).parents[1]
    for name in ("update_rules.h", "formats.h"):
        copy = Path(optim.__file__).parent / name
        assert copy.read_bytes() == (root / "metal" / name).read_bytes()


def values_of(rule: str, nesterov: float = 1.0) -> dict[str, Any]:
    values = {name: VALUES.get(name, 0.1) for name in _ext.hyperparameters(rule)}
    return {**values, "nesterov": nesterov} if "nesterov" in values else values


def scalars_of(rule: str) -> Arguments:
    return {
        "learning_rate": mx.array(0.01),
        "step": mx.array(3, mx.uint64),
        "coefficient": mx.array(0.7),
    }


def update(
    kernels: Any,
    rule: str,
    values: list[dict[str, Any]],
    dtypes: tuple[mx.Dtype, mx.Dtype, mx.Dtype] = (mx.float32,) * 3,
    shape_of_gradient: Callable[[tuple[int, ...]], tuple[int, ...]] = lambda x: x,
    **arguments: Any,
) -> dict[str, mx.array]:
    """One update of a tree by the extension or by plain operations."""
    rng = np.random.default_rng(0)
    parameter, gradient, state = dtypes
    tree = [
        (
            random_array(rng, shape_of_gradient(shape), gradient),
            random_array(rng, shape, parameter),
            # Moments of squares are positive.
            {k: mx.abs(random_array(rng, shape, state)) for k in _ext.states(rule)},
        )
        for shape in SHAPES
    ]
    gradients, parameters, states = map(list, zip(*tree, strict=True))
    leaves = kernels.Leaves(gradients, parameters, states)
    assert leaves.update(rule, values, **{**scalars_of(rule), **arguments})
    updated = leaves.commit()
    results = {f"parameter {i}": x for i, x in enumerate(updated)}
    for i, x in enumerate(leaves.gradients):
        results[f"gradient {i}"] = x
    for i, entry in enumerate(leaves.states):
        results |= {f"{key} {i}": x for key, x in entry.items()}
    return results


def assert_equal_updates(
    *arguments: Any, relative: float = 2e-6, **keywords: Any
) -> None:
    actual = update(_plain, *arguments, **keywords)
    expected = update(_ext, *arguments, **keywords)
    assert actual.keys() == expected.keys()
    for name, x in actual.items():
        y = expected[name]
        assert (x.dtype, x.shape) == (y.dtype, y.shape), name
        np.testing.assert_allclose(
            to_numpy(x), to_numpy(y), rtol=relative, atol=relative, err_msg=name
        )


def per_tensor(rng: np.random.Generator) -> Arguments:
    count = len(SHAPES)
    return {
        "learning_rate": mx.array(rng.uniform(0.01, 0.1, count).astype(np.float32)),
        "step": mx.array(np.arange(1, count + 1, dtype=np.uint64)),
        "gradient_scale": mx.array(rng.uniform(0.1, 2, count).astype(np.float32)),
        "skip": mx.array(np.arange(count) % 2 == 0),
        "per_tensor": True,
    }


ARGUMENTS: dict[str, Arguments] = {
    "plain": {},
    "clipped": {"gradient_scale": mx.array(0.3)},
    "skipped": {"skip": mx.array(True)},
    "not skipped": {"skip": mx.array(False), "gradient_scale": mx.array(0.3)},
    "per tensor": per_tensor(np.random.default_rng(1)),
    "some": {"indices": [1, 3, 5]},
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("arguments", ARGUMENTS.values(), ids=ARGUMENTS)
def test_every_rule_gives_the_extensions_numbers(
    rule: str, arguments: Arguments
) -> None:
    mx.set_default_device(mx.cpu)
    assert_equal_updates(rule, [values_of(rule)], **arguments)


@pytest.mark.parametrize("rule", RULES)
def test_every_branch_of_a_rule(rule: str) -> None:
    """Each hyper-parameter at 0 and not; and a set of its own for each tensor."""
    mx.set_default_device(mx.cpu)
    sets = [values_of(rule), *({**values_of(rule), k: 0.0} for k in values_of(rule))]
    for values in sets:
        assert_equal_updates(rule, [values])
    set_of = [i % len(sets) for i in range(len(SHAPES))]
    assert_equal_updates(rule, sets, sets=set_of)


@pytest.mark.parametrize("rule", RULES)
def test_arrays_as_hyperparameters(rule: str) -> None:
    mx.set_default_device(mx.cpu)
    values = {name: mx.array(x) for name, x in values_of(rule).items()}
    assert_equal_updates(rule, [values])


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("state_dtype", [None, mx.float32, mx.bfloat16], ids=str)
def test_mixtures_of_dtypes(rule: str, state_dtype: mx.Dtype | None) -> None:
    """The dtypes of the results are the same, and the numbers to a rounding."""
    mx.set_default_device(mx.cpu)
    single, half, brain = FLOATS
    for mixture in (
        *((x, x, x) for x in (half, brain)),
        *((half, half, single), (single, half, single), (brain, single, single)),
        *((brain, brain, half), (half, brain, half), (single, single, brain)),
    ):
        values = [values_of(rule)]
        assert_equal_updates(
            rule, values, mixture, state_dtype=state_dtype, relative=2**-7
        )


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", [mx.float64, mx.complex64, mx.int32], ids=str)
def test_dtypes_without_kernels(rule: str, dtype: mx.Dtype) -> None:
    mx.set_default_device(mx.cpu)
    for mixture in ((dtype, dtype, dtype), (mx.float32, dtype, mx.float32)):
        # Not closer: csrc/graph/node.h computes with numbers alone in float32.
        # Before 0.32 MLX adds numbers to float64 in float32.
        narrow = 1e-7 if MLX_VERSION < (0, 32, 0) else 1e-8
        relative = narrow if mixture[0] == mx.float64 else 2e-6
        assert_equal_updates(rule, [values_of(rule)], mixture, relative=relative)


@pytest.mark.parametrize("rule", [x for x in RULES if x not in ("Scale", "MuonMoment")])
def test_gradients_and_learning_rates_broadcast(rule: str) -> None:
    mx.set_default_device(mx.cpu)
    values = [values_of(rule)]
    assert_equal_updates(rule, values, shape_of_gradient=lambda x: x[1:])
    rate = mx.array([[0.01], [0.02]])
    assert_equal_updates(rule, values, learning_rate=rate, indices=[0])
    assert_equal_updates(rule, values, learning_rate=rate[0], indices=[1, 2])


ADAFACTOR: list[Arguments] = [
    {},
    {"beta_1": 0.9, "weight_decay": 0.1, "warmup_init": True},
    {"relative_step": False, "scale_parameter": False, "learning_rate": 1e-3},
    {"state_dtype": mx.float16},
    {"max_grad_norm": 0.1, "skip_nonfinite": True},
]


@pytest.mark.parametrize("dtype", [*FLOATS, mx.float64], ids=str)
@pytest.mark.parametrize("options", ADAFACTOR, ids=lambda x: "-".join(x))
def test_adafactor_gives_the_extensions_numbers(
    dtype: mx.Dtype, options: Arguments
) -> None:
    mx.set_default_device(mx.cpu)
    results: list[Any] = []
    for kernels in (_plain, _ext):
        rng = np.random.default_rng(0)
        tree = {str(i): mx.zeros(s) for i, s in enumerate(SHAPES)}
        parameters = fill(tree, rng, dtype)
        with _kernels.using(kernels):
            optimizer = optim.Adafactor(**options)
            for _ in range(4):
                gradients = fill(tree, rng, dtype)
                parameters = optimizer.apply_gradients(gradients, parameters)
        results.append([parameters, optimizer.state])
    relative = 4e-3 if dtype == mx.bfloat16 or "state_dtype" in options else 5e-6
    actual, expected = results
    assert_trees_match(actual, expected, relative, relative)


def test_norms_and_scaling() -> None:
    mx.set_default_device(mx.cpu)
    rng = np.random.default_rng(0)
    arrays = [random_array(rng, s, d) for s, d in zip(SHAPES, FLOATS * 2, strict=True)]
    for given in (arrays, arrays[:1], []):
        actual, expected = (
            k.sums_of_squares(given, mx.array(2.0)) for k in (_plain, _ext)
        )
        # How a later call goes on is each one's own.
        for x, y in zip(actual[:-1], expected[:-1], strict=True):
            assert (x.dtype, x.shape) == (y.dtype, y.shape)
            np.testing.assert_allclose(to_numpy(x), to_numpy(y), rtol=2e-6)
    # Summed in one chain, squares of a shorter array lose digits, too.
    chain = [mx.broadcast_to(mx.array([0.9]), (1984,)), mx.array([1.0])]
    _, norm, *_ = _plain.sums_of_squares(chain, mx.array(2.0))
    assert norm.item() == pytest.approx((0.81 * 1984 + 1) ** 0.5, rel=1e-6)
    factor = mx.array(0.37)
    pairs = zip(_plain.scale(arrays, factor), _ext.scale(arrays, factor), strict=True)
    assert all(x.dtype == y.dtype and mx.array_equal(x, y) for x, y in pairs)


@pytest.mark.parametrize("kernels", [_ext, _plain], ids=["extension", "plain"])
def test_what_is_no_array_and_what_is_no_leaf(kernels: Any) -> None:
    one = mx.array(1.0)

    def refused(error: type[Exception], text: str, *trees: Any) -> None:
        with pytest.raises(error, match=text):
            kernels.Leaves(*trees)

    refused(TypeError, r"the gradient of 'a\.0' is of type float; exp", {"a": [1.0]})
    refused(TypeError, "the value of '0' is of type str", ["x"], None, None, "value")
    refused(KeyError, "the gradient of '1' has no parameter", [one, one], [one])
    refused(KeyError, "the gradient of 'a' has no parameter", {"a": one}, one)
    refused(KeyError, "of 'a' has no state. When a", {"a": one}, None, {"a": one})
    refused(KeyError, "the gradient has no state", one, one, 1)
    decay = [{"weight_decay": 0.0}]
    leaves = kernels.Leaves([one], [None], [{}])
    assert not leaves.update("SGD", decay, learning_rate=one)
    leaves = kernels.Leaves([one], [one], [{"v": mx.ones((2, 3))}])
    with pytest.raises(ValueError, match=r"state v has shape \(2,3\); expected \(\)"):
        leaves.update("Adagrad", [{"eps": 1.0}], learning_rate=one)
    with pytest.raises(ValueError, match="expected as many as the tree has"):
        kernels.Leaves([one]).replace([])
    tree: list[Any] = []
    tree.append(tree)
    refused(RecursionError, "recursion", tree)


@pytest.mark.parametrize("kernels", [_ext, _plain], ids=["extension", "plain"])
def test_snapshots(kernels: Any) -> None:
    """Of all, or of what another tree has; arrays that were changed in place too."""
    for like in (None, {"b": [None, 0], "c": {"d": 0}}):
        tree: dict[str, Any] = {
            "a": mx.array(1.0),
            "b": [mx.array(2.0), mx.array(3.0)],
            "c": {"d": mx.array(4.0), "e": mx.array(5.0)},
        }
        first = tree["b"][0]
        before = kernels.Snapshot(tree, like)
        tree["b"][1] += 10
        tree["c"]["d"] = None
        tree["c"]["e"] = mx.array(6.0)
        tree["a"] = mx.array(7.0)
        kept = tree["b"]
        before.restore()
        assert tree["b"] is kept and tree["b"][0] is first
        values = [x.item() for x in leaves_of(tree).values()]
        assert values == ([1, 2, 3, 4, 5] if like is None else [7, 2, 3, 4, 6])


def test_what_cannot_be_translated_is_named() -> None:
    parameters = "thread T& g, thread T& p, thread T* s"
    rule = f"RULE(R) {{{{ void update({parameters}) const thread {{{{ {{}} }}}} }}}}"
    for statement in ("p = p > 0 ? g : p;", "while (g) {}", "p += g;", "if (p) {}"):
        with pytest.raises(ValueError, match=r"cannot translate"):
            _rules.translate(rule.format(statement))
    for statement in ("thread T& m = s[0]; m = -(g * 1e-3f);", ""):
        _rules.translate(rule.format(statement))


# The package without its extensions


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A folder with the package, whose extensions are gone."""
    copy = tmp_path / "mlx_fused_optimizers"
    shutil.copytree(Path(optim.__file__).parent, copy)
    for path in copy.glob("*.so"):
        path.unlink()
    return tmp_path


def run(site: Path, *arguments: str, **environment: str) -> tuple[int, str, str]:
    done = subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "PYTHONPATH": str(site), **environment},
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stdout, done.stderr


TRAINING = """
import sys
import mlx.core as mx, mlx.nn as nn
import mlx_fused_optimizers as optim
mx.set_default_device(mx.cpu)
mx.random.seed(0)
model = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 2))
optimizer = optim.AdamW(1e-2, bias_correction=True, max_grad_norm=0.5)
loss_and_grad = nn.value_and_grad(model, lambda m, x: mx.square(m(x) - 1).mean())
state = [model.state, optimizer.state]
optimizer.init(model.trainable_parameters())
if len(sys.argv) > 2:
    optim.load(sys.argv[2], model, optimizer)
losses = []
for i in range(8):
    x = mx.random.normal((4, 8), key=mx.random.key(i))
    loss, gradients = loss_and_grad(model, x)
    optimizer.update(model, gradients)
    mx.eval(state)
    losses.append(loss.item())
optim.save(sys.argv[1], model, optimizer)
print(optim.backend(), losses[-1] < losses[0])
"""


def load_arrays(file: str) -> dict[str, mx.array]:
    return mx.load(file, format="safetensors")  # type: ignore[return-value]


def test_without_extensions_it_trains_saves_and_loads(
    site: Path, tmp_path: Path
) -> None:
    files = [str(tmp_path / name) for name in ("plain", "fused", "again", "both")]
    code, output, errors = run(site, "-c", TRAINING, files[0])
    assert (code, output) == (0, "plain True\n"), errors
    assert errors.count("RuntimeWarning") == 1
    assert "uses plain MLX operations, slower and with more memory" in errors
    # The extension's checkpoint is the same, and each loads the other's.
    code, output, errors = run(tmp_path / "none", "-c", TRAINING, files[1])
    assert (code, output, errors) == (0, "cpu True\n", "")
    assert run(site, "-c", TRAINING, files[2], files[1])[0] == 0
    assert run(tmp_path / "none", "-c", TRAINING, files[3], files[0])[0] == 0
    for pair in (files[:2], files[2:]):
        x, y = (load_arrays(file) for file in pair)
        assert x.keys() == y.keys() and len(x) == 15
        for key in x:
            assert x[key].dtype == y[key].dtype
            assert mx.allclose(x[key], y[key], rtol=1e-4, atol=1e-6), key


def test_without_extensions_the_self_check_says_so(site: Path) -> None:
    code, output, _ = run(site, "-m", "mlx_fused_optimizers.selfcheck")
    assert code == 0
    version = metadata.version("mlx")
    assert output.startswith(
        "Backend in use: plain.\n"
        f"Steps take plain MLX operations: it has no kernels for MLX {version}.\n"
    )
    assert output.endswith("There are no kernels to check.\n")
    code, output, _ = run(site, "-m", "mlx_fused_optimizers.selfcheck", "--json")
    report = json.loads(output)
    assert (code, report["machine"]["backend"], report["results"]) == (0, "plain", [])


def test_without_extensions_an_error_if_kernels_are_required(site: Path) -> None:
    code, _, errors = run(site, "-c", TRAINING, "none", MLX_FUSED_REQUIRE="1")
    assert code == 1
    assert "ImportError: mlx_fused_optimizers uses plain MLX operations" in errors


# A GPU without Metal: shown by the choice alone, as no such GPU was at hand.


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """The default device is a GPU without Metal, in the eyes of the choice."""
    monkeypatch.setattr(_kernels._Kernels, "extension", _ext)
    monkeypatch.setattr(_kernels, "_is_gpu", lambda: True)
    monkeypatch.setattr(mx.metal, "is_available", lambda: False)
    monkeypatch.setattr(_kernels._Kernels, "has_warned", False)
    mx.set_default_device(mx.cpu)


def step() -> mx.array:
    optimizer = optim.AdamW(1e-2)
    updated = optimizer.apply_gradients({"w": mx.ones((3,))}, {"w": mx.ones((3,))})
    return updated["w"]  # type: ignore[no-any-return]


def test_a_gpu_without_metal_takes_plain_operations(cuda: None) -> None:
    assert optim.backend() == "plain"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        plain = [step() for _ in range(3)]
    (warning,) = caught
    assert warning.category is RuntimeWarning
    assert "it has no kernels for this GPU" in str(warning.message)
    assert isinstance(_kernels.kernels.Leaves([]), _plain.Leaves)
    assert mx.allclose(plain[0], plain[2])


def test_a_gpu_without_metal_if_kernels_are_required(
    cuda: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLX_FUSED_REQUIRE", "1")
    with pytest.raises(RuntimeError, match="MLX_FUSED_REQUIRE is set"):
        step()


def test_a_gpu_without_metal_leaves_the_cpu_its_kernels(
    cuda: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(_kernels, "_is_gpu", lambda: False)
    assert optim.backend() == "cpu"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step()


def test_backends_by_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_kernels._Kernels, "extension", _ext)
    mx.set_default_device(mx.cpu)
    assert optim.backend() == "cpu"
    with _kernels.using(_plain):
        assert optim.backend() == "plain"
    monkeypatch.setattr(_kernels, "_is_gpu", lambda: True)
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    assert optim.backend() == "metal"

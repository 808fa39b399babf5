"""LAMB and cautious updates, whose size is that of a whole tensor; amsgrad's state."""

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_fused_optimizers as optim
import numpy as np
import pytest
from mlx_fused_optimizers._kernels import kernels
from mlx_fused_optimizers.optimizers.directions import batches
from support import FLOATS, LAYOUTS, random_array, snapshot, to_numpy

WHOLE: list[tuple[str, dict[str, Any]]] = [
    ("LAMB", {}),
    ("Adam", {"cautious": True}),
    ("AdamW", {"cautious": True, "weight_decay": 0.1, "bias_correction": True}),
    ("Lion", {"cautious": True, "weight_decay": 0.1}),
]
whole = pytest.mark.parametrize(("name", "options"), WHOLE)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_counts(backend: str, dtype: mx.Dtype, layout: str) -> None:
    """Exactly, of arrays of several sizes, dtypes and layouts in one call."""
    rng = np.random.default_rng(0)
    arrays = [
        LAYOUTS[layout](mx.maximum(random_array(rng, shape, dtype), 0))
        for shape in [(7,), (80, 70), (9001,), (), (3, 4, 5)]
    ]
    arrays += [mx.zeros((0, 3), dtype), mx.array([0.0, -0.0, float("nan"), -1e-30])]
    expected = [int(np.count_nonzero(to_numpy(x))) for x in arrays]
    assert kernels.count_nonzero(arrays).tolist() == expected


@pytest.mark.fused
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_the_check_of_counts(backend: str, dtype: mx.Dtype) -> None:
    if backend != "plain":
        assert kernels.check_sums(mx.zeros(1, dtype), True) is None


def tree(seed: int) -> dict[str, mx.array]:
    rng = np.random.default_rng(seed)
    shapes = {"a": (12, 40), "b": (40,), "c": (3, 4, 5), "d": ()}
    return {key: random_array(rng, x, mx.float32) for key, x in shapes.items()}


def run(optimizer: Any, steps: int = 3, compiled: bool = False) -> Any:
    parameters = tree(0)
    optimizer.init(parameters)
    step: Any = optimizer.apply_gradients
    if compiled:
        step = mx.compile(step, inputs=optimizer.state, outputs=optimizer.state)
    for seed in range(1, steps + 1):
        parameters = step(tree(seed), parameters)
        mx.eval(parameters, optimizer.state)
    return parameters


@whole
def test_with_other_options(backend: str, name: str, options: dict[str, Any]) -> None:
    """Clipping is that of the gradients, eager or compiled; decay as filtered."""
    kind = getattr(optim, name)
    for last in (False, True):
        clip: Any = {"max_grad_norm": 0.5, "clip_by_last_norm": last}
        eager = run(kind(0.05, **options, **clip))
        other = run(kind(0.05, **options, **clip), compiled=True)
        for key, x in eager.items():
            np.testing.assert_allclose(
                to_numpy(x), to_numpy(other[key]), rtol=2e-5, atol=1e-6
            )
    if name == "Adam":
        return
    usual = {**options, "weight_decay": 0.3}
    filtered = kind(0.05, **usual, weight_decay_filter=lambda path, _: path in "ac")
    several = optim.MultiOptimizer(
        [kind(0.05, **usual), kind(0.05, **{**usual, "weight_decay": 0.0})],
        [lambda path, _: path in "ac"],
    )
    ours, theirs = run(filtered), run(several)
    for key, x in ours.items():
        np.testing.assert_allclose(to_numpy(x), to_numpy(theirs[key]), rtol=1e-6)


@whole
def test_a_skipped_step_changes_nothing(
    backend: str, name: str, options: dict[str, Any]
) -> None:
    optimizer = getattr(optim, name)(0.1, skip_nonfinite=True, **options)
    parameters = optimizer.apply_gradients(tree(1), tree(0))
    states = [optimizer.state[key] for key in parameters]
    before = snapshot([parameters, states, optimizer.state["step"]])
    gradients = {**tree(2), "b": mx.full((40,), float("inf"))}
    parameters = optimizer.apply_gradients(gradients, parameters)
    states = [optimizer.state[key] for key in parameters]
    assert snapshot([parameters, states, optimizer.state["step"]]) == before
    assert optimizer.skipped_steps.item() == 1


@whole
def test_nan_is_no_update_that_is_left_out(
    backend: str, name: str, options: dict[str, Any]
) -> None:
    if name == "Lion":
        return  # the sign of NaN is 0 where there are kernels
    gradients = {**tree(1), "b": mx.full((40,), float("nan"))}
    updated = getattr(optim, name)(0.1, **options).apply_gradients(gradients, tree(0))
    assert np.isnan(to_numpy(updated["b"])).all()
    assert np.isfinite(to_numpy(updated["a"])).all()


@whole
def test_zeros_and_nothing(backend: str, name: str, options: dict[str, Any]) -> None:
    """No division by a norm or a count of 0, and none by eps alone."""
    parameters = {"zero": mx.zeros(9), "one": mx.ones(9), "empty": mx.zeros((0, 3))}
    gradients = {key: mx.zeros_like(x) for key, x in parameters.items()}
    usual = {**options, "weight_decay": 0.0} if name != "Adam" else options
    optimizer = getattr(optim, name)(0.1, **usual)
    updated = optimizer.apply_gradients(gradients, parameters)
    assert snapshot(updated) == snapshot(parameters)
    assert optimizer.apply_gradients({}, {}) == {}


@whole
def test_float64_and_complex(name: str, options: dict[str, Any]) -> None:
    mx.set_default_device(mx.cpu)
    results = []
    for dtype in (mx.float32, mx.float64):
        optimizer = getattr(optim, name)(0.1, **options)
        parameters = {key: x.astype(dtype) for key, x in tree(0).items()}
        for seed in (1, 2):
            gradients = {key: x.astype(dtype) for key, x in tree(seed).items()}
            parameters = optimizer.apply_gradients(gradients, parameters)
        assert parameters["a"].dtype == dtype
        results.append({key: np.array(x) for key, x in parameters.items()})
    for key, x in results[0].items():
        np.testing.assert_allclose(x, results[1][key], rtol=1e-4, atol=1e-5)
    # A complex number is two real ones.
    rng = np.random.default_rng(0)
    w, g = (random_array(rng, (5, 2), mx.float32) for _ in range(2))
    pairs = [x[..., 0] + 1j * x[..., 1] for x in (w, g)]
    real = getattr(optim, name)(0.1, **options).apply_gradients({"w": g}, {"w": w})
    made = getattr(optim, name)(0.1, **options).apply_gradients(
        {"w": pairs[1]}, {"w": pairs[0]}
    )["w"]
    found = np.stack([np.array(made).real, np.array(made).imag], axis=-1)
    np.testing.assert_allclose(found, np.array(real["w"]), rtol=1e-5)


@whole
def test_the_learning_rate_is_a_scalar(name: str, options: dict[str, Any]) -> None:
    optimizer = getattr(optim, name)(mx.array([0.1] * 4), **options)
    before = snapshot(optimizer.state)
    with pytest.raises(ValueError, match=r"learning_rate has shape \(4,\); expected a"):
        optimizer.apply_gradients(tree(1), tree(0))
    assert snapshot(optimizer.state) == before


@whole
def test_shards_are_refused_by_name(name: str, options: dict[str, Any]) -> None:
    class Group:
        def size(self) -> int:
            return 2

    optimizer = getattr(optim, name)(0.1, **options)
    leaves = kernels.Leaves(tree(1))
    group: Any = Group()
    with pytest.raises(ValueError, match=r"'b' is a shard, of which 2 ranks"):
        optimizer._check_shards(leaves, {"b": group})
    plain = {key: x for key, x in options.items() if key != "cautious"}
    if name != "LAMB":
        getattr(optim, name)(0.1, **plain)._check_shards(leaves, {"b": group})


def test_batches_are_a_sixth_or_so() -> None:
    arrays = [mx.zeros((10,)) for _ in range(60)]
    found = [*batches(arrays)]
    assert [i for batch in found for i in batch] == [*reversed(range(60))]
    assert {len(batch) for batch in found} == {10}
    assert [*batches([mx.zeros((1000,)), mx.zeros((1,))])] == [[1], [0]]
    assert max(map(len, batches([mx.zeros((1,))] * 1000))) == 24
    assert [*batches([])] == []


# amsgrad


@pytest.mark.parametrize("held", [{}, {"state_dtype": "int8"}], ids=["", "int8"])
def test_checkpoints_without_the_maximum_load(
    tmp_path: Path, held: dict[str, Any]
) -> None:
    """It then begins at the next step."""
    mx.set_default_device(mx.cpu)
    usual: Any = optim.AdamW(0.1, bias_correction=True)
    parameters = run(usual)
    optim.save(tmp_path / "file", parameters, usual)
    everything: Any = {"quantize_filter": lambda *_: True} if held else {}
    options = {"bias_correction": True, "amsgrad": True, **held, **everything}
    resumed: Any = optim.AdamW(0.1, **options)
    loaded = {key: mx.zeros_like(x) for key, x in parameters.items()}
    if held:
        with pytest.warns(UserWarning, match="converted"):
            optim.load(tmp_path / "file", loaded, resumed)
    else:
        optim.load(tmp_path / "file", loaded, resumed)
        assert not np.any(to_numpy(resumed.state["a"]["v_max"]))
    loaded = resumed.apply_gradients(tree(9), loaded)
    parameters = usual.apply_gradients(tree(9), parameters)
    tolerance = 0.02 if held else 1e-6
    for key, x in parameters.items():
        np.testing.assert_allclose(to_numpy(loaded[key]), to_numpy(x), atol=tolerance)
    optim.save(tmp_path / "file", loaded, resumed)
    with pytest.raises(ValueError, match=r"'a\.v_max"):
        optim.load(
            tmp_path / "file", parameters, optim.AdamW(0.1, bias_correction=True)
        )


def test_a_state_without_the_maximum_is_completed(backend: str) -> None:
    usual = optim.Adam(0.1)
    parameters = run(usual)
    optimizer = optim.Adam(0.1, amsgrad=True)
    optimizer.state = {**usual.state}
    optimizer.apply_gradients(tree(9), parameters)
    assert sorted(optimizer.state["a"]) == ["m", "v", "v_max"]


def test_the_maximum_stays(backend: str) -> None:
    optimizer = optim.Adam(0.0, betas=(0.0, 0.0), amsgrad=True)
    parameters = {"w": mx.zeros(3)}
    for g in ([1.0, 2.0, 3.0], [2.0, 1.0, 0.0]):
        parameters = optimizer.apply_gradients({"w": mx.array(g)}, parameters)
    assert optimizer.state["w"]["v_max"].tolist() == [4.0, 4.0, 9.0]

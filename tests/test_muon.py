"""Muon's batched iterations and its own arguments; float64 as the oracle."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.optimizers as stock
import mlx_fused_optimizers as optim
import numpy as np
import pytest
from mlx_fused_optimizers.optimizers import muon
from support import LAYOUTS, copy_tree, random_array, snapshot, to_numpy

SHAPES: dict[str, tuple[int, ...]] = {
    **{f"square{i}": (24, 24) for i in range(9)},
    **{f"wide{i}": (8, 30) for i in range(3)},
    **{f"tall{i}": (30, 8) for i in range(3)},
    "filters": (16, 3, 3, 2),
    "alone": (5, 7),
    "vector": (11,),
}

JORDAN = (3.4445, -4.7750, 2.0315)


def random_tree(
    seed: int, dtype: mx.Dtype = mx.float32, layout: str = "contiguous"
) -> dict[str, mx.array]:
    rng = np.random.default_rng(seed)
    return {
        key: LAYOUTS[layout](random_array(rng, shape, dtype))
        for key, shape in SHAPES.items()
    }


def newton_schulz(x: Any, polynomials: list[Any], safety: float = 1.0) -> Any:
    wide = x.T if x.shape[0] > x.shape[1] else x
    wide = wide / (np.linalg.norm(wide) * safety + 1e-7)
    for a, b, c in polynomials:
        gram = wide @ wide.T
        wide = a * wide + (b * gram + c * gram @ gram) @ wide
    return wide.T if x.shape[0] > x.shape[1] else wide


def float64_steps(
    start: Any,
    gradients: list[Any],
    weight_decay: float = 0.01,
    nesterov: bool = True,
    decoupled: bool = False,
    matrix_scale: bool = False,
    polynomials: list[Any] | None = None,
    safety: float = 1.0,
) -> dict[str, Any]:
    """The formulas of the docstring, with momentum 0.95 and learning rate 0.1."""
    result = {}
    for key, x in start.items():
        w = to_numpy(x).astype(np.float64)
        v = np.zeros_like(w)
        for gradient in gradients:
            g = to_numpy(gradient[key]).astype(np.float64)
            if not decoupled:
                g = g + weight_decay * w
            v = 0.95 * v + 0.05 * g
            u = 0.05 * g + 0.95 * v if nesterov else v
            rows = columns = 1
            if w.ndim > 1:
                matrix = u.reshape(len(u), -1)
                rows, columns = matrix.shape if matrix_scale else w.shape[-2:]
                u = newton_schulz(matrix, polynomials or [JORDAN] * 5, safety)
                u = u.reshape(w.shape)
            if decoupled:
                w = w * (1 - 0.1 * weight_decay)
            w = w - 0.1 * max(1, rows / columns) ** 0.5 * u
        result[key] = w
    return result


def steps(
    module: Any, start: Any, gradients: list[Any], **options: Any
) -> dict[str, Any]:
    optimizer = module.Muon(0.1, **options)
    parameters: Any = copy_tree(start)
    for gradient in gradients:
        parameters = optimizer.apply_gradients(gradient, parameters)
    return {key: to_numpy(x) for key, x in parameters.items()}


def test_matrices_of_one_shape_are_updated_together() -> None:
    parameters = [*random_tree(0).values()]
    batches = [*muon._batches(parameters)]
    assert sorted(i for batch in batches for i in batch) == [*range(len(parameters))]
    limit = sum(x.size for x in parameters) // 6
    for batch in batches:
        matrices = [parameters[i] for i in batch if parameters[i].ndim > 1]
        assert len({tuple(sorted(muon._matrix_shape(x))) for x in matrices}) <= 1
        assert len(matrices) <= 1 or sum(x.size for x in matrices) <= limit
    squares = [len(batch) for batch in batches if parameters[batch[0]].size == 24 * 24]
    assert squares == [2, 2, 2, 2, 1]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("nesterov", [True, False])
def test_steps_are_those_of_float64(backend: str, layout: str, nesterov: bool) -> None:
    start = random_tree(0)
    gradients = [random_tree(seed, layout=layout) for seed in (1, 2)]
    mine = steps(optim, start, gradients, nesterov=nesterov)
    for key, x in float64_steps(start, gradients, nesterov=nesterov).items():
        np.testing.assert_allclose(mine[key], x, 1e-4, 1e-5, err_msg=key)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=str)
def test_half_precision_is_closer_to_float64_than_stocks(
    backend: str, dtype: mx.Dtype
) -> None:
    start = random_tree(0, dtype)
    gradients = [random_tree(seed, dtype) for seed in (1, 2, 3)]
    expected = float64_steps(start, gradients)
    errors = []
    for module in (optim, stock):
        found = steps(module, start, gradients)
        errors.append(
            {key: np.square(found[key] - x).mean() for key, x in expected.items()}
        )
    mine, theirs = (sum(x.values()) for x in errors)
    assert mine <= theirs
    # Not by the vector alone.
    assert errors[0]["square0"] <= errors[1]["square0"]


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16], ids=str)
def test_the_scale_of_gradients_does_not_matter(backend: str, dtype: mx.Dtype) -> None:
    start, zero = random_tree(0, dtype), random_tree(0, dtype)
    zero = {key: mx.zeros_like(x) for key, x in zero.items() if x.ndim > 1}
    largest = {mx.float16: 2.0**13, mx.bfloat16: 2.0**80, mx.float32: 2.0**80}[dtype]
    results = []
    for scale in (1.0, 2.0**-6, largest):
        gradient = {key: start[key] * scale for key in zero}
        results.append(steps(optim, zero, [gradient], weight_decay=0.0))
    unit = {mx.float16: 1e-3, mx.bfloat16: 1e-2, mx.float32: 1e-5}[dtype]
    for other in results[1:]:
        for key, x in results[0].items():
            assert np.abs(x).max() > 0.01
            np.testing.assert_allclose(other[key], x, atol=unit, err_msg=key)
    # Nothing moves without a gradient, and nothing is divided by zero.
    still = steps(optim, start, [{k: mx.zeros_like(x) for k, x in start.items()}])
    assert all(np.isfinite(x).all() for x in still.values())


@pytest.mark.parametrize("filtered", [False, True], ids=["", "filter"])
def test_decoupled_weight_decay(backend: str, filtered: bool) -> None:
    start = random_tree(0)
    gradients = [random_tree(seed) for seed in (1, 2)]
    options: dict[str, Any] = {"weight_decay": 0.5, "decoupled_weight_decay": True}
    if filtered:
        options["weight_decay_filter"] = lambda path, x: path != "tall0"
    mine = steps(optim, start, gradients, **options)
    expected = float64_steps(start, gradients, weight_decay=0.5, decoupled=True)
    undecayed = float64_steps(start, gradients, weight_decay=0.0)
    for key, x in expected.items():
        wanted = undecayed[key] if filtered and key == "tall0" else x
        np.testing.assert_allclose(mine[key], wanted, 1e-4, 1e-5, err_msg=key)


def test_matrix_scale(backend: str) -> None:
    start, gradient = random_tree(0), random_tree(1)
    mine = steps(optim, start, [gradient], matrix_scale=True)
    expected = float64_steps(start, [gradient], matrix_scale=True)
    for key, x in expected.items():
        np.testing.assert_allclose(mine[key], x, 1e-4, 1e-5, err_msg=key)
    usual = steps(optim, start, [gradient])
    assert {k for k, x in usual.items() if np.any(x != mine[k])} == {"filters"}


FACTORS: dict[str, Callable[[int, int], float]] = {
    "match_rms_adamw": lambda rows, columns: 0.2 * max(rows, columns) ** 0.5,
    "spectral_unclamped": lambda rows, columns: (rows / columns) ** 0.5,
}


@pytest.mark.parametrize("decoupled", [False, True], ids=["", "decoupled"])
@pytest.mark.parametrize("name", FACTORS)
def test_adjusted_learning_rates(backend: str, name: str, decoupled: bool) -> None:
    """By those of the default, of which decay and moment depend on no shape."""
    start, gradients = random_tree(0), [random_tree(1)]
    options = {"weight_decay": 0.5, "decoupled_weight_decay": decoupled}
    mine = steps(optim, start, gradients, adjust_lr_fn=name, **options)
    usual = steps(optim, start, gradients, **options)
    for key, x in start.items():
        kept = to_numpy(x) * (1 - 0.1 * 0.5 * decoupled)
        factor = 1.0
        if x.ndim > 1:
            rows, columns = x.shape[-2:]
            factor = FACTORS[name](rows, columns) / max(1, rows / columns) ** 0.5
        expected = kept + factor * (usual[key] - kept)
        np.testing.assert_allclose(mine[key], expected, 1e-4, 1e-5, err_msg=key)


def test_adjust_lr_fn_is_checked_and_saved(tmp_path: Path) -> None:
    message = r"adjust_lr_fn should be 'original' or .*, 'other' was provided"
    with pytest.raises(ValueError, match=message):
        optim.Muon(0.1, adjust_lr_fn="other")
    tree = {"w": mx.ones((2, 2))}
    usual, adjusted = (
        optim.Muon(0.1, adjust_lr_fn=x) for x in ("original", "match_rms_adamw")
    )
    for optimizer in (usual, adjusted):
        optimizer.init(tree)
    optim.save(tmp_path / "file", tree, usual)
    with pytest.raises(ValueError, match="adjust_lr_fn"):
        optim.load(tmp_path / "file", tree, adjusted)


def test_coefficients(backend: str) -> None:
    start, gradients = random_tree(0), [random_tree(1)]
    default = steps(optim, start, gradients)
    same = steps(optim, start, gradients, ns_coefficients=[JORDAN, JORDAN])
    assert all(np.array_equal(x, same[key]) for key, x in default.items())
    two = [(2.0, -1.5, 0.5), (1.875, -1.25, 0.375)]
    mine = steps(optim, start, gradients, ns_steps=4, ns_coefficients=two)
    expected = float64_steps(start, gradients, polynomials=[*two, two[1], two[1]])
    for key, x in expected.items():
        np.testing.assert_allclose(mine[key], x, 1e-4, 1e-5, err_msg=key)


def test_polar_express(backend: str) -> None:
    """Singular values come closer to 1 than with the usual coefficients."""
    rng = np.random.default_rng(0)
    bases = [np.linalg.qr(rng.standard_normal((24, 24)))[0] for _ in range(2)]
    gradient = bases[0] * np.geomspace(1e-2, 1, 24) @ bases[1]
    zero = {"w": mx.zeros((24, 24))}
    spread = {}
    for name, coefficients in {"usual": JORDAN, "polar": "polar_express"}.items():
        updated = steps(
            optim,
            zero,
            [{"w": mx.array(gradient, mx.float32)}],
            ns_steps=8,
            ns_coefficients=coefficients,
        )
        values = np.linalg.svd(updated["w"] / -0.1, compute_uv=False)
        spread[name] = np.abs(values - 1).max()
    assert spread["polar"] < 1e-4
    assert spread["usual"] > 0.1


@pytest.mark.parametrize(
    "coefficients", ["polar", [], (1.0, 2.0), [(1.0, 2.0, 3.0), (1.0, 2.0)], [[]]]
)
def test_other_coefficients_are_refused(coefficients: Any) -> None:
    with pytest.raises(ValueError, match=r"ns_coefficients should be triples or"):
        optim.Muon(0.1, ns_coefficients=coefficients)


def test_the_arguments_are_documented() -> None:
    text = inspect.getdoc(optim.Muon) or ""
    for name in inspect.signature(optim.Muon).parameters:
        assert f"{name} (" in text


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_all_options_together(backend: str, compiled: bool) -> None:
    mine: Any = random_tree(0)
    optimizer: Any = optim.Muon(
        0.1,
        weight_decay=0.1,
        ns_coefficients="polar_express",
        decoupled_weight_decay=True,
        max_grad_norm=1.0,
        skip_nonfinite=True,
        state_dtype=mx.float32,
        weight_decay_filter=lambda path, x: x.ndim > 1,
    )
    optimizer.init(mine)

    def step(parameters: Any, gradients: Any) -> Any:
        return optimizer.apply_gradients(gradients, parameters)

    if compiled:
        step = mx.compile(step, inputs=optimizer.state, outputs=optimizer.state)
    gradients = random_tree(1)
    polynomials, safety = muon._polynomials("polar_express")
    clipped, _ = stock.clip_grad_norm(gradients, 1.0)
    start = mine
    # As the norm's 1e-7 shows after clipping: the same in the reference.
    expected = float64_steps(
        start,
        [clipped],
        weight_decay=0.1,
        decoupled=True,
        polynomials=[*polynomials[:5]],
        safety=safety,
    )
    undecayed = float64_steps(start, [clipped], weight_decay=0.0)["vector"]
    mine = step(mine, gradients)
    for key, x in {**expected, "vector": undecayed}.items():
        np.testing.assert_allclose(to_numpy(mine[key]), x, 1e-4, 1e-5, err_msg=key)
    state = {key: optimizer.state[key] for key in SHAPES}
    kept = snapshot([mine, state])
    bad = {**gradients, "wide1": gradients["wide1"] * float("inf")}
    mine = step(mine, bad)
    assert snapshot([mine, {key: optimizer.state[key] for key in SHAPES}]) == kept
    assert int(optimizer.skipped_steps) == int(optimizer.step) == 1


def test_transforms(backend: str) -> None:
    """mx.grad and mx.vmap through a step are those of stock's."""
    rng = np.random.default_rng(0)
    start, gradient = (random_array(rng, (4, 3), mx.float32) for _ in range(2))
    batch = random_array(rng, (5, 4, 3), mx.float32)
    results = []
    for module in (optim, stock):

        def step(w: mx.array, g: mx.array, module: Any = module) -> mx.array:
            optimizer = module.Muon(0.1)
            parameters = {"a": w, "b": w * 2}
            gradients = {"a": g * w, "b": g}
            updated = optimizer.apply_gradients(gradients, parameters)
            result: mx.array = updated["a"] + updated["b"]
            return result

        def loss(w: mx.array, step: Any = step) -> mx.array:
            return mx.square(step(w, gradient)).sum()

        results.append(
            [
                mx.grad(loss)(start),
                mx.vmap(step)(batch, batch[::-1]),
                mx.vmap(step, in_axes=(0, None))(batch, gradient),
            ]
        )
    for mine, theirs in zip(*results, strict=True):
        np.testing.assert_allclose(to_numpy(mine), to_numpy(theirs), 1e-4, 1e-5)

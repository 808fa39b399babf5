"""Adafactor's own kernels: float64 as the oracle, layouts, half precision, options."""

from typing import Any

import mlx.core as mx
import mlx.optimizers as stock
import mlx_fused_optimizers as optim
import numpy as np
import pytest
from mlx.utils import tree_map
from mlx_fused_optimizers import _ext
from support import (
    LAYOUTS,
    assert_trees_match,
    copy_tree,
    leaves_of,
    more_dimensions_in_adafactor,
    random_array,
    snapshot,
    to_numpy,
)

# Kernels that fail their check would leave the work to plain operations.
pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")

Arrays = dict[str, Any]

OPTIONS: list[dict[str, Any]] = [
    {},
    {"beta_1": 0.9, "weight_decay": 0.1, "warmup_init": True},
    {"relative_step": False, "scale_parameter": False, "learning_rate": 0.03},
    {"eps": (1e-4, 0.5), "clip_threshold": 0.1, "decay_rate": -0.5, "beta_1": 0.5},
]
every_option = pytest.mark.parametrize(
    "options", OPTIONS, ids=["-".join(options) for options in OPTIONS]
)

# A lone element, tails, several tiles and pieces, matrices with few rows or columns,
# and many small ones.
SHAPES: dict[str, tuple[int, ...]] = {
    "scalar": (),
    "vector": (300,),
    "row": (1, 9),
    "column": (9, 1),
    "small": (5, 4),
    "tall": (260, 3),
    "wide": (3, 1300),
    "large": (200, 140),
    "unaligned": (131, 67),
    "filters": (4, 3, 5, 7),
    "stack": (3, 40, 36),
}


def float64_steps(
    start: Any, gradients: list[Any], options: dict[str, Any]
) -> tuple[Arrays, dict[str, Arrays]]:
    """The formulas of the docstring; parameters and state after these steps."""
    o = {
        "eps": (1e-30, 1e-3),
        "clip_threshold": 1.0,
        "decay_rate": -0.8,
        "beta_1": None,
        "weight_decay": 0.0,
        "scale_parameter": True,
        "relative_step": True,
        "warmup_init": False,
        **options,
    }
    parameters, states = {}, {}
    for key, x in start.items():
        w = to_numpy(x).astype(np.float64)
        r = c = m = 0.0
        for t, gradient in enumerate(gradients, start=1):
            g = to_numpy(gradient[key]).astype(np.float64)
            s = g**2 + o["eps"][0]
            beta = 1 - t ** o["decay_rate"]
            if g.ndim < 2:
                c = beta * c + (1 - beta) * s
                u = g / np.sqrt(c)
                states[key] = {"exp_avg_sq": c}
            else:
                r = beta * r + (1 - beta) * s.mean(-1)
                c = beta * c + (1 - beta) * s.mean(-2)
                v = r[..., None] * c[..., None, :] / r.mean(-1)[..., None, None]
                u = g / np.sqrt(v)
                states[key] = {"exp_avg_sq_row": r, "exp_avg_sq_col": c}
            rate = o["learning_rate"] if not o["relative_step"] else None
            if rate is None:
                most = 1e-6 * t if o["warmup_init"] else 1e-2
                rate = min(most, t**-0.5)
            if o["scale_parameter"]:
                rate *= max(o["eps"][1], np.sqrt(np.mean(w**2)))
            u *= rate / max(1, np.sqrt(np.mean(u**2)) / o["clip_threshold"])
            if o["beta_1"] is not None:
                m = o["beta_1"] * m + (1 - o["beta_1"]) * u
                states[key]["exp_avg"] = u = m
            w = w - o["weight_decay"] * rate * w - u
        parameters[key] = w
    return parameters, states


def random_tree(
    seed: int, dtype: mx.Dtype = mx.float32, layout: str = "contiguous"
) -> dict[str, mx.array]:
    rng = np.random.default_rng(seed)
    return {
        key: LAYOUTS[layout](random_array(rng, shape, dtype))
        for key, shape in SHAPES.items()
    }


def assert_close(actual: Any, expected: Any, relative: float, absolute: float) -> None:
    flat = leaves_of(actual)
    for key, value in expected.items():
        for name, x in value.items() if isinstance(value, dict) else [("", value)]:
            path = f"{key}.{name}" if name else key
            np.testing.assert_allclose(
                to_numpy(flat[path]), x, rtol=relative, atol=absolute, err_msg=path
            )


@every_option
@pytest.mark.parametrize("layout", LAYOUTS)
def test_three_steps_are_those_of_float64(
    backend: str, options: dict[str, Any], layout: str
) -> None:
    start = random_tree(0)
    gradients = [random_tree(seed, layout=layout) for seed in (1, 2, 3)]
    optimizer = optim.Adafactor(**options)
    mine: Any = copy_tree(start)
    for gradient in gradients:
        mine = optimizer.apply_gradients(gradient, mine)
    parameters, states = float64_steps(start, gradients, options)
    assert_close(mine, parameters, 1e-5, 1e-6)
    state = {key: optimizer.state[key] for key in SHAPES}
    assert_close(state, states, 1e-5, 1e-6)


@every_option
@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
def test_half_precision_is_float32_rounded_once(
    backend: str, options: dict[str, Any], dtype: mx.Dtype, layout: str
) -> None:
    start, gradient = random_tree(0, dtype), random_tree(1, dtype, layout)
    optimizer = optim.Adafactor(**options)
    mine: Any = optimizer.apply_gradients(gradient, copy_tree(start))
    parameters, states = float64_steps(start, [gradient], options)
    # Half a unit in the last place, and float32's errors beside a tie.
    unit = 2.0**-11 if dtype == mx.float16 else 2.0**-8
    assert_close(mine, parameters, 1.01 * unit, 1e-5)
    assert_close({k: optimizer.state[k] for k in SHAPES}, states, 1.01 * unit, 1e-5)
    assert all(x.dtype == dtype for x in mine.values())


@more_dimensions_in_adafactor
@every_option
@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=str)
def test_half_precision_is_closer_to_float64_than_stocks(
    backend: str, options: dict[str, Any], dtype: mx.Dtype
) -> None:
    start = random_tree(0, dtype)
    gradients = [random_tree(seed, dtype) for seed in range(1, 11)]
    errors = []
    expected, _ = float64_steps(start, gradients, options)
    for module in (optim, stock):
        optimizer = module.Adafactor(**options)
        mine: Any = copy_tree(start)
        for gradient in gradients:
            mine = optimizer.apply_gradients(gradient, mine)
        errors.append(
            sum(
                float(np.square(to_numpy(mine[key]) - x).sum())
                for key, x in expected.items()
            )
        )
    # Equal where the rounding of parameters outweighs all else. Stock's eps of 1e-30
    # is zero in float16, and its squares overflow there.
    assert np.isfinite(errors[0])
    assert np.isnan(errors[1]) or errors[0] <= errors[1] * 1.03


@pytest.mark.parametrize("scale", [1e-4, 300.0, 6e4])
def test_means_of_squares_that_leave_float16(backend: str, scale: float) -> None:
    parameters: Any = random_tree(0, mx.float16)
    gradients = tree_map(lambda x: mx.tanh(x) * scale, random_tree(1, mx.float16))
    optimizer = optim.Adafactor(relative_step=False, learning_rate=0.1)
    for _ in range(3):
        before, parameters = (
            parameters,
            optimizer.apply_gradients(gradients, parameters),
        )
        for key, x in parameters.items():
            moved = np.abs(to_numpy(x) - to_numpy(before[key])).mean()
            assert np.isfinite(moved) and moved > 1e-3, key
    state = leaves_of({key: optimizer.state[key] for key in SHAPES})
    assert all(float(mx.max(x)) <= 65504 for x in state.values())


@more_dimensions_in_adafactor
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=str)
def test_all_options_together(backend: str, compiled: bool, dtype: mx.Dtype) -> None:
    def is_matrix(path: str, array: mx.array) -> bool:
        return array.ndim > 1

    options: dict[str, Any] = {"beta_1": 0.9, "weight_decay": 0.1}
    optimizer: Any = optim.Adafactor(
        **options,
        max_grad_norm=1.0,
        skip_nonfinite=True,
        state_dtype=mx.float32,
        weight_decay_filter=is_matrix,
    )
    mine: Any = random_tree(0, dtype)
    optimizer.init(mine)

    def step(parameters: Any, gradients: Any) -> Any:
        return optimizer.apply_gradients(gradients, parameters)

    if compiled:
        step = mx.compile(step, inputs=optimizer.state, outputs=optimizer.state)
    decaying, plain = stock.Adafactor(**options), stock.Adafactor(beta_1=0.9)
    states = []
    for seed in range(1, 4):
        before = tree_map(lambda x: x.astype(mx.float32), mine)
        gradients = random_tree(seed, dtype, "transposed")
        wide = tree_map(lambda x: x.astype(mx.float32), gradients)
        clipped, _ = stock.clip_grad_norm(wide, 1.0)
        expected = decaying.apply_gradients(clipped, before)
        undecayed = plain.apply_gradients(clipped, before)
        expected = {k: x if x.ndim > 1 else undecayed[k] for k, x in expected.items()}
        mine = step(mine, gradients)
        tolerance = 1e-5 if dtype == mx.float32 else 1.01 * 2**-8
        assert_trees_match(
            tree_map(lambda x: x.astype(mx.float32), mine), expected, tolerance, 1e-6
        )
        states = [optimizer.state[key] for key in SHAPES]
        assert_trees_match(states, [decaying.state[k] for k in SHAPES], 1e-4, 1e-7)
        bad = {**gradients, "large": gradients["large"] * float("nan")}
        kept = snapshot([mine, states])
        mine = step(mine, bad)
        assert snapshot([mine, [optimizer.state[k] for k in SHAPES]]) == kept
    assert int(optimizer.step) == int(optimizer.skipped_steps) == 3


@pytest.mark.fused
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=str)
def test_a_step_is_in_place(backend: str, compiled: bool, dtype: mx.Dtype) -> None:
    shapes = {"a": (128, 256), "b": (256, 128), "c": (256,)}
    rng = np.random.default_rng(0)
    parameters: Any = {k: random_array(rng, s, dtype) for k, s in shapes.items()}
    optimizer = optim.Adafactor(beta_1=0.9)
    optimizer.init(parameters)

    def step(parameters: Any, gradients: Any) -> Any:
        return optimizer.apply_gradients(gradients, parameters)

    if compiled:
        step = mx.compile(step, inputs=optimizer.state, outputs=optimizer.state)
    for i in range(4):
        gradients = {
            k: LAYOUTS["transposed"](random_array(rng, s, dtype))
            for k, s in shapes.items()
        }
        mx.eval(parameters, gradients, optimizer.state)
        mx.synchronize()
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        parameters = step(parameters, gradients)
        mx.eval(parameters, optimizer.state)
        if i > 0:  # tracing holds the first arguments
            # Sums and factors of rows and columns, of which the host has its own.
            assert mx.get_peak_memory() - before < 0.2 * parameters["a"].size * 4


def test_held_arrays_keep_their_values(backend: str) -> None:
    parameters, gradients = random_tree(0), random_tree(1, layout="transposed")
    optimizer = optim.Adafactor(beta_1=0.9)
    optimizer.init(parameters)
    held = tree_map(lambda x: x, [parameters, optimizer.state, gradients])
    before = snapshot(held)
    mx.eval(optimizer.apply_gradients(gradients, parameters), optimizer.state)
    assert snapshot(held) == before


@pytest.mark.fused  # MLX's means round by layout
@pytest.mark.parametrize("layout", ["transposed", "strided", "broadcast", "offset"])
def test_parameters_and_moments_of_any_layout(backend: str, layout: str) -> None:
    gradients = random_tree(1)
    results = []
    for as_given in (True, False):
        parameters = random_tree(0, layout=layout)
        optimizer = optim.Adafactor(beta_1=0.9)
        optimizer.init(parameters)
        for key, x in random_tree(2, layout=layout).items():
            optimizer.state[key]["exp_avg"] = x
        if not as_given:
            parameters, optimizer.state = copy_tree([parameters, optimizer.state])
        updated = optimizer.apply_gradients(gradients, parameters)
        results.append(snapshot([updated, optimizer.state]))
    assert results[0] == results[1]


@pytest.mark.fused
def test_the_number_of_threads_changes_no_bit() -> None:
    mx.set_default_device(mx.cpu)
    rng = np.random.default_rng(0)
    shapes = {"a": (700, 900), "b": (64, 3, 3, 64), "c": (5000,)}
    start, gradients = (
        {k: random_array(rng, s, mx.float32) for k, s in shapes.items()}
        for _ in range(2)
    )
    threads, results = _ext.num_threads(), set()
    try:
        for count in (1, 2, 5):
            _ext.set_num_threads(count)
            optimizer = optim.Adafactor(beta_1=0.9)
            updated = optimizer.apply_gradients(gradients, copy_tree(start))
            results.add(str(snapshot([updated, optimizer.state])))
    finally:
        _ext.set_num_threads(threads)
    assert len(results) == 1


@every_option
def test_transforms(backend: str, options: dict[str, Any]) -> None:
    """mx.grad and mx.vmap through a step are those of stock's."""
    rng = np.random.default_rng(0)
    start, gradient = (random_array(rng, (4, 3), mx.float32) for _ in range(2))
    batch = random_array(rng, (5, 4, 3), mx.float32)
    results = []
    for module in (optim, stock):

        def step(w: mx.array, g: mx.array, module: Any = module) -> mx.array:
            optimizer = module.Adafactor(**options)
            for _ in range(2):
                w = optimizer.apply_gradients({"w": g * w}, {"w": w})["w"]
            result: mx.array = w + optimizer.state["w"]["exp_avg_sq_row"][..., None]
            return result

        def loss(w: mx.array, step: Any = step) -> mx.array:
            return mx.square(step(w, gradient)).sum()

        _, (tangent,) = mx.jvp(loss, [start], [gradient])
        results.append(
            [
                mx.grad(loss)(start),
                tangent,
                mx.vmap(step)(batch, batch[::-1]),
                mx.vmap(step, in_axes=(0, None))(batch, gradient),
            ]
        )
    for mine, theirs in zip(*results, strict=True):
        np.testing.assert_allclose(to_numpy(mine), to_numpy(theirs), 2e-5, 1e-5)


@pytest.mark.parametrize("name", ["Adafactor", "Muon"])
def test_complex_matrices_are_refused(backend: str, name: str) -> None:
    tree = {"inner": {"w": mx.array([[1 + 2j, 1j], [2 + 0j, 3 - 1j]])}}
    optimizer = getattr(optim, name)(learning_rate=0.1)
    before = snapshot(optimizer.state)
    with pytest.raises(TypeError, match=rf"\[{name}\] .*'inner.w' is of dtype complex"):
        optimizer.apply_gradients(tree, tree)
    assert snapshot(optimizer.state) == before

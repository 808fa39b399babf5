"""max_grad_norm, skip_nonfinite, weight_decay_filter, state_dtype, on everything."""

from typing import Any

import mlx.core as mx
import mlx.optimizers as stock
import mlx_fused_optimizers as optim
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mlx.utils import tree_map
from support import (
    ALL_OPTIMIZERS,
    DECAYING_OPTIMIZERS,
    LAYOUTS,
    assert_trees_match,
    copy_tree,
    every_optimizer,
    fill,
    for_each,
    leaves_of,
    oracle,
    random_array,
    snapshot,
    to_numpy,
)

decaying = for_each(DECAYING_OPTIMIZERS)


def model(rng: np.random.Generator, dtype: mx.Dtype = mx.float32) -> Any:
    return {
        "embed": random_array(rng, (9, 4), dtype),
        "layers": [
            {
                "weight": random_array(rng, (6, 4), dtype),
                "bias": random_array(rng, (6,), dtype),
            }
            for _ in range(2)
        ],
        "scale": random_array(rng, (), dtype),
    }


@every_optimizer
@pytest.mark.parametrize("max_norm", [0.3, 1e3])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_max_grad_norm_is_clip_grad_norm_and_a_step(
    backend: str, name: str, options: dict[str, Any], max_norm: float, compiled: bool
) -> None:
    rng = np.random.default_rng(0)
    mine = model(rng)
    reference = copy_tree(mine)
    ours = getattr(optim, name)(learning_rate=1e-2, max_grad_norm=max_norm, **options)
    theirs = getattr(oracle, name)(learning_rate=1e-2, **options)
    ours.init(mine)

    def step(parameters: Any, gradients: Any) -> Any:
        return ours.apply_gradients(gradients, parameters)

    if compiled:
        step = mx.compile(step, inputs=ours.state, outputs=ours.state)
    for _ in range(3):
        gradients = fill(mine, rng, mx.float32)
        clipped, norm = stock.clip_grad_norm(gradients, max_norm)
        reference = theirs.apply_gradients(clipped, reference)
        mine = step(mine, gradients)
        assert_trees_match(mine, reference, 2e-5, 2e-6)
        assert float(ours.grad_norm) == pytest.approx(float(norm), rel=1e-5)
    state = {k: v for k, v in ours.state.items() if k != "grad_norm"}
    assert_trees_match(state, theirs.state, 2e-5, 2e-6)


@every_optimizer
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_nonfinite_steps_are_skipped(
    backend: str, name: str, options: dict[str, Any], compiled: bool
) -> None:
    rng = np.random.default_rng(1)
    schedule = optim.exponential_decay(1e-1, 0.5)
    optimizers: list[Any] = [
        getattr(optim, name)(learning_rate=schedule, skip_nonfinite=skip, **options)
        for skip in (True, False)
    ]
    skipping, plain = optimizers
    mine = model(rng)
    reference = copy_tree(mine)
    skipping.init(mine)

    def step(parameters: Any, gradients: Any) -> Any:
        return skipping.apply_gradients(gradients, parameters)

    if compiled:
        step = mx.compile(step, inputs=skipping.state, outputs=skipping.state)
    bad = [float("nan"), float("inf"), float("-inf")]
    for i in range(6):
        gradients = fill(mine, rng, mx.float32)
        if i % 2 == 0:
            spoiled = tree_map(lambda x: x, gradients)
            spoiled["layers"][1]["bias"] = mx.array([0.0] * 5 + [bad[i // 2]])
            before = snapshot([mine, skipping.state])
            mine = step(mine, spoiled)
            mx.eval(mine, skipping.state)
            after = snapshot([mine, skipping.state])
            changed = {path for path in after if after[path] != before[path]}
            allowed = {"1.grad_norm", "1.skipped_steps", "1.learning_rate"}
            assert changed <= allowed
            assert not np.isfinite(float(skipping.grad_norm))
        else:
            mine = step(mine, gradients)
            reference = plain.apply_gradients(gradients, reference)
        assert int(skipping.skipped_steps) == i // 2 + 1
    assert int(skipping.step) == int(plain.step) == 3
    assert_trees_match(mine, reference, 1e-5, 1e-6)


@decaying
def test_weight_decay_filter(backend: str, name: str, options: dict[str, Any]) -> None:
    rng = np.random.default_rng(2)
    parameters, gradients = model(rng), model(rng)
    make = getattr(optim, name)
    filtered = make(
        learning_rate=1e-2,
        weight_decay=0.3,
        weight_decay_filter=optim.decay_matrices_only,
        **options,
    )
    results = leaves_of(filtered.apply_gradients(gradients, parameters))
    for decay in (0.3, 0.0):
        plain = make(learning_rate=1e-2, weight_decay=decay, **options)
        expected = leaves_of(plain.apply_gradients(gradients, parameters))
        for path, x in expected.items():
            decays = path.endswith("weight")
            if decays == (decay > 0):
                np.testing.assert_array_equal(to_numpy(results[path]), to_numpy(x))
    compared = getattr(optim, name)(learning_rate=1e-2, weight_decay=0.3, **options)
    all_decay = leaves_of(compared.apply_gradients(gradients, parameters))
    assert not np.array_equal(to_numpy(all_decay["embed"]), to_numpy(results["embed"]))


@every_optimizer
@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16], ids=str)
def test_state_dtype(
    backend: str, name: str, options: dict[str, Any], dtype: mx.Dtype
) -> None:
    rng = np.random.default_rng(3)
    parameters = model(rng, dtype)
    optimizer = getattr(optim, name)(
        learning_rate=1e-2, state_dtype=mx.float32, **options
    )
    # A checkpoint of stock has moments in half precision: they are widened.
    half = getattr(oracle, name)(learning_rate=1e-2, **options)
    half.init(parameters)
    optimizer.state = copy_tree(half.state)
    exact = getattr(oracle, name)(learning_rate=1e-2, **options)
    wide = tree_map(lambda x: x.astype(mx.float32), parameters)
    for step in range(3):
        gradients = fill(parameters, rng, dtype)
        before = tree_map(lambda x: x.astype(mx.float32), parameters)
        parameters = optimizer.apply_gradients(gradients, parameters)
        wide = exact.apply_gradients(
            tree_map(lambda x: x.astype(mx.float32), gradients), before
        )
        assert all(x.dtype == dtype for x in leaves_of(parameters).values())
        moments = {k: v for k, v in optimizer.state.items() if k in parameters}
        if name == "SGD" and "momentum" not in options:
            moments = {}  # without momentum, v is never used
        assert all(x.dtype == mx.float32 for x in leaves_of(moments).values())
        if step == 0 and name not in ("Adafactor", "Muon"):
            # From the same state, the moments are those of float32 to the bit.
            expected = {k: v for k, v in exact.state.items() if k in moments}
            assert_trees_match(moments, expected, 1e-6, 1e-12)
        if name not in ("Adafactor", "Muon"):
            rounded = tree_map(lambda x: x.astype(dtype), wide)
            assert_trees_match(parameters, rounded, 2e-2, 1e-2)


def test_options_add_no_state_by_default(backend: str) -> None:
    parameters = model(np.random.default_rng(0))
    plain, extended = optim.AdamW(1e-2), optim.AdamW(1e-2, max_grad_norm=1.0)
    theirs = stock.AdamW(1e-2)
    for optimizer in (plain, extended, theirs):
        optimizer.init(parameters)
    assert plain.state.keys() == theirs.state.keys()
    assert extended.state.keys() - theirs.state.keys() == {"grad_norm"}
    assert plain.grad_norm is None
    assert plain.skipped_steps is None
    # A stock checkpoint loads into an optimizer that has options on.
    resumed: Any = optim.AdamW(1e-2, max_grad_norm=1.0, skip_nonfinite=True)
    resumed.state = copy_tree(theirs.state)
    updated = resumed.apply_gradients(parameters, parameters)
    mx.eval(updated)
    assert int(resumed.skipped_steps) == 0
    assert float(resumed.grad_norm) > 0


def multi(module: Any, **options: Any) -> Any:
    return module.MultiOptimizer(
        [module.SGD(1e-2, momentum=0.9), module.AdamW(1e-3), module.Lion(1e-3)],
        [lambda path, x: "bias" in path, lambda path, x: x.ndim == 2],
        **options,
    )


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_multi_optimizer(backend: str, compiled: bool) -> None:
    rng = np.random.default_rng(4)
    mine = model(rng)
    reference = copy_tree(mine)
    ours, theirs = multi(optim, max_grad_norm=0.5), multi(stock)
    assert issubclass(type(ours), stock.MultiOptimizer)
    ours.init(mine)

    def step(parameters: Any, gradients: Any) -> Any:
        return ours.apply_gradients(gradients, parameters)

    if compiled:
        step = mx.compile(step, inputs=ours.state, outputs=ours.state)
    for _ in range(3):
        gradients = fill(mine, rng, mx.float32)
        clipped, norm = stock.clip_grad_norm(gradients, 0.5)
        reference = theirs.apply_gradients(clipped, reference)
        mine = step(mine, gradients)
        assert_trees_match(mine, reference, 2e-5, 2e-6)
        assert float(ours.grad_norm) == pytest.approx(float(norm), rel=1e-5)
    assert_trees_match({"states": ours.state["states"]}, theirs.state, 2e-5, 2e-6)
    plain = multi(optim)
    plain.state = copy_tree(theirs.state)
    assert_trees_match(
        plain.apply_gradients(gradients, mine),
        theirs.apply_gradients(gradients, mine),
        2e-6,
        1e-7,
    )
    plain.learning_rate = 0.5
    assert float(plain.learning_rate) == 0.5


def test_multi_optimizer_skips_all_parts_or_none(backend: str) -> None:
    rng = np.random.default_rng(5)
    parameters, gradients = model(rng), model(rng)
    optimizer: Any = multi(optim, skip_nonfinite=True)
    optimizer.init(parameters)
    gradients["scale"] = mx.array(float("nan"))
    before = snapshot([parameters, optimizer.state["states"]])
    updated = optimizer.apply_gradients(gradients, parameters)
    after = snapshot([updated, optimizer.state["states"]])
    assert after == before
    assert int(optimizer.skipped_steps) == 1
    with pytest.raises(ValueError, match=r"skip_nonfinite needs optimizers of mlx_f"):
        optim.MultiOptimizer([stock.SGD(0.1)], skip_nonfinite=True)
    with pytest.raises(ValueError, match="Given 0 filters but 1 needed"):
        optim.MultiOptimizer([optim.SGD(0.1), optim.SGD(0.1)])


def test_an_error_in_one_part_changes_no_part(backend: str) -> None:
    rng = np.random.default_rng(6)
    parameters, gradients = model(rng), model(rng)
    optimizer = multi(optim, max_grad_norm=1.0)
    parameters = optimizer.apply_gradients(gradients, parameters)
    before = snapshot([parameters, optimizer.state])
    gradients["scale"] = mx.ones((3, 5))  # belongs to the last part
    gradients["layers"][0]["bias"] = mx.ones((7,))
    with pytest.raises(ValueError, match="shape"):
        optimizer.apply_gradients(gradients, parameters)
    assert snapshot([parameters, optimizer.state]) == before


class Plain(optim.Optimizer):
    """A user's optimizer, which gets the options too."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)

    def init_single(self, parameter: mx.array, state: dict[str, Any]) -> None:
        state["sum"] = mx.zeros_like(parameter)

    def apply_single(
        self, gradient: mx.array, parameter: mx.array, state: dict[str, Any]
    ) -> mx.array:
        state["sum"] = state["sum"] + gradient
        updated: mx.array = parameter - 0.1 * state["sum"]
        return updated


def test_options_on_users_own_optimizers(backend: str) -> None:
    rng = np.random.default_rng(7)
    parameters, gradients = model(rng), model(rng)
    clipped, _ = stock.clip_grad_norm(gradients, 0.5)
    expected = Plain().apply_gradients(clipped, parameters)
    optimizer = Plain(max_grad_norm=0.5, skip_nonfinite=True)
    assert_trees_match(
        optimizer.apply_gradients(gradients, parameters), expected, 1e-5, 1e-7
    )
    before = snapshot(optimizer.state["embed"])
    gradients["embed"] = gradients["embed"] * float("inf")
    updated = optimizer.apply_gradients(gradients, parameters)
    assert snapshot(updated) == snapshot(parameters)
    assert snapshot(optimizer.state["embed"]) == before


def is_matrix(path: str, array: mx.array) -> bool:
    return array.ndim >= 2


@settings(
    max_examples=30,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    which=st.sampled_from(ALL_OPTIMIZERS),
    layout=st.sampled_from([*LAYOUTS]),
    dtype=st.sampled_from([mx.float32, mx.float16, mx.bfloat16]),
    max_norm=st.none() | st.floats(0.01, 10),
    skip=st.booleans(),
    state_dtype=st.sampled_from([None, mx.float32]),
    filtered=st.booleans(),
    calls=st.sampled_from([None, 2]),
    ema=st.sampled_from([None, 0.5]),
    seed=st.integers(0, 2**32),
)
def test_any_combination_of_options(
    backend: str,
    which: tuple[str, dict[str, Any]],
    layout: str,
    dtype: mx.Dtype,
    max_norm: float | None,
    skip: bool,
    state_dtype: mx.Dtype | None,
    filtered: bool,
    calls: int | None,
    ema: float | None,
    seed: int,
) -> None:
    """In float32 arithmetic, options together are what they are one by one."""
    name, options = which
    filtered = filtered and "weight_decay" in options
    ema = None if name.startswith("ScheduleFree") else ema  # they have one of their own
    more: dict[str, Any] = {"weight_decay_filter": is_matrix} if filtered else {}
    if calls is not None:
        more |= {"accumulate": calls, "accumulate_dtype": mx.float32}
    rng = np.random.default_rng(seed)
    mine = model(rng, dtype)
    ours = getattr(optim, name)(
        learning_rate=1e-2,
        max_grad_norm=max_norm,
        skip_nonfinite=skip,
        state_dtype=state_dtype,
        ema=ema,
        **options,
        **more,
    )
    gradients = fill(mine, rng, dtype, layout)

    def widen(tree: Any) -> Any:
        return tree_map(lambda x: x.astype(mx.float32), tree)

    reference = widen(gradients)
    if max_norm is not None:
        reference, _ = stock.clip_grad_norm(reference, max_norm)
    theirs = getattr(oracle, name)(learning_rate=1e-2, **options)
    # Copies: before MLX 0.32.3, SGD adds the weight decay to the gradients it is given.
    expected = theirs.apply_gradients(copy_tree(reference), widen(mine))
    if filtered:
        options = {**options, "weight_decay": 0.0}
        theirs = getattr(oracle, name)(learning_rate=1e-2, **options)
        undecayed = theirs.apply_gradients(reference, widen(mine))
        expected = tree_map(
            lambda a, b: a if is_matrix("", a) else b, expected, undecayed
        )
    updated = copy_tree(mine)
    for call in range(calls or 1):
        assert call == 0 or snapshot(updated) == snapshot(mine)
        updated = ours.apply_gradients(copy_tree(gradients), updated)
    if dtype != mx.float32 and name == "Muon":
        return  # its products may be MLX's, in half precision
    tolerance = {mx.float32: 2e-5, mx.float16: 2e-3, mx.bfloat16: 1e-2}[dtype]
    assert_trees_match(
        updated, tree_map(lambda x: x.astype(dtype), expected), tolerance, tolerance
    )
    if ema is not None:
        averages = tree_map(lambda a, b: ema * a + (1 - ema) * b, widen(mine), expected)
        kept = tree_map(
            lambda state: state["weight_average"],
            {key: ours.state[key] for key in mine},
            is_leaf=lambda x: isinstance(x, dict) and "weight_average" in x,
        )
        assert_trees_match(kept, averages, tolerance, tolerance)

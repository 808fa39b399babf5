"""Steps of optimizers whose states are codes, or whose weights have masters."""

import os
from typing import Any

import mlx.core as mx
import mlx_fused_optimizers as optim
import numpy as np
import pytest
from conftest import SIMULATOR
from held_reference import (
    ROOT_ERRORS,
    STORAGES,
    Storage,
    block_scales,
    kind_in,
    master_of,
    options_of,
    plain_state,
    rounded_roots,
    spacing,
    stepper,
    storage_named,
    whole_codes,
)
from mlx.utils import tree_map
from mlx_fused_optimizers._kernels import kernels
from support import (
    copy_tree,
    fill,
    for_each,
    oracle,
    random_array,
    snapshot,
    to_numpy,
)

# These turn gradients into directions, and copy what is held.
DIRECTED: list[tuple[str, dict[str, Any]]] = [
    ("LAMB", {}),
    ("AdamW", {"cautious": True, "bias_correction": True}),
    ("Lion", {"cautious": True}),
    ("Muon", {}),
]
RULES: list[tuple[str, dict[str, Any]]] = [
    ("SGD", {"momentum": 0.9, "weight_decay": 0.1}),
    ("SGD", {"momentum": 0.8, "nesterov": True}),
    ("Adam", {}),
    ("AdamW", {"weight_decay": 0.1, "bias_correction": True}),
    ("Adamax", {}),
    ("Lion", {"weight_decay": 0.1}),
    ("RMSprop", {}),
    ("Adagrad", {}),
    ("AdaDelta", {"rho": 0.8}),
    ("AdEMAMix", {"weight_decay": 0.1, "warmup": 5}),
    ("AdamW", {"amsgrad": True, "bias_correction": True}),
    ("AdaBelief", {"weight_decay": 0.1}),
    ("Adan", {"weight_decay": 0.1}),
    ("NAdam", {"weight_decay": 0.1}),
    ("RAdam", {"betas": (0.9, 0.99)}),
    ("ScheduleFreeSGD", {"weight_decay": 0.1}),
    ("ScheduleFreeAdamW", {"warmup_steps": 3}),
    *DIRECTED,
]
each_storage = pytest.mark.parametrize("storage", STORAGES, ids=lambda x: x.name)
# Of each kind one, for what is not about a rule or a dtype.
FEW = [storage_named(x) for x in ("int8", "int8-24bit", "int4-32bit", "int8-random")]
few_storages = pytest.mark.parametrize("storage", FEW, ids=lambda x: x.name)
eager_and_compiled = pytest.mark.parametrize(
    "compiled", [False, True], ids=["eager", "compiled"]
)
# Whole blocks, tails of blocks and of vectors, an odd size, none, and one element.
SHAPES: dict[str, tuple[int, ...]] = {
    "matrix": (40, 64),
    "odd": (13, 35),
    "tail": (97,),
    "one": (1,),
    "empty": (0, 3),
    "scalar": (),
}


def random_tree(rng: np.random.Generator, dtype: mx.Dtype, shapes: Any = SHAPES) -> Any:
    return {key: random_array(rng, shape, dtype) for key, shape in shapes.items()}


def turned(x: mx.array) -> mx.array:
    """The same values, the last dimension outermost in memory."""
    return mx.contiguous(x.T).T


# Against a step in float32


def assert_state_is(
    state: dict[str, mx.array], expected: dict[str, mx.array], rule: str
) -> None:
    """Codes within one of the expected values', and scales; or float32 values."""
    for key, values in expected.items():
        x = np.array(values)
        kind = kind_in(state, key)
        if kind is None:
            rounding = 0.0 if state[key].dtype == mx.float32 else 2.0**-8
            found = to_numpy(state[key])
            np.testing.assert_allclose(found, x, rtol=1e-4 + rounding, atol=1e-6)
            continue
        is_positive = key in kernels.non_negative(rule)
        q = whole_codes(np.array(state[f"{key}_{kind}"]), kind, is_positive, x.size)
        flat = x.reshape(-1)
        scales = block_scales(flat, kind)
        np.testing.assert_allclose(np.array(state[f"{key}_scales"]), scales, rtol=1e-4)
        if x.size == 0:
            continue
        roots = rounded_roots(flat, kind, is_positive) * np.sign(flat)
        # Half a code, and what float32 roundings of the rule may add beside a tie.
        allowed = 0.501 + np.abs(roots) * (ROOT_ERRORS[is_positive] + 1e-4)
        is_least = is_positive & (q == 1) & (roots < 0.5)
        off = np.abs(q - roots) > allowed
        # A moment in which two terms cancel has fewer digits.
        assert np.mean(off & ~is_least) <= 1e-3
        assert np.all((np.abs(q - roots) <= 1) | is_least)


def assert_weight_is(
    weight: mx.array,
    state: dict[str, mx.array],
    expected: mx.array,
    storage: Storage,
    absolute: float,
) -> None:
    """The expected float32, as exactly as it is held."""
    wide = np.array(expected).astype(np.float64)
    slack = 1e-5 * np.abs(wide) + absolute
    interval = spacing(wide, storage.dtype)
    if storage.options.get("stochastic_rounding"):
        slack = slack + interval
    elif "error" in state:
        slack = slack + interval * (1 / 254 if state["error"].dtype == mx.int8 else 0)
    elif storage.dtype != mx.float32:
        slack = slack + interval / 2
    found = np.array(master_of(weight, state)).astype(np.float64)
    assert np.all(np.abs(found - wide) <= slack)


@for_each(RULES)
@each_storage
def test_a_step_is_that_of_float32(
    backend: str, name: str, options: dict[str, Any], storage: Storage
) -> None:
    """Decoded, stepped by mlx.optimizers, encoded; from where the last step ended.

    The simulator compiles a kernel for each, so it gets each rule with one storage, and
    one rule with all; with MLX_FUSED_TEST_ALL, all.
    """
    is_usual = (name, options) == RULES[3] or storage.name == "int8-24bit"
    if backend == SIMULATOR and not (is_usual or os.environ.get("MLX_FUSED_TEST_ALL")):
        pytest.skip("set MLX_FUSED_TEST_ALL for each rule with each storage")
    rng = np.random.default_rng(0)
    weights = random_tree(rng, storage.dtype)
    optimizer = getattr(optim, name)(0.01, **options_of(storage, **options))
    optimizer.init(weights)
    rule = optimizer._rule()
    for number in range(2):
        gradients = fill(weights, rng, storage.dtype)
        given = {
            key: turned(g) if number == 1 and g.ndim == 2 else g
            for key, g in gradients.items()
        }
        reference = getattr(oracle, name)(0.01, **options)
        wide = {k: master_of(w, optimizer.state[k]) for k, w in weights.items()}
        reference.init(wide)
        reference.state["step"] = mx.array(number, mx.uint64)
        for key in weights:
            shape = SHAPES[key]
            reference.state[key] = plain_state(optimizer.state[key], shape, rule)
        for key in ("weight_sum", "lr_max"):
            if key in optimizer.state:
                reference.state[key] = optimizer.state[key]
        widened = {key: g.astype(mx.float32) for key, g in gradients.items()}
        expected = reference.apply_gradients(widened, wide)
        weights = optimizer.apply_gradients(given, weights)
        for key, weight in weights.items():
            assert (weight.dtype, weight.shape) == (storage.dtype, SHAPES[key])
            state = optimizer.state[key]
            assert_state_is(state, reference.state[key], rule)
            assert ("error" in state) == ("master_weights" in storage.options)
            # Directions are of the gradient's dtype: 2^-8 of an update of 0.01, which
            # Muon's iterations enlarge.
            absolute = 2e-4 if (name, options) in DIRECTED else 2e-6
            assert_weight_is(weight, state, expected[key], storage, absolute)


# Layouts of gradients

# Columns of whole blocks and others, few and more than are turned at a time; more
# dimensions; rows that are no vectors; odd sizes.
LAYOUT_SHAPES: list[tuple[int, ...]] = [
    (64, 64),
    (130, 192),
    (67, 131),
    (40, 96),
    (7, 65),
    (1, 5),
    (17, 1088),
    (5, 1100),
    (20, 3, 24),
    (3, 20, 128),
]


@pytest.mark.fused
@few_storages
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_layouts_of_gradients_do_not_matter(
    backend: str, storage: Storage, threads: int
) -> None:
    """Nor do threads: all bits are those of a contiguous gradient."""
    if backend == SIMULATOR and threads > 1:
        pytest.skip("its kernels have no threads to set")
    rng = np.random.default_rng(1)
    shapes = {str(shape): shape for shape in LAYOUT_SHAPES}
    if backend != SIMULATOR:
        shapes |= {"many": (700, 640), "many, no blocks": (601, 703)}
    start = random_tree(rng, storage.dtype, shapes)
    steps = 1 if backend == SIMULATOR else 2
    gradients = [fill(start, rng, storage.dtype) for _ in range(steps)]
    usual = kernels.num_threads()
    results = []
    try:
        for layout in (None, turned, swapped, strided):
            kernels.set_num_threads(1 if layout is None else threads)
            optimizer = optim.AdamW(1e-2, **options_of(storage))
            weights = copy_tree(start)
            for tree in gradients:
                given = tree if layout is None else tree_map(layout, tree)
                weights = optimizer.apply_gradients(given, weights)
            results.append(snapshot([weights, optimizer.state]))
    finally:
        kernels.set_num_threads(usual)
    for result in results[1:]:
        assert result == results[0]


# Patterns of bfloat16: NaNs and infinities of both signs, the largest of finite values,
# which an update takes over the edge or to it, zeros and denormals.
EXTREME_WEIGHTS = np.array(
    [0x7FFF, 0xFFFF, 0x7FC0, 0xFF81, 0x7F80, 0xFF80, 0x7F7F, 0xFF7F, 0, 0x8000, 1, 0x80]
)


@pytest.mark.fused
@pytest.mark.parametrize("rate", [1e-2, 1e36], ids=["small", "huge"])
@few_storages
def test_values_that_are_not_finite_in_any_layout(
    backend: str, storage: Storage, rate: float
) -> None:
    """What is special about a value does not depend on the loop that meets it."""
    rng = np.random.default_rng(3)
    bits = rng.choice(EXTREME_WEIGHTS, (3, 64)).astype(np.uint16)
    usual = np.array(random_array(rng, (5, 64), mx.bfloat16).view(mx.uint16))
    weights = mx.array(np.concatenate([bits, usual])).view(mx.bfloat16)
    start = {"w": weights.astype(storage.dtype)}
    gradients = [fill(start, rng, storage.dtype) for _ in range(3)]
    strange = np.array(gradients[1]["w"].astype(mx.float32))
    strange[4, :3] = [np.nan, np.inf, -np.inf]
    gradients[1]["w"] = mx.array(strange).astype(storage.dtype)
    results = []
    for layout in (None, strided):
        optimizer = optim.AdamW(rate, **options_of(storage))
        weights = copy_tree(start)
        for tree in gradients:
            given = tree if layout is None else tree_map(layout, tree)
            weights = optimizer.apply_gradients(given, weights)
        results.append(snapshot([weights, optimizer.state]))
    assert results[1] == results[0]
    # The NaNs in codes stay in their block of 64, or two of 32.
    after = master_of(weights["w"], optimizer.state["w"])
    assert not mx.any(mx.isfinite(after[4, :3]))
    assert mx.all(mx.isnan(after[:3]) >= mx.isnan(start["w"][:3]))
    if rate < 1:
        assert mx.all(mx.isfinite(after[5:]))


def swapped(x: mx.array) -> mx.array:
    """The same values, the last two dimensions exchanged in memory."""
    return mx.contiguous(x.swapaxes(-1, -2)).swapaxes(-1, -2)


def strided(x: mx.array) -> mx.array:
    return mx.contiguous(mx.repeat(x[..., ::-1], 2, axis=-1))[..., ::-2]


@pytest.mark.fused
@few_storages
def test_weights_and_states_in_any_layout(backend: str, storage: Storage) -> None:
    """As where a user has sliced or transposed them."""
    rng = np.random.default_rng(2)
    start = {"w": random_array(rng, (30, 70), storage.dtype)}
    gradients = {"w": random_array(rng, (30, 70), storage.dtype)}
    results = []
    for is_strange in (False, True):
        optimizer = optim.AdamW(1e-2, **options_of(storage))
        weights = optimizer.apply_gradients(gradients, copy_tree(start))
        if is_strange:
            weights = tree_map(turned, weights)
            state = optimizer.state["w"]
            for key, x in state.items():
                state[key] = turned(x) if x.ndim > 1 else strided(x)
        weights = optimizer.apply_gradients(gradients, weights)
        results.append(snapshot([weights, optimizer.state]))
    assert results[0] == results[1]


# In place


@pytest.mark.fused
@for_each([row for row in RULES if row not in DIRECTED])
@few_storages
@eager_and_compiled
def test_a_step_copies_nothing(
    name: str, options: dict[str, Any], storage: Storage, compiled: bool
) -> None:
    mx.set_default_device(mx.cpu)
    rng = np.random.default_rng(3)
    weights = random_tree(rng, storage.dtype, {"a": (300, 200), "b": (77, 33)})
    optimizer = getattr(optim, name)(1e-3, **options_of(storage, **options))
    optimizer.init(weights)
    mx.eval(weights, optimizer.state)
    step = stepper(optimizer, compiled)
    for number in range(3):
        gradients = fill(weights, rng, storage.dtype)
        mx.eval(gradients)
        mx.synchronize()
        mx.reset_peak_memory()
        memory, copied = mx.get_active_memory(), kernels.bytes_copied()
        weights = step(gradients, weights)
        mx.eval(weights, optimizer.state)
        mx.synchronize()
        if number > 0:  # tracing holds the first arguments
            assert kernels.bytes_copied() == copied
            assert mx.get_peak_memory() - memory < 4096


@pytest.mark.fused
@few_storages
def test_a_step_leaves_what_the_caller_holds(backend: str, storage: Storage) -> None:
    rng = np.random.default_rng(4)
    weights = random_tree(rng, storage.dtype)
    optimizer = optim.AdamW(0.1, **options_of(storage))
    optimizer.init(weights)
    weights = optimizer.apply_gradients(fill(weights, rng, storage.dtype), weights)
    held = tree_map(lambda x: x, [weights, optimizer.state])
    before = snapshot(held)
    weights = optimizer.apply_gradients(fill(weights, rng, storage.dtype), weights)
    mx.eval(weights, optimizer.state)
    assert snapshot(held) == before
    assert snapshot([weights, optimizer.state])["0.matrix"] != before["0.matrix"]


@few_storages
@eager_and_compiled
def test_compiled_and_eager_steps_are_the_same(
    backend: str, storage: Storage, compiled: bool
) -> None:
    rng = np.random.default_rng(5)
    start = random_tree(rng, storage.dtype)
    steps = [fill(start, rng, storage.dtype) for _ in range(3)]
    results = []
    for is_compiled in (False, compiled):
        weights = copy_tree(start)
        optimizer = optim.AdamW(1e-2, max_grad_norm=1.0, **options_of(storage))
        optimizer.init(weights)
        step = stepper(optimizer, is_compiled)
        for gradients in steps:
            weights = step(gradients, weights)
        results.append(snapshot([weights, optimizer.state]))
    assert results[0] == results[1]

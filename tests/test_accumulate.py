"""``accumulate=k``: a step of the mean of k gradients, at each k-th call."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import metal_simulator
import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as stock
import mlx_fused_optimizers as optim
import numpy as np
import pytest
from metal_simulator.extension import extension, simulated
from mlx.utils import tree_map
from mlx_fused_optimizers import _ext
from support import (
    FLOATS,
    LAYOUTS,
    MLX_VERSION,
    PARTLY_FUSED,
    assert_trees_match,
    copy_tree,
    every_optimizer,
    fill,
    leaves_of,
    random_array,
    snapshot,
    to_numpy,
)
from users_classes import Plain, Shrinking

SHAPES: Any = {
    "layer": {"weight": (24, 20), "bias": (24,)},
    "rest": [(70, 66), (), (0, 3), (5,)],
}
# Of which the simulator compiles kernels: of few states and many, of two launches.
SIMULATED = ("SGD", "AdamW", "Muon", "Adafactor", "LAMB")
OPTION_KEYS = ("gradient_sum", "micro_step")


def arrays(seed: int, dtype: mx.Dtype = mx.float32, scale: float = 1.0) -> Any:
    rng = np.random.default_rng(seed)
    layer = {k: scale * random_array(rng, s, dtype) for k, s in SHAPES["layer"].items()}
    rest = [scale * random_array(rng, shape, dtype) for shape in SHAPES["rest"]]
    return copy_tree({"layer": layer, "rest": rest})


def own_state(optimizer: Any) -> dict[str, bytes]:
    """What the optimizer has without the option, too."""
    state = snapshot(optimizer.state)
    return {k: x for k, x in state.items() if not set(k.split(".")) & {*OPTION_KEYS}}


def mean_of(gradients: list[Any]) -> Any:
    """In the order of the calls; halves are added in their own dtype."""

    def mean(first: mx.array, *others: mx.array) -> mx.array:
        total = first
        for x in others:
            total = total + x
        return total / len(gradients)

    return tree_map(mean, *gradients)


class Run:
    """An optimizer with its parameters, eager or compiled."""

    def __init__(self, optimizer: Any, parameters: Any, compiled: bool = False) -> None:
        self.optimizer = optimizer
        self.parameters = copy_tree(parameters)
        optimizer.init(self.parameters)
        mx.eval(optimizer.state)

        def apply(parameters: Any, gradients: Any) -> Any:
            return optimizer.apply_gradients(gradients, parameters)

        self.apply = apply
        if compiled:
            state = optimizer.state
            self.apply = mx.compile(apply, inputs=state, outputs=state)

    def call(self, gradients: Any, evaluates: bool = True) -> Run:
        self.parameters = self.apply(self.parameters, gradients)
        if evaluates:
            mx.eval(self.parameters, self.optimizer.state)
        return self

    def all_bits(self) -> tuple[Any, Any]:
        return snapshot(self.parameters), own_state(self.optimizer)


def make(name: str, **options: Any) -> Any:
    given = (
        {}
        if options.get("relative_step", name == "Adafactor")
        else {"learning_rate": 0.01}
    )
    return getattr(optim, name)(**given, **options)


def both(
    name: str,
    k: int = 2,
    compiled: bool = False,
    dtype: mx.Dtype = mx.float32,
    **options: Any,
) -> tuple[Run, Run]:
    """With the option, and the same optimizer without it."""
    parameters = arrays(0, dtype)
    return (
        Run(make(name, accumulate=k, **options), parameters, compiled),
        Run(make(name, **options), parameters, compiled),
    )


def check_equal(ours: Run, plain: Run, k: int = 2, steps: int = 3, **how: Any) -> None:
    """Of k a power of two, bit for bit: the factor 1 / k rounds nothing."""
    for step in range(steps):
        gradients = [arrays(10 + k * step + i, **how) for i in range(k)]
        before = ours.all_bits()
        for number, g in enumerate(gradients):
            if number > 0:
                now = ours.all_bits()
                for bits in (before[1], now[1]):
                    bits.pop("learning_rate", None)  # a schedule's, for the next step
                assert now == before
            ours.call(g)
        plain.call(mean_of(gradients))
        assert ours.all_bits() == plain.all_bits()


@every_optimizer
def test_a_step_is_that_of_the_mean(
    backend: str, name: str, options: dict[str, Any]
) -> None:
    if backend == "metal-simulator" and (options or name not in SIMULATED):
        pytest.skip("the simulator compiles a kernel for each")
    check_equal(*both(name, **options))


@every_optimizer
def test_compiled(name: str, options: dict[str, Any]) -> None:
    ours, _ = both(name, 4, **options)
    compiled = Run(make(name, accumulate=4, **options), arrays(0), compiled=True)
    for step in range(2):
        for i in range(4):
            ours.call(arrays(4 * step + i))
            compiled.call(arrays(4 * step + i))
            if (name, options) not in PARTLY_FUSED:
                assert compiled.all_bits() == ours.all_bits()
    assert_trees_match(compiled.parameters, ours.parameters, 2e-5, 1e-6)
    assert compiled.optimizer.step.item() == 2


OPTIONS: dict[str, dict[str, Any]] = {
    "max_grad_norm": {"max_grad_norm": 0.5},
    "clip_by_last_norm": {"max_grad_norm": 0.5, "clip_by_last_norm": True},
    "skip_nonfinite": {"skip_nonfinite": True},
    "both": {"max_grad_norm": 0.5, "skip_nonfinite": True},
    "filter": {"weight_decay_filter": optim.decay_matrices_only},
    "groups": {
        "groups": [
            (
                lambda path, array: array.ndim < 2,
                {"learning_rate": optim.linear_schedule(0.1, 0.2, 5), "eps": 1e-3},
            )
        ]
    },
    "int8": {"state_dtype": "int8", "quantize_filter": lambda path, array: True},
    "int4": {"state_dtype": "int4", "quantize_filter": lambda path, array: True},
    "bfloat16 states": {"state_dtype": mx.bfloat16},
    "schedule": {"learning_rate": optim.exponential_decay(0.1, 0.5)},
    "accumulate_dtype": {"accumulate_dtype": mx.float32},
}
HALF_OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "24bit": {"master_weights": "24bit"},
    "32bit and norm": {"master_weights": "32bit", "max_grad_norm": 0.5},
    "stochastic": {"stochastic_rounding": True},
    "float32 states": {"state_dtype": mx.float32, "skip_nonfinite": True},
    "int8": {"state_dtype": "int8", "master_weights": "24bit"},
}


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("option", OPTIONS)
def test_with_other_options(backend: str, option: str, compiled: bool) -> None:
    if compiled and backend == "plain":
        pytest.skip("MLX compiles plain operations with the machine's compiler")
    if backend == "metal-simulator" and (compiled != (option == "both")):
        pytest.skip("the same kernels")
    given = {"learning_rate": 0.01, **OPTIONS[option]}
    plain = {k: v for k, v in given.items() if k != "accumulate_dtype"}
    parameters = arrays(0)
    check_equal(
        Run(optim.AdamW(accumulate=2, **given), parameters, compiled),
        Run(optim.AdamW(**plain), parameters, compiled),
    )


@pytest.mark.parametrize("dtype", FLOATS[1:], ids=str)
@pytest.mark.parametrize("option", HALF_OPTIONS)
def test_half_precision(backend: str, option: str, dtype: mx.Dtype) -> None:
    if backend == "metal-simulator" and (
        dtype == mx.float16 or option not in ("32bit and norm", "stochastic")
    ):
        pytest.skip("the simulator compiles a kernel for each; these are the richest")
    ours, plain = both("AdamW", dtype=dtype, **HALF_OPTIONS[option])
    check_equal(ours, plain, dtype=dtype)


@pytest.mark.parametrize("name", ["AdamW", "Muon", "Adafactor"])
@pytest.mark.parametrize("dtype", FLOATS[1:], ids=str)
def test_a_float32_buffer_of_half_gradients(
    backend: str, name: str, dtype: mx.Dtype
) -> None:
    """Nearer to the mean in float64 than a buffer of half precision; no dtype grows."""
    k, shape = 64, (64, 32)
    rng = np.random.default_rng(0)
    gradients = [random_array(rng, shape, dtype) + 1 for _ in range(k)]
    exact = np.mean([to_numpy(g).astype(np.float64) for g in gradients], axis=0)
    errors = []
    for wanted in (dtype, mx.float32):
        optimizer = optim.SGD(1.0, accumulate=k, accumulate_dtype=wanted)
        parameters = {"a": mx.zeros(shape)}
        optimizer.init({"a": mx.zeros(shape, dtype)})
        for g in gradients:
            parameters = optimizer.apply_gradients({"a": g}, parameters)
        # The parameter is float32, so that it shows the mean.
        errors.append(np.abs(to_numpy(parameters["a"]) + exact).max())
        assert optimizer.state["a"]["gradient_sum"].dtype == wanted
    assert errors[1] < 1e-6 < 1e-4 < errors[0]
    optimizer = make(name, accumulate=2, accumulate_dtype=mx.float32)
    run = Run(optimizer, {"a": random_array(rng, shape, dtype)})
    before = {k: x.dtype for k, x in leaves_of(run.optimizer.state).items()}
    for g in gradients[:4]:
        run.call({"a": g})
    assert run.parameters["a"].dtype == dtype
    state = leaves_of(run.optimizer.state)
    if name != "Muon":  # whose float16 moment is float32 in any case
        assert {k: x.dtype for k, x in state.items()} == before


def test_any_number(backend: str) -> None:
    """1 / 3 is rounded once: within two units of the last place."""
    ours, plain = both("SGD", 3)
    for step in range(2):
        gradients = [arrays(step * 3 + i) for i in range(3)]
        for g in gradients:
            ours.call(g)
        plain.call(mean_of(gradients))
    assert_trees_match(ours.parameters, plain.parameters, 5e-7, 1e-8)


def test_one_large_batch(backend: str) -> None:
    """Micro-batches of equal sizes, against all of them at once."""
    mx.random.seed(0)
    x, y = mx.random.normal((64, 8)), mx.random.normal((64, 3))
    models = [nn.Linear(8, 3) for _ in range(2)]
    models[1].update(models[0].parameters())
    loss_and_grads = [
        nn.value_and_grad(m, lambda x, y, m=m: mx.square(m(x) - y).mean())
        for m in models
    ]
    ours = optim.Adam(0.05, accumulate=4, bias_correction=True)
    whole = optim.Adam(0.05, bias_correction=True)
    for _ in range(5):
        for i in range(4):
            part = slice(16 * i, 16 * i + 16)
            ours.update(models[0], loss_and_grads[0](x[part], y[part])[1])
        whole.update(models[1], loss_and_grads[1](x, y)[1])
        mx.eval(models[0].parameters(), models[1].parameters())
    assert_trees_match(models[0].parameters(), models[1].parameters(), 2e-4, 1e-5)


def test_without_evaluation(backend: str) -> None:
    """The counter is not computed yet: the device decides."""
    ours, plain = both("AdamW", 2, max_grad_norm=0.5)
    for i in range(6):
        ours.call(arrays(i), evaluates=False)
    for i in range(0, 6, 2):
        plain.call(mean_of([arrays(i), arrays(i + 1)]))
    assert ours.all_bits() == plain.all_bits()


def test_a_nan_skips_the_whole_step(backend: str) -> None:
    ours, plain = both("AdamW", skip_nonfinite=True, max_grad_norm=1.0)
    spoilt = arrays(1)
    spoilt["rest"][0][3, 4] = mx.nan
    before = ours.all_bits()[0]
    ours.call(spoilt).call(arrays(2))
    assert ours.all_bits()[0] == before
    assert ours.optimizer.step.item() == 0
    assert ours.optimizer.skipped_steps.item() == 1
    assert np.isnan(ours.optimizer.grad_norm.item())
    plain.call(spoilt)
    check_equal(ours, plain)
    assert ours.optimizer.skipped_steps.item() == 1
    # In the middle the norm is still the last step's.
    norm = ours.optimizer.grad_norm.item()
    ours.call(arrays(3))
    assert ours.optimizer.grad_norm.item() == norm


def test_another_number_in_mid_run(backend: str) -> None:
    ours, plain = both("AdamW", 4)
    gradients = [arrays(i) for i in range(4)]
    for g in gradients[:3]:
        ours.call(g)
    ours.optimizer.accumulate = 2  # and four are there at the next call
    ours.call(gradients[3])
    plain.call(mean_of(gradients))
    check_equal(ours, plain)
    ours.call(gradients[0])
    with pytest.raises(ValueError, match="while 1 gradients wait for their step"):
        ours.optimizer.accumulate = None
    ours.call(gradients[1])
    plain.call(mean_of(gradients[:2]))
    ours.optimizer.accumulate = None
    ours.call(gradients[0])
    plain.call(gradients[0])
    assert ours.all_bits() == plain.all_bits()
    assert ours.optimizer.state.keys() == plain.optimizer.state.keys()
    assert "gradient_sum" not in ours.optimizer.state["layer"]["bias"]


def test_switched_on_in_mid_run(backend: str) -> None:
    ours, plain = (Run(optim.AdamW(0.01), arrays(0)) for _ in range(2))
    ours.call(arrays(1))
    plain.call(arrays(1))
    ours.optimizer.accumulate = 2
    check_equal(ours, plain)


@pytest.mark.parametrize("value", [0, -1])
def test_refuses_numbers_below_one(value: int) -> None:
    with pytest.raises(ValueError, match=f"accumulate should be >=1, {value} was"):
        optim.SGD(0.1, accumulate=value)


@pytest.mark.parametrize("value", [2.0, True, "2"])
def test_refuses_what_is_no_number(value: Any) -> None:
    with pytest.raises(TypeError, match="accumulate is of type"):
        optim.SGD(0.1, accumulate=value)


def test_refuses_other_dtypes() -> None:
    with pytest.raises(ValueError, match="accumulate_dtype should be float32"):
        optim.SGD(0.1, accumulate=2, accumulate_dtype=mx.int8)
    with pytest.raises(TypeError, match="accumulate_dtype is of type str"):
        optim.SGD(0.1, accumulate=2, accumulate_dtype="float32")  # type: ignore[arg-type]
    with pytest.warns(UserWarning, match="accumulate_dtype has no effect without"):
        optim.SGD(0.1, accumulate_dtype=mx.float32)
    with pytest.raises(ValueError, match="'micro_step' has the name of an entry"):
        optim.SGD(0.1, accumulate=2).init({"micro_step": mx.zeros(2)})


@pytest.mark.parametrize("k", [1, None])
def test_off_is_as_without(k: int | None) -> None:
    ours, plain = both("AdamW", k)  # type: ignore[arg-type]
    ours.call(arrays(1))
    plain.call(arrays(1))
    assert ours.all_bits() == plain.all_bits()
    assert snapshot(ours.optimizer.state) == snapshot(plain.optimizer.state)


def test_errors_change_nothing(backend: str) -> None:
    ours, _ = both("AdamW", 2)
    ours.call(arrays(1))

    def fails(step: mx.array) -> mx.array:
        raise ZeroDivisionError

    everything = snapshot(ours.optimizer.state)
    wrong = arrays(2)
    wrong["layer"]["weight"] = mx.zeros((3, 7))
    with pytest.raises(ValueError, match=r"layer\.weight"):
        ours.optimizer.apply_gradients(wrong, ours.parameters)
    with pytest.raises(KeyError, match="has no parameter"):
        ours.optimizer.apply_gradients({"other": mx.zeros(3)}, ours.parameters)
    assert snapshot(ours.optimizer.state) == everything
    ours.optimizer._schedulers["learning_rate"] = fails
    with pytest.raises(ZeroDivisionError):
        ours.optimizer.apply_gradients(arrays(2), ours.parameters)
    assert snapshot(ours.optimizer.state) == everything


def test_shapes_are_checked_at_each_call(backend: str) -> None:
    """Not at the k-th alone, when the wrong gradient would be in the sum."""
    ours, _ = both("AdamW", 3)
    before = snapshot(ours.optimizer.state)
    wrong = arrays(2)
    wrong["rest"][0] = mx.zeros((3, 7))
    with pytest.raises(ValueError, match=r"rest\.0"):
        ours.optimizer.apply_gradients(wrong, ours.parameters)
    assert snapshot(ours.optimizer.state) == before


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_of_any_strides(backend: str, layout: str) -> None:
    ours, plain = both("AdamW")
    rng = np.random.default_rng(5)
    gradients = [fill(arrays(0), rng, mx.float32, layout) for _ in range(2)]
    for g in gradients:
        ours.call(g)
    plain.call(mean_of(gradients))
    assert ours.all_bits() == plain.all_bits()


@pytest.mark.parametrize("dtype", [mx.complex64, mx.float64], ids=str)
def test_other_dtypes(dtype: mx.Dtype) -> None:
    mx.set_default_device(mx.cpu)
    choices: list[dict[str, Any]] = [{}, {"max_grad_norm": 0.1}]
    for options in choices:
        ours, plain = both("SGD", 3, dtype=mx.float32, **options)
        wide = [tree_map(lambda x: x.astype(dtype) / 3, arrays(i)) for i in range(4)]
        for run in (ours, plain):
            run.parameters = copy_tree(wide[3])
            run.optimizer.init(run.parameters)
        for g in wide[:3]:
            ours.call(g)
        plain.call(mean_of(wide[:3]))
        tolerance = 1e-14 if dtype == mx.float64 else 1e-6
        if MLX_VERSION < (0, 32, 0):  # it adds numbers to float64 in float32
            tolerance = max(tolerance, 1e-10)
        assert_trees_match(ours.parameters, plain.parameters, tolerance, tolerance)


def test_frozen_parameters(backend: str) -> None:
    ours, plain = both("AdamW")
    ours.call(arrays(1)).call(arrays(2))
    plain.call(mean_of([arrays(1), arrays(2)]))
    some = [{"layer": arrays(i)["layer"]} for i in (3, 4)]
    updated = [
        ours.optimizer.apply_gradients(some[0], ours.parameters),
        ours.optimizer.apply_gradients(some[1], ours.parameters),
    ]
    expected = plain.optimizer.apply_gradients(mean_of(some), plain.parameters)
    assert snapshot(updated[1]) == snapshot(expected)
    assert snapshot(updated[0]) == snapshot({"layer": ours.parameters["layer"]})
    assert own_state(ours.optimizer) == own_state(plain.optimizer)


def test_copies(backend: str) -> None:
    """In the middle of an accumulation."""
    ours, _ = both("AdamW")
    ours.call(arrays(1))
    for again in (
        copy.deepcopy(ours.optimizer),
        pickle.loads(pickle.dumps(ours.optimizer)),
    ):
        updated = again.apply_gradients(arrays(2), copy_tree(ours.parameters))
        expected = Run(optim.AdamW(0.01), arrays(0)).call(
            mean_of([arrays(1), arrays(2)])
        )
        assert snapshot(updated) == snapshot(expected.parameters)


@pytest.mark.parametrize(
    "options", [{}, {"max_grad_norm": 0.5, "skip_nonfinite": True}]
)
def test_users_classes(backend: str, options: dict[str, Any]) -> None:
    parameters = arrays(0)
    check_equal(
        Run(Plain(accumulate=2, **options), parameters),
        Run(Plain(**options), parameters),
    )
    check_equal(
        Run(Shrinking(0.01, accumulate=2, **options), parameters),
        Run(Shrinking(0.01, **options), parameters),
    )


def test_users_classes_keep_dtypes() -> None:
    run = Run(Plain(accumulate=2, accumulate_dtype=mx.float32), arrays(0, mx.bfloat16))
    run.call(arrays(1, mx.bfloat16)).call(arrays(2, mx.bfloat16))
    assert {x.dtype for x in leaves_of(run.parameters).values()} == {mx.bfloat16}


def is_matrix(path: str, array: mx.array) -> bool:
    return array.ndim == 2


def multi(**options: Any) -> Any:
    part: dict[str, Any] = options.pop("part", {})
    return optim.MultiOptimizer(
        [optim.SGD(0.1, momentum=0.9, **part), optim.AdamW(0.01, **part)],
        [is_matrix],
        **options,
    )


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize(
    "options", [{}, {"max_grad_norm": 0.5}, {"skip_nonfinite": True}], ids=str
)
@pytest.mark.parametrize("part", [{}, {"max_grad_norm": 0.3}], ids=str)
def test_of_a_multi_optimizer(
    backend: str, options: dict[str, Any], part: dict[str, Any], compiled: bool
) -> None:
    if compiled and backend == "plain":
        pytest.skip("MLX compiles plain operations with the machine's compiler")
    parameters = arrays(0)
    ours = Run(multi(accumulate=2, part=part, **options), parameters, compiled)
    plain = Run(multi(part=part, **options), parameters, compiled)
    assert "gradient_sums" in ours.optimizer.state
    for step in range(3):
        gradients = [arrays(2 * step + i + 1) for i in range(2)]
        before = snapshot(ours.parameters)
        ours.call(gradients[0])
        assert snapshot(ours.parameters) == before
        ours.call(gradients[1])
        plain.call(mean_of(gradients))
        # A part that clips gets gradients that the whole has rounded.
        tolerance = 1e-6 if part else 0.0
        assert_trees_match(ours.parameters, plain.parameters, tolerance, tolerance)
    assert ours.optimizer.step.item() == 3


def test_of_parts(backend: str) -> None:
    """One part accumulates; the whole's norm clips each of its gradients."""
    parameters = arrays(0)

    def build(**part: Any) -> Any:
        return optim.MultiOptimizer(
            [optim.SGD(0.1, **part), optim.AdamW(0.01)],
            [is_matrix],
            max_grad_norm=1.0,
            skip_nonfinite=True,
        )

    ours = Run(build(accumulate=2), parameters)
    gradients = [arrays(i) for i in (1, 2)]
    spoilt = arrays(3)
    spoilt["layer"]["bias"][0] = mx.nan
    first = snapshot(ours.parameters["layer"]["weight"])
    ours.call(gradients[0])
    ours.call(spoilt)  # and does not count
    assert snapshot(ours.parameters["layer"]["weight"]) == first
    assert ours.optimizer.optimizers[0].state["micro_step"].item() == 1
    assert ours.optimizer.skipped_steps.item() == 1
    ours.call(gradients[1])
    clipped = [optim.clip_grad_norm(g, 1.0)[0] for g in gradients]
    mean = mean_of(clipped)
    expected = parameters["layer"]["weight"] - 0.1 * mean["layer"]["weight"]
    np.testing.assert_allclose(
        to_numpy(ours.parameters["layer"]["weight"]), to_numpy(expected), rtol=1e-6
    )
    assert [o.step.item() for o in ours.optimizer.optimizers] == [1, 2]


def test_multi_refuses_other_packages() -> None:
    with pytest.raises(ValueError, match="accumulate needs optimizers of"):
        optim.MultiOptimizer([stock.SGD(0.1)], accumulate=2)


def test_multi_keeps_dtypes(backend: str) -> None:
    ours = Run(multi(accumulate=2, accumulate_dtype=mx.float32), arrays(0, mx.bfloat16))
    ours.call(arrays(1, mx.bfloat16)).call(arrays(2, mx.bfloat16))
    assert {x.dtype for x in leaves_of(ours.parameters).values()} == {mx.bfloat16}
    sums = leaves_of(ours.optimizer.state["gradient_sums"])
    assert {x.dtype for x in sums.values()} == {mx.float32}


@pytest.mark.parametrize("kind", ["AdamW", "Muon", "Adafactor", "multi", "int8"])
def test_a_checkpoint_in_the_middle(kind: str, tmp_path: Path) -> None:
    def build() -> Any:
        if kind == "multi":
            return multi(accumulate=4, max_grad_norm=1.0)
        held = {"state_dtype": "int8"} if kind == "int8" else {}
        name = "AdamW" if kind == "int8" else kind
        return make(name, accumulate=4, max_grad_norm=1.0, **held)

    run = Run(build(), arrays(0))
    for i in range(6):
        run.call(arrays(i))
    optim.save(tmp_path / "a", run.parameters, run.optimizer)
    again = Run(build(), arrays(7))
    optim.load(tmp_path / "a", again.parameters, again.optimizer)
    for i in range(6, 13):
        for r in (run, again):
            r.call(arrays(i))
    assert snapshot(again.parameters) == snapshot(run.parameters)
    assert snapshot(again.optimizer.state) == snapshot(run.optimizer.state)
    assert run.optimizer.step.item() == 3


@pytest.mark.parametrize("of", ["stock", "ours"])
def test_a_checkpoint_without_the_option(of: str, tmp_path: Path) -> None:
    """Of another optimizer, in the middle of an accumulation: it begins anew."""
    source = (stock if of == "stock" else optim).AdamW(0.01)
    parameters = arrays(0)
    source.init(parameters)
    parameters = source.apply_gradients(arrays(1), parameters)
    optim.save(tmp_path / "a", parameters, source)
    run = Run(optim.AdamW(0.01, accumulate=2), arrays(7))
    run.call(arrays(8))
    optim.load(tmp_path / "a", run.parameters, run.optimizer)
    assert run.optimizer.state["micro_step"].item() == 0
    plain = Run(optim.AdamW(0.01), arrays(7))
    optim.load(tmp_path / "a", plain.parameters, plain.optimizer)
    check_equal(run, plain)
    # And the other way, when asked to.
    run.call(arrays(1))
    optim.save(tmp_path / "b", run.parameters, run.optimizer)
    with pytest.raises(ValueError, match="'accumulate': found 2, expected nothing"):
        optim.load(tmp_path / "b", plain.parameters, optim.AdamW(0.01))
    other = optim.AdamW(0.01)
    with pytest.warns(UserWarning, match="gradient_sum"):
        optim.load(tmp_path / "b", plain.parameters, other, strict=False)
    assert own_state(other) == own_state(run.optimizer)
    assert snapshot(other.state).keys() == own_state(other).keys()


def test_full_precision_leaves_the_buffer_out() -> None:
    run = Run(
        optim.AdamW(0.01, accumulate=2, master_weights="24bit"), arrays(0, mx.bfloat16)
    )
    run.call(arrays(1, mx.bfloat16))
    _, state = optim.full_precision(run.parameters, run.optimizer)
    assert state.keys() == {"layer", "rest", "step", "learning_rate"}
    assert state["layer"]["bias"].keys() == {"m", "v"}


# Memory


def peak(k: int, compiled: bool) -> int:
    """Bytes of a training call beyond what the training holds, the largest of all."""
    mx.random.seed(0)
    width, layers = 256, 12
    model = nn.Sequential(*[nn.Linear(width, width) for _ in range(layers)])
    optimizer = optim.AdamW(1e-4, accumulate=k)
    optimizer.init(model.trainable_parameters())
    state = [model.state, optimizer.state]
    mx.eval(state)
    loss_and_grad = nn.value_and_grad(model, lambda model, x: model(x).square().mean())

    def call(x: mx.array) -> mx.array:
        value, gradients = loss_and_grad(model, x)
        optimizer.update(model, gradients)
        return value  # type: ignore[no-any-return]

    if compiled:
        call = mx.compile(call, inputs=state, outputs=state)
    found = 0
    for i in range(2 * k + 1):
        mx.synchronize()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        mx.eval(call(mx.ones((4, width))), state)
        if i > 0:  # tracing holds the first arguments
            found = max(found, mx.get_peak_memory() - before)
    return found


@pytest.mark.fused
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_peak_does_not_grow_with_the_number(compiled: bool) -> None:
    mx.set_default_device(mx.cpu)
    gradients = 12 * 257 * 256 * 4
    peaks = [peak(k, compiled) for k in (2, 4, 8)]
    # Gradients go as soon as they are added: no call holds all of them.
    assert max(peaks) < 0.5 * gradients
    assert max(peaks) - min(peaks) < 0.02 * gradients


@pytest.mark.fused
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 1.0}], ids=str)
@pytest.mark.parametrize("name", ["SGD", "AdamW", "Lion"])
def test_no_call_allocates(
    backend: str, name: str, options: dict[str, Any], compiled: bool
) -> None:
    shapes = {"a": (90, 50), "b": (40, 30)}
    rng = np.random.default_rng(0)
    run = Run(
        make(name, accumulate=3, **options),
        {k: random_array(rng, shape, mx.float32) for k, shape in shapes.items()},
        compiled,
    )
    for i in range(7):
        gradients = fill(run.parameters, rng, mx.float32)
        mx.eval(gradients)
        mx.synchronize()
        mx.reset_peak_memory()
        before, copied = mx.get_active_memory(), _ext.bytes_copied()
        run.call(gradients)
        if i > 2:  # the first step checks kernels on Metal
            assert mx.get_peak_memory() - before < 40 * 30 * 4
            assert _ext.bytes_copied() == copied


@pytest.mark.fused
def test_bytes_on_metal() -> None:
    """A call adds, 12 bytes an element; the step's kernels then move nothing, or 28."""
    if extension() is None:
        pytest.skip("the simulator is not built")
    elements = 64 * 128 + 4096
    with simulated():
        for is_known in (True, False):
            run = Run(
                optim.AdamW(1e-3, accumulate=2, bias_correction=True),
                {"a": mx.ones((64, 128)), "b": mx.ones((4096,))},
            )
            run.call({"a": mx.ones((128, 64)).T, "b": mx.ones((4096,))})
            run.call({"a": mx.ones((128, 64)).T, "b": mx.ones((4096,))})
            if not is_known:  # a counter that is pending
                state = run.optimizer.state
                state["micro_step"] = state["micro_step"] + 0
            moved = []
            for _ in range(2):
                g = {"a": mx.contiguous(mx.ones((128, 64))).T, "b": mx.ones((4096,))}
                mx.eval(g)
                mx.synchronize()
                metal_simulator.reset()
                run.call(g)
                mx.synchronize()
                launches = metal_simulator.counters()
                by_kernel: dict[bool, int] = {True: 0, False: 0}
                for launch in launches:
                    is_sum = "GradientSum" in launch.kernel
                    by_kernel[is_sum] += launch.bytes_read + launch.bytes_written
                moved.append((by_kernel[True] / elements, by_kernel[False] / elements))
                if is_known and len(moved) == 1:
                    assert all("GradientSum" in x.kernel for x in launches)
            # A sum that begins is read as well: kernels have one way.
            assert moved == [(12, 0), (12, 28)]
    assert metal_simulator.take_errors() == []

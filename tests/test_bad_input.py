"""Bad input: a clear error of the right type, and nothing has changed."""

import signal
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.optimizers as stock
import mlx_fused_optimizers as optim
import numpy as np
import pytest
from support import (
    ALL_OPTIMIZERS,
    MLX_VERSION,
    assert_trees_match,
    is_stocks,
    oracle,
    random_array,
    snapshot,
)

# Refused by a constructor: class, arguments, error, its text. Stock's own conditions
# come first; the options are ours.
CONSTRUCTORS: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    ("SGD", {"nesterov": True}, ValueError, "Nesterov momentum requires"),
    ("SGD", {"nesterov": True, "momentum": 0.9, "dampening": 0.1}, ValueError, "zero"),
    ("RMSprop", {"alpha": -1.0}, ValueError, "alpha should be >=0, -1.0"),
    ("RMSprop", {"eps": 0.0}, ValueError, "epsilon should be >0, 0.0"),
    ("Adagrad", {"eps": 0.0}, ValueError, "epsilon should be >0, 0.0"),
    ("AdaDelta", {"rho": -0.1}, ValueError, "rho should be >=0, -0.1"),
    ("AdaDelta", {"eps": -1.0}, ValueError, "epsilon should be >0, -1.0"),
    ("Adam", {"betas": (1.0, 0.9)}, ValueError, r"beta1 should be in \[0, 1\), 1.0"),
    ("Adam", {"eps": -1.0}, ValueError, "epsilon should be >=0, -1.0"),
    ("AdamW", {"betas": (0.9, -0.1)}, ValueError, r"beta2 should be in \[0, 1\)"),
    ("Adamax", {"betas": (2.0, 0.9)}, ValueError, r"beta1 should be in \[0, 1\), 2.0"),
    ("Lion", {"betas": (0.9, 1.5)}, ValueError, r"beta2 should be in \[0, 1\), 1.5"),
    ("AdEMAMix", {"betas": (0.9, 0.9, 1.0)}, ValueError, r"beta3 should be in \[0, 1"),
    ("AdEMAMix", {"alpha": -1.0}, ValueError, "alpha should be >=0, -1.0"),
    ("Adam", {"amsgrad": 1}, TypeError, "amsgrad is of type int; expected True or"),
    ("AdamW", {"amsgrad": True, "cautious": True}, ValueError, "exclude each other"),
    ("Lion", {"cautious": "yes"}, TypeError, "cautious is of type str; expected True"),
    ("AdaBelief", {"betas": (1.0, 0.9)}, ValueError, r"beta1 should be in \[0, 1\)"),
    ("Adan", {"betas": (0.9, 0.9)}, ValueError, "length 2; expected 3 numbers"),
    ("Adan", {"no_prox": None}, TypeError, "no_prox is of type NoneType"),
    ("LAMB", {"eps": -1.0}, ValueError, "eps should be >=0, -1.0"),
    ("NAdam", {"momentum_decay": -1.0}, ValueError, "momentum_decay should be >=0"),
    ("RAdam", {"weight_decay": "x"}, TypeError, "weight_decay is of type str"),
    ("ScheduleFreeSGD", {"momentum": 0.0}, ValueError, r"momentum should be in \(0, 1"),
    ("ScheduleFreeAdamW", {"betas": (0, 0.9)}, ValueError, r"beta1 should be in \(0"),
    ("ScheduleFreeAdamW", {"warmup_steps": -1}, ValueError, "warmup_steps should be"),
    ("Adam", {"beta": 0.9}, TypeError, "unexpected keyword argument 'beta'"),
    ("Adam", {"weight_decay_filter": len}, TypeError, "Adam takes no weight decay"),
    ("Adam", {"max_grad_norm": -1.0}, ValueError, "max_grad_norm should be >=0, -1.0"),
    ("Muon", {"max_grad_norm": float("nan")}, ValueError, "should be >=0, nan"),
    (
        "Adam",
        {"state_dtype": mx.int32},
        ValueError,
        "should be float32, float16, bfloat16,",
    ),
]


@pytest.mark.parametrize(
    ("name", "options", "error", "text"),
    CONSTRUCTORS,
    ids=[f"{case[0]}-{'-'.join(case[1])}" for case in CONSTRUCTORS],
)
def test_constructors(
    name: str, options: dict[str, Any], error: type[Exception], text: str
) -> None:
    is_plain = is_stocks(name, options) and not options.keys() & {
        *("max_grad_norm", "state_dtype", "weight_decay_filter")
    }
    if is_plain and MLX_VERSION < (0, 32, 2):
        try:
            getattr(stock, name)(0.1, **options)
        except error:
            pass
        else:
            pytest.skip("this MLX takes it, so we do")
    with pytest.raises(error, match=text):
        getattr(optim, name)(0.1, **options)
    if is_plain:
        with pytest.raises(error):
            getattr(oracle, name)(0.1, **options)


SCHEDULES: list[tuple[Callable[[], Any], str]] = [
    (lambda: optim.step_decay(0.1, 0.9, 0), "step_size must be greater than 0"),
    (lambda: optim.cosine_decay(0.1, 0), "decay_steps must be greater than 0"),
    (lambda: optim.linear_schedule(0.1, 0.2, 0), "steps must be greater than 0"),
    (lambda: optim.join_schedules([], []), "at least 1 schedule"),
    (lambda: optim.inverse_sqrt(0.1, 0), "warmup_steps must be at least 1, but got 0"),
    (lambda: optim.polynomial_decay(0.1, 0.0, 0), "decay_steps must be at least 1"),
    (lambda: optim.polynomial_decay(0.1, 0.0, 5, 0.0), "power must be greater than 0"),
    (lambda: optim.warmup_stable_decay(0.1, -1, 1, 1), "warmup_steps must be at least"),
    (lambda: optim.warmup_stable_decay(0.1, 1, 1, 0), "decay_steps must be at least 1"),
]


@pytest.mark.parametrize(("make", "text"), SCHEDULES)
def test_schedules(make: Callable[[], Any], text: str) -> None:
    if MLX_VERSION < (0, 32, 1) and text.startswith(
        ("step_size", "decay_steps must be g")
    ):
        pytest.skip("this MLX takes it, and the schedule is its own")
    with pytest.raises(ValueError, match=text):
        make()


class Step(NamedTuple):
    """A step that is refused."""

    label: str
    error: type[Exception]
    text: str
    gradients: Callable[[Any], Any] = lambda tree: tree
    parameters: Callable[[Any], Any] = lambda tree: tree
    state: Callable[[Any], Any] = lambda tree: tree


STEPS = [
    Step(
        "gradient without parameter",
        KeyError,
        "layers",
        parameters=lambda tree: {"bias": tree["bias"]},
    ),
    Step(
        "gradient without state",
        KeyError,
        "other",
        gradients=lambda tree: {**tree, "other": mx.ones((2,))},
        parameters=lambda tree: {**tree, "other": mx.ones((2,))},
    ),
    Step(
        "gradient of another shape",
        ValueError,
        r"the gradient of 'bias' has shape \(7,\); expected \(3,\)",
        gradients=lambda tree: {**tree, "bias": mx.ones((7,))},
    ),
    Step(
        "gradient that is text",
        TypeError,
        "the gradient of 'bias' is of type str; expected an mx.array",
        gradients=lambda tree: {**tree, "bias": "text"},
    ),
    Step(
        "gradient that is None",
        TypeError,
        "the gradient of 'bias' is of type NoneType; expected an mx.array",
        gradients=lambda tree: {**tree, "bias": None},
    ),
    Step(
        "state of another optimizer",
        KeyError,
        "the state of 'layers.0.w' has other; expected m, v. Is it another",
        state=lambda state: {
            **state,
            "layers": [{"w": {"other": mx.zeros((4, 3))}}],
        },
    ),
    Step(
        "state of another shape",
        ValueError,
        r"the m of 'bias' has shape \(2, 2\); expected \(3,\)",
        state=lambda state: {
            **state,
            "bias": {"m": mx.zeros((2, 2)), "v": mx.zeros((3,))},
        },
    ),
]


@pytest.mark.parametrize("case", STEPS, ids=[case.label for case in STEPS])
@pytest.mark.parametrize("guarded", [False, True], ids=["", "options"])
def test_steps(backend: str, case: Step, guarded: bool) -> None:
    rng = np.random.default_rng(0)
    parameters: Any = {
        "layers": [{"w": random_array(rng, (4, 3), mx.float32)}],
        "bias": random_array(rng, (3,), mx.float32),
    }
    options: Any = {"max_grad_norm": 1.0, "skip_nonfinite": True} if guarded else {}
    optimizer: Any = optim.Adam(optim.exponential_decay(0.1, 0.9), **options)
    gradients = parameters
    parameters = optimizer.apply_gradients(gradients, parameters)
    optimizer.state.update(case.state(dict(optimizer.state)))
    before = snapshot([parameters, optimizer.state])
    with pytest.raises(case.error, match=case.text):
        optimizer.apply_gradients(
            case.gradients(gradients), case.parameters(parameters)
        )
    assert snapshot([parameters, optimizer.state]) == before
    mx.eval(parameters, optimizer.state)


def test_schedule_that_gives_no_scalar(backend: str) -> None:
    with pytest.raises(ValueError, match=r"learning_rate gave an array of"):
        optim.SGD(lambda step: mx.array([0.1, 0.2]))
    optimizer = optim.SGD(lambda step: mx.ones((1 + int(step > 0),)))
    updated = optimizer.apply_gradients({"w": mx.ones(2)}, {"w": mx.ones(2)})
    before = snapshot(optimizer.state)
    with pytest.raises(ValueError, match=r"learning_rate gave an array of"):
        optimizer.apply_gradients({"w": mx.ones(2)}, updated)
    assert snapshot(optimizer.state) == before
    # A Python number is one; upstream takes only arrays.
    half: Any = lambda step: 0.5  # noqa: E731
    number = optim.SGD(half)
    updated = number.apply_gradients({"w": mx.ones(2)}, {"w": mx.ones(2)})
    assert updated["w"].tolist() == [0.5, 0.5]


@pytest.mark.parametrize(
    ("name", "options"), [row for row in ALL_OPTIMIZERS if is_stocks(*row)]
)
@pytest.mark.parametrize("dtype", [mx.int32, mx.complex64, mx.bool_], ids=str)
def test_what_stock_does_with_other_dtypes(
    backend: str, name: str, options: dict[str, Any], dtype: mx.Dtype
) -> None:
    """The same result, or the same error."""
    if dtype == mx.complex64 and name in ("Adafactor", "Muon"):
        return  # refused by name: test_complex_matrices_are_refused_by_name
    parameters = {"w": mx.array([[1, 0], [3, 2]]).astype(dtype)}
    gradient_dtype = mx.float16 if dtype != mx.complex64 else dtype
    gradients = {"w": mx.array([[1, 2], [0, 1]]).astype(gradient_dtype)}
    results: list[Any] = []
    for module in (optim, oracle):
        optimizer = getattr(module, name)(learning_rate=0.1, **options)
        try:
            updated = optimizer.apply_gradients(gradients, parameters)
            mx.eval(updated, optimizer.state)
            results.append([updated, optimizer.state])
        except (ValueError, RuntimeError, TypeError) as error:
            results.append(type(error))
    if dtype == mx.complex64 and name in ("Adafactor", "Muon"):
        assert results[0] is TypeError  # stock's formulas are wrong for matrices
    elif isinstance(results[1], type):
        assert isinstance(results[0], type)
    else:
        (mine, state), (theirs, stock_state) = results
        assert_trees_match(mine, theirs, 1e-2, 1e-3)
        assert_trees_match(state, stock_state, 1e-2, 1e-3)


def test_what_stock_takes_instead_of_arrays(backend: str) -> None:
    for make in (optim.Adam, stock.Adam):
        optimizer: Any = make(0.1, bias_correction=True)
        optimizer.state["step"] = 3
        optimizer.state["w"] = {
            "m": np.ones((2,), np.float32),
            "v": np.ones((2,), np.float32),
        }
        updated = optimizer.apply_gradients({"w": mx.ones(2)}, {"w": np.ones(2, "f")})
        result = np.array(updated["w"])
        if make is optim.Adam:
            mine = result
    np.testing.assert_allclose(mine, result, rtol=1e-6)


def test_an_instance_may_have_an_apply_single_of_its_own(backend: str) -> None:
    optimizer: Any = optim.SGD(0.1)
    optimizer.apply_single = lambda gradient, parameter, state: parameter * 0
    updated = optimizer.apply_gradients({"w": mx.ones(2)}, {"w": mx.ones(2)})
    assert updated["w"].tolist() == [0, 0]


def test_a_model_that_refuses_the_update(backend: str) -> None:
    class Model(dict):  # type: ignore[type-arg]
        def update(self, *arguments: Any) -> None:  # type: ignore[override]
            raise RuntimeError("refused")

    optimizer = optim.AdamW(0.1)
    before = snapshot(optimizer.state)
    with pytest.raises(RuntimeError, match="refused"):
        optimizer.update(Model(w=mx.ones(2)), {"w": mx.ones(2)})
    assert snapshot(optimizer.state) == before


@pytest.mark.parametrize(("name", "options"), ALL_OPTIMIZERS)
@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0), (2, 0, 4)])
def test_arrays_without_elements(
    backend: str, name: str, options: dict[str, Any], shape: tuple[int, ...]
) -> None:
    optimizer = getattr(optim, name)(learning_rate=0.1, max_grad_norm=1.0, **options)
    empty = {"w": mx.zeros(shape)}
    updated = optimizer.apply_gradients(empty, empty)
    mx.eval(updated, optimizer.state)
    assert updated["w"].shape == shape
    assert float(optimizer.grad_norm) == 0


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs POSIX timers")
def test_interrupts_at_any_moment_of_a_step() -> None:
    """The step happened and its result was returned, or nothing happened.

    But for the moment between the return and the assignment, which is the caller's.
    """
    mx.set_default_device(mx.cpu)
    tree = {str(i): mx.ones((10,)) for i in range(1000)}
    optimizer = optim.AdamW(optim.exponential_decay(1e-2, 0.9))
    optimizer.init(tree)
    mx.eval(optimizer.state)

    def interrupt(*arguments: Any) -> None:
        raise KeyboardInterrupt

    start = time.perf_counter()
    optimizer.apply_gradients(tree, tree)
    duration = time.perf_counter() - start
    interrupted = mismatches = 0
    previous = signal.signal(signal.SIGALRM, interrupt)
    try:
        for i in range(60):
            before = snapshot(optimizer.state)
            result = None
            try:
                signal.setitimer(signal.ITIMER_REAL, duration * (i + 1) / 60)
                result = optimizer.apply_gradients(tree, tree)
                signal.setitimer(signal.ITIMER_REAL, 0)
            except KeyboardInterrupt:
                interrupted += 1
            signal.setitimer(signal.ITIMER_REAL, 0)
            changed = snapshot(optimizer.state) != before
            mismatches += changed != (result is not None)
    finally:
        signal.signal(signal.SIGALRM, previous)
    assert interrupted > 0
    assert mismatches <= 1

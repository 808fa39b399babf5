"""Interrupts, callbacks that raise, and memory that runs out: what was is whole.

See test_bad_input.py for interrupts at any moment of apply_gradients, and
test_in_place.py for a stream's error.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_fused_optimizers as optim
import numpy as np
import pytest
from support import random_array, snapshot


class Callback:
    """Calls a function, counts the calls, and raises at the one of a given number."""

    def __init__(self) -> None:
        self.function: Callable[..., Any] = lambda: None
        self.calls = 0
        self.raises_at: int | None = None

    def __call__(self, *arguments: Any) -> Any:
        self.calls += 1
        if self.calls - 1 == self.raises_at:
            raise KeyboardInterrupt
        return self.function(*arguments)


class OwnSingle(optim.Adam):
    """A user's class that overrides the update of one parameter."""

    update_one = staticmethod(lambda *arguments: None)

    def apply_single(
        self, gradient: mx.array, parameter: mx.array, state: dict[str, Any]
    ) -> mx.array:
        updated = super().apply_single(gradient, parameter, state)
        self.update_one()
        return updated


def is_matrix(path: str, array: mx.array) -> bool:
    return array.ndim == 2


def with_schedule(call: Callback) -> Any:
    call.function = optim.exponential_decay(1e-2, 0.9)
    return optim.AdamW(call, max_grad_norm=1.0, skip_nonfinite=True)


def with_decay_filter(call: Callback) -> Any:
    call.function = is_matrix
    schedule = optim.exponential_decay(1e-2, 0.9)
    return optim.AdamW(schedule, weight_decay_filter=call, max_grad_norm=1.0)


def with_adafactor_filter(call: Callback) -> Any:
    call.function = is_matrix
    return optim.Adafactor(weight_decay=0.1, beta_1=0.9, weight_decay_filter=call)


def with_muon_filter(call: Callback) -> Any:
    call.function = is_matrix
    return optim.Muon(1e-2, weight_decay_filter=call)


def with_multi_filter(call: Callback) -> Any:
    call.function = is_matrix
    parts = [optim.AdamW(1e-2), optim.Lion(1e-3)]
    return optim.MultiOptimizer(parts, [call], max_grad_norm=1.0)


def with_last_parts_schedule(call: Callback) -> Any:
    call.function = optim.exponential_decay(1e-2, 0.9)
    parts = [optim.AdamW(1e-2), optim.SGD(call, momentum=0.9)]
    return optim.MultiOptimizer(parts, [is_matrix], skip_nonfinite=True)


def with_apply_single(call: Callback) -> Any:
    optimizer = OwnSingle(optim.exponential_decay(1e-2, 0.9))
    call.function = optimizer.update_one
    optimizer.update_one = call
    return optimizer


@pytest.mark.parametrize(
    "make",
    [
        with_schedule,
        with_decay_filter,
        with_adafactor_filter,
        with_muon_filter,
        with_multi_filter,
        with_last_parts_schedule,
        with_apply_single,
    ],
)
def test_callbacks_that_raise(backend: str, make: Callable[[Callback], Any]) -> None:
    """At each of its calls, in the first step and later: the run without them."""
    rng = np.random.default_rng(0)
    shapes = {"a": (6, 4), "b": (6,), "c": (4, 4), "d": ()}
    start = {key: random_array(rng, shape, mx.float32) for key, shape in shapes.items()}
    gradients = [
        {key: random_array(rng, shape, mx.float32) for key, shape in shapes.items()}
        for _ in range(3)
    ]

    def run(raises: bool, calls: list[int]) -> dict[str, bytes]:
        """Three steps; each has been interrupted at all of its calls first."""
        callback = Callback()
        optimizer = make(callback)
        model = nn.Module()
        dict.update(model, start)
        for step, gradient in enumerate(gradients):
            for position in range(calls[step] if raises else 0):
                before = snapshot([model.parameters(), optimizer.state])
                callback.calls, callback.raises_at = 0, position
                with pytest.raises(KeyboardInterrupt):
                    optimizer.update(model, gradient)
                assert snapshot([model.parameters(), optimizer.state]) == before
            callback.calls, callback.raises_at = 0, None
            optimizer.update(model, gradient)
            if not raises:
                calls.append(callback.calls)
        return snapshot([model.parameters(), optimizer.state])

    calls: list[int] = []
    expected = run(False, calls)
    assert min(calls) > 0
    assert run(True, calls) == expected


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs POSIX timers")
def test_interrupts_at_any_moment_of_an_update() -> None:
    """Model and state are both the old ones or both the new ones."""
    mx.set_default_device(mx.cpu)
    model = nn.Sequential(*[nn.Linear(4, 4) for _ in range(100)])
    optimizer = optim.AdamW(optim.exponential_decay(1e-2, 0.99))
    gradients = model.trainable_parameters()
    optimizer.update(model, gradients)
    start = time.perf_counter()
    optimizer.update(model, gradients)
    duration = time.perf_counter() - start

    def interrupt(*arguments: Any) -> None:
        raise KeyboardInterrupt

    interrupted = 0
    previous = signal.signal(signal.SIGALRM, interrupt)
    try:
        for i in range(100):
            before = snapshot([model.parameters(), optimizer.state])
            try:
                signal.setitimer(signal.ITIMER_REAL, duration * (i + 1) / 100)
                optimizer.update(model, gradients)
                signal.setitimer(signal.ITIMER_REAL, 0)
            except KeyboardInterrupt:
                interrupted += 1
            signal.setitimer(signal.ITIMER_REAL, 0)
            after = snapshot([model.parameters(), optimizer.state])
            assert after.keys() == before.keys()
            assert len({after[path] == x for path, x in before.items()}) == 1
    finally:
        signal.signal(signal.SIGALRM, previous)
    assert interrupted > 0


INTERRUPTED_EVALUATION = """
import os, signal, sys, threading, time
import mlx.core as mx
import mlx_fused_optimizers as optim

signal.signal(signal.SIGINT, signal.default_int_handler)  # shells may ignore it
mx.set_default_device(mx.cpu)
parameters = {str(i): mx.ones((1 << 20,)) for i in range(8)}
gradients = {key: mx.ones((1 << 20,)) for key in parameters}
optimizer = optim.SGD(0.5, momentum=0.5)
optimizer.init(parameters)
mx.eval(parameters, gradients, optimizer.state)
steps = interrupted = 0
while interrupted < 5:
    # Slow work ahead of the update, so that the signal comes before its end.
    slow = mx.zeros((256, 256))
    for _ in range(20):
        slow = slow @ slow
    scaled = {key: g + slow[0, 0] for key, g in gradients.items()}
    kill = threading.Timer(0.002, os.kill, (os.getpid(), signal.SIGINT))
    try:
        try:
            updated = optimizer.apply_gradients(scaled, parameters)
            parameters = updated
            steps += 1
            kill.start()
            mx.eval(parameters, optimizer.state)
        finally:
            kill.join()
    except KeyboardInterrupt:
        interrupted += 1
mx.eval(parameters, optimizer.state)
p, v = 1.0, 0.0
for _ in range(steps):
    v = 0.5 * v + 1
    p -= 0.5 * v
assert optimizer.step.item() == steps
for key, array in parameters.items():
    assert mx.all(mx.abs(array - p) < 1e-4).item(), (key, array[0].item(), p)
    assert mx.all(mx.abs(optimizer.state[key]["v"] - v) < 1e-5).item()
print(interrupted)
"""


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals")
def test_interrupts_while_a_step_is_evaluated() -> None:
    """Every step counts once, whenever the interrupt comes."""
    result = subprocess.run(
        [sys.executable, "-c", INTERRUPTED_EVALUATION],
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert (result.stdout, result.returncode) == ("5\n", 0), result.stderr


@pytest.mark.fused
def test_one_tensor_of_several_has_no_memory(backend: str) -> None:
    """Those before it are updated; and the next step works when it is left out.

    Updates go from the tree's end to its beginning, each after the one before.
    """
    optimizer = optim.SGD(0.5, momentum=0.5)
    parameters = {key: mx.ones((4, 5)) for key in "abcdef"}
    optimizer.init(parameters)
    mx.eval(parameters, optimizer.state)
    huge = mx.broadcast_to(mx.array(1.0), (1 << 24, 1 << 24))
    optimizer.state["huge"] = {"v": huge}
    optimizer.init({**parameters, "huge": huge})
    tree = {"huge": huge, **parameters}
    updated = optimizer.apply_gradients(tree, tree)
    with pytest.raises(RuntimeError, match="no memory for an array of shape"):
        mx.eval(updated, optimizer.state)
    del updated["huge"], optimizer.state["huge"], tree
    for _ in range(2):
        mx.eval(updated, optimizer.state)  # what the error kept from being done
        parameters = updated
        updated = optimizer.apply_gradients(
            {key: mx.ones((4, 5)) for key in updated}, updated
        )
    # v is 1, then 1.5; p is 1 - 0.5, then 0.5 - 0.75.
    for array in parameters.values():
        np.testing.assert_array_equal(np.array(array), np.full((4, 5), -0.25))


MEMORY_RUNS_OUT = """
import resource
import mlx.core as mx
import mlx_fused_optimizers as optim

mx.set_default_device(mx.cpu)
mx.set_cache_limit(0)
size = 4 << 20  # 16 MiB each
parameters = {str(i): mx.ones((size,)) for i in range(8)}
gradients = {key: mx.ones((size,)) for key in parameters}
optimizer = optim.SGD(0.5, momentum=0.5)
parameters = optimizer.apply_gradients(gradients, parameters)
mx.eval(parameters, gradients, optimizer.state)

# Who still holds the old arrays makes the update take new memory.
held = [parameters, *(optimizer.state[key]["v"] for key in parameters)]
updated = optimizer.apply_gradients(gradients, parameters)
pages = int(open("/proc/self/statm").read().split()[0])
limit = pages * resource.getpagesize() + (100 << 20)
unlimited = resource.getrlimit(resource.RLIMIT_AS)
resource.setrlimit(resource.RLIMIT_AS, (limit, unlimited[1]))
errors = 0
for _ in range(3):
    try:
        mx.eval(updated, optimizer.state)
    except RuntimeError as error:
        assert "no memory for an array of shape" in str(error), error
        errors += 1
assert errors == 3, errors

# The old arrays are what they were.
for key, array in parameters.items():
    assert mx.array_equal(array[::4096], mx.full((size // 4096,), 0.5)).item()

# The memory is freed, and the limit stays: the same step, each tensor once.
del held, parameters, array
mx.eval(updated, optimizer.state)
updated = optimizer.apply_gradients(gradients, updated)
mx.eval(updated, optimizer.state)
# v is 1, 1.5, 1.75; p is 0.5, -0.25, -1.125.
for key, array in updated.items():
    assert mx.all(array == -1.125).item(), (key, array[0].item())
    assert mx.all(optimizer.state[key]["v"] == 1.75).item()
assert optimizer.step.item() == 3
print("done")
"""


@pytest.mark.fused
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs RLIMIT_AS")
@pytest.mark.skipif(
    "san.so" in os.environ.get("LD_PRELOAD", ""),
    reason="sanitizers reserve terabytes of addresses",
)
def test_memory_runs_out_in_the_middle_of_an_evaluation() -> None:
    """The step is taken up again where it stopped, with the right numbers."""
    result = subprocess.run(
        [sys.executable, "-c", MEMORY_RUNS_OUT],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert (result.stdout, result.returncode) == ("done\n", 0), result.stderr

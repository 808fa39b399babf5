"""Updates happen in place, and never in memory that the caller still holds."""

import subprocess
import sys
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_fused_optimizers as optim
import numpy as np
import pytest
from mlx_fused_optimizers import _ext
from support import (
    FLOATS,
    HAS_STREAM_ERRORS,
    PARTLY_FUSED,
    copy_tree,
    every_fused_optimizer,
    fill,
    for_each,
    leaves_of,
    oracle,
    random_array,
    snapshot,
    to_numpy,
)

# One large tensor, and more small ones than one primitive takes.
SHAPES = {"large": (600, 500), **{f"small{i}": (40, 30) for i in range(9)}}


def make(dtype: mx.Dtype, shapes: Any) -> Any:
    rng = np.random.default_rng(0)
    tree = {key: random_array(rng, shape, dtype) for key, shape in shapes.items()}
    mx.eval(tree)
    return tree


@pytest.mark.fused
@every_fused_optimizer
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_a_step_allocates_nothing(
    backend: str, name: str, options: dict[str, Any], compiled: bool, dtype: mx.Dtype
) -> None:
    shapes = SHAPES if backend != "metal-simulator" else {"a": (90, 50), "b": (40, 30)}
    parameters = make(dtype, shapes)
    optimizer = getattr(optim, name)(1e-3, **options)
    optimizer.init(parameters)
    mx.eval(optimizer.state)
    rng = np.random.default_rng(1)

    def step(parameters: Any, gradients: Any) -> Any:
        return optimizer.apply_gradients(gradients, parameters)

    if compiled:
        step = mx.compile(step, inputs=optimizer.state, outputs=optimizer.state)
    smallest = min(x.nbytes for x in parameters.values())
    for i in range(4):
        gradients = fill(parameters, rng, dtype)
        mx.eval(gradients)
        mx.synchronize()
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        parameters = step(parameters, gradients)
        mx.eval(parameters, optimizer.state)
        if i > 0:  # tracing holds the first arguments
            # The step count and the learning rate are new scalars each step.
            assert mx.get_peak_memory() - before < min(smallest, 4096)


@pytest.mark.fused
@for_each(PARTLY_FUSED)
def test_partly_fused_optimizers_allocate_no_more_than_stock(
    name: str, options: dict[str, Any]
) -> None:
    mx.set_default_device(mx.cpu)
    shapes = {f"a{i}": (300, 200) for i in range(8)} | {"b": (100, 300), "c": (300,)}
    extra = []
    for module in (optim, oracle):
        parameters = make(mx.float32, shapes)
        optimizer = getattr(module, name)(learning_rate=1e-3, **options)
        optimizer.init(parameters)
        peak = 0
        for i in range(4):
            gradients = make(mx.float32, shapes)
            mx.eval(parameters, optimizer.state)
            mx.synchronize()
            mx.reset_peak_memory()
            before = mx.get_active_memory()
            parameters = optimizer.apply_gradients(gradients, parameters)
            mx.eval(parameters, optimizer.state)
            if i > 0:
                peak = max(peak, mx.get_peak_memory() - before)
        extra.append(peak)
    assert extra[0] <= extra[1] + 4096
    # Few matrices at a time; rows and columns alone.
    assert extra[0] <= (0.7 if name == "Muon" else 0.1) * extra[1]


@pytest.mark.fused
@every_fused_optimizer
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_the_documented_loop_copies_nothing(
    name: str, options: dict[str, Any], compiled: bool
) -> None:
    """Forward, backward and update in one evaluation; on the CPU.

    A GPU's parameters may still be held by work under way (csrc/primitives.h).
    """
    mx.random.seed(0)
    mx.set_default_device(mx.cpu)
    model = nn.Sequential(*[nn.Linear(256, 256) for _ in range(6)])
    mx.eval(model.parameters())
    optimizer = getattr(optim, name)(1e-3, **options)
    optimizer.init(model.trainable_parameters())
    loss_and_grad = nn.value_and_grad(
        model, lambda model, x: mx.square(model(x)).mean()
    )

    def step(x: mx.array) -> mx.array:
        loss, grads = loss_and_grad(model, x)
        optimizer.update(model, grads)
        return loss  # type: ignore[no-any-return]

    state = [model.state, optimizer.state]
    if compiled:
        step = mx.compile(step, inputs=state, outputs=state)
    for i in range(5):
        if i == 1:  # tracing holds the first arguments
            before = _ext.bytes_copied()
        step(mx.random.normal((64, 256)))
        mx.eval(model.parameters(), optimizer.state)
    # Biases may be copied: that is cheaper than to wait for what still reads them.
    assert _ext.bytes_copied() - before <= 4 * 6 * 256 * 4


@pytest.mark.fused
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_gradients_are_freed_as_the_backward_pass_goes_on(compiled: bool) -> None:
    """Forward, backward and update in one evaluation take far less than all gradients.

    On the CPU: the simulator's kernels write new parameters there.
    """
    mx.set_default_device(mx.cpu)
    model = nn.Sequential(*[nn.Linear(256, 256) for _ in range(16)])
    optimizer = optim.AdamW(1e-3)
    optimizer.init(model.trainable_parameters())
    state = [model.state, optimizer.state]
    x = mx.random.normal((8, 256))
    mx.eval(state, x)
    loss_and_grad = nn.value_and_grad(model, lambda m, x: mx.square(m(x)).mean())

    def step(x: mx.array) -> mx.array:
        loss, gradients = loss_and_grad(model, x)
        optimizer.update(model, gradients)
        return loss  # type: ignore[no-any-return]

    if compiled:
        step = mx.compile(step, inputs=state, outputs=state)
    gradients = 16 * 256 * 256 * 4
    for i in range(4):
        mx.synchronize()
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        mx.eval(step(x), state)
        if i > 1:
            assert mx.get_peak_memory() - before < 0.5 * gradients


def held_views(x: mx.array) -> list[mx.array]:
    views = [x, x[1:], x[:, ::2], x.T, x.reshape(-1), mx.stop_gradient(x)]
    mx.eval(views)
    return views


@every_fused_optimizer
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_arrays_that_the_caller_holds_keep_their_values(
    backend: str, name: str, options: dict[str, Any], compiled: bool
) -> None:
    parameters = make(mx.float32, {"a": (20, 30), "b": (8, 6), "c": (3, 3)})
    optimizer = getattr(optim, name)(1e-1, **options)
    optimizer.init(parameters)
    rng = np.random.default_rng(2)

    def step(parameters: Any, gradients: Any) -> Any:
        return optimizer.apply_gradients(gradients, parameters)

    if compiled:
        step = mx.compile(step, inputs=optimizer.state, outputs=optimizer.state)
    for position in range(len(held_views(parameters["a"]))):
        held = [
            held_views(x)[position]
            for x in leaves_of([parameters, optimizer.state]).values()
            if x.ndim == 2
        ]
        expected = [to_numpy(x).copy() for x in held]
        gradients = fill(parameters, rng, mx.float32)
        held_gradients = [to_numpy(g).copy() for g in gradients.values()]
        before = snapshot(parameters)
        parameters = step(parameters, gradients)
        mx.eval(parameters, optimizer.state)
        assert snapshot(parameters) != before
        for x, y in zip(held, expected, strict=True):
            np.testing.assert_array_equal(to_numpy(x), y)
        for g, y in zip(gradients.values(), held_gradients, strict=True):
            np.testing.assert_array_equal(to_numpy(g), y)


def test_an_update_that_nobody_wants_keeps_its_memory_until_it_is_done() -> None:
    """Updates wait for one another; nothing reads the one that came before."""
    mx.set_default_device(mx.cpu)
    shape = (1 << 16,)
    ones = np.ones(shape, np.float32)
    for _ in range(5):
        slow = mx.zeros((256, 256))
        for _ in range(20):
            slow = slow @ slow
        parameters = {key: mx.array(ones) for key in "abc"}
        gradients = {key: mx.array(ones) + slow[0, 0] for key in "abc"}
        optimizer = optim.SGD(0.5)
        wanted = optimizer.apply_gradients(gradients, parameters)["a"]
        del parameters, gradients
        mx.async_eval(wanted)
        others = [mx.array(ones) for _ in range(16)]  # in memory that came free
        mx.eval(wanted)
        assert mx.all(wanted == 0.5).item()
        for other in others:
            np.testing.assert_array_equal(to_numpy(other), ones)


STEPS_WITHOUT_EVALUATION = """
import mlx.core as mx
import mlx_fused_optimizers as optim

mx.set_default_device(mx.cpu)
optimizer = optim.AdamW(1e-3)
parameters = gradients = {"w": mx.ones((4,))}
optimizer.init(parameters)
mx.eval(parameters, optimizer.state)
for _ in range(200_000):
    parameters = optimizer.apply_gradients(gradients, parameters)
del parameters, optimizer
print("dropped")
"""


def test_a_long_graph_is_taken_apart_without_recursion() -> None:
    done = subprocess.run(
        [sys.executable, "-c", STEPS_WITHOUT_EVALUATION],
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert (done.stdout, done.returncode) == ("dropped\n", 0), done.stderr


@pytest.mark.fused
@pytest.mark.parametrize("is_held", [False, True])
def test_state_arrays_change_in_place_unless_somebody_holds_them(
    backend: str, is_held: bool
) -> None:
    parameters = make(mx.float32, {"w": (4, 3)})
    optimizer = optim.Adam(1e-2)
    optimizer.init(parameters)
    state = optimizer.state["w"]
    before, bits = id(state["m"]), snapshot(optimizer.state)
    held = state["m"] if is_held else None
    optimizer.apply_gradients(parameters, parameters)
    assert (id(state["m"]) == before) is not is_held
    if held is not None:
        assert snapshot(held) == {"": bits["w.m"]}
    np.testing.assert_allclose(
        to_numpy(state["m"]), 0.1 * to_numpy(parameters["w"]), rtol=1e-6
    )


def test_one_array_in_several_places(backend: str) -> None:
    """Tied parameters, a gradient that is the parameter, moments that are one array."""
    results = []
    for tie in (True, False):
        x = make(mx.float32, {"x": (5, 4)})["x"]
        pick = (lambda a: a) if tie else (lambda a: mx.array(np.array(a)))
        optimizer = optim.AdamW(1e-1, bias_correction=True)
        zero = mx.zeros((5, 4))
        optimizer.state.update(
            {key: {"m": pick(zero), "v": pick(zero)} for key in ("a", "b")}
        )
        parameters = {"a": pick(x), "b": pick(x)}
        gradients = {"a": pick(x), "b": pick(x)}
        del x, zero
        for _ in range(3):
            parameters = optimizer.apply_gradients(gradients, parameters)
        results.append(snapshot([parameters, optimizer.state]))
    assert results[0] == results[1]


def test_a_small_view_does_not_keep_a_large_buffer(backend: str) -> None:
    large = mx.zeros((1 << 20,))
    mx.eval(large)
    parameters = {"w": large[:16]}
    mx.eval(parameters)
    del large
    optimizer = optim.SGD(0.1, momentum=0.9)
    before = mx.get_active_memory()
    parameters = optimizer.apply_gradients({"w": mx.ones((16,))}, parameters)
    mx.eval(parameters, optimizer.state)
    assert mx.get_active_memory() < before - (3 << 20)


@pytest.mark.parametrize("layout", ["transposed", "strided", "broadcast", "offset"])
def test_parameters_and_state_of_any_layout(backend: str, layout: str) -> None:
    rng = np.random.default_rng(4)
    shape = {"w": mx.zeros((6, 8))}
    parameters = fill(shape, rng, mx.float32, layout)
    moments = fill(shape, rng, mx.float32, layout)
    gradients = fill(shape, rng, mx.float32)
    results = []
    for as_given in (True, False):
        optimizer = optim.SGD(0.1, momentum=0.9)
        given = [parameters, moments] if as_given else copy_tree([parameters, moments])
        optimizer.state["w"] = {"v": given[1]["w"]}
        updated = optimizer.apply_gradients(gradients, given[0])
        results.append(snapshot([updated, optimizer.state]))
    assert results[0] == results[1]


# An array that cannot be read: its file is truncated, within its header, after it was
# opened. (MLX 0.32.3 and before report no error if they can read a part.) The stream's
# error then surfaces in whatever is put on it next.
FAILING_EVALUATION = """
import sys, tempfile
import mlx.core as mx, numpy as np
import mlx_fused_optimizers as optim

mx.set_default_device(mx.cpu)
path = tempfile.mkdtemp() + "/array.npy"
np.save(path, np.ones(4096, np.float32))
broken = mx.load(path)
open(path, "r+b").truncate(100)
count, size = int(sys.argv[1]), int(sys.argv[2])
parameters = {f"{i:04d}": mx.contiguous(mx.ones((size,)) + 0) for i in range(count)}
gradients = {key: mx.ones((size,)) for key in parameters}
mx.eval(parameters, gradients)
optimizer = optim.SGD(0.1, momentum=0.9)
optimizer.init(parameters)
mx.eval(optimizer.state)
updated = optimizer.apply_gradients(gradients, parameters)
del parameters
try:
    mx.async_eval(broken)
    mx.eval(updated, optimizer.state)
    print("no error")
except RuntimeError:
    pass
# Each output again, alone and the moment first.
for key in sorted(updated):
    for array in (optimizer.state[key]["v"], updated[key]):
        try:
            mx.eval(array)
        except RuntimeError:
            pass
print({round(float(x[5]), 4) for x in updated.values()})
"""


@pytest.mark.parametrize(("count", "size"), [("600", "4096"), ("100", "262144")])
def test_evaluation_again_after_an_error(count: str, size: str) -> None:
    """It neither crashes nor applies an update twice.

    Up to MLX 0.32.0 there is no error to see: Load waits for its reader and does not
    ask how it went, and a stream of the CPU has no errors. (MLX 0.32.1: "Propagate CPU
    errors to events".) There the update goes on, and must be applied once, too.
    """
    error = "" if HAS_STREAM_ERRORS else "no error\n"
    for _ in range(3):
        result = subprocess.run(
            [sys.executable, "-c", FAILING_EVALUATION, count, size],
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.returncode == 0, result.stderr
        assert result.stdout == error + "{0.9}\n"


TOO_LARGE = """
import mlx.core as mx
import mlx_fused_optimizers as optim

mx.set_default_device(mx.cpu)
huge = mx.broadcast_to(mx.array(1.0), (1 << 24, 1 << 24))
optimizer = optim.SGD(0.1, momentum=0.9)
optimizer.state["w"] = {"v": huge}
updated = optimizer.apply_gradients({"w": huge}, {"w": huge})
try:
    mx.eval(updated)
except RuntimeError as error:
    print(error)
"""


@pytest.mark.fused
def test_an_array_without_memory_is_refused() -> None:
    # In a process of its own: MLX goes on counting the memory as in use, and above its
    # limit an evaluation waits for all others.
    done = subprocess.run(
        [sys.executable, "-c", TOO_LARGE], capture_output=True, text=True, timeout=60
    )
    assert "no memory for an array of shape" in done.stdout, done.stderr


FORK = """
import os
import mlx.core as mx
import mlx_fused_optimizers as optim

mx.set_default_device(mx.cpu)

def step():
    w = {"w": mx.ones((1 << 20,))}
    result = optim.SGD(0.5).apply_gradients({"w": mx.ones((1 << 20,))}, w)
    mx.eval(result)
    assert result["w"][7].item() == 0.5

step()
child = os.fork()
if child == 0:
    with mx.stream(mx.new_stream(mx.cpu)):
        step()
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
"""


def test_a_forked_process_has_threads_of_its_own() -> None:
    subprocess.run([sys.executable, "-c", FORK], check=True, timeout=60)

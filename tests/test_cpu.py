"""The CPU's loops: every instruction set and any number of threads, the same bits."""

import itertools
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_fused_optimizers as optim
import numpy as np
import pytest
from mlx_fused_optimizers import _ext
from support import fill, random_array, snapshot

pytestmark = pytest.mark.fused
DIGEST = """
import hashlib, sys
import mlx.core as mx, numpy as np
import mlx_fused_optimizers as optim
from mlx.utils import tree_flatten
from mlx_fused_optimizers import _ext
from support import OPTIMIZERS

mx.set_default_device(mx.cpu)
digest = hashlib.sha256()
rng = np.random.default_rng(0)
for dtype in (mx.float32, mx.float16, mx.bfloat16):
    draw = lambda: mx.array(rng.standard_normal(70001).astype(np.float32)).astype(dtype)
    for name, options in OPTIMIZERS:
        parameters = {"w": draw()}
        optimizer = getattr(optim, name)(1e-2, **options)
        for _ in range(3):
            gradients, norm = optim.clip_grad_norm({"w": draw()}, 100.0)
            parameters = optimizer.apply_gradients(gradients, parameters)
            digest.update(np.array(norm.astype(mx.float32)).tobytes())
        digest.update(np.array(parameters["w"].astype(mx.float32)).tobytes())
# Codes, masters and gradients that are transposed; the last block is a short one.
for options in (
    {"state_dtype": "int8", "master_weights": "24bit"},
    {"state_dtype": "int4", "master_weights": "32bit"},
    {"stochastic_rounding": True},
):
    optimizer = optim.AdamW(1e-2, quantize_filter=lambda path, x: True, **options)
    draw = lambda: mx.array(rng.standard_normal((131, 77))).astype(mx.bfloat16)
    parameters = {"w": draw(), "transposed": draw().T}
    for _ in range(3):
        gradients = {"w": draw(), "transposed": draw().T}
        parameters = optimizer.apply_gradients(gradients, parameters)
    for _, x in tree_flatten([parameters, optimizer.state]):
        digest.update(np.array(x.astype(mx.float32)).tobytes())
print(_ext.instruction_set(), digest.hexdigest())
"""


def digest(**environment: str) -> tuple[str, str]:
    """The instruction set that was used, and a digest of many results."""
    path = os.pathsep.join(
        [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    )
    done = subprocess.run(
        [sys.executable, "-c", DIGEST],
        env={**os.environ, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    name, result = done.stdout.split()
    return name, result


def test_instruction_sets_give_the_same_bits() -> None:
    fastest, expected = digest()
    sets = ["default", "v3", "v4"]  # a machine that has one has those before it
    for name in sets[: sets.index(fastest) + 1]:
        assert digest(MLX_FUSED_INSTRUCTION_SET=name) == (name, expected)


def test_any_number_of_threads_gives_the_same_bits() -> None:
    threads = _ext.num_threads()
    rng = np.random.default_rng(0)
    values = [random_array(rng, shape, mx.float32) for shape in [(700, 300), (131,)]]
    results = []
    try:
        for count in (1, 2, 3, 7):
            _ext.set_num_threads(count)
            assert _ext.num_threads() == count
            optimizer = optim.AdamW(1e-2, bias_correction=True)
            clipped, norm = optim.clip_grad_norm({"w": values}, 1.0)
            updated = optimizer.apply_gradients(clipped, {"w": values})
            results.append(snapshot([updated, norm, optimizer.state]))
    finally:
        _ext.set_num_threads(threads)
    assert all(result == results[0] for result in results)
    with pytest.raises(ValueError, match="count is 0; expected 1 to 256"):
        _ext.set_num_threads(0)


def test_streams_share_the_threads_while_their_number_changes() -> None:
    makers: list[Callable[[], Any]] = [
        lambda: optim.AdamW(1e-2, bias_correction=True),
        lambda: optim.SGD(1e-2, momentum=0.9, max_grad_norm=1.0),
        lambda: optim.Lion(1e-3, skip_nonfinite=True),
        lambda: optim.Adagrad(1e-2, state_dtype=mx.float16),
    ]

    def run(index: int) -> dict[str, bytes]:
        rng = np.random.default_rng(index)
        with mx.stream(mx.new_stream(mx.cpu)):
            optimizer = makers[index]()
            tree = {"large": mx.zeros((400, 300)), "small": mx.zeros((30,))}
            parameters = fill(tree, rng, mx.float32)
            gradients = fill(tree, rng, mx.float32)
            for _ in range(30):
                parameters = optimizer.apply_gradients(gradients, parameters)
                mx.async_eval(parameters, optimizer.state)
            return snapshot([parameters, optimizer.state])

    threads = _ext.num_threads()
    try:
        with ThreadPoolExecutor(len(makers)) as executor:
            futures = [executor.submit(run, i) for i in range(len(makers))]
            for count in itertools.cycle((2, 3, 1, 4)):
                _ext.set_num_threads(count)
                if wait(futures, timeout=0.005).not_done == set():
                    break
        results = [future.result() for future in futures]
    finally:
        _ext.set_num_threads(threads)
    assert results == [run(i) for i in range(len(makers))]


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=str)
@pytest.mark.parametrize("instruction_set", ["", "default"])
def test_every_half_precision_number_loads_and_stores(
    dtype: mx.Dtype, instruction_set: str
) -> None:
    """Subnormal numbers, infinities and NaN included."""
    name = str(dtype).replace("mlx.core", "mx")
    program = f"""
import mlx.core as mx, numpy as np
from mlx_fused_optimizers import _ext
mx.set_default_device(mx.cpu)
every = mx.array(np.arange(1 << 16, dtype=np.uint16)).view({name})
same, = _ext.scale([every], mx.array(1.0))
given, result = (np.array(x.astype(mx.float32)) for x in (every, same))
nan = np.isnan(given)
assert nan.any() and np.isnan(result[nan]).all()
kept = np.array(same.view(mx.uint16))[~nan]
assert (kept == np.arange(1 << 16)[~nan]).all()
# Rounding: halfway between neighbours and beside it, as MLX rounds.
wide = given[np.isfinite(given)]
between = np.concatenate([
    (wide[:-1] + wide[1:]) / 2, np.nextafter(wide, np.float32(np.inf)),
    np.array([65519.9, 65520, 1e-8, 3e-8, 1e30, -1e30], np.float32)])
zeros = mx.zeros(between.shape, {name})
leaves = _ext.Leaves(mx.array(-between).astype({name}), zeros)
assert leaves.update("SGD", [{{"weight_decay": 0}}], learning_rate=mx.array(1.0))
updated = leaves.commit()
expected = mx.array(between).astype({name})
magnitude = lambda x: x.view(mx.uint16) & 0x7fff  # 0 - -0 is 0
assert mx.array_equal(magnitude(updated), magnitude(expected))
"""
    subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "MLX_FUSED_INSTRUCTION_SET": instruction_set},
        check=True,
    )


def test_a_norm_in_parts_is_the_norm_to_the_bit() -> None:
    """A step by the last norm takes it so; a ShardedOptimizer at once."""
    mx.set_default_device(mx.cpu)
    rng = np.random.default_rng(0)
    for exponent in (-100, -20, 0, 20, 100):  # squares overflow, and vanish
        scale = np.float32(2.0) ** np.float32(exponent)
        for _ in range(50):
            values = rng.standard_normal((10, 1000)).astype(np.float32) * scale
            rows = [mx.array(row) for row in values]
            _, whole, *_ = _ext.sums_of_squares(rows, mx.array(1.0))
            carry = mx.array(0.0)
            for row in rows:
                _, norm, _, carry = _ext.sums_of_squares([row, carry], mx.array(1.0))
            assert norm.item() == whole.item()
    for bad in (mx.inf, mx.nan):
        _, _, _, carry = _ext.sums_of_squares([mx.array([1.0, bad])], mx.array(1.0))
        _, norm, *_ = _ext.sums_of_squares([carry, mx.array([1.0])], mx.array(1.0))
        assert str(norm.item()) == str(bad)


def test_refused_arguments_name_what_was_given() -> None:
    one = mx.array(1.0)
    leaves = _ext.Leaves([one], [one], [{"m": one, "v": one}])

    def refused(text: str, rule: str, values: Any, **arguments: Any) -> None:
        with pytest.raises(ValueError, match=text):
            leaves.update(rule, values, **arguments)

    refused('rule is "Adamx"; expected one of SGD, Momentum, Adam, ', "Adamx", [{}])
    known = r"expected \{weight_decay\}"
    refused(rf"hyperparameters of SGD are \{{\}}; {known}", "SGD", [{}])
    both = {"weight_decay": 0.0, "beta": 1.0}
    refused(rf"(weight_decay, beta|beta, weight_decay)\}}; {known}", "SGD", [both])
    decay = [{"weight_decay": 0.0}]
    refused("learning_rate is missing; the rule reads it", "SGD", decay)
    pair = mx.array([1.0, 2.0])
    two = r"has shape \(2\); expected a scalar"
    refused(
        f"gradient_scale {two}", "SGD", decay, learning_rate=one, gradient_scale=pair
    )
    refused(f"learning_rate {two}", "SGD", decay, learning_rate=pair, per_tensor=True)
    refused(
        "a tensor has hyper-parameter set 1", "SGD", decay, sets=[1], learning_rate=one
    )
    refused(
        "sets has 2 entries; expected 1", "SGD", decay, sets=[0, 0], learning_rate=one
    )
    with pytest.raises(ValueError, match="dtype int32; expected float32, float16"):
        _ext.sums_of_squares([mx.array([1])], one)
    assert leaves.commit() == [one]

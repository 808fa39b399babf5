"""What a step may cost on Metal, counted by the simulator (bench/metal_cost.py)."""

import sys
from pathlib import Path

import mlx.core as mx
import pytest
from conftest import SIMULATOR

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.metal_cost import CASES, Case, fused_cost, stock_cost

# The least that the updates can move: each array read and written once.
LEAST = {
    "SGD": 12,
    "SGD momentum": 20,
    "Lion": 20,
    "Adam": 28,
    "AdamW": 28,
    "RMSprop": 20,
    "Adagrad": 20,
    "AdaDelta": 28,
    "Adamax": 28,
    "AdEMAMix": 36,
    "AdamW clipped": 32,
}

FUSED = [case for case in CASES if case.label in LEAST]
REST = [case for case in CASES if case.label not in LEAST]


@pytest.mark.fused
@pytest.mark.parametrize("backend", [SIMULATOR], indirect=True)
@pytest.mark.parametrize("case", FUSED, ids=[case.label for case in FUSED])
def test_bytes_and_launches_are_the_least(backend: str, case: Case) -> None:
    for dtype in (mx.float32, mx.bfloat16):
        cost = fused_cost(case, 32, dtype)
        least = LEAST[case.label] * dtype.size / 4
        # The norm's partial sums are a few bytes a tensor.
        assert least <= cost.bytes_per_parameter <= least * 1.01
        assert cost.launches_per_tensor <= 0.34


@pytest.mark.fused
@pytest.mark.parametrize("backend", [SIMULATOR], indirect=True)
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=str)
def test_lines_of_the_cache_on_real_gradients(backend: str, dtype: mx.Dtype) -> None:
    adamw = next(case for case in FUSED if case.label == "AdamW")
    cost = fused_cost(adamw, 128, dtype, real=True)
    # Beside 28 and 14 bytes, of which each must be moved.
    assert cost.line_bytes_per_parameter <= (30 if dtype == mx.float32 else 17)
    assert cost.launches_per_tensor <= 0.34
    theirs = stock_cost(adamw, 128, dtype, compiled=True, real=True)
    assert theirs.line_bytes_per_parameter > 100


@pytest.mark.fused
@pytest.mark.parametrize("backend", [SIMULATOR], indirect=True)
@pytest.mark.parametrize("case", REST, ids=[case.label for case in REST])
def test_partly_fused_optimizers_cost_less_than_stock(backend: str, case: Case) -> None:
    ours = fused_cost(case, 32, mx.float32)
    theirs = stock_cost(case, 32, mx.float32, compiled=False)
    assert ours.launches_per_tensor < theirs.launches_per_tensor
    assert ours.bytes_per_parameter < theirs.bytes_per_parameter


def test_stock_is_counted_from_its_graph() -> None:
    sgd, clipped = CASES[0], CASES[-1]
    eager = stock_cost(sgd, 32, mx.float32, compiled=False)
    # A product (gradient in, product out) and a difference (two in, one out).
    assert eager.bytes_per_parameter == pytest.approx(20, rel=1e-3)
    # One more in all: the step count.
    assert eager.launches_per_tensor == pytest.approx(2 + 1 / 100)
    compiled = stock_cost(sgd, 32, mx.float32, compiled=True)
    assert compiled.bytes_per_parameter == pytest.approx(12, rel=1e-3)
    assert compiled.launches_per_tensor == pytest.approx(1 + 1 / 100)
    more = stock_cost(clipped, 32, mx.float32, compiled=True)
    assert more.bytes_per_parameter > 60

"""What a step may cost on Metal, counted by the simulator (bench/metal_cost.py)."""

import sys
from pathlib import Path

import mlx.core as mx
import pytest
from conftest import SIMULATOR
from mlx_fused_optimizers.optimizers.muon import _batches

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.metal_cost import CASES, Case, fused_cost, stock_cost, transformer

pytestmark = pytest.mark.fused
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
    "AdamW amsgrad": 36,
    "AdaBelief": 28,
    "Adan": 44,
    "NAdam": 28,
    "RAdam": 28,
    "ScheduleFreeSGD": 20,
    "ScheduleFreeAdamW": 28,
    "AdamW clipped": 32,
}

FUSED = [case for case in CASES if case.label in LEAST]


@pytest.mark.parametrize("backend", [SIMULATOR], indirect=True)
@pytest.mark.parametrize("case", FUSED, ids=[case.label for case in FUSED])
def test_bytes_and_launches_are_the_least(backend: str, case: Case) -> None:
    for dtype in (mx.float32, mx.bfloat16):
        cost = fused_cost(case, 32, dtype)
        least = LEAST[case.label] * dtype.size / 4
        # The norm's partial sums are a few bytes a tensor.
        assert least <= cost.bytes_per_parameter <= least * 1.01
        assert cost.launches_per_tensor <= 0.34


@pytest.mark.parametrize("backend", [SIMULATOR], indirect=True)
@pytest.mark.parametrize(
    ("label", "least"), [("LAMB", 48), ("AdamW cautious", 44), ("Lion cautious", 36)]
)
def test_whole_updates_are_written_once_and_read_twice(
    backend: str, label: str, least: int
) -> None:
    """The moments' pass, the sums', and the write of the parameter."""
    (case,) = (case for case in CASES if case.label == label)
    cost = fused_cost(case, 64, mx.float32)
    assert least <= cost.bytes_per_parameter <= least * 1.02
    assert cost.launches_per_tensor <= 2


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


@pytest.mark.parametrize("backend", [SIMULATOR], indirect=True)
def test_adafactor_reads_gradients_three_times(backend: str) -> None:
    """Parameter and gradient, the gradient, then all five arrays: 32 bytes.

    Small matrices keep the gradient for the last pass. Rows and columns are counted.
    """
    (case,) = (case for case in CASES if case.name == "Adafactor")
    cost = fused_cost(case, 64, mx.float32)
    theirs = stock_cost(case, 64, mx.float32, compiled=True)
    assert 28 <= cost.bytes_per_parameter <= 32 < 0.3 * theirs.bytes_per_parameter
    assert cost.launches_per_tensor <= 1 < 0.1 * theirs.launches_per_tensor
    half = fused_cost(case, 64, mx.bfloat16)
    # Sums and factors are float32 nevertheless.
    assert half.bytes_per_parameter <= 17


@pytest.mark.parametrize("backend", [SIMULATOR], indirect=True)
def test_muon_shares_its_launches_among_matrices_of_one_shape(backend: str) -> None:
    (case,) = (case for case in CASES if case.name == "Muon")
    cost = fused_cost(case, 32, mx.float32)
    theirs = stock_cost(case, 32, mx.float32, compiled=True)
    shapes = [*transformer(32, mx.float32).values()]
    batches = [x for x in _batches(shapes) if shapes[x[0]].ndim > 1]
    smallest = min(len(batch) for batch in batches)
    assert smallest > 4
    assert cost.launches_per_tensor <= theirs.launches_per_tensor / smallest
    assert cost.bytes_per_parameter < theirs.bytes_per_parameter


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

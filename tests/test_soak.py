"""A short soak; `make soak` runs a long one."""

import mlx.core as mx
import pytest
import soak
from support import MLX_VERSION


@pytest.mark.skipif(
    MLX_VERSION < (0, 32, 1), reason="this MLX does not save arrays without elements"
)
def test_two_thousand_steps() -> None:
    mx.set_default_device(mx.cpu)
    report = soak.soak(2000, seed=0)
    assert (report.steps, report.checks > 2) == (2000, True)
    # Each kind of disturbance has come.
    assert report.compiled > 0
    assert report.reloads > 0
    assert report.reassignments > 0
    assert report.exceptions > 0
    assert report.skipped > 0

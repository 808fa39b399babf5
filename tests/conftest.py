"""The backend fixture: tests that ask for it run on each backend that is here."""

from collections.abc import Iterator

import metal_simulator
import mlx.core as mx
import pytest
from metal_simulator.extension import extension, simulated
from support import MLX_VERSION

SIMULATOR = "metal-simulator"
# Those that are here; `make test` builds the simulator.
BACKENDS = ["cpu"]
# The simulator reports faults as errors on a stream of the CPU. Before MLX 0.32.1 such
# an error ends the process.
HAS_STREAM_ERRORS = MLX_VERSION >= (0, 32, 1)
collect_ignore_glob = [] if HAS_STREAM_ERRORS else ["test_metal*"]
if HAS_STREAM_ERRORS and extension() is not None:
    BACKENDS.append(SIMULATOR)
if mx.metal.is_available():
    BACKENDS.append("gpu")


def pytest_report_header() -> str:
    return f"backends: {', '.join(BACKENDS)}"


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """The name of a backend, which the package uses while the test runs."""
    name: str = request.param
    device = mx.default_device()
    mx.set_default_device(mx.gpu if name == "gpu" else mx.cpu)
    if name == SIMULATOR:
        with simulated():
            yield name
            mx.synchronize()
        assert metal_simulator.take_errors() == []
    else:
        yield name
    mx.set_default_device(device)

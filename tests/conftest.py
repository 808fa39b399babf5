"""The backend fixture: tests that ask for it run on each backend that is here."""

from collections.abc import Iterator

import metal_simulator
import mlx.core as mx
import pytest
from metal_simulator.extension import extension, simulated

SIMULATOR = "metal-simulator"
# Those that are here; `make test` builds the simulator.
BACKENDS = ["cpu"]
if extension() is not None:
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

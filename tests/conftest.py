"""The backend fixture: tests that ask for it run on each backend that is here.

MLX_FUSED_TEST_BACKENDS names backends to run on alone. If that is `plain`, the other
tests run on plain operations too, but for those marked `fused`.
"""

import os
from collections.abc import Iterator

import metal_simulator
import mlx.core as mx
import pytest
from metal_simulator.extension import extension, simulated
from mlx_fused_optimizers import _plain
from mlx_fused_optimizers._kernels import using

SIMULATOR = "metal-simulator"
# Those that are here; `make test` builds the simulator.
BACKENDS = ["cpu", "plain"]
if extension() is not None:
    BACKENDS.append(SIMULATOR)
if mx.metal.is_available():
    BACKENDS.append("gpu")
if wanted := os.environ.get("MLX_FUSED_TEST_BACKENDS"):
    BACKENDS = [backend for backend in BACKENDS if backend in wanted.split(",")]


def pytest_report_header() -> str:
    return f"backends: {', '.join(BACKENDS)}"


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """The name of a backend, which the package uses while the test runs."""
    name: str = request.param
    if name == "plain" and request.node.get_closest_marker("fused"):
        pytest.skip("asserts what only kernels do")
    device = mx.default_device()
    mx.set_default_device(mx.gpu if name == "gpu" else mx.cpu)
    if name == SIMULATOR:
        with simulated():
            yield name
            mx.synchronize()
        assert metal_simulator.take_errors() == []
    elif name == "plain":
        with using(_plain):
            yield name
    else:
        yield name
    mx.set_default_device(device)


@pytest.fixture(autouse=BACKENDS == ["plain"])
def plain(request: pytest.FixtureRequest) -> Iterator[None]:
    """Plain operations for the tests that do not ask for a backend."""
    if request.node.get_closest_marker("fused"):
        pytest.skip("asserts what only kernels do")
    with using(_plain):
        yield

"""The backend fixture: tests that ask for it run on each backend that is here.

MLX_FUSED_TEST_BACKENDS names those to run on alone. With `plain` (`make test-plain`)
all tests run on plain operations, but for those marked `fused`. Otherwise these are for
test_plain.py and the comparisons with mlx.optimizers and torch, not compiled: MLX
compiles plain operations with the machine's compiler, which takes minutes.
"""

import os
from collections.abc import Iterator
from typing import Any

import metal_simulator
import mlx.core as mx
import pytest
from metal_simulator.extension import extension, simulated
from mlx_fused_optimizers import _plain
from mlx_fused_optimizers._kernels import reason, using
from support import HAS_STREAM_ERRORS

SIMULATOR = "metal-simulator"
PLAIN_BY_DEFAULT = {"test_against_mlx.py", "test_pytorch.py"}
# Those that are here; `make test` builds the simulator.
BACKENDS = ["cpu", "plain"]
# The simulator reports faults as errors on a stream of the CPU.
if HAS_STREAM_ERRORS and extension() is not None:
    BACKENDS.append(SIMULATOR)
if mx.metal.is_available():
    BACKENDS.append("gpu")
if wanted := os.environ.get("MLX_FUSED_TEST_BACKENDS"):
    BACKENDS = [backend for backend in BACKENDS if backend in wanted.split(",")]


def pytest_report_header() -> str:
    return f"backends: {', '.join(BACKENDS)}"


def pytest_collection_modifyitems(
    config: pytest.Config, items: list[pytest.Item]
) -> None:
    """On plain operations, leave out what asserts fusion or takes long.

    And the simulator's own tests where its faults would end the process.
    """
    left_out = [item for item in items if _is_left_out(item)]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]


def _is_left_out(item: pytest.Item) -> bool:
    if not HAS_STREAM_ERRORS and item.path.name.startswith("test_metal"):
        return True
    call: Any = getattr(item, "callspec", None)
    parameters = {} if call is None else call.params
    if BACKENDS != ["plain"] and parameters.get("backend") != "plain":
        return False
    if item.get_closest_marker("fused") is not None:
        return True
    is_short = item.path.name in PLAIN_BY_DEFAULT and not parameters.get("compiled")
    return not wanted and not is_short


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
    elif name == "plain":
        with using(_plain):
            yield name
    else:
        assert reason() is None  # plain operations would pass, too
        yield name
    mx.set_default_device(device)


@pytest.fixture(autouse=BACKENDS == ["plain"])
def plain() -> Iterator[None]:
    """Plain operations for the tests that do not ask for a backend."""
    with using(_plain):
        yield

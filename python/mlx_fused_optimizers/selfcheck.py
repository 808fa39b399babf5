"""Check every kernel on this machine: ``python -m mlx_fused_optimizers.selfcheck``.

Runs each rule for each combination of dtypes that an optimizer meets, on every
device that is here, and compares the results with those of plain MLX operations in
float32. Exit code 1 if any kernel cannot be built or disagrees. Where plain operations
are in use there is nothing to check: it says why, with exit code 0.
"""

import argparse
import json
import platform
import sys
from collections.abc import Iterator
from importlib import metadata
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.optimizers as stock

from . import __version__
from ._kernels import backend, kernels, reason
from .optimizers import fuse

DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}
# Parameter, gradient, state: one dtype throughout, and the mixtures of training in
# half precision with float32 gradients, moments or parameters.
MIXTURES = [
    *[(name, name, name) for name in DTYPES],
    *[(half, half, "float32") for half in ("float16", "bfloat16")],
    *[("float32", half, "float32") for half in ("float16", "bfloat16")],
]
# The dtype of parameter and gradient, and how parameter and states are held: each way
# to hold either. States that are in no codes are float32.
HELD = [
    ("bfloat16", "24bit", "int8"),
    ("bfloat16", "32bit", "int4"),
    ("bfloat16", "stochastic", "plain"),
    ("float16", "24bit", "int8"),
    ("float16", "stochastic", "plain"),
]


def held_kernels(rule: str) -> list[tuple[str, str, str]]:
    """Those of :data:`HELD` that a rule can have: a parameter, and states in codes."""
    is_factored = rule.startswith("Adafactor")
    slots, written = kernels.written_slots(rule)
    has_parameter = slots > len(kernels.states(rule)) + 1
    return [
        (dtype, parameter, state if kernels.states(rule) else "plain")
        for dtype, parameter, state in HELD
        if has_parameter and not is_factored and (0 in written or state != "plain")
    ]


class Result(NamedTuple):
    """The check of one kernel."""

    device: str
    kernel: str
    parameter: str
    gradient: str
    state: str
    failure: str | None


def check_all() -> Iterator[Result]:
    """Check every kernel on every device; the default device is left as it was."""
    default = mx.default_device()
    devices = {"cpu": mx.cpu}
    if mx.metal.is_available():
        devices["gpu"] = mx.gpu
    try:
        for name, device in devices.items():
            mx.set_default_device(device)
            if reason() is None:
                yield from _check_device(name)
    finally:
        mx.set_default_device(default)


def _check_device(device: str) -> Iterator[Result]:
    arrays = {name: mx.zeros((1,), dtype) for name, dtype in DTYPES.items()}
    for name, rule in every_rule().items():
        for mixture in MIXTURES:
            parameter, gradient, state = (arrays[dtype] for dtype in mixture)
            failure = kernels.check_update(rule, parameter, gradient, state)
            yield Result(device, name, *mixture, failure)
        if averaged := _with_average(rule):
            for mixture in MIXTURES:
                parameter, gradient, state = (arrays[dtype] for dtype in mixture)
                failure = kernels.check_update(averaged, parameter, gradient, state)
                yield Result(device, averaged, *mixture, failure)
        for dtype, weight, codes in held_kernels(rule):
            like = arrays[dtype]
            failure = kernels.check_update(
                rule, like, like, arrays["float32"], weight, codes
            )
            held = "float32" if codes == "plain" else codes
            yield Result(device, name, f"{dtype} {weight}", dtype, held, failure)
    for dtype, array in arrays.items():
        for name, counts in (("sums", False), ("counts", True)):
            failure = kernels.check_sums(array, counts)
            yield Result(device, name, "", dtype, "", failure)


def _with_average(rule: str) -> str | None:
    """The rule that keeps an average of the weights too, if there is one."""
    name = f"{rule}Averaged"
    try:
        kernels.states(name)
    except ValueError:
        return None
    return name


class _Example(stock.Optimizer):
    """A class as somebody writes it, for a kernel of ``fuse``."""

    def __init__(self) -> None:
        super().__init__()
        self._maybe_schedule("learning_rate", 0.1)

    def init_single(self, parameter: mx.array, state: dict[str, Any]) -> None:
        state["m"] = mx.zeros_like(parameter)
        state["v"] = mx.zeros_like(parameter)

    def apply_single(
        self, gradient: mx.array, parameter: mx.array, state: dict[str, Any]
    ) -> mx.array:
        m = 0.9 * state["m"] + 0.1 * gradient
        v = mx.maximum(0.99 * state["v"], mx.square(gradient - m))
        state["m"], state["v"] = m, v
        update = mx.where(m * gradient > 0, m, mx.tanh(m)) / (mx.sqrt(v) + 1e-3)
        updated: mx.array = parameter - self.learning_rate * update
        return updated


def every_rule() -> dict[str, str]:
    """The rules, and as "fuse" one that it makes of a class."""
    optimizer = fuse(_Example())
    parameters = {"a": mx.zeros((4,))}
    optimizer.apply_gradients(parameters, parameters)
    (made,) = optimizer.rules()
    return {name: name for name in kernels.rule_names()} | {"fuse": made}


def machine() -> dict[str, str]:
    """What a report of a failure needs to say."""
    description = {
        "mlx_fused_optimizers": __version__,
        "mlx": metadata.version("mlx"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "backend": backend(),
    }
    if mx.metal.is_available():
        description["gpu"] = str(mx.device_info()["device_name"])
    return description


def main() -> int:
    """Run the checks; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m mlx_fused_optimizers.selfcheck",
        description="Check every fused kernel against plain MLX operations.",
    )
    parser.add_argument("--json", action="store_true", help="print JSON, not a table")
    as_json = parser.parse_args().json

    why_plain = reason()
    results = []
    row = "{:<6} {:<20} {:<19} {:<10} {:<10} {}"
    if not as_json:
        print(f"Backend in use: {backend()}.")
        if why_plain is not None:
            print(f"Steps take plain MLX operations: {why_plain}.")
        print(
            row.format("device", "kernel", "parameter", "gradient", "state", "result")
        )
    for result in check_all():
        results.append(result)
        if not as_json:
            print(row.format(*result[:-1], result.failure or "ok"), flush=True)
    failed = [result for result in results if result.failure]
    if as_json:
        report = {"machine": machine(), "results": [r._asdict() for r in results]}
        print(json.dumps(report, indent=2))
        return 1 if failed else 0
    if not results:
        print("There are no kernels to check.")
        return 0
    if not mx.metal.is_available():
        print("Metal is not available on this machine: only the CPU was checked.")
    print(f"{len(results) - len(failed)} of {len(results)} kernels agree.")
    if failed:
        print("Please report this with the output of --json to the project's issues.")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

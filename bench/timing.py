"""Medians of interleaved runs."""

import statistics
import time
from collections.abc import Callable, Mapping

# Each run begins on a machine at rest: a peer's threads may still be spinning.
PAUSE = 0.01  # seconds


def interleave(
    steps: Mapping[str, Callable[[], None]], rounds: int, warm_up: int = 2
) -> dict[str, float]:
    """The median time in seconds of each step over rounds in which all take turns."""
    times: dict[str, list[float]] = {label: [] for label in steps}
    labels = list(steps)
    for i in range(-warm_up, rounds):
        first = i % len(labels)
        for label in labels[first:] + labels[:first]:
            time.sleep(PAUSE)
            start = time.perf_counter()
            steps[label]()
            if i >= 0:
                times[label].append(time.perf_counter() - start)
    return {label: statistics.median(values) for label, values in times.items()}

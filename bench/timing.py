"""Interleaved runs. What else the machine does differs from one moment to the next."""

import statistics
import time
from collections.abc import Callable, Mapping

# Each run begins on a machine at rest: a peer's threads may still be spinning.
PAUSE = 0.01  # seconds


class Times:
    """Seconds that each of several steps took, in rounds in which all took turns."""

    def __init__(self, rounds: dict[str, list[float]]) -> None:
        self.rounds = rounds

    def median(self, label: str) -> float:
        """The median of a step's times in seconds."""
        return statistics.median(self.rounds[label])

    def ratio(self, label: str, other: str) -> float:
        """How many times as long as another a step took: the median of the rounds'."""
        pairs = zip(self.rounds[label], self.rounds[other], strict=True)
        return statistics.median(a / b for a, b in pairs)


def interleave(
    steps: Mapping[str, Callable[[], None]], rounds: int, warm_up: int = 2
) -> Times:
    """The times of steps that take turns."""
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
    return Times(times)

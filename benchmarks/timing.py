"""Timing on noisy machines: competitors run in turn, and ratios are taken within a round."""

import statistics
import time
from collections.abc import Callable, Mapping


def in_turn(
    calls: Mapping[str, Callable[[], object]], rounds: int, warmup: int = 1
) -> dict[str, list[float]]:
    """Runs every call once a round, in rotating order; returns each one's seconds, round by round.

    A call has to wait for its own result.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(warmup):
        for call in calls.values():
            call()
    names = list(calls)
    for i in range(rounds):
        shift = i % len(names)
        for name in names[shift:] + names[:shift]:
            start = time.perf_counter()
            calls[name]()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def median(values: list[float]) -> float:
    """Returns the median."""
    return statistics.median(values)


def ratio(numerator: list[float], denominator: list[float]) -> float:
    """Returns the median over rounds of the ratio within a round."""
    return median([a / b for a, b in zip(numerator, denominator, strict=True)])


def fastest(seconds: Mapping[str, list[float]], prefix: str) -> str:
    """Returns the name with that prefix whose median is smallest: a competitor's best setting."""
    return min((n for n in seconds if n.startswith(prefix)), key=lambda n: median(seconds[n]))

"""Timing on noisy machines: competitors run in turn, and ratios are taken within a round."""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax


def in_turn(
    calls: Mapping[str, Callable[[], object]],
    rounds: int,
    warmup: int = 1,
    budget: float = float("inf"),
    clock: Callable[[], float] = time.perf_counter,
    lead_in: int = 0,
) -> dict[str, list[float]]:
    """Runs every call once a round, in rotating order; returns each one's seconds, round by round.

    A call has to wait for its own result. No round begins once the budget of seconds is spent:
    calls so long that the warm-up spends it are timed there. On a busy machine a clock of the
    processor's time tells more than that on the wall, where one core does all the work. With a
    lead-in a call is made so many times untimed right before: the first after others' may pay for
    memory and caches that a steady run keeps.
    """
    names, start, turns = list(calls), time.perf_counter(), []
    for i in range(warmup + rounds):
        shift = i % len(names)
        order = names[shift:] + names[:shift]
        turns.append({name: _seconds(calls[name], clock, lead_in) for name in order})
        if time.perf_counter() - start > budget:
            break
    timed = turns[warmup:] or turns[-1:]
    return {name: [turn[name] for turn in timed] for name in names}


def compiled(f: Callable[..., Any], *args: Any) -> Callable[[], Any]:
    """Returns the call of f on these arguments, compiled, that waits for its result."""
    program = jax.jit(f).lower(*args).compile()
    return lambda: jax.block_until_ready(program(*args))


def _seconds(call: Callable[[], object], clock: Callable[[], float], lead_in: int) -> float:
    for _ in range(lead_in):
        call()
    start = clock()
    call()
    return clock() - start


def median(values: list[float]) -> float:
    """Returns the median."""
    return statistics.median(values)


def ratio(numerator: list[float], denominator: list[float]) -> float:
    """Returns the median over rounds of the ratio within a round."""
    return median([a / b for a, b in zip(numerator, denominator, strict=True)])


def fastest(seconds: Mapping[str, list[float]], prefix: str) -> str:
    """Returns the name with that prefix whose median is smallest: a competitor's best setting."""
    return min((n for n in seconds if n.startswith(prefix)), key=lambda n: median(seconds[n]))

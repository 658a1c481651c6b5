"""How times are taken: candidates take turns, so that whatever disturbs the machine disturbs all alike."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

# Long enough that reading the clock is nothing beside it, short enough that most samples see no interruption.
SAMPLE_SECONDS = 8e-3
LEAST_ROUNDS = 9
# Beyond this interquartile range, as a share of the median, the machine was too busy to trust the digits.
WIDE_SPREAD = 0.10


@dataclass(frozen=True)
class Timing:
    """Seconds per call: median and quartiles of all rounds."""

    median: float
    low: float
    high: float
    rounds: int

    @classmethod
    def of(cls, samples: list[float]) -> Timing:
        low, median, high = statistics.quantiles(samples, n=4, method="inclusive")
        return cls(median, low, high, len(samples))

    @property
    def spread(self) -> float:
        return (self.high - self.low) / self.median


def race(
    candidates: Mapping[str, Callable[[], object]],
    *,
    seconds: float,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Timing]:
    """Times the candidates for about ``seconds`` altogether.

    In each round every candidate gives one sample, the mean of as many calls as fill SAMPLE_SECONDS, and each
    round begins with another candidate. The first call of a turn, which finds the caches full of another's
    data, is not timed.
    """

    def sample(run: Callable[[], object], calls: int) -> float:
        run()
        begin = clock()
        for _ in range(calls):
            run()
        return (clock() - begin) / calls

    begin = clock()
    calls = {}
    for name, run in candidates.items():
        sample(run, 3)  # the first calls pay for caches, threads and memory
        calls[name] = max(1, round(SAMPLE_SECONDS / max(sample(run, 3), 1e-9)))
    order = list(candidates)
    samples: dict[str, list[float]] = {name: [] for name in order}
    while len(samples[order[0]]) < LEAST_ROUNDS or clock() - begin < seconds:
        for name in order:
            samples[name].append(sample(candidates[name], calls[name]))
        order.append(order.pop(0))
    return {name: Timing.of(times) for name, times in samples.items()}


def geometric_mean(values: Iterable[float]) -> float:
    logarithms = [math.log(value) for value in values]
    return math.exp(sum(logarithms) / len(logarithms))

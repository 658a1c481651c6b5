"""How times are taken: contenders take turns, so that whatever disturbs the machine disturbs all alike."""

from __future__ import annotations

import math
import statistics
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

# Long enough that reading the clock is nothing beside it, short enough that most samples see no interruption.
SAMPLE_SECONDS = 8e-3
LEAST_ROUNDS = 9
# Contenders with threads of their own keep them spinning for a while after a call, on the cores of the next
# contender: where there are such, all take turns in blocks, and the machine rests between two pools.
BLOCK_SECONDS = 0.25
REST_SECONDS = 0.1
LEAST_BLOCKS = 3
# Beyond this interquartile range, as a share of the median, the machine was too busy to trust the digits.
WIDE_SPREAD = 0.10


@dataclass(frozen=True)
class Sample:
    """Some calls, one after the other: seconds on the clock, and of the processor in all threads together."""

    seconds: float
    cpu_seconds: float


class Contender(ABC):
    """Something that is timed."""

    # Whose threads it runs on. Contenders of one pool do not disturb each other.
    pool = "torch"

    @abstractmethod
    def sample(self, calls: int) -> Sample: ...


class Local(Contender):
    """A function of this process."""

    def __init__(
        self,
        run: Callable[[], object],
        clock: Callable[[], float] = time.perf_counter,
        cpu_clock: Callable[[], float] = time.process_time,
    ) -> None:
        self.run, self.clock, self.cpu_clock = run, clock, cpu_clock

    def sample(self, calls: int) -> Sample:
        run = self.run
        cpu_begin = self.cpu_clock()
        begin = self.clock()
        for _ in range(calls):
            run()
        seconds = self.clock() - begin
        return Sample(seconds, self.cpu_clock() - cpu_begin)


class OnGpu(Contender):
    """A function whose work is done by the current CUDA device: timed there, by events in its stream."""

    def __init__(self, run: Callable[[], object]) -> None:
        self.run = run

    def sample(self, calls: int) -> Sample:
        run = self.run
        event: Any = torch.cuda.Event
        begin, end = (event(enable_timing=True) for _ in range(2))
        cpu_begin = time.process_time()
        torch.cuda.synchronize()
        begin.record()
        for _ in range(calls):
            run()
        end.record()
        end.synchronize()
        return Sample(begin.elapsed_time(end) * 1e-3, time.process_time() - cpu_begin)


@dataclass(frozen=True)
class Timing:
    """Seconds per call: median and quartiles of all rounds; and how many cores were at work."""

    median: float
    low: float
    high: float
    rounds: int
    cores: float | None = None

    @classmethod
    def of(cls, samples: list[float], cores: float | None = None) -> Timing:
        low, median, high = statistics.quantiles(samples, n=4, method="inclusive")
        return cls(median, low, high, len(samples), cores)

    @property
    def spread(self) -> float:
        return (self.high - self.low) / self.median


class Race:
    """Times contenders against each other.

    In each round every contender gives one sample, the mean of as many calls as fill SAMPLE_SECONDS, and each
    round begins with another contender. The first call of a turn, which finds the caches full of another's
    data, is not timed. Where there are several pools of threads, each contender has the machine for
    BLOCK_SECONDS at a time, and between two pools it rests.
    """

    def __init__(
        self,
        contenders: Mapping[str, Contender],
        clock: Callable[[], float] = time.perf_counter,
        rest: Callable[[float], None] = time.sleep,
    ) -> None:
        self.contenders, self.clock, self.rest = contenders, clock, rest
        self.pools: dict[str, list[str]] = {}
        for name, contender in contenders.items():
            self.pools.setdefault(contender.pool, []).append(name)
        self.calls: dict[str, int] = {}
        # Seconds per call, and seconds of the clock and of the processor in sum.
        self.samples: dict[str, list[float]] = {name: [] for name in contenders}
        self.totals = dict.fromkeys(contenders, (0.0, 0.0))

    def run(self, seconds: float) -> dict[str, Timing]:
        """Goes on for about that long altogether, and for LEAST_ROUNDS at least."""
        begin = self.clock()
        self.warm_up()
        order, blocks = list(self.pools), 0
        apart = len(order) > 1
        while (
            blocks < (LEAST_BLOCKS if apart else LEAST_ROUNDS)
            or min(map(len, self.samples.values())) < LEAST_ROUNDS
            or self.clock() - begin < seconds
        ):
            for pool in order:
                self.block(pool, BLOCK_SECONDS if apart else 0.0)
                if apart:
                    self.rest(REST_SECONDS)
            order.append(order.pop(0))
            blocks += 1
        return {
            name: Timing.of(samples, self.totals[name][1] / max(self.totals[name][0], 1e-12))
            for name, samples in self.samples.items()
        }

    def warm_up(self) -> None:
        """The first calls pay for caches, threads and memory; the next tell how many make a sample."""
        for names in self.pools.values():
            for name in names:
                contender = self.contenders[name]
                contender.sample(4)
                mean = contender.sample(4).seconds / 4
                self.calls[name] = max(1, round(SAMPLE_SECONDS / max(mean, 1e-9)))
            if len(self.pools) > 1:
                self.rest(REST_SECONDS)

    def block(self, pool: str, seconds: float) -> None:
        names = self.pools[pool]
        for name in names:
            begin = self.clock()
            self.turn(name)
            while self.clock() - begin < seconds:
                self.turn(name)
        names.append(names.pop(0))

    def turn(self, name: str) -> None:
        contender, calls = self.contenders[name], self.calls[name]
        contender.sample(1)
        sample = contender.sample(calls)
        self.samples[name].append(sample.seconds / calls)
        wall, cpu = self.totals[name]
        self.totals[name] = wall + sample.seconds, cpu + sample.cpu_seconds


def race(contenders: Mapping[str, Contender | Callable[[], object]], *, seconds: float) -> dict[str, Timing]:
    """Times contenders, or functions of this process, for about ``seconds`` altogether; see Race."""
    made = {name: c if isinstance(c, Contender) else Local(c) for name, c in contenders.items()}
    return Race(made).run(seconds)


def doubts(timing: Timing, threads: int) -> list[str]:
    """Why a time is not to be trusted, in a few words each."""
    found = []
    if timing.spread > WIDE_SPREAD:
        found.append(f"varies by {timing.spread:.0%}")
    if timing.cores is not None and timing.cores > threads + 0.25:
        found.append(f"kept {timing.cores:.1f} cores busy instead of {threads}")
    return found


def geometric_mean(values: Iterable[float]) -> float:
    logarithms = [math.log(value) for value in values]
    return math.exp(sum(logarithms) / len(logarithms))

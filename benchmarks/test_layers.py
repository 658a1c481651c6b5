"""Layers one by one: fastsep, torch's two convolutions in both layouts, torch.compile, plain loops.

pytest benchmarks/ [--networks mobilenet_v2,xception] [--phases training] [--quick], and pytest-benchmark's
options.

The contenders for a layer take turns, as `python -m fastsep bench` has them: a group of pytest-benchmark's
table. Its tests share one comparison, from which each shows its own samples.
"""

import itertools

import pytest


class Replay:
    """A clock for pytest-benchmark that shows times taken before."""

    __name__ = "samples"

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def show(self, benchmark, samples):
        turns = itertools.cycle(samples)

        def begin():
            self.now = 0.0

        def end():
            self.now = next(turns)

        benchmark.pedantic(end, setup=begin, rounds=len(samples))


replay = Replay()


@pytest.mark.benchmark(timer=replay)
def test_layer(benchmark, group, contender, result):
    benchmark.group = f"{group.network} {group.case.name}, {group.phase}, {group.case.dtype}"
    benchmark.name = contender
    benchmark.extra_info.update(result.information)
    replay.show(benchmark, result.samples)

"""The timing method, on a clock of our own."""

import pytest

from fastsep.bench import engine
from fastsep.bench.engine import Contender, Local, Race, Sample, Timing, doubts, geometric_mean, race


class Clock:
    """Stands still but for what the contenders add."""

    def __init__(self):
        self.now = 0.0
        self.cpu = 0.0
        self.calls = []
        self.rests = 0

    def __call__(self):
        return self.now

    def rest(self, seconds):
        assert seconds == engine.REST_SECONDS
        self.calls.append(" ")
        self.now += seconds
        self.rests += 1

    def contender(self, name, *costs, pool="torch", cores=1.0):
        """Costs in turn, the last one from then on."""
        left = list(costs)

        def run():
            self.calls.append(name)
            cost = left.pop(0) if len(left) > 1 else left[0]
            self.now += cost
            self.cpu += cost * cores

        made = Local(run, clock=self, cpu_clock=lambda: self.cpu)
        made.pool = pool
        return made

    def race(self, contenders, seconds):
        return Race(contenders, clock=self, rest=self.rest).run(seconds)


def test_race_measures_each_contender():
    clock = Clock()
    # Eight calls of warm-up, dear as first calls are.
    fast = clock.contender("fast", *[1e-3] * 8, 1e-4)
    slow = clock.contender("slow", *[9e-3] * 8, 5e-3)
    times = clock.race({"fast": fast, "slow": slow}, 0.5)
    assert times["fast"].median == pytest.approx(1e-4)
    assert times["slow"].median == pytest.approx(5e-3)
    assert times["fast"].spread == pytest.approx(0, abs=1e-9)
    assert times["fast"].rounds == times["slow"].rounds
    assert 0.5 <= clock.now < 0.6
    assert clock.rests == 0


def test_contenders_take_turns():
    clock = Clock()
    cost = engine.SAMPLE_SECONDS  # so one call a sample
    clock.race({name: clock.contender(name, cost) for name in "abc"}, 0)
    rounds = clock.calls[3 * 8 :]  # two a turn, of which the first is not timed
    assert len(rounds) == 2 * 3 * engine.LEAST_ROUNDS
    assert "".join(rounds[:24]) == "aabbcc" + "bbccaa" + "ccaabb" + "aabbcc"


def test_the_first_call_of_a_turn_is_not_timed():
    clock = Clock()
    costs = [1.0] * 8 + [99.0, 1.0] * engine.LEAST_ROUNDS
    assert clock.race({"a": clock.contender("a", *costs)}, 0)["a"].high == pytest.approx(1.0)


def test_short_calls_are_repeated_to_fill_a_sample():
    clock = Clock()
    clock.race({"a": clock.contender("a", engine.SAMPLE_SECONDS / 50)}, 0)
    assert len(clock.calls) == 8 + 51 * engine.LEAST_ROUNDS


def test_beside_another_pool_each_contender_has_the_machine_for_a_block():
    """c's idle threads would spin into the times of a and b: each works alone, and pools rest between."""
    clock = Clock()
    cost = engine.BLOCK_SECONDS / 4  # two calls a turn: a block holds two turns
    contenders = {name: clock.contender(name, cost) for name in "ab"}
    contenders["c"] = clock.contender("c", cost, pool="another")
    times = clock.race(contenders, 0)
    warm_up, rest, later = "a" * 8 + "b" * 8, " ", "".join(clock.calls)
    assert later.startswith(warm_up + rest + "c" * 8 + rest)
    blocks = later[len(warm_up) + 10 :].split()
    assert blocks[:4] == ["aaaabbbb", "cccc", "cccc", "bbbbaaaa"]
    assert set(blocks) == {"aaaabbbb", "bbbbaaaa", "cccc"}
    assert len(blocks) >= 2 * engine.LEAST_BLOCKS
    assert min(timing.rounds for timing in times.values()) >= engine.LEAST_ROUNDS


def test_a_contender_of_another_process_is_asked_for_its_own_time():
    class Elsewhere(Contender):
        pool = "elsewhere"

        def sample(self, calls):
            return Sample(seconds=calls * 2e-3, cpu_seconds=calls * 6e-3)

    timing = Race({"a": Elsewhere()}, clock=Clock(), rest=lambda seconds: None).run(-1)["a"]
    assert timing.median == pytest.approx(2e-3)
    assert timing.cores == pytest.approx(3)


def test_functions_can_race_too():
    times = race({"a": lambda: sum(range(100))}, seconds=0)
    assert 0 < times["a"].median < 1
    assert times["a"].rounds == engine.LEAST_ROUNDS


def test_one_disturbance_does_not_move_the_median():
    assert Timing.of([1.0, 1.0, 9.0, 1.0, 1.0]).median == 1.0
    timing = Timing.of([1.0, 2.0, 3.0, 4.0, 5.0])
    assert (timing.low, timing.median, timing.high, timing.rounds) == (2.0, 3.0, 4.0, 5)
    assert timing.spread == pytest.approx(2 / 3)


def test_doubts():
    assert doubts(Timing(1.0, 0.98, 1.02, 9, cores=1.0), threads=1) == []
    assert doubts(Timing(1.0, 0.9, 1.1, 9, cores=1.0), threads=1) == ["varies by 20%"]
    assert doubts(Timing(1.0, 1.0, 1.0, 9, cores=1.9), threads=1) == ["kept 1.9 cores busy instead of 1"]
    assert doubts(Timing(1.0, 1.0, 1.0, 9, cores=1.9), threads=2) == []


def test_cores_are_counted():
    clock = Clock()
    assert clock.race({"a": clock.contender("a", 1e-3, cores=2)}, 0)["a"].cores == pytest.approx(2)


def test_geometric_mean():
    assert geometric_mean([1, 4]) == pytest.approx(2)

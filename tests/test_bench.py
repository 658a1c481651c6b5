"""The timing method, on a clock of our own, and the files of layers."""

import pytest
from commands import run

from fastsep._case import parse_case
from fastsep.bench import engine, layers
from fastsep.bench.engine import Timing, geometric_mean, race
from fastsep.bench.report import Report, Row


class Clock:
    """Stands still but for what the candidates add."""

    def __init__(self):
        self.now = 0.0
        self.calls = []

    def __call__(self):
        return self.now

    def candidate(self, name, *costs):
        """Costs in turn, the last one from then on."""
        left = list(costs)

        def run():
            self.calls.append(name)
            self.now += left.pop(0) if len(left) > 1 else left[0]

        return run


def test_race_measures_each_candidate():
    clock = Clock()
    # Eight calls of warm-up, dear as first calls are.
    fast = clock.candidate("fast", *[1e-3] * 8, 1e-4)
    slow = clock.candidate("slow", *[9e-3] * 8, 5e-3)
    times = race({"fast": fast, "slow": slow}, seconds=0.5, clock=clock)
    assert times["fast"].median == pytest.approx(1e-4)
    assert times["slow"].median == pytest.approx(5e-3)
    assert times["fast"].spread == pytest.approx(0, abs=1e-9)
    assert times["fast"].rounds == times["slow"].rounds
    assert 0.5 <= clock.now < 0.6


def test_candidates_take_turns():
    clock = Clock()
    cost = engine.SAMPLE_SECONDS  # so one call a sample
    race({name: clock.candidate(name, cost) for name in "abc"}, seconds=0, clock=clock)
    rounds = clock.calls[3 * 8 :]  # two a turn, of which the first is not timed
    assert len(rounds) == 2 * 3 * engine.LEAST_ROUNDS
    assert "".join(rounds[:24]) == "aabbcc" + "bbccaa" + "ccaabb" + "aabbcc"


def test_the_first_call_of_a_turn_is_not_timed():
    clock = Clock()
    costs = [1.0] * 8 + [99.0, 1.0] * engine.LEAST_ROUNDS
    assert race({"a": clock.candidate("a", *costs)}, seconds=0, clock=clock)["a"].high == pytest.approx(1.0)


def test_short_calls_are_repeated_to_fill_a_sample():
    clock = Clock()
    race({"a": clock.candidate("a", engine.SAMPLE_SECONDS / 50)}, seconds=0, clock=clock)
    assert len(clock.calls) == 8 + 51 * engine.LEAST_ROUNDS


def test_one_disturbance_does_not_move_the_median():
    assert Timing.of([1.0, 1.0, 9.0, 1.0, 1.0]).median == 1.0
    timing = Timing.of([1.0, 2.0, 3.0, 4.0, 5.0])
    assert (timing.low, timing.median, timing.high, timing.rounds) == (2.0, 3.0, 4.0, 5)
    assert timing.spread == pytest.approx(2 / 3)


def test_geometric_mean():
    assert geometric_mean([1, 4]) == pytest.approx(2)


def report(spread=0.0):
    def timing(seconds):
        return Timing(seconds, seconds * (1 - spread / 2), seconds * (1 + spread / 2), 9)

    line = "name=one c=4 h=3 w=3 k=6 kh=3 kw=3 pt=1 pb=1 pl=1 pr=1"
    times = {"fastsep": 1.0, "unfrozen": 2.0, "torch nchw": 4.0, "torch nhwc": 5.0}
    row = Row(line, {name: timing(seconds) for name, seconds in times.items()}, peak=2 * 9 * 4 * (9 + 6) * 2)
    return Report("net", 1, 1, "nhwc", "scalar", "machine", {"torch": "2"}, [row, row])


def test_report():
    made = report()
    assert made.rows[0].torch_layout == "nchw"
    assert made.total("torch") == 8
    assert made.total("unfrozen") == 4
    assert made.geometric_mean == pytest.approx(4)
    assert made.share_of_peak == pytest.approx(0.5)
    assert made.warnings == []
    assert Report.from_json(made.to_json()) == made


def test_a_wide_spread_is_warned_of():
    (warning,) = report(spread=0.2).warnings
    assert "one (fastsep, 20%)" in warning


def test_layers_of_the_networks():
    assert layers.names() == ["mobilenet_v1", "other"]
    network = layers.load("mobilenet_v1")
    assert len(network.layers) == 13
    # Of the 569 million multiply-adds that the paper counts, what is left without first layer and classifier.
    assert sum(map(layers.operations, network.layers)) / 2 == pytest.approx(557e6, rel=0.01)
    for before, after in zip(network.layers, network.layers[1:], strict=False):
        assert (before.k, before.oh, before.ow) == (after.c, after.h, after.w)
    assert {(case.kh, case.sh, case.dh, case.m) for case in layers.load("other").layers} == {
        *((5, 1, 1, 1), (7, 1, 1, 1), (3, 2, 1, 1), (3, 1, 2, 1), (3, 1, 1, 2))
    }


def test_operations():
    assert layers.operations(parse_case("n=2 c=3 h=5 w=4 k=7 kh=3 kw=2 m=2")) == 2 * 2 * 3 * 3 * 6 * (6 + 7)


def test_the_benchmarks_run():
    result = run("pytest benchmarks --quick")
    assert result.returncode == 0, result.stdout
    assert "7 passed" in result.stdout


def test_files_that_are_no_networks(tmp_path):
    with pytest.raises(ValueError, match="must be one of mobilenet_v1, other or a file of layers"):
        layers.load("vgg")
    (tmp_path / "empty.txt").write_text("# nothing\n")
    with pytest.raises(ValueError, match="holds no layers"):
        layers.load(str(tmp_path / "empty.txt"))

"""Options of `pytest benchmarks/`, and the comparisons that its tests share."""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch

from fastsep import _native
from fastsep._case import DTYPES, LAYOUTS, Case
from fastsep.bench import arguments, contenders, layers, machine
from fastsep.bench.engine import Race, Timing
from fastsep.bench.report import Doubt, Row, doubts_of, warnings

NAMES = ["naive", *contenders.TORCH, "compile", *(f"fastsep {layout}" for layout in LAYOUTS)]


class Group(NamedTuple):
    """A layer and what of it is measured: the contenders for it take turns."""

    network: str
    case: Case
    phase: str
    compiled: bool  # whether torch.compile takes part, which takes seconds to compile


def pytest_addoption(parser):
    group = parser.getgroup("fastsep")
    known = ",".join(layers.names())
    group.addoption(
        "--networks",
        help=f"some of {known}, or files of layers, or all (default: mobilenet_v1, with --quick all)",
    )
    group.addoption("--phases", default="forward,training", help=f"some of {','.join(layers.PHASES)}")
    group.addoption("--device", help="cpu or cuda (default: cuda where there is one)")
    group.addoption(
        "--dtype", default=None, help="some of float32, float16, bfloat16 (default: all that fit the device)"
    )
    group.addoption("--threads", default="1", help="of each contender (default: 1)")
    group.addoption("--batch", default="1", help="images (default: 1)")
    group.addoption("--seconds", default="2", help="for each layer and phase (default: 2)")
    group.addoption(
        "--quick", action="store_true", help="the smallest layer of each network, as few rounds as can be"
    )


def pytest_configure(config):
    """A wrong option ends with a sentence and the exit status 2, as it does all other commands."""
    config.addinivalue_line("filterwarnings", "default")  # an error in the tests, but none to a user
    config.fastsep_doubts = []
    try:
        if _native.core is None:
            raise ValueError(f"the native module is missing: {_native.missing}")
        parse(config.option)
        config.fastsep_groups = groups(config.getoption)
    except ValueError as error:
        pytest.exit(str(error), returncode=2)


def parse(option) -> None:
    """The numbers among the options."""
    for name, kind in (
        ("threads", arguments.count),
        ("batch", arguments.count),
        ("seconds", arguments.duration),
    ):
        try:
            setattr(option, name, kind(getattr(option, name)))
        except argparse.ArgumentTypeError as error:
            raise ValueError(f"{name} {error}") from None
    if option.threads > machine.cores():
        raise ValueError(f"threads must be 1 to {machine.cores()}, got {option.threads}")


def device_of(option) -> str:
    device = option("device") or ("cuda" if torch.cuda.is_available() else "cpu")
    if device not in ("cpu", "cuda"):
        raise ValueError(f"device must be cpu or cuda, got {device!r}")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device is cuda, but torch finds no GPU here")
    return device


def dtypes_of(option, device: str) -> list[str]:
    if option("dtype") is None:
        return ["float32"] if device == "cpu" else ["float32", "float16", "bfloat16"]
    for dtype in option("dtype").split(","):
        if dtype not in ("float32", "float64", "float16", "bfloat16"):
            raise ValueError(f"dtype must be float32, float64, float16 or bfloat16, got {dtype!r}")
        if device == "cpu" and DTYPES[dtype] not in _native.DTYPES:
            raise ValueError(f"dtype {dtype} is measured on cuda, and the device is cpu")
    return option("dtype").split(",")


def groups(option) -> list[Group]:
    """All that is to be measured."""
    quick, device = option("quick"), device_of(option)
    named = option("networks") or ("all" if quick else "mobilenet_v1")
    networks = [layers.load(name) for name in (layers.names() if named == "all" else named.split(","))]
    phases = option("phases").split(",")
    for phase in phases:
        if phase not in layers.PHASES:
            raise ValueError(f"phase must be one of {', '.join(layers.PHASES)}, got {phase!r}")
    found = []
    for network in networks:
        cases = layers.distinct(network.layers)
        if quick:
            cases = [min(cases, key=layers.operations)]
        for case in cases:
            for dtype in dtypes_of(option, device):
                sized = replace(case, dtype=dtype, n=option("batch"))
                compiled = not quick or network.name == "mobilenet_v1"
                found += [Group(network.name, sized, phase, compiled) for phase in phases]
    return found


def pytest_generate_tests(metafunc):
    if "group" in metafunc.fixturenames:
        found = metafunc.config.fastsep_groups
        pairs = [(group, name) for group in found for name in NAMES]
        ids = [f"{g.network}-{g.case.name}-{g.phase}-{g.case.dtype}-{name}" for g, name in pairs]
        metafunc.parametrize(("group", "contender"), pairs, ids=ids)


class Result(NamedTuple):
    """Of one contender."""

    samples: list[float]
    information: dict[str, object]


class Comparison:
    """Runs the contenders of a group against each other once, for all its tests."""

    def __init__(self, config) -> None:
        option = config.getoption
        self.device, self.threads = device_of(option), option("threads")
        self.seconds = 0.0 if option("quick") else option("seconds")
        self.isa = _native.core.best_isa() if self.device == "cpu" else ""
        with machine.fixed_threads(self.threads):
            self.bandwidth = machine.measure_bandwidth(self.device)
        self.done: dict[Group, dict[str, Result]] = {}
        self.doubts: list[Doubt] = config.fastsep_doubts

    def reason(self, group: Group, contender: str) -> str:
        """Why a contender does not take part; empty where it does."""
        if contender == "compile" and not group.compiled:
            return "torch.compile takes part in one layer of --quick"
        if contender.startswith("torch "):
            return ""
        return contenders.unavailable(contender.split()[0], group.case, group.phase, self.device)

    def results(self, group: Group, selected: list[str]) -> dict[str, Result]:
        if group not in self.done:
            with machine.fixed_threads(self.threads), contenders.context(group.phase):
                self.done = {group: self.measure(group, selected)}  # the tests of a group are neighbours
        return self.done[group]

    def measure(self, group: Group, selected: list[str]) -> dict[str, Result]:
        others = [name for name in ("naive", "compile") if name in selected and not self.reason(group, name)]
        subjects = {}
        with contenders.ExitStack() as stack:
            for layout in LAYOUTS:
                case = replace(group.case, layout=layout)
                task = contenders.Task.of(case, group.phase, self.device, self.threads)
                made = contenders.build(task, others if layout == "nhwc" else [], stack)
                contenders.verify(task, made)
                made = {f"fastsep {layout}" if name == "fastsep" else name: s for name, s in made.items()}
                subjects |= {name: subject for name, subject in made.items() if name in selected}
            peak = machine.measure_peak(self.device, self.isa, group.case.dtype, self.threads)
            race = Race({name: subject.contender for name, subject in subjects.items()})
            times = race.run(self.seconds)
        done = layers.phase_operations(case, group.phase), layers.traffic(case, group.phase)
        row = Row(case.name, "", times, *done, peak, task.is_cold)
        if self.device == "cpu":
            self.doubts += doubts_of(f"{group.network} {case.name}, {group.phase}", times, self.threads)
        return {name: Result(race.samples[name], self.information(row, name)) for name in subjects}

    def information(self, row: Row, name: str) -> dict[str, object]:
        timing: Timing = row.times[name]
        return {
            "gflops_per_s": row.operations / timing.median / 1e9,
            "gbytes_per_s": row.bytes / timing.median / 1e9,
            "share_of_peak": row.share_of_peak(name),
            "share_of_roof": row.share_of_roof(self.bandwidth, name),
            "peak_gflops_per_s": row.peak / 1e9,
            "bandwidth_gbytes_per_s": self.bandwidth / 1e9,
            "spread": timing.spread,
            "cores": timing.cores,
            "device": machine.device_name(self.device),
            "isa": self.isa,
            "threads": self.threads,
            **machine.versions(self.device),
        }


@pytest.fixture(scope="session")
def comparison(pytestconfig):
    with machine.Load() as load:
        yield Comparison(pytestconfig)
    pytestconfig.fastsep_load = load


def pytest_terminal_summary(terminalreporter, config):
    """Why the times are not to be trusted; a fixture would print it where pytest captures it."""
    load = getattr(config, "fastsep_load", None)
    for line in [*(load.doubts if load else []), *warnings(config.fastsep_doubts)]:
        terminalreporter.write_line(f"warning: {line}", yellow=True)


@pytest.fixture
def result(request, comparison, group, contender) -> Result:
    """What was measured of this contender, against all that were selected of its group."""
    reason = comparison.reason(group, contender)
    if reason:
        pytest.skip(reason)
    params = [item.callspec.params for item in request.session.items if hasattr(item, "callspec")]
    selected = [given["contender"] for given in params if given.get("group") == group]
    return comparison.results(group, selected)[contender]

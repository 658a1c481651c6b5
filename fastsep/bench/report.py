"""The result of a comparison, and what is kept of it as JSON and CSV."""

from __future__ import annotations

import csv
import io
import os
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

from .._case import LAYOUTS, Case, parse_case
from .engine import Timing, doubts, geometric_mean
from .machine import Roof

# Of the files. A change of their meaning is another number.
FORMAT = 3


@dataclass(frozen=True)
class Row:
    """One layer, or a network in one piece."""

    name: str
    line: str  # the case; empty for a whole network
    times: dict[str, Timing]  # of each contender
    operations: float  # that fastsep takes
    bytes: float  # that a call moves at least, through caches or past them; 0 of a whole network
    peak: float  # operations per second that the threads in use could do
    cold: bool = False  # whether the last-level cache does not hold them, so that memory is a roof, too
    fused: str = ""  # of a whole network: how many of its depthwise convolutions optimize() fused
    error: float | None = None  # and how far the largest output moved by that, relative to itself

    @property
    def case(self) -> Case | None:
        return parse_case(self.line) if self.line else None

    @property
    def torch_layout(self) -> str:
        """The layout in which torch is faster; empty where it took no part."""
        measured = [layout for layout in LAYOUTS if f"torch {layout}" in self.times]
        return min(measured, key=lambda layout: self.times[f"torch {layout}"].median, default="")

    def time(self, name: str) -> Timing | None:
        """Of a contender; "torch" is the one in the layout that is faster."""
        return self.times.get(f"torch {self.torch_layout}" if name == "torch" else name)

    def speedup(self, over: str = "torch") -> float | None:
        fastsep, other = self.time("fastsep"), self.time(over)
        return other.median / fastsep.median if fastsep and other else None

    def share_of_peak(self, name: str = "fastsep") -> float | None:
        """Of what multiply-add units could do that had nothing else to do."""
        timing = self.time(name)
        return self.operations / timing.median / self.peak if timing else None

    def share_of_roof(self, bandwidth: float | None, name: str = "fastsep") -> float | None:
        """Of the least time that arithmetic, or memory where no cache holds the tensors, leaves possible."""
        timing = self.time(name)
        return self.roof(bandwidth) / timing.median if timing else None

    def roof(self, bandwidth: float | None) -> float:
        """That least time in seconds."""
        if bandwidth is None:
            return self.operations / self.peak
        return Roof(self.peak, bandwidth).seconds(self.operations, self.bytes if self.cold else 0)


class Doubt(NamedTuple):
    """Why a time is not to be trusted."""

    spread: float
    text: str


def doubts_of(what: str, times: Mapping[str, Timing], threads: int) -> list[Doubt]:
    """Those of a comparison on the CPU."""
    return [
        Doubt(timing.spread, f"{what}: {name} {why}")
        for name, timing in times.items()
        for why in doubts(timing, threads)
    ]


def warnings(found: Iterable[Doubt]) -> list[str]:
    """One that names the worst, if there are any."""
    worst = sorted(found, key=lambda doubt: -doubt.spread)
    if not worst:
        return []
    more = f", and {len(worst) - 3} more" if len(worst) > 3 else ""
    return [f"measure again when the machine is idle; {'; '.join(doubt.text for doubt in worst[:3])}{more}"]


@dataclass(frozen=True)
class Report:
    network: str
    whole: bool  # in one piece instead of layer by layer
    phase: str
    batch: int
    threads: int
    layout: str  # of fastsep; torch's is the better one for each layer
    dtype: str
    device: str
    isa: str
    machine: str
    versions: dict[str, str]
    bandwidth: float | None  # bytes per second; None where it was not measured
    rows: list[Row]
    command: str = ""
    remarks: list[str] = field(
        default_factory=list
    )  # who could not take part, and what disturbed the measurement
    format: int = FORMAT

    @property
    def contenders(self) -> list[str]:
        """All that took part, in their order; torch once."""
        found = dict.fromkeys(name for row in self.rows for name in row.times)
        return list(dict.fromkeys("torch" if name.startswith("torch ") else name for name in found))

    def total(self, name: str) -> float | None:
        """Seconds for all layers; None where a contender did not take part in all."""
        times = [row.time(name) for row in self.rows]
        return sum(timing.median for timing in times if timing) if all(times) else None

    def mean_speedup(self, over: str = "torch") -> float | None:
        """The geometric mean over the layers; None where one of the two did not take part in all."""
        speedups = [row.speedup(over) for row in self.rows]
        return None if None in speedups else geometric_mean(s for s in speedups if s)

    @property
    def share_of_peak(self) -> float | None:
        total = self.total("fastsep")
        return sum(row.operations / row.peak for row in self.rows) / total if total else None

    @property
    def share_of_roof(self) -> float | None:
        total = self.total("fastsep")
        return sum(row.roof(self.bandwidth) for row in self.rows) / total if total else None

    @property
    def warnings(self) -> list[str]:
        """Why the times are not to be trusted: the worst of them, by name."""
        return warnings(doubt for row in self.rows for doubt in self.doubts(row))

    def doubts(self, row: Row) -> list[Doubt]:
        """Those of a row; on a GPU, whose events time it alone, the processor's other work is none."""
        if self.device != "cpu":
            return []
        times = {name: timing for name in self.contenders if (timing := row.time(name))}
        return doubts_of(row.name, times, self.threads)

    def to_json(self) -> dict[str, Any]:
        values = asdict(self)
        return {"format": values.pop("format"), **values}

    @classmethod
    def from_json(cls, values: Any) -> Report:
        """ValueError where it is no result, or one of another version."""
        version = values.get("format", 1) if isinstance(values, dict) and "rows" in values else None
        if version is None:
            raise ValueError("is no result of python -m fastsep bench --json")
        if version != FORMAT:
            raise ValueError(f"is a result of format {version}, this version reads format {FORMAT}")
        given = {f.name for f in fields(cls)} & set(values)
        try:
            rows = [
                Row(**(row | {"times": {name: Timing(**timing) for name, timing in row["times"].items()}}))
                for row in values["rows"]
            ]
            return cls(**({name: values[name] for name in given} | {"rows": rows}))
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"is no result of python -m fastsep bench --json: {error}") from None

    def to_csv(self) -> str:
        """A line for each layer and contender."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        heads = (
            "network phase batch threads dtype device isa layer contender median_s low_s high_s rounds cores"
        )
        writer.writerow(
            [*heads.split(), "gflops_per_s", "gbytes_per_s", "share_of_peak", "share_of_roof", "case"]
        )
        what = self.network, self.phase, self.batch, self.threads, self.dtype, self.device, self.isa
        for row in self.rows:
            for name, t in row.times.items():
                rates = row.operations / t.median / 1e9, row.bytes / t.median / 1e9 if row.bytes else ""
                shares = row.share_of_peak(name), row.share_of_roof(self.bandwidth, name)
                numbers = t.median, t.low, t.high, t.rounds, t.cores
                writer.writerow([*what, row.name, name, *numbers, *rates, *shares, row.line])
        return text.getvalue()


def write_whole(path: Path, content: str | bytes) -> None:
    """Writes a file all at once: what was there before stays until then."""
    data = content.encode() if isinstance(content, str) else content
    handle, name = tempfile.mkstemp(dir=path.parent or ".", prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.chmod(name, 0o666 & ~_umask())
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def title(report: Report) -> tuple[str, str]:
    """What was measured, and on what."""
    threads = "1 thread" if report.threads == 1 else f"{report.threads} threads"
    whole = " in one piece" if report.whole else ""
    where = threads if report.device == "cpu" else report.device
    what = f"{report.network}{whole}, {report.phase}, batch {report.batch}"
    return (
        f"{what}, {report.dtype}, {report.layout}, {where}",
        f"{report.machine}, {roofs(report)}; {listing(report.versions)}",
    )


def roofs(report: Report) -> str:
    peaks = sorted(row.peak for row in report.rows)
    peak = peaks[len(peaks) // 2] / 1e9
    isa = f"{report.isa}, " if report.isa else ""
    memory = f", memory {report.bandwidth / 1e9:.0f} GB/s" if report.bandwidth else ""
    return f"{isa}peak {peak:.0f} GFLOP/s{memory}"


def listing(versions: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())

"""The result of a comparison: what is kept as JSON, and the table that people read."""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from .._case import Case, parse_case
from .engine import WIDE_SPREAD, Timing, geometric_mean
from .layers import operations


@dataclass(frozen=True)
class Row:
    """One layer."""

    line: str  # the case
    times: dict[str, Timing]  # of compare.candidates()
    peak: float  # floating-point operations per second that the threads in use could do

    @property
    def case(self) -> Case:
        return parse_case(self.line)

    @property
    def torch_layout(self) -> str:
        """The layout in which torch is faster."""
        return min(("nchw", "nhwc"), key=lambda layout: self.times[f"torch {layout}"].median)

    @property
    def torch(self) -> Timing:
        return self.times[f"torch {self.torch_layout}"]

    @property
    def speedup(self) -> float:
        return self.torch.median / self.times["fastsep"].median

    @property
    def share_of_peak(self) -> float:
        return operations(self.case) / self.times["fastsep"].median / self.peak


@dataclass(frozen=True)
class Report:
    network: str
    batch: int
    threads: int
    layout: str  # of fastsep; torch's is the better one for each layer
    isa: str
    machine: str
    versions: dict[str, str]
    rows: list[Row]

    def total(self, name: str) -> float:
        """Seconds for all layers."""
        return sum(row.torch.median if name == "torch" else row.times[name].median for row in self.rows)

    @property
    def geometric_mean(self) -> float:
        return geometric_mean(row.speedup for row in self.rows)

    @property
    def share_of_peak(self) -> float:
        return sum(operations(row.case) / row.peak for row in self.rows) / self.total("fastsep")

    @property
    def title(self) -> str:
        """What was measured, on what."""
        threads = "1 thread" if self.threads == 1 else f"{self.threads} threads"
        peak = statistics.median(row.peak for row in self.rows) / 1e9
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        return (
            f"{self.network}, batch {self.batch}, {self.rows[0].case.dtype}, {self.layout}, {threads}\n"
            f"{self.machine}, {self.isa}, peak {peak:.0f} GFLOP/s; {versions}"
        )

    @property
    def warnings(self) -> list[str]:
        wide = [
            f"{row.case.name or row.line} ({name}, {timing.spread:.0%})"
            for row in self.rows
            for name, timing in (("fastsep", row.times["fastsep"]), ("torch", row.torch))
            if timing.spread > WIDE_SPREAD
        ]
        if not wide:
            return []
        return [f"the machine was busy, these times vary: {', '.join(wide)}. Measure again when it is idle."]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Report:
        rows = [
            Row(row["line"], {name: Timing(**timing) for name, timing in row["times"].items()}, row["peak"])
            for row in values["rows"]
        ]
        return cls(**(values | {"rows": rows}))


def show(report: Report, console: Console) -> None:
    table = Table(
        title=report.title, box=box.SIMPLE_HEAD, show_footer=True, pad_edge=False, padding=(0, 1, 0, 0)
    )
    torch, fastsep, unfrozen = (report.total(name) * 1e3 for name in ("torch", "fastsep", "unfrozen"))
    for header, footer in (
        *(("layer", "sum"), ("shape", "")),
        *(("torch", f"{torch:.3f}"), ("\u00b1%", ""), ("layout", "")),
        *(("fastsep", f"{fastsep:.3f}"), ("\u00b1%", "")),
        *(("speedup", f"{torch / fastsep:.2f}"), ("of peak", f"{report.share_of_peak:.1%}")),
    ):
        left = header in ("layer", "shape", "layout")
        table.add_column(header, footer, justify="left" if left else "right", no_wrap=True)
    for index, row in enumerate(report.rows, 1):
        case = row.case
        table.add_row(
            case.name or str(index),
            f"{case.c}\u00d7{case.h}\u00d7{case.w}\u2192{case.k}",
            *(milliseconds(row.torch), half_spread(row.torch), row.torch_layout),
            *(milliseconds(row.times["fastsep"]), half_spread(row.times["fastsep"])),
            *(f"{row.speedup:.2f}", f"{row.share_of_peak:.1%}"),
        )
    console.print(table)
    for line in (
        f"Geometric mean of the speedups: {report.geometric_mean:.2f}.",
        f"fastsep: frozen layers, {report.layout}; with weights packed at each call {unfrozen:.3f} ms.",
        "torch: its two convolutions and in-place activations, in the layout that is faster.",
        "Median milliseconds, half the interquartile range, and the share of what FMA units alone can do.",
        *(f"[yellow]Warning:[/] {warning}" for warning in report.warnings),
    ):
        console.print(line, highlight=False)


def milliseconds(timing: Timing) -> str:
    return f"{timing.median * 1e3:.3f}"


def half_spread(timing: Timing) -> str:
    return f"[dim]{timing.spread * 50:.1f}[/]"

"""A result as the table that people read."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .engine import Timing
from .report import Report, Row, title


def show(report: Report, console: Console) -> None:
    table = Table(
        title="\n".join(title(report)),
        box=box.SIMPLE_HEAD,
        show_footer=len(report.rows) > 1,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    others = [name for name in report.contenders if name not in ("fastsep", "unfrozen", "torch")]
    table.add_column("layer", "sum", no_wrap=True)
    if not report.whole:
        table.add_column("shape", no_wrap=True)
    heads = [("torch", "torch"), ("\u00b1%", ""), ("layout", ""), ("fastsep", "fastsep"), ("\u00b1%", "")]
    for head, contender in heads:
        footer = milliseconds(report.total(contender)) if contender else ""
        table.add_column(head, footer, justify="left" if head == "layout" else "right", no_wrap=True)
    total = ratio(report.total("torch"), report.total("fastsep"))
    for head, footer in (
        ("speedup", total),
        ("of peak", percent(report.share_of_peak)),
        ("of roof", percent(report.share_of_roof)),
    ):
        table.add_column(head, footer, justify="right", no_wrap=True)
    for name in others:
        table.add_column(name, milliseconds(report.total(name)), justify="right")
        table.add_column("ratio", ratio(report.total(name), report.total("fastsep")), justify="right")
    for row in report.rows:
        table.add_row(*cells(report, row, others))
    console.print(table)
    for line in footnotes(report):
        console.print(line, highlight=False)


def cells(report: Report, row: Row, others: list[str]) -> list[str]:
    torch, fastsep = row.time("torch"), row.time("fastsep")
    case = row.case
    cells = [row.name]
    if case:
        cells.append(f"{case.c}\u00d7{case.h}\u00d7{case.w}\u2192{case.k or case.c * case.m}")
    cells += [median(torch), half_spread(torch), row.torch_layout, median(fastsep), half_spread(fastsep)]
    cells += [f"{row.speedup():.2f}" if row.speedup() else "\u2013"]
    cells += [percent(row.share_of_peak()), percent(row.share_of_roof(report.bandwidth))]
    for name in others:
        timing = row.time(name)
        cells += [median(timing), ratio(timing.median, fastsep.median) if timing and fastsep else "\u2013"]
    return cells


def footnotes(report: Report) -> list[str]:
    mean, unfrozen = report.mean_speedup(), report.total("unfrozen")
    lines = []
    if mean and len(report.rows) > 1:
        lines.append(f"Geometric mean of the speedups: {mean:.2f}.")
    if unfrozen:
        packed = f"with weights packed at each call {milliseconds(unfrozen)} ms"
        lines.append(f"fastsep: frozen layers, {report.layout}; {packed}.")
    lines += [
        "torch: eager, its norms folded into the convolutions, in the layout that is faster."
        if report.whole
        else "torch: its two convolutions and in-place activations, in the layout that is faster.",
        "Median milliseconds, and half the interquartile range. Of peak: the share of what",
        "FMA units alone can do; of roof: of what they or the memory can, where no cache holds the tensors.",
        *(f"[dim]{escape(remark)}[/]" for remark in report.remarks),
        *(f"[yellow]Warning:[/] {escape(warning)}" for warning in report.warnings),
    ]
    return lines


def milliseconds(seconds: float | None) -> str:
    return "\u2013" if seconds is None else f"{seconds * 1e3:.3f}"


def median(timing: Timing | None) -> str:
    return milliseconds(timing.median if timing else None)


def half_spread(timing: Timing | None) -> str:
    return "" if timing is None else f"[dim]{timing.spread * 50:.1f}[/]"


def ratio(seconds: float | None, fastsep: float | None) -> str:
    return f"{seconds / fastsep:.2f}" if seconds and fastsep else "\u2013"


def percent(share: float | None) -> str:
    return "\u2013" if share is None else f"{share:.1%}"

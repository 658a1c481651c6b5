"""A result as a picture: arithmetic per second of each layer beside the roof, and time against size."""

from __future__ import annotations

import importlib.util
import io
import statistics
import sys
import textwrap
from dataclasses import replace
from pathlib import Path
from typing import Any

from .engine import Timing
from .report import Report, Row, title
from .table import milliseconds

SUFFIXES = {".png", ".svg", ".pdf"}
# fastsep stands out; the others are muted. The palette is of Okabe and Ito, apart also to the colour-blind.
COLOURS = {
    "fastsep": "#D55E00",
    "unfrozen": "#E8A87C",
    "torch": "#7F8C9B",
    "eager": "#C3CAD2",
    "compile": "#0072B2",
    "onnxruntime": "#009E73",
    "openvino": "#56B4E9",
    "xnnpack": "#CC79A7",
    "ncnn": "#F0C40F",
    "naive": "#D9D9D9",
}
INK, FAINT = "#22303C", "#8A97A3"
# Beyond so many layers, those that are equal have one bar.
MERGED = 14
# Inches: of the figure at least and at most, and of a letter below the bars.
NARROWEST, WIDEST, LETTER = 12.0, 18.0, 0.068
ERROR_BARS = {"elinewidth": 0.8, "ecolor": INK, "alpha": 0.55}


def check(path: Path) -> None:
    """ValueError where no picture could be drawn there."""
    if path.suffix not in SUFFIXES:
        raise ValueError(f"plot must end in {', '.join(sorted(SUFFIXES))}, got {str(path)!r}")
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("plot needs matplotlib: pip install matplotlib")


def draw(report: Report, kind: str) -> bytes:
    """The picture, in a format that matplotlib knows."""
    buffer = io.BytesIO()
    figure(report).savefig(buffer, format=kind)
    return buffer.getvalue()


def figure(report: Report) -> Any:
    import matplotlib as mpl
    from matplotlib.figure import Figure

    style: dict[str, Any] = {
        "font.size": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": FAINT,
    }
    one, (bars, labels) = len(report.rows) == 1, _bars_of(report)
    width = 8.5 if one else min(WIDEST, max(NARROWEST, _needed(labels)))
    with mpl.rc_context(style):
        made = Figure(figsize=(width, 4.6 if one else 8.4), dpi=160, layout="constrained", facecolor="white")
        layout: Any = made.get_layout_engine()
        layout.set(hspace=0.08, h_pad=0.12, w_pad=0.12)
        what, where = title(report)
        made.suptitle(_headline(report), x=0.012, ha="left", fontsize=16, fontweight="bold", color=INK)
        where = textwrap.fill(where, round(width * (12 if one else 14)))
        made.text(0.012, 0.004, f"{what}\n{where}", fontsize=8.5, color=FAINT, va="bottom")
        if one:
            _times(report, made.subplots())
        else:
            above, below = made.subplots(2, 1, height_ratios=[1.15, 1])
            _bars(report, bars, labels, width, above)
            _sizes(report, below)
        lines = 2 + where.count("\n")
        bottom = lines * (0.032 if one else 0.019) + 0.012
        layout.set(rect=(0, bottom, 1, 1 - bottom))
    return made


def _bars_of(report: Report) -> tuple[list[Row], list[list[str]]]:
    """What has bars of its own, and the lines below each: layers, or where there are many, kinds of them."""
    kinds: dict[object, list[Row]] = {}
    for row in report.rows:
        case = row.case
        same = case is not None and len(report.rows) > MERGED
        kinds.setdefault((case.problem, case.db, case.b) if case and same else len(kinds), []).append(row)
    rows, counts = [_merged(same) for same in kinds.values()], [len(same) for same in kinds.values()]

    def labels(room: int) -> list[list[str]]:
        return [_label(row, count, room) for row, count in zip(rows, counts, strict=True)]

    broken = labels(max(8, int(NARROWEST / (len(rows) + 1) / LETTER) - 1))
    return rows, broken if _needed(broken) <= WIDEST else labels(sys.maxsize)


def _merged(rows: list[Row]) -> Row:
    """Equal layers as one: the median of their medians, and the outermost of their quartiles."""
    if len(rows) == 1:
        return rows[0]
    times = {}
    for name in rows[0].times:
        all_ = [row.times[name] for row in rows if name in row.times]
        low, high = min(t.low for t in all_), max(t.high for t in all_)
        times[name] = Timing(
            statistics.median(t.median for t in all_), low, high, sum(t.rounds for t in all_)
        )
    return replace(rows[0], times=times)


def _headline(report: Report) -> str:
    mean, phase = report.mean_speedup(), "" if report.phase == "forward" else f" {report.phase}"
    if mean is None:
        return f"{report.network}{phase}"
    times = "times as fast as torch" if mean >= 1 else "times the speed of torch"
    return f"{report.network}{phase}: fastsep is {mean:.2f} {times}" + (
        "" if len(report.rows) == 1 else ", in the geometric mean"
    )


def _shown(report: Report) -> list[str]:
    """fastsep first; the same layer with packing in every call is for the table."""
    return sorted((n for n in report.contenders if n != "unfrozen"), key=lambda name: name != "fastsep")


def _rates(row: Row, name: str) -> tuple[float, float, float]:
    """GFLOP/s of a contender, and how far its quartiles lie above and below."""
    t = row.time(name)
    if t is None:
        return 0.0, 0.0, 0.0
    median, high, low = (row.operations / seconds / 1e9 for seconds in (t.median, t.low, t.high))
    return median, high - median, median - low


def _bars(report: Report, rows: list[Row], labels: list[list[str]], width: float, axes: Any) -> None:
    names = _shown(report)
    thickness = 0.84 / len(names)
    for i, name in enumerate(names):
        at = [r + (i - (len(names) - 1) / 2) * thickness for r in range(len(rows))]
        heights, above, below = zip(*(_rates(row, name) for row in rows), strict=True)
        spreads = below, above
        axes.bar(
            at, heights, thickness * 0.94, color=COLOURS[name], label=name, yerr=spreads, error_kw=ERROR_BARS
        )
    room = width / (len(rows) + 1)  # of a layer, in inches
    size = min(9.0, room * 72 / 3.6)  # five letters as wide as 0.6 of their height, and a space
    for r, row in enumerate(rows):
        roof = row.operations / row.roof(report.bandwidth) / 1e9
        axes.plot(
            [r - 0.46, r + 0.46],
            [roof, roof],
            color=INK,
            lw=2,
            label="" if r else "roof",
            solid_capstyle="butt",
        )
        if (speedup := row.speedup()) is not None:
            axes.text(
                *(r, roof * 1.015, f"{speedup:.2f}\u00d7"),
                ha="center",
                va="bottom",
                color=INK,
                fontsize=max(size, 6.0),
                rotation=0 if size >= 6 else 90,
            )
    upright = width >= _needed(labels)
    axes.set_xticks(
        range(len(rows)),
        [("\n" if upright else "  ").join(label) for label in labels],
        fontsize=8 if upright else min(8.0, room * 72 / 1.4),
        rotation=0 if upright else 90,
    )
    axes.tick_params(length=0)
    axes.set_ylabel("GFLOP/s")
    axes.set_xlim(-0.6, len(rows) - 0.4)
    axes.margins(y=0.1 if size >= 6 else 0.2)
    axes.set_title(
        "Arithmetic per second, and over each layer the speedup over torch",
        loc="left",
        fontsize=10,
        color=INK,
        pad=6 if len(names) <= 4 else 26,  # above the legend, where that needs the width
    )
    axes.legend(ncols=len(names) + 1, frameon=False, loc="lower right", bbox_to_anchor=(1, 1), fontsize=9)


def _needed(labels: list[list[str]]) -> float:
    """Inches in which labels have room beside each other, with a letter between them."""
    longest = max((len(line) for label in labels for line in label), default=0)
    return (len(labels) + 1) * (longest + 1) * LETTER


def _label(row: Row, count: int, room: int) -> list[str]:
    """Lines: the name, broken where it has more letters than there is room for; kernel, channels, size."""
    name, line = [], ""
    for part in row.name.replace("/", "/\0").replace(".", ".\0").split("\0"):
        if line and len(line) + len(part) > room:
            name.append(line)
            line = ""
        line += part
    name.append(line)
    case = row.case
    if case is None:
        return name
    stride = f"/{case.sh}" if case.sh > 1 else ""
    dilation = f" d{case.dh}" if case.dh > 1 else ""
    return [
        *name,
        f"{case.kh}\u00d7{case.kw}{stride}{dilation}",
        f"{case.c}\u2192{case.k or case.c * case.m}",
        f"{case.h}\u00d7{case.w}",
        *([f"{count} layers"] if count > 1 else []),
    ]


def _sizes(report: Report, axes: Any) -> None:
    from matplotlib.ticker import FuncFormatter, NullLocator

    for name in reversed(_shown(report)):
        points = sorted(
            (row.operations / 1e6, t.median * 1e3) for row in report.rows if (t := row.time(name)) is not None
        )
        axes.plot(*zip(*points, strict=True), "o", ms=8 if name == "fastsep" else 6, color=COLOURS[name],
                  mec="white", mew=0.8, label=name, zorder=3)  # fmt: skip
    floor = sorted((row.operations / 1e6, row.roof(report.bandwidth) * 1e3) for row in report.rows)
    axes.plot(*zip(*floor, strict=True), "-", color=INK, lw=1.6, label="roof", zorder=2)
    axes.set_xscale("log")
    axes.set_yscale("log")
    for axis in (axes.xaxis, axes.yaxis):
        low, high = axis.get_view_interval()
        axis.set_major_locator(_ticks(high / low))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.10g}"))
        axis.set_minor_locator(NullLocator())
        axis.set_tick_params(labelsize=8)
    axes.grid(color="#E6EAED", lw=0.7)
    axes.set_axisbelow(True)
    axes.set_xlabel("million operations of a layer")
    axes.set_ylabel("milliseconds")
    axes.set_title(
        "Time against size: the nearer to the line, the less is wasted", loc="left", fontsize=10, color=INK
    )


def _ticks(span: float) -> Any:
    """Of a logarithmic axis whose ends are so far apart, as many as there is room for."""
    from matplotlib.ticker import LogLocator, MaxNLocator

    if span < 4:
        return MaxNLocator(6, steps=[1, 2, 5, 10])
    subs = (1, 2, 3, 4, 5, 6, 8) if span < 10 else (1, 2, 5) if span < 1e5 else (1,)
    return LogLocator(subs=subs, numticks=100)


def _times(report: Report, axes: Any) -> None:
    """Bars of one row: the time of each contender, the fastest first."""
    (row,) = report.rows
    times = {name: t for name in _shown(report) if (t := row.time(name)) is not None}
    names = sorted(times, key=lambda name: -times[name].median)
    for y, name in enumerate(names):
        t = times[name]
        reach = [[(t.median - t.low) * 1e3], [(t.high - t.median) * 1e3]]
        axes.barh(y, t.median * 1e3, 0.7, color=COLOURS[name], xerr=reach, error_kw=ERROR_BARS)
        ratio = row.speedup(name)
        note = f"  {milliseconds(t.median)} ms" + (
            f"   {ratio:.2f}\u00d7" if ratio and name != "fastsep" else ""
        )
        axes.text(t.high * 1e3, y, note, va="center", fontsize=9, color=INK)
    roof = row.roof(report.bandwidth) * 1e3
    axes.axvline(roof, color=INK, lw=2)
    axes.text(roof, len(names) - 0.45, " roof", fontsize=9, color=INK, va="bottom")
    axes.set_yticks(range(len(names)), names)
    axes.tick_params(axis="y", length=0)
    axes.margins(x=0.22)
    axes.set_xlabel("milliseconds, median and quartiles; beside them the ratio to fastsep")

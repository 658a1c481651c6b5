"""A result as a picture: arithmetic per second of each layer beside the roof, and time against size."""

from __future__ import annotations

import importlib.util
import io
import textwrap
from pathlib import Path
from typing import Any

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
ERROR_BARS = {"elinewidth": 0.8, "ecolor": INK, "alpha": 0.55}


def check(path: Path) -> None:
    """ValueError where no picture could be drawn there."""
    if path.suffix not in SUFFIXES:
        raise ValueError(f"plot must end in {', '.join(sorted(SUFFIXES))}, got {str(path)!r}")
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("plot needs matplotlib: pip install matplotlib")


def draw(report: Report, kind: str) -> bytes:
    """The picture, in a format that matplotlib knows."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    style: dict[str, Any] = {
        "font.size": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": FAINT,
    }
    with mpl.rc_context(style):
        one = len(report.rows) == 1
        figure = Figure(
            figsize=(8.5, 4.6) if one else (12, 8.4), dpi=160, layout="constrained", facecolor="white"
        )
        layout: Any = figure.get_layout_engine()
        layout.set(hspace=0.08, h_pad=0.12, w_pad=0.12)
        what, where = title(report)
        figure.suptitle(_headline(report), x=0.012, ha="left", fontsize=16, fontweight="bold", color=INK)
        where = textwrap.fill(where, 100 if one else 170)
        figure.text(0.012, 0.004, f"{what}\n{where}", fontsize=8.5, color=FAINT, va="bottom")
        if one:
            _times(report, figure.subplots())
        else:
            above, below = figure.subplots(2, 1, height_ratios=[1.15, 1])
            _bars(report, above)
            _sizes(report, below)
        lines = 2 + where.count("\n")
        bottom = lines * (0.032 if one else 0.019) + 0.012
        layout.set(rect=(0, bottom, 1, 1 - bottom))
        buffer = io.BytesIO()
        figure.savefig(buffer, format=kind)
    return buffer.getvalue()


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


def _bars(report: Report, axes: Any) -> None:
    names = _shown(report)
    width = 0.84 / len(names)
    for i, name in enumerate(names):
        at = [r + (i - (len(names) - 1) / 2) * width for r in range(len(report.rows))]
        heights, above, below = zip(*(_rates(row, name) for row in report.rows), strict=True)
        spreads = below, above
        axes.bar(
            at, heights, width * 0.94, color=COLOURS[name], label=name, yerr=spreads, error_kw=ERROR_BARS
        )
    for r, row in enumerate(report.rows):
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
                r, roof * 1.015, f"{speedup:.2f}\u00d7", ha="center", va="bottom", fontsize=9, color=INK
            )
    axes.set_xticks(range(len(report.rows)), [_label(row) for row in report.rows], fontsize=8)
    axes.tick_params(length=0)
    axes.set_ylabel("GFLOP/s")
    axes.set_xlim(-0.6, len(report.rows) - 0.4)
    axes.margins(y=0.1)
    axes.set_title(
        "Arithmetic per second, and over each layer the speedup over torch",
        loc="left",
        fontsize=10,
        color=INK,
    )
    axes.legend(ncols=len(names) + 1, frameon=False, loc="lower right", bbox_to_anchor=(1, 1), fontsize=9)


def _label(row: Row) -> str:
    case = row.case
    if case is None:
        return str(row.name)
    stride = f"/{case.sh}" if case.sh > 1 else ""
    dilation = f" d{case.dh}" if case.dh > 1 else ""
    kernel, channels = (
        f"{case.kh}\u00d7{case.kw}{stride}{dilation}",
        f"{case.c}\u2192{case.k or case.c * case.m}",
    )
    return f"{row.name}\n{kernel}\n{channels}\n{case.h}\u00d7{case.w}"


def _sizes(report: Report, axes: Any) -> None:
    from matplotlib.ticker import ScalarFormatter

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
        for formatter in (axis.set_major_formatter, axis.set_minor_formatter):
            formatter(ScalarFormatter())
        axis.set_tick_params(which="both", labelsize=8)
    axes.grid(which="both", color="#E6EAED", lw=0.7)
    axes.set_axisbelow(True)
    axes.set_xlabel("million operations of a layer")
    axes.set_ylabel("milliseconds")
    axes.set_title(
        "Time against size: the nearer to the line, the less is wasted", loc="left", fontsize=10, color=INK
    )


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

"""Writes the tables and plots of README.md from benchmarks/results/.

A machine is a folder there, with what `python -m fastsep bench --json` and benchmarks/training_step.py --json
wrote; that with the most results goes first. Its mobilenet_v1.json is shown layer by layer and drawn, so are
gradients of the depthwise half on each machine; the others take a line each.

    python benchmarks/update_readme.py [--check]

With --check it writes nothing, and exits with 1 where README.md does not show what the files say; with 2,
and nothing written, where a file is of another version or README.md lacks the lines between which results go.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

import training_step

from fastsep._case import LAYOUTS, Case
from fastsep.bench import plot
from fastsep.bench.engine import WIDE_SPREAD
from fastsep.bench.report import Report, Row, title, write_whole
from fastsep.bench.table import median, milliseconds

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- results: benchmarks/update_readme.py -->\n", "<!-- end of results -->\n"
DOUBTFUL = "\u2020"

# Of a whole network, in the order of the table; who took no part in any result is left out.
RUNTIMES = ["eager", "torch", "compile", "ncnn", "onnxruntime", "openvino", "xnnpack", "fastsep"]
PLOTS = {"mobilenet_v1": "The time of each layer", "sizes": "One layer at growing sizes"}


def row_of(*cells: object) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def head(left: list[str], right: list[str]) -> list[str]:
    """The first two lines of a table: its columns, words to the left, numbers to the right."""
    return [row_of(*left, *right), "|" + "---|" * len(left) + "--:|" * len(right)]


def marked(name: str, doubtful: object) -> str:
    """A name with the sign of the footnote, where the times behind it are not to be trusted."""
    return f"{name} {DOUBTFUL}" if doubtful else name


def half(spread: float) -> str:
    """Half an interquartile range, in percent of the median."""
    return f"{spread * 50:.1f}"


def detail(report: Report) -> str:
    """One result, layer by layer."""
    what, where = title(report)
    torch, fused = report.total("torch"), report.total("fastsep")
    share = sum(row.operations / row.peak for row in report.rows) / torch
    mean = (
        f"Geometric mean of the speedups: {report.mean_speedup():.2f}; torch reaches {share:.0%} of the peak."
    )
    right = ["output channels", "stride", "torch, ms", "fastsep, ms", "speedup", "of peak"]
    lines = [f"**{what}**; {where}. {mean}\n", *head(["layer", "input"], right)]
    for row in report.rows:
        case, timing = row.case, row.time("torch")
        lines.append(
            row_of(
                *(marked(row.name, report.doubts(row)), f"{case.c} x {case.h} x {case.w}", case.k, case.sh),
                *(f"{median(timing)} ({row.torch_layout})", median(row.time("fastsep"))),
                *(f"{row.speedup():.2f}", f"{row.share_of_peak():.0%}"),
            )
        )
    sums = milliseconds(torch), milliseconds(fused), f"{torch / fused:.2f}", f"{report.share_of_peak:.0%}"
    return "\n".join([*lines, row_of("sum", "", "", "", *sums)])


def summary(reports: list[Report]) -> str:
    """Sums over the layers of several results, and the medians of the layers' spreads."""

    def columns(report: Report, name: str) -> tuple[str, str]:
        spread = statistics.median(row.time(name).spread for row in report.rows)
        return milliseconds(report.total(name)), half(spread)

    rows = [
        row_of(
            *(marked(report.network, report.warnings), report.phase, report.isa, report.layout),
            *(report.batch, report.threads, *columns(report, "torch"), *columns(report, "fastsep")),
            *(milliseconds(report.total("unfrozen")), f"{report.mean_speedup():.2f}"),
            f"{report.share_of_peak:.0%}",
        )
        for report in reports
    ]
    right = [
        "batch",
        "threads",
        "torch ms",
        "\u00b1%",
        "fastsep ms",
        "\u00b1%",
        "unfrozen",
        "speedup",
        "of peak",
    ]
    return "\n".join([*head(["layers", "phase", "kernels", "format"], right), *rows])


def depthwise(reports: list[Report]) -> str:
    """Gradients of the depthwise half alone, layer by layer: a mean would hide how far they differ."""
    ordered = sorted(reports, key=lambda report: (report.phase, -list(LAYOUTS).index(report.layout)))
    first = ordered[0]
    for what in ("batch", "threads", "isa"):
        if len({getattr(report, what) for report in ordered}) > 1:
            raise ValueError(f"the results of depthwise layers must be of one {what} for one table")
    heads = [f"{report.phase}, {report.layout}" for report in ordered]
    lines = head(["kernel and input"], heads)
    for rows in zip(*(report.rows for report in ordered), strict=True):
        (layer,) = {described(row.case) for row in rows}
        cells = [
            marked(gradient(row, report.layout), report.doubts(row))
            for row, report in zip(rows, ordered, strict=True)
        ]
        lines.append(row_of(layer, *cells))
    what = f"Gradients of depthwise convolutions, batch {first.batch}, {first.isa}"
    shown = (
        "milliseconds of fastsep, and its speedups over torch in the same format and in torch's better one"
    )
    return f"**{what}**: {shown}.\n\n" + "\n".join(lines)


def described(case: Case) -> str:
    dilation = f", dilation {case.dh}" if case.dh > 1 else ""
    return f"{case.kh} x {case.kw}{dilation}; {case.c} x {case.h} x {case.w}"


def gradient(row: Row, layout: str) -> str:
    return f"{median(row.time('fastsep'))}; {row.speedup(f'torch {layout}'):.2f}, {row.speedup():.2f}"


def whole(reports: list[Report]) -> str:
    """Networks in one piece, in milliseconds, and each contender's time as a multiple of fastsep's."""
    taking_part = [name for name in RUNTIMES if any(name in report.contenders for report in reports)]
    lines = head(["network"], ["fused", "error", "batch", "threads", *taking_part])
    for report in sorted(reports, key=lambda report: (report.batch, report.threads)):
        (row,) = report.rows
        error = "" if row.error is None else f"{row.error:.0e}"
        name = marked(report.network, report.warnings)
        what = name, row.fused, error, report.batch, report.threads
        lines.append(row_of(*what, *(with_ratio(row, name) for name in taking_part)))
    return "\n".join(lines)


def with_ratio(row: Row, name: str) -> str:
    """Milliseconds, and how many times what fastsep takes."""
    ratio = row.speedup(name)
    times = milliseconds(timing.median) if (timing := row.time(name)) else ""
    return times if name == "fastsep" or ratio is None else f"{times} ({ratio:.2f})"


def steps(results: list[dict]) -> str:
    """Training steps, as training_step.py measured them."""
    right = ["batch", "threads", "torch ms", "\u00b1%", "fastsep ms", "\u00b1%", "speedup"]
    lines = head(["training step", "format"], [*right, "torch MB", "fastsep MB", "less"])
    for result in results:
        for layout in LAYOUTS:
            torch, fused = (result["rows"].get(f"{library} {layout}") for library in ("torch", "fastsep"))
            if torch is None:
                continue
            speedup, less = torch["seconds"] / fused["seconds"], 1 - fused["memory"] / torch["memory"]
            times = [
                cell for row in (torch, fused) for cell in (milliseconds(row["seconds"]), half(row["spread"]))
            ]
            memory = f"{torch['memory'] / 1e6:.0f}", f"{fused['memory'] / 1e6:.0f}", f"{less:.0%}"
            name = marked(result["network"], max(torch["spread"], fused["spread"]) > WIDE_SPREAD)
            what = name, layout, result["batch"], result["threads"]
            lines.append(row_of(*what, *times, f"{speedup:.2f}", *memory))
    return "\n".join(lines)


def read(path: Path) -> Report | dict:
    """A result of bench or of training_step.py; ValueError in a sentence where it is none of this version."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise ValueError(f"{path} is no JSON") from None
    if not isinstance(values, dict) or values.get("kind") != training_step.KIND:
        try:
            return Report.from_json(values)
        except ValueError as error:
            raise ValueError(f"{path} {error}") from None
    if values.get("format") != training_step.FORMAT:
        formats = f"format {values.get('format')}, this version reads format {training_step.FORMAT}"
        raise ValueError(f"{path} is a training step of {formats}")
    return values


def machine(folder: Path, *, layer_by_layer: bool) -> str:
    """All results of one machine in Markdown."""
    results = {path.stem: read(path) for path in sorted(folder.glob("*.json"))}
    reports = {name: result for name, result in results.items() if isinstance(result, Report)}
    if layer_by_layer:
        parts = [detail(reports["mobilenet_v1"])] if "mobilenet_v1" in reports else []
        for name, text in PLOTS.items():
            if name in reports:
                parts.append(f"![{text}]({folder.relative_to(ROOT)}/{name}.png)")
    else:
        parts = [f"**{title(report)[1]}**" for report in [*reports.values()][:1]]
    layers = [report for report in reports.values() if not report.whole]
    for show, chosen in (
        (summary, [report for report in layers if report.network != "depthwise"]),
        (depthwise, [report for report in layers if report.network == "depthwise"]),
        (whole, [report for report in reports.values() if report.whole]),
        (steps, [result for result in results.values() if not isinstance(result, Report)]),
    ):
        if chosen:
            parts.append(show(chosen))
    if any(DOUBTFUL in part for part in parts):
        parts.append(
            f"{DOUBTFUL} To be measured again: the quartiles of a contender lie more than {WIDE_SPREAD:.0%} "
            "apart, or it kept other cores busy."
        )
    return "\n\n".join(parts) + "\n"


def draw(folder: Path) -> None:
    """The plots that README.md shows, from the results of the same name."""
    for name in PLOTS:
        path = folder / f"{name}.json"
        if path.exists():
            write_whole(folder / f"{name}.png", plot.draw(read(path), "png"))


def updated(text: str, folders: list[Path]) -> str:
    """README.md with the results of now; ValueError where it does not tell where they belong."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"README.md must hold the lines {BEGIN.strip()} and {END.strip()}, in this order")
    tables = [machine(folder, layer_by_layer=i == 0) + "\n" for i, folder in enumerate(folders)]
    return before + BEGIN + "\n" + "\n".join(tables) + END + after


def main() -> int:
    """0; 1 where README.md is not up to date; 2 where it cannot be."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--check", action="store_true", help="write nothing, tell whether there is something to"
    )
    arguments = parser.parse_args()
    readme = ROOT / "README.md"
    folders = [path for path in (ROOT / "benchmarks" / "results").iterdir() if path.is_dir()]
    folders.sort(key=lambda folder: (-len(list(folder.glob("*.json"))), folder.name))
    try:
        text = readme.read_text(encoding="utf-8")
        now = updated(text, folders)
        if not arguments.check:
            for folder in folders[:1]:
                draw(folder)
            write_whole(readme, now)
    except (OSError, ValueError) as error:
        print(f"update_readme: {error}", file=sys.stderr)
        return 2
    if arguments.check and now != text:
        print("README.md is not up to date: python benchmarks/update_readme.py", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Writes the tables and plots of README.md from benchmarks/results/.

A machine is a folder there, with what `python -m fastsep bench --json` and benchmarks/training_step.py --json
wrote. Its mobilenet_v1.json is shown layer by layer and drawn, the others in a line each.

    python benchmarks/update_readme.py [--check]

With --check it writes nothing, and fails where README.md does not show what the files say.
"""

import json
import sys
from pathlib import Path

from fastsep._case import LAYOUTS
from fastsep.bench import plot
from fastsep.bench.report import Report, Row, title, write_whole
from fastsep.bench.table import median, milliseconds

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- results: benchmarks/update_readme.py -->\n", "<!-- end of results -->\n"

DETAIL = """\
| layer | input | output channels | stride | torch, ms | fastsep, ms | speedup | of peak |
|---|---|--:|--:|--:|--:|--:|--:|"""

SUMMARY = """\
| layers | phase | kernels | format | batch | threads | torch ms | fastsep ms | unfrozen | speedup | of peak |
|---|---|---|---|--:|--:|--:|--:|--:|--:|--:|"""

STEPS = """\
| training step | batch | threads | format | torch ms | fastsep ms | speedup | torch MB | fastsep MB | less |
|---|--:|--:|---|--:|--:|--:|--:|--:|--:|"""

# Of a whole network, in the order of the table; who took no part in any result is left out.
RUNTIMES = ["eager", "torch", "compile", "ncnn", "onnxruntime", "openvino", "xnnpack", "fastsep"]
PLOTS = {"mobilenet_v1": "The time of each layer", "sizes": "One layer at growing sizes"}


def row_of(*cells: object) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def detail(report: Report) -> str:
    """One result, layer by layer."""
    what, where = title(report)
    mean = f"Geometric mean of the speedups: {report.mean_speedup():.2f}."
    lines = [f"**{what}**; {where}. {mean}\n", DETAIL]
    for row in report.rows:
        case, torch = row.case, row.time("torch")
        lines.append(
            row_of(
                *(row.name, f"{case.c} x {case.h} x {case.w}", case.k, case.sh),
                *(f"{median(torch)} ({row.torch_layout})", median(row.time("fastsep"))),
                *(f"{row.speedup():.2f}", f"{row.share_of_peak():.0%}"),
            )
        )
    torch, fused = report.total("torch"), report.total("fastsep")
    sums = milliseconds(torch), milliseconds(fused), f"{torch / fused:.2f}", f"{report.share_of_peak:.0%}"
    return "\n".join([*lines, row_of("sum", "", "", "", *sums)])


def summary(reports: list[Report]) -> str:
    """Sums over the layers of several results."""
    rows = [
        row_of(
            *(report.network, report.phase, report.isa, report.layout, report.batch, report.threads),
            *(milliseconds(report.total(name)) for name in ("torch", "fastsep", "unfrozen")),
            *(f"{report.mean_speedup():.2f}", f"{report.share_of_peak:.0%}"),
        )
        for report in reports
    ]
    return "\n".join([SUMMARY, *rows])


def whole(reports: list[Report]) -> str:
    """Networks in one piece, in milliseconds, and each contender's time as a multiple of fastsep's."""
    taking_part = [name for name in RUNTIMES if any(name in report.contenders for report in reports)]
    lines = [row_of("network", "fused", "error", "batch", "threads", *taking_part)]
    lines.append("|---|" + "--:|" * (4 + len(taking_part)))
    for report in sorted(reports, key=lambda report: (report.batch, report.threads)):
        (row,) = report.rows
        error = "" if row.error is None else f"{row.error:.0e}"
        what = report.network, row.fused, error, report.batch, report.threads
        lines.append(row_of(*what, *(with_ratio(row, name) for name in taking_part)))
    return "\n".join(lines)


def with_ratio(row: Row, name: str) -> str:
    """Milliseconds, and how many times what fastsep takes."""
    ratio = row.speedup(name)
    times = milliseconds(timing.median) if (timing := row.time(name)) else ""
    return times if name == "fastsep" or ratio is None else f"{times} ({ratio:.2f})"


def steps(results: list[dict]) -> str:
    """Training steps, as training_step.py measured them."""
    lines = [STEPS]
    for result in results:
        for layout in LAYOUTS:
            torch, fused = (result["rows"].get(f"{library} {layout}") for library in ("torch", "fastsep"))
            if torch is None:
                continue
            speedup, less = torch["seconds"] / fused["seconds"], 1 - fused["memory"] / torch["memory"]
            times = milliseconds(torch["seconds"]), milliseconds(fused["seconds"]), f"{speedup:.2f}"
            memory = f"{torch['memory'] / 1e6:.0f}", f"{fused['memory'] / 1e6:.0f}", f"{less:.0%}"
            what = result["network"], result["batch"], result["threads"], layout
            lines.append(row_of(*what, *times, *memory))
    return "\n".join(lines)


def machine(folder: Path) -> str:
    """All results of one machine in Markdown."""
    files = {
        path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))
    }
    reports = {name: Report.from_json(values) for name, values in files.items() if "format" in values}
    parts = [detail(reports["mobilenet_v1"])] if "mobilenet_v1" in reports else []
    for name, text in PLOTS.items():
        if name in reports:
            parts.append(f"![{text}]({folder.relative_to(ROOT)}/{name}.png)")
    for show, chosen in (
        (summary, [report for report in reports.values() if not report.whole]),
        (whole, [report for report in reports.values() if report.whole]),
        (steps, [values for values in files.values() if "format" not in values]),
    ):
        if chosen:
            parts.append(show(chosen))
    return "\n\n".join(parts) + "\n"


def draw(folder: Path) -> None:
    """The plots that README.md shows, from the results of the same name."""
    for name in PLOTS:
        path = folder / f"{name}.json"
        if path.exists():
            report = Report.from_json(json.loads(path.read_text(encoding="utf-8")))
            write_whole(folder / f"{name}.png", plot.draw(report, "png"))


def main() -> str | None:
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    folders = sorted(path for path in (ROOT / "benchmarks" / "results").iterdir() if path.is_dir())
    updated = before + BEGIN + "\n" + "\n".join(machine(folder) + "\n" for folder in folders) + END + after
    if "--check" in sys.argv[1:]:
        return None if updated == text else "README.md is not up to date: python benchmarks/update_readme.py"
    for folder in folders:
        draw(folder)
    readme.write_text(updated, encoding="utf-8")
    return None


if __name__ == "__main__":
    sys.exit(main())

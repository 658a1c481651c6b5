"""Writes the tables of README.md from benchmarks/results/, which `python -m fastsep bench --json` printed.

A machine is a folder there. Its mobilenet_v1.json is shown layer by layer, the others in a line each.

    python benchmarks/update_readme.py [--check]

With --check it writes nothing, and fails where README.md does not show what the files say.
"""

import json
import sys
from pathlib import Path

from fastsep.bench.report import Report

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- results: benchmarks/update_readme.py -->\n", "<!-- end of results -->\n"


DETAIL = """\
| layer | input | output channels | stride | torch, ms | fastsep, ms | speedup | of peak |
|---|---|--:|--:|--:|--:|--:|--:|"""

SUMMARY = """\
| layers | kernels | format | batch | threads | torch, ms | fastsep, ms | unfrozen, ms | speedup | of peak |
|---|---|---|--:|--:|--:|--:|--:|--:|--:|"""


def milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.3f}"


def row_of(*cells: object) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def detail(report: Report) -> str:
    """One result, layer by layer."""
    what, _, where = report.title.partition("\n")
    mean = f"Geometric mean of the speedups: {report.geometric_mean:.2f}."
    lines = [f"**{what}**; {where}. {mean}\n", DETAIL]
    for row in report.rows:
        case, fastsep = row.case, row.times["fastsep"]
        lines.append(
            row_of(
                *(case.name, f"{case.c} x {case.h} x {case.w}", case.k, case.sh),
                *(f"{milliseconds(row.torch.median)} ({row.torch_layout})", milliseconds(fastsep.median)),
                *(f"{row.speedup:.2f}", f"{row.share_of_peak:.0%}"),
            )
        )
    torch, fused = report.total("torch"), report.total("fastsep")
    sums = milliseconds(torch), milliseconds(fused), f"{torch / fused:.2f}", f"{report.share_of_peak:.0%}"
    return "\n".join([*lines, row_of("sum", "", "", "", *sums)])


def summary(reports: list[Report]) -> str:
    """Sums over the layers of several results."""
    rows = [
        row_of(
            *(report.network, report.isa, report.layout, report.batch, report.threads),
            *(milliseconds(report.total(name)) for name in ("torch", "fastsep", "unfrozen")),
            *(f"{report.geometric_mean:.2f}", f"{report.share_of_peak:.0%}"),
        )
        for report in reports
    ]
    return "\n".join([SUMMARY, *rows])


def machine(folder: Path) -> str:
    """All results of one machine in Markdown."""
    reports = {
        path.stem: Report.from_json(json.loads(path.read_text(encoding="utf-8")))
        for path in sorted(folder.glob("*.json"))
    }
    return f"{detail(reports['mobilenet_v1'])}\n\n{summary(list(reports.values()))}\n"


def main() -> str | None:
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    folders = sorted(path for path in (ROOT / "benchmarks" / "results").iterdir() if path.is_dir())
    updated = before + BEGIN + "\n" + "\n".join(machine(folder) + "\n" for folder in folders) + END + after
    if "--check" in sys.argv[1:]:
        return None if updated == text else "README.md is not up to date: python benchmarks/update_readme.py"
    readme.write_text(updated, encoding="utf-8")
    return None


if __name__ == "__main__":
    sys.exit(main())

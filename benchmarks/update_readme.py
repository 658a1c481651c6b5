"""Writes the tables of README.md from benchmarks/results/*.json, which `fastsep bench --json` printed.

    python benchmarks/update_readme.py [--check]

With --check it writes nothing, and fails where README.md does not show what the files say.
"""

import json
import sys
from pathlib import Path

from fastsep.bench.report import Report

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- results: benchmarks/update_readme.py -->\n", "<!-- end of results -->\n"


HEADER = """\
| layer | input | output channels | stride | torch, ms | fastsep, ms | speedup | of peak |
|---|---|--:|--:|--:|--:|--:|--:|"""


def milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.3f}"


def table(report: Report) -> str:
    """One result in Markdown."""
    what, _, where = report.title.partition("\n")
    mean = f"Geometric mean of the speedups: {report.geometric_mean:.2f}."
    lines = [f"**{what}**; {where}. {mean}\n", HEADER]
    for row in report.rows:
        case, fastsep = row.case, row.times["fastsep"]
        cells = [case.name, f"{case.c} x {case.h} x {case.w}", str(case.k), str(case.sh)]
        cells += [f"{milliseconds(row.torch.median)} ({row.torch_layout})", milliseconds(fastsep.median)]
        cells += [f"{row.speedup:.2f}", f"{row.share_of_peak:.0%}"]
        lines.append(f"| {' | '.join(cells)} |")
    torch, fused = report.total("torch"), report.total("fastsep")
    cells = ["sum", "", "", "", milliseconds(torch), milliseconds(fused)]
    cells += [f"{torch / fused:.2f}", f"{report.share_of_peak:.0%}"]
    lines.append(f"| {' | '.join(cells)} |\n")
    return "\n".join(lines)


def main() -> str | None:
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    results = sorted((ROOT / "benchmarks" / "results").glob("*.json"))
    tables = [table(Report.from_json(json.loads(path.read_text(encoding="utf-8")))) for path in results]
    updated = before + BEGIN + "\n" + "\n".join(f"{table}\n" for table in tables) + END + after
    if "--check" in sys.argv[1:]:
        return None if updated == text else "README.md is not up to date: python benchmarks/update_readme.py"
    readme.write_text(updated, encoding="utf-8")
    return None


if __name__ == "__main__":
    sys.exit(main())

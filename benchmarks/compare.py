"""Two results of `python -m fastsep bench --json`, layer by layer: what became slower, beyond their spread.

    python benchmarks/compare.py BEFORE.json NOW.json [--contender fastsep]

It exits with 1 where a layer's lower quartile now is above the upper quartile before, and its median by more
than 3 %; with 2 where a file is no result, one of another version, or one of another measurement. That the
machines or their kernels differ is said, for it may be what is to be compared.
"""

import argparse
import json
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from fastsep.bench.engine import Timing, geometric_mean
from fastsep.bench.report import Report

# Slower by less than this is not worth a word, however sharp the measurement.
ALLOWED = 0.03


def read(path: Path) -> Report:
    """ValueError in a sentence where it is no result that this version reads."""
    try:
        return Report.from_json(json.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise ValueError(f"{path} is no JSON") from None
    except ValueError as error:
        raise ValueError(f"{path} {error}") from None


def is_slower(before: Timing, now: Timing) -> bool:
    return now.low > before.high and now.median > before.median * (1 + ALLOWED)


def is_faster(before: Timing, now: Timing) -> bool:
    return now.high < before.low and now.median < before.median / (1 + ALLOWED)


def pairs(before: Report, now: Report, contender: str) -> list[tuple[str, Timing, Timing]]:
    """The layers of both; ValueError where they are not the same."""
    for what in ("network", "whole", "phase", "dtype", "layout", "device", "threads", "batch"):
        if getattr(before, what) != getattr(now, what):
            raise ValueError(f"the results differ in {what}: {getattr(before, what)}, {getattr(now, what)}")
    if [(row.name, row.line) for row in before.rows] != [(row.name, row.line) for row in now.rows]:
        raise ValueError("the results are of different layers")
    if not before.rows:
        raise ValueError("the results are of no layers")
    found = []
    for old, new in zip(before.rows, now.rows, strict=True):
        times = old.time(contender), new.time(contender)
        if None in times:
            raise ValueError(f"{contender} took no part in {old.name}")
        found.append((old.name, *times))
    return found


def interval(before: Timing, now: Timing) -> str:
    """How far the ratio lies, at the least and at the most, if each time may be any between its quartiles."""
    return f"{now.low / before.high:.3f} to {now.high / before.low:.3f}"


def show(before: Report, now: Report, console: Console, contender: str = "fastsep") -> bool:
    """Prints the table; whether no layer became slower."""
    table = Table(title=f"{contender}, {now.network}, {now.phase}, batch {now.batch}")
    for head in ("layer", "before, ms", "\u00b1%", "now, ms", "\u00b1%", "ratio", "between", ""):
        table.add_column(head, justify="left" if head in ("layer", "") else "right")
    slower = False
    rows = pairs(before, now, contender)
    for name, old, new in rows:
        word = "slower" if is_slower(old, new) else "faster" if is_faster(old, new) else ""
        slower |= word == "slower"
        cells = [cell for t in (old, new) for cell in (f"{t.median * 1e3:.3f}", f"{t.spread * 50:.1f}")]
        table.add_row(name, *cells, f"{new.median / old.median:.3f}", interval(old, new), word)
    console.print(table)
    for what in ("isa", "machine"):
        then, today = getattr(before, what), getattr(now, what)
        if then != today:
            console.print(f"Not the same {what}: {then}, {today}.", markup=False)
    mean = geometric_mean(new.median / old.median for _, old, new in rows)
    console.print(f"Geometric mean of the ratios: {mean:.3f}.")
    return not slower


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("before", type=Path)
    parser.add_argument("now", type=Path)
    parser.add_argument("--contender", default="fastsep", help="whose times (default: %(default)s)")
    arguments = parser.parse_args()
    try:
        passed = show(read(arguments.before), read(arguments.now), Console(width=100), arguments.contender)
    except ValueError as error:
        print(f"compare: {error}", file=sys.stderr)
        return 2
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())

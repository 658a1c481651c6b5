"""What the rows of gpu_matrix.py come to: a summary, targets met or not, factors for the planner, a table."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from fastsep import _cuda_model, _native, _plan
from fastsep._activations import ACTIVATIONS
from fastsep._case import LAYOUTS, Case, parse_case
from fastsep.bench.engine import geometric_mean
from fastsep.bench.layers import load

TOLERANCE = 1.03  # how much longer than torch's two convolutions a layer may take
OFFENDERS = 12  # so many of those that take longer are listed


def best(row: dict, name: str) -> float | None:
    """Median of a contender in its better layout."""
    found = [
        row["seconds"][f"{name} {layout}"][1] for layout in LAYOUTS if f"{name} {layout}" in row["seconds"]
    ]
    return min(found, default=None)


# ---- the layers of MobileNetV1, which has some of them several times


def half(case: Case) -> Case:
    """The depthwise half alone."""
    return replace(case, k=0, b=0, act="identity", name=f"{case.name}_depthwise")


def _identity(case: Case) -> tuple:
    return replace(case, n=1, dtype="float32", layout="nchw").problem, case.db, case.b


@lru_cache
def repetitions() -> Counter:
    """How often MobileNetV1 has a layer, or a depthwise half, by what it is."""
    layers = load("mobilenet_v1").layers
    return Counter(_identity(part) for case in layers for part in (case, half(case)))


def weight_of(row: dict) -> int:
    """0 for what MobileNetV1 does not have."""
    return repetitions()[_identity(parse_case(row["case"]))]


def weighted_mean(values: Iterable[tuple[float, int]]) -> float:
    """Geometric, each value as often as its weight says."""
    return geometric_mean(value for value, weight in values for _ in range(weight))


# ---- the summary


def summary(rows: list[dict]) -> list[dict]:
    """By layers (MobileNetV1's or others), batch, dtype and phase: means against torch's better layout."""
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        if best(row, "fastsep") and best(row, "torch"):
            case = parse_case(row["case"])
            key = (
                *("pair" if case.k else "depthwise", "mobilenet_v1" if weight_of(row) else "others"),
                *(case.n, row["dtype"], row["phase"]),
            )
            groups.setdefault(key, []).append(row)
    compiled = {row["key"]: row for row in rows if best(row, "compile")}
    return [_summarized(key, members, compiled) for key, members in groups.items()]


def _summarized(key: tuple, members: list[dict], compiled: dict[str, dict]) -> dict:
    what, layers, batch, dtype, phase = key

    def mean(ratio: Callable[[dict], float | None]) -> float | None:
        found = [(value, weight_of(row) or 1) for row in members if (value := ratio(row))]
        return weighted_mean(found) if found else None

    def against(name: str) -> Callable[[dict], float | None]:
        return lambda row: ratio_of(best(row, name), best(row, "fastsep"))

    def against_compile(row: dict) -> float | None:
        times = [best(compiled[k], "compile") for k in compiled if k.startswith(row["key"] + " compile")]
        return ratio_of(min(times, default=None), best(row, "fastsep"))

    speedups = [best(row, "torch") / best(row, "fastsep") for row in members]
    return {
        "what": what,
        "of": layers,
        "batch": batch,
        "dtype": dtype,
        "phase": phase,
        "layers": sum(weight_of(row) or 1 for row in members),
        "speedup": mean(against("torch")),
        "slowest": min(speedups),
        "speedup_in_graphs": mean(lambda row: ratio_of(best(row, "graph torch"), best(row, "graph fastsep"))),
        "over_compile": mean(against_compile),
        "over_naive": mean(against("naive")),
        "terabytes_per_second": max(row["bytes"] / best(row, "fastsep") for row in members) / 1e12,
        "share_of_roof": mean(lambda row: row["roof"] / best(row, "fastsep")),
    }


def ratio_of(slow: float | None, fast: float | None) -> float | None:
    return slow / fast if slow and fast else None


def hopper_gains(rows: list[dict]) -> list[dict]:
    """By batch and dtype: how often the kernel for 9.0 would run in the time of the portable one."""
    groups: dict[tuple, list[float]] = {}
    for row in rows:
        if ratio := ratio_of(best(row, _cuda_model.FUSED), best(row, _cuda_model.HOPPER)):
            groups.setdefault((parse_case(row["case"]).n, row["dtype"]), []).append(ratio)
    return [
        {"batch": n, "dtype": dtype, "layers": len(found), "gain": geometric_mean(found), "least": min(found)}
        for (n, dtype), found in groups.items()
    ]


# ---- the targets


@dataclass(frozen=True)
class Target:
    what: str
    least: float
    found: float | None  # None where nothing of it was measured
    measured: int
    of: int  # layers

    @property
    def verdict(self) -> str:
        if self.found is None:
            return "not measured"
        part = "" if self.measured == self.of else f", on {self.measured} of {self.of} layers"
        return f"{'met' if self.found >= self.least else 'NOT MET'}{part}"

    def as_json(self) -> dict:
        return {"what": self.what, "least": self.least, "found": self.found, "verdict": self.verdict}


def targets(rows: list[dict]) -> list[Target]:
    """What the kernels were to reach on an H200, against torch's better layout."""
    chosen = {
        (parse_case(row["case"]).name, parse_case(row["case"]).n, row["dtype"], row["phase"]): row
        for row in rows
        if best(row, "fastsep") and best(row, "torch") and weight_of(row)
    }

    def of(batch: int, dtype: str, phase: str, half: bool = False) -> list[dict]:
        found = [row for (_, n, d, p), row in chosen.items() if (n, d, p) == (batch, dtype, phase)]
        return [row for row in found if (parse_case(row["case"]).k == 0) == half]

    def mean(what: str, least: float, values: Sequence[tuple[float | None, int]]) -> Target:
        good = [(value, weight) for value, weight in values if value]
        measured = sum(weight for _, weight in good)
        return Target(what, least, weighted_mean(good) if good else None, measured, 13)

    def speedups(members: list[dict], graph: str = "") -> list[tuple[float | None, int]]:
        return [
            (ratio_of(best(row, f"{graph}torch"), best(row, f"{graph}fastsep")), weight_of(row))
            for row in members
        ]

    forward = of(128, "bfloat16", "forward")
    first = {case.name for case in load("mobilenet_v1").layers[:6]}
    shares = [row["roof"] / best(row, "fastsep") for row in forward if parse_case(row["case"]).name in first]
    found = [
        mean("forward, bfloat16, batch 128: mean speedup", 1.5, speedups(forward)),
        Target(
            "forward, bfloat16, batch 128: least share of the roof, layers 1 to 6",
            *(0.6, min(shares, default=None), len(shares), 6),
        ),
        mean(
            "forward, bfloat16, batch 1, in a CUDA graph: mean speedup",
            *(2.0, speedups(of(1, "bfloat16", "forward"), "graph ")),
        ),
        mean(
            "forward and backward, bfloat16, batch 128: mean speedup",
            *(2.0, speedups(of(128, "bfloat16", "training"))),
        ),
    ]
    for dtype in ("float32", "bfloat16"):
        x, weights = (of(128, dtype, phase, half=True) for phase in ("input-gradient", "weight-gradient"))
        by_case = {parse_case(row["case"]).name: row for row in weights}
        pairs = [(row, by_case.get(parse_case(row["case"]).name)) for row in x]
        ratios = [
            (
                ratio_of(
                    best(a, "torch") + best(b, "torch"),
                    best(a, "fastsep") + best(b, "fastsep"),
                ),
                weight_of(a),
            )
            for a, b in pairs
            if b is not None
        ]
        found.append(mean(f"depthwise backward alone, {dtype}, batch 128: mean speedup", 4.0, ratios))
    return found


def slower(rows: list[dict]) -> tuple[int, list[tuple[float, str]]]:
    """How many shapes were held against torch's convolutions in their better layout, and the cells that take
    more than 3 % longer, the worst first, with the ratio."""
    held, found = 0, []
    for row in rows:
        if row["phase"] not in ("forward", "training") or not parse_case(row["case"]).k:
            continue
        own, torch_ = best(row, "fastsep"), best(row, "torch")
        if own and torch_:
            held += 1
            if own > TOLERANCE * torch_:
                found.append((own / torch_, row["key"]))
    return held, sorted(found, reverse=True)


# ---- for the planner


def asked_of(case: Case) -> _cuda_model.Asked:
    """What a step of training asks for, of a layer that keeps its output where it is of use."""
    needed = (True, True, bool(case.k), bool(case.db), bool(case.b and case.k))
    code, module = ACTIVATIONS[case.act].code, _native.cuda or _native.core
    saved = case.act != "identity" and module.derivative_from_output(code)
    return _cuda_model.Asked(bool(case.db), bool(case.b), needed, saved)


def factors(rows: list[dict]) -> dict[str, float]:
    """For fastsep/cuda_factors.json: measured over modelled time, in geometric mean over the layers."""
    gpu = _cuda_model.Gpu.of(0)
    by_key = {row["key"]: row for row in rows}
    ratios: dict[str, list[float]] = {}
    for row in rows:
        case, tf32 = parse_case(row["case"]), row["dtype"] == "tf32"
        beside = best(row, _cuda_model.HOPPER) is not None  # where the portable kernel is only compared with
        for layout, path in itertools.product(LAYOUTS, _cuda_model.PATHS):
            name = f"{path} {layout}"
            if name not in row["seconds"] or row["phase"] not in ("forward", "training"):
                continue
            if beside and path != _cuda_model.HOPPER:
                continue
            problem, seconds = replace(case, layout=layout).problem, row["seconds"][name][1]
            phase = _cuda_model.FORWARD
            if row["phase"] == "training":  # less the forward pass, which was measured too
                forward = by_key.get(row["key"].replace("training", "forward"))
                if forward is None or name not in forward["seconds"]:
                    continue
                phase, seconds = _cuda_model.BACKWARD, seconds - forward["seconds"][name][1]
            modelled = _cuda_model.modelled(problem, phase, path, gpu, tf32, asked_of(case))
            if seconds > 0:
                ratios.setdefault(_plan.factor_key(problem, phase, path, tf32), []).append(seconds / modelled)
    return {key: round(geometric_mean(found), 4) for key, found in sorted(ratios.items())}


# ---- as text


def table(header: Sequence[str], lines: Sequence[Sequence[object]]) -> str:
    """Columns of plain text: nothing has to be installed for it."""
    cells = [[_text(value) for value in line] for line in [header, *lines]]
    widths = [max(len(line[i]) for line in cells) for i in range(len(header))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in cells
    )


def _text(value: object) -> str:
    return "" if value is None else f"{value:.2f}" if isinstance(value, float) else str(value)


def text(result: dict) -> str:
    """Of result.json."""
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    parts = [f"{result['device']}, {versions}, {result['commit']}"]
    if result["dry_run"]:
        parts[0] = f"A dry run, of tiny layers on the CPU: no figure here says anything.\n{parts[0]}"
    parts.append("\n".join(f"{name}: {state}" for name, state in result["stages"].items()))
    goals = [(goal["what"], goal["least"], goal["found"], goal["verdict"]) for goal in result["targets"]]
    parts.append(table(("target", "at least", "found", ""), goals))
    held, offenders = result["held_against_torch"], result["slower_than_torch"]
    if held:
        verdict = "met" if not offenders else "NOT MET"
        parts.append(f"not 3 % slower than torch: {verdict}, {len(offenders)} of {held} shapes are slower")
        parts[-1] += "".join(f"\n  {ratio:.2f} times torch: {key}" for ratio, key in offenders[:OFFENDERS])
    else:
        parts.append("not 3 % slower than torch: not measured")
    columns = {
        "what": "what", "of": "of", "batch": "batch", "dtype": "dtype", "phase": "phase", "layers": "layers",
        "speedup": "speedup", "slowest": "slowest", "speedup_in_graphs": "in graphs",
        "over_compile": "compile", "over_naive": "naive", "terabytes_per_second": "TB/s",
        "share_of_roof": "of roof",
    }  # fmt: skip
    parts.append(table(list(columns.values()), [[g[name] for name in columns] for g in result["summary"]]))
    gains = [
        "hopper kernel, batch {batch}, {dtype}, {layers} layers: {gain:.2f} times as fast as the portable "
        "one, at least {least:.2f}".format(**group)
        for group in result["hopper"]
    ]
    parts += ["\n".join(gains)] if gains else []
    failed = [f"failed: {row['key']}: {row['error']}" for row in result["rows"] if "error" in row]
    return "\n\n".join([*parts, *failed]) + "\n"

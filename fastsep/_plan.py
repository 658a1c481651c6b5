"""On a GPU, which path computes a call: the fused kernel, its like for compute capability 9.0, the depthwise
kernel with one of torch's products behind it, or torch's operators alone.

The model of _cuda_model.py counts bytes, operations and launches of each path. What was measured corrects it:
cuda_factors.json, for GPUs that are in it; and where torch.backends.cudnn.benchmark is set, the paths are
timed once for each distinct problem, as cuDNN does it with its algorithms. FASTSEP_CUDA_KERNEL in the
environment names a path, which then computes all calls that have it.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from . import _cuda_model
from ._cuda_model import ALL, HOPPER, PATHS, Asked, Gpu, Problem

DTYPE_NAMES = {0: "float32", 2: "float16", 3: "bfloat16"}

# The path that the environment names, for tests and measurements. choose() refuses one that it does not know:
# an import must not fail.
NAMED = os.environ.get("FASTSEP_CUDA_KERNEL", "")


@lru_cache
def factors() -> dict[str, dict[str, float]]:
    """By the name of a GPU: of "phase path dtype layout", measured time over modelled time."""
    text = Path(__file__).with_name("cuda_factors.json").read_text(encoding="utf-8")
    measured: dict[str, dict[str, float]] = json.loads(text)["gpus"]
    return measured


def factor_key(problem: Problem, phase: str, path: str, tf32: bool) -> str:
    dtype = "tf32" if tf32 and problem[16] == 0 else DTYPE_NAMES[problem[16]]
    return f"{phase} {path} {dtype} {'nhwc' if problem[17] else 'nchw'}"


def predicted(problem: Problem, phase: str, path: str, gpu: Gpu, tf32: bool, asked: Asked = ALL) -> float:
    """Seconds that a path takes: the model's, corrected by what was measured on such a GPU."""
    factor = factors().get(gpu.name, {}).get(factor_key(problem, phase, path, tf32), 1.0)
    return factor * _cuda_model.modelled(problem, phase, path, gpu, tf32, asked)


def was_measured(path: str) -> bool:
    """Whether any GPU has a factor for it."""
    return any(key.split()[1] == path for found in factors().values() for key in found)


def why_not(problem: Problem, phase: str, path: str, tf32: bool, asked: Asked, gpu: Gpu) -> str:
    """Why a path that a call has is not taken, nor even timed, unless it is named; empty where it may be.

    The kernel for compute capability 9.0 has not run on a GPU yet: each kind of GPU has to have been tried.
    """
    if unaligned := why_unaligned(path, asked):
        return unaligned
    if path == HOPPER and factor_key(problem, phase, path, tf32) not in factors().get(gpu.name, {}):
        return f"{path} left out, it was not measured on a {gpu.name}"
    return ""


def why_unaligned(path: str, asked: Asked) -> str:
    """Why a path cannot take a call's addresses, even where it is named; empty where it can."""
    if path == HOPPER and not asked.aligned:
        return f"{path} left out, it wants addresses that are multiples of 16"
    return ""


class Choice(NamedTuple):
    path: str
    why: str
    measured: bool


Candidates = Mapping[str, Callable[[], object]]

_choices: dict[tuple[Any, ...], Choice] = {}
# What keep() was given, by all that tells calls apart; as good as the choices.
calls: dict[tuple[Any, ...], Any] = {}
_MOST_CHOICES = 1 << 14  # sizes may be without end; then all are chosen anew
_forced: list[str] = []


@contextmanager
def force(path: str) -> Iterator[None]:
    """Has one path computed, where a call has it; for tests and measurements."""
    _forced.append(path)
    try:
        yield
    finally:
        _forced.pop()


def choose(
    problem: Problem,
    phase: str,
    tf32: bool,
    asked: Asked,
    device: int,
    candidates: Candidates,
    gpu_of: Callable[[int], Gpu] | None = None,
    seconds_of: Callable[[Candidates], dict[str, float]] | None = None,
) -> Choice:
    """The path for a call; ValueError where the environment names one that there is not."""
    if NAMED not in ("", *PATHS):
        raise ValueError(f"FASTSEP_CUDA_KERNEL is {NAMED!r}, expected {', '.join(PATHS[:-1])} or {PATHS[-1]}")
    path, by = forced(), "forced" if _forced else "named by FASTSEP_CUDA_KERNEL"
    if path in candidates and not why_unaligned(path, asked):
        return Choice(path, by, True)
    choice = _choose(problem, phase, tf32, asked, device, candidates, gpu_of, seconds_of)
    if path and path not in candidates:
        return choice._replace(why=f"{choice.why}; {path}, {by}, is not there for such a call on this GPU")
    return choice


def _choose(
    problem: Problem,
    phase: str,
    tf32: bool,
    asked: Asked,
    device: int,
    candidates: Candidates,
    gpu_of: Callable[[int], Gpu] | None,
    seconds_of: Callable[[Candidates], dict[str, float]] | None,
) -> Choice:
    """Where none is named that the call has."""
    key = problem, phase, tf32, asked, device
    known = _choices.get(key)
    if known is not None and known.path not in candidates:  # for which torch has since been told otherwise
        known = None
    if known is not None and (known.measured or not torch.backends.cudnn.benchmark):
        return known
    refused: list[str] = []
    if HOPPER in candidates:
        refused = [why_not(problem, phase, HOPPER, tf32, asked, (gpu_of or Gpu.of)(device))]
        candidates = {path: run for path, run in candidates.items() if path != HOPPER or not refused[0]}
    if may_measure(device):
        with torch.cuda.device(device):  # events, and what they time, are of the current device's stream
            choice = _by_time((seconds_of or measure)(candidates))
    elif known is not None:
        return known
    else:
        choice = by_model(problem, phase, tf32, (gpu_of or Gpu.of)(device), candidates, asked)
    choice = choice._replace(why="; ".join([choice.why, *filter(None, refused)]))
    if len(_choices) >= _MOST_CHOICES:
        _choices.clear()
    _choices[key] = choice
    return choice


def forced() -> str:
    """The path that force() asks for, or the environment; empty where none."""
    return _forced[-1] if _forced else NAMED


def keep(key: tuple[Any, ...], choice: Choice, paths: Mapping[str, Any]) -> None:
    """Has calls[key] be what was chosen, unless it is to be chosen again."""
    if torch.backends.cudnn.benchmark and not choice.measured:
        return
    if len(calls) >= _MOST_CHOICES:
        calls.clear()
    calls[key] = paths[choice.path]


def forget() -> None:
    """Has everything chosen anew."""
    _choices.clear()
    calls.clear()


def by_model(
    problem: Problem, phase: str, tf32: bool, gpu: Gpu, candidates: Candidates, asked: Asked = ALL
) -> Choice:
    times = {path: predicted(problem, phase, path, gpu, tf32, asked) for path in candidates}
    return _best(times, "by the model", measured=False)


def _by_time(times: dict[str, float]) -> Choice:
    return _best(times, "measured", measured=True)


def _best(times: dict[str, float], how: str, *, measured: bool) -> Choice:
    """The first of the fastest, in the order of the candidates."""
    path = min(times, key=lambda name: times[name])
    listed = ", ".join(f"{name} {seconds * 1e6:.1f} us" for name, seconds in times.items())
    return Choice(path, f"{how}: {listed}", measured)


def may_measure(device: int) -> bool:
    """Whether calls may be timed: where torch.backends.cudnn.benchmark asks for it, a time does not choose
    between results that must not differ, and the wait spoils no graph of the device."""
    if not torch.backends.cudnn.benchmark:
        return False
    if torch.backends.cudnn.deterministic or torch.are_deterministic_algorithms_enabled():
        return False
    return not is_capturing(device)


def is_capturing(device: int) -> bool:
    """Whether the device's current stream records a graph."""
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


ROUNDS, CALLS = 3, 4


class Stopwatch:
    """Times what is queued on the current stream, by events; it waits for the end."""

    def __call__(self, run: Callable[[], object], calls: int) -> float:
        event: Any = torch.cuda.Event
        begin, end = event(enable_timing=True), event(enable_timing=True)
        begin.record()
        for _ in range(calls):
            run()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) * 1e-3


Clock = Callable[[Callable[[], object], int], float]


def measure(candidates: Candidates, stopwatch: Clock | None = None) -> dict[str, float]:
    """Seconds per call, the best of a few rounds in turn; without paths that there is no memory for."""
    clock = stopwatch or Stopwatch()
    times: dict[str, float] = {}
    for index, (path, run) in enumerate(candidates.items(), 1):
        try:
            clock(run, 1)  # modules are loaded, and cuDNN chooses its own algorithms
            times[path] = math.inf
        except torch.OutOfMemoryError:
            if index == len(candidates) and not times:
                raise
    for _ in range(ROUNDS):
        for path in times:
            times[path] = min(times[path], clock(candidates[path], CALLS) / CALLS)
    return times

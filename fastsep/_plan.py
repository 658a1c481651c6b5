"""On a GPU, which path computes a call: the fused kernel, its like for compute capability 9.0, the depthwise
kernel with torch's pointwise convolution behind it, or torch's operators alone.

A model counts bytes, operations and launches of each path against what the GPU can do at most. What was
measured corrects it: cuda_factors.json, for GPUs that are in it; and where torch.backends.cudnn.benchmark is
set, the paths are timed once for each distinct problem, as cuDNN does it with its algorithms.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

FUSED, HOPPER, DEPTHWISE, TORCH = "fused", "hopper", "depthwise", "torch"
FORWARD, BACKWARD = "forward", "backward"

Problem = tuple[int, ...]  # the 20 integers of _core.pyi
_ITEM_BYTES = {0: 4, 2: 2, 3: 2}
_DTYPE_NAMES = {0: "float32", 2: "float16", 3: "bfloat16"}

# Output channels of a tile of the fused kernels: for each, the depthwise half is computed again.
_TILE_CHANNELS = {FUSED: 128, HOPPER: 256}
_HOPPER_TILE_PIXELS = 128  # a block has a multiprocessor to itself

# The path that the environment names, for tests; where a call does not have it, nothing changes.
NAMED = os.environ.get("FASTSEP_CUDA_KERNEL", "")
if NAMED not in ("", FUSED, HOPPER, DEPTHWISE, TORCH):
    raise ValueError(f"FASTSEP_CUDA_KERNEL must be fused, hopper, depthwise or torch, got {NAMED}")


@dataclass(frozen=True)
class Gpu:
    """What a GPU can do at most."""

    name: str
    multiprocessors: int
    bandwidth: float  # bytes per second
    fma: float  # operations per second in float32, a multiply-add counts as two
    matrix: float  # and of the tensor cores in float16

    @classmethod
    def of(cls, device: int) -> Gpu:
        return cls.from_properties(torch.cuda.get_device_properties(device))

    @classmethod
    def from_properties(cls, properties: Any) -> Gpu:
        """From what the driver tells. Older versions of torch tell no clocks: then the usual ones."""
        major, minor = properties.major, properties.minor
        lanes, matrix = _UNITS.get((major, minor)) or _UNITS.get((major, 0)) or _UNITS[9, 0]
        clock = (getattr(properties, "clock_rate", 0) or 1_700_000) * 1e3
        memory_clock = (getattr(properties, "memory_clock_rate", 0) or 2_000_000) * 1e3
        bus = (getattr(properties, "memory_bus_width", 0) or 4096) / 8
        units = properties.multi_processor_count
        # Memory gives two words a cycle.
        return cls(
            *(properties.name, units, 2 * memory_clock * bus),
            *(units * clock * 2 * lanes, units * clock * matrix),
        )


# Of a multiprocessor, by compute capability: lanes for float32, and operations of the tensor cores in
# a cycle, float16 with sums in float32. NVIDIA, CUDA C++ Programming Guide, "Compute Capabilities", and the
# data sheets.
_UNITS = {
    (8, 0): (64, 2048),
    (8, 6): (128, 512),
    (8, 9): (128, 512),
    (9, 0): (128, 4096),
    (10, 0): (128, 8192),
    (12, 0): (128, 1024),
}


class Share(NamedTuple):
    """What a kind of step reaches, of the bandwidth and of the operations."""

    bandwidth: float
    operations: float


# Assumed, before anything was measured: of torch's kernels after published times, where depthwise ones reach
# 2 to 30 % of the bandwidth; of the kernels here after what their instructions allow.
_SHARES = {
    "fused": Share(0.75, 0.4),
    "hopper": Share(0.75, 0.5),  # FMAs and products at the same time
    "depthwise": Share(0.8, 0.4),
    "fused backward": Share(0.6, 0.3),
    "depthwise backward": Share(0.7, 0.3),
    "pointwise": Share(0.8, 0.65),
    "elementwise": Share(0.85, 0.5),
    "torch depthwise": Share(0.3, 0.2),
    "torch depthwise backward": Share(0.12, 0.1),
}
LAUNCH = 3e-6  # seconds from the end of a kernel to the work of the next


class Step(NamedTuple):
    """One kernel launch."""

    kind: str
    bytes: float
    fma: float = 0.0
    matrix: float = 0.0

    def seconds(self, gpu: Gpu, matrix: float) -> float:
        share = _SHARES[self.kind]
        operations = self.fma / gpu.fma + self.matrix / matrix
        return max(self.bytes / gpu.bandwidth / share.bandwidth, operations / share.operations) + LAUNCH


class Sizes(NamedTuple):
    """Bytes of x, of the depthwise output u, of y and of the weights; operations of the two halves."""

    x: float
    u: float
    y: float
    weights: float
    depthwise: float
    pointwise: float


def sizes(problem: Problem) -> Sizes:
    n, c, h, w, k, m, kh, kw, sh, sw, dh, dw, top, bottom, left, right, dtype = problem[:17]
    item, inner = _ITEM_BYTES[dtype], c * m
    oh, ow = (
        (h + top + bottom - dh * (kh - 1) - 1) // sh + 1,
        (w + left + right - dw * (kw - 1) - 1) // sw + 1,
    )
    pixels = n * oh * ow
    return Sizes(
        *(item * n * c * h * w, item * pixels * inner, item * pixels * k, item * inner * (kh * kw + k)),
        *(2.0 * pixels * inner * kh * kw, 2.0 * pixels * inner * k),
    )


def steps(problem: Problem, phase: str, path: str) -> list[Step]:
    """The launches of a path. Without a pointwise half the depthwise kernel is all there is to fuse."""
    x, u, y, weights, depthwise, pointwise = sizes(problem)
    mid, act = problem[18] != 0, problem[19] != 0
    whole = problem[4] > 0
    uneven = problem[12] != problem[13] or problem[14] != problem[15]
    own = path != TORCH
    if phase == FORWARD:
        if path in _TILE_CHANNELS:
            again = math.ceil(problem[4] / _TILE_CHANNELS[path])
            return [Step(path, x + y + weights, depthwise * again, pointwise)]
        made = [Step("depthwise" if own else "torch depthwise", x + u + weights, depthwise)]
        if not own:
            made += [Step("elementwise", 2 * x)] * uneven + [Step("elementwise", 2 * u)] * mid
        if whole:
            made += [Step("pointwise", u + y + weights, 0, pointwise)] + [Step("elementwise", 2 * y)] * act
        return made
    if path == FUSED:
        # The gradient of the depthwise output, then of x and its weights; of the pointwise weights; sums.
        again = math.ceil(problem[4] / _TILE_CHANNELS[FUSED])
        return [
            Step("fused backward", 2 * x + 2 * y + weights, 3 * depthwise, pointwise),
            Step("fused backward", x + 2 * y + weights, again * depthwise, pointwise),
            Step("elementwise", weights),
        ]
    made = []
    if whole:  # u again, its activation's slope, both gradients of the pointwise half
        made += [Step("depthwise" if own else "torch depthwise", x + u + weights, depthwise)]
        made += [Step("elementwise", 3 * y)] * act
        made += [Step("pointwise", u + y + weights, 0, pointwise)] * 2
    if own:
        return [*made, Step("depthwise backward", 2 * x + 2 * u, 3 * depthwise), Step("elementwise", weights)]
    made += [Step("elementwise", 3 * u)] * mid
    return made + [Step("torch depthwise backward", x + u, depthwise)] * 2


@lru_cache
def factors() -> dict[str, dict[str, float]]:
    """By the name of a GPU: of "phase path dtype layout", measured time over modelled time."""
    text = Path(__file__).with_name("cuda_factors.json").read_text(encoding="utf-8")
    measured: dict[str, dict[str, float]] = json.loads(text)["gpus"]
    return measured


def factor_key(problem: Problem, phase: str, path: str, tf32: bool) -> str:
    dtype = "tf32" if tf32 and problem[16] == 0 else _DTYPE_NAMES[problem[16]]
    return f"{phase} {path} {dtype} {'nhwc' if problem[17] else 'nchw'}"


def modelled(problem: Problem, phase: str, path: str, gpu: Gpu, tf32: bool) -> float:
    """Seconds that a path takes by the model alone."""
    products = gpu.fma
    if problem[16] != 0 or tf32:
        products = gpu.matrix / (2 if problem[16] == 0 else 1)
    seconds = sum(step.seconds(gpu, products) for step in steps(problem, phase, path))
    if path != HOPPER:
        return seconds
    # Large tiles: the last ones may leave most of the GPU idle.
    pixels = sizes(problem).pointwise / (2.0 * problem[1] * problem[5] * problem[4])
    tiles = math.ceil(pixels / _HOPPER_TILE_PIXELS) * math.ceil(problem[4] / _TILE_CHANNELS[HOPPER])
    rounds = math.ceil(tiles / gpu.multiprocessors)
    return (seconds - LAUNCH) * rounds * gpu.multiprocessors / tiles + LAUNCH


def admitted(
    problem: Problem,
    phase: str,
    path: str,
    tf32: bool,
    device: int,
    gpu_of: Callable[[int], Gpu] | None = None,
) -> bool:
    """Whether a path that not every GPU was tried with may be taken: measured on such a one, or named."""
    if path == (_forced[-1] if _forced else NAMED):
        return True
    key = factor_key(problem, phase, path, tf32)
    known = [name for name, measured in factors().items() if key in measured]
    return bool(known) and (gpu_of or Gpu.of)(device).name in known


def predicted(problem: Problem, phase: str, path: str, gpu: Gpu, tf32: bool) -> float:
    """The same, corrected by what was measured on such a GPU."""
    factor = factors().get(gpu.name, {}).get(factor_key(problem, phase, path, tf32), 1.0)
    return factor * modelled(problem, phase, path, gpu, tf32)


class Choice(NamedTuple):
    path: str
    why: str
    measured: bool


Candidates = Mapping[str, Callable[[], object]]

_choices: dict[tuple[Any, ...], Choice] = {}
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
    variant: tuple[bool, ...],
    device: int,
    candidates: Candidates,
    gpu_of: Callable[[int], Gpu] | None = None,
    seconds_of: Callable[[Candidates], dict[str, float]] | None = None,
) -> Choice:
    """The path for a call; `variant` tells apart calls of one problem that take different time."""
    named = _forced[-1] if _forced else NAMED
    if named in candidates:
        return Choice(named, "forced", True)
    key = problem, phase, tf32, variant, device
    known = _choices.get(key)
    if known is not None and (known.measured or not torch.backends.cudnn.benchmark):
        return known
    if torch.backends.cudnn.benchmark and may_measure():
        choice = _by_time((seconds_of or measure)(candidates))
    elif known is not None:
        return known
    else:
        choice = by_model(problem, phase, tf32, (gpu_of or Gpu.of)(device), candidates)
    if len(_choices) >= _MOST_CHOICES:
        _choices.clear()
    _choices[key] = choice
    return choice


def forget() -> None:
    """Has everything chosen anew."""
    _choices.clear()


def by_model(problem: Problem, phase: str, tf32: bool, gpu: Gpu, candidates: Candidates) -> Choice:
    times = {path: predicted(problem, phase, path, gpu, tf32) for path in candidates}
    return _best(times, "by the model", measured=False)


def _by_time(times: dict[str, float]) -> Choice:
    return _best(times, "measured", measured=True)


def _best(times: dict[str, float], how: str, *, measured: bool) -> Choice:
    """The first of the fastest, in the order of the candidates."""
    path = min(times, key=lambda name: times[name])
    listed = ", ".join(f"{name} {seconds * 1e6:.1f} us" for name, seconds in times.items())
    return Choice(path, f"{how}: {listed}", measured)


def may_measure() -> bool:
    """Not where a time would choose between results that must not differ, or the wait spoil a graph."""
    if torch.backends.cudnn.deterministic or torch.are_deterministic_algorithms_enabled():
        return False
    return not torch.cuda.is_current_stream_capturing()


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

"""How long a path takes on a GPU, by a model: the launches of each, their bytes and their operations, against
what the GPU can do at most.

The launches are those of csrc/cuda and of torch's operators as fastsep/_cuda_kernels.py calls them, one Step
for each; tests/cuda_launches.txt holds the former against the kernels' source.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

# The paths: the fused kernel; its like for compute capability 9.0; the depthwise kernel with torch's
# convolution behind it, with its matrix product, which adds the bias itself, and with the two of its
# operators that apply relu, too; torch's operators alone.
FUSED, HOPPER, DEPTHWISE, ADDMM, ADDMM_RELU, CUDNN_RELU, TORCH = PATHS = (
    *("fused", "hopper", "depthwise", "addmm", "addmm_relu", "cudnn_relu", "torch"),
)
FORWARD, BACKWARD = "forward", "backward"

Problem = tuple[int, ...]  # the 20 integers of _core.pyi
ITEM_BYTES = {0: 4, 2: 2, 3: 2}

# Output channels of a tile of the fused kernels: for each, the depthwise half is computed again.
_TILE_CHANNELS = {FUSED: 128, HOPPER: 256}
_HOPPER_TILE_PIXELS = 128  # of the one block that a multiprocessor has at a time


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
# 2 to 30 % of the bandwidth; of the kernels here after what their instructions allow. The product of the
# backward pass applies slopes to each chunk that it stages, so it is given less than the fused forward pass.
_SHARES = {
    "fused": Share(0.75, 0.4),
    "hopper": Share(0.75, 0.5),  # products and FMAs at the same time; it never ran on a GPU
    "depthwise": Share(0.8, 0.4),
    "product": Share(0.6, 0.3),
    "depthwise backward": Share(0.7, 0.3),
    "torch product": Share(0.8, 0.65),
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


class Asked(NamedTuple):
    """What tells apart calls of one problem that take different time."""

    depthwise_bias: bool = True
    bias: bool = True
    needed: tuple[bool, ...] = (True,) * 5  # of the backward pass: which gradients, in the operator's order
    saved: bool = True  # and whether it is given the output
    aligned: bool = True  # whether tensors can be read in accesses of 16 bytes


ALL = Asked()


class Sizes(NamedTuple):
    """Bytes of x, of the depthwise output u, of y and of the weights; operations of the two halves."""

    x: float
    u: float
    y: float
    weights: float
    depthwise: float
    pointwise: float


def output_size(problem: Problem) -> tuple[int, int]:
    _, _, h, w, _, _, kh, kw, sh, sw, dh, dw, top, bottom, left, right = problem[:16]
    return (
        (h + top + bottom - dh * (kh - 1) - 1) // sh + 1,
        (w + left + right - dw * (kw - 1) - 1) // sw + 1,
    )


def sizes(problem: Problem) -> Sizes:
    n, c, h, w, k, m, kh, kw = problem[:8]
    item, inner, pixels = ITEM_BYTES[problem[16]], c * m, n * math.prod(output_size(problem))
    return Sizes(
        *(item * n * c * h * w, item * pixels * inner, item * pixels * k, item * inner * (kh * kw + k)),
        *(2.0 * pixels * inner * kh * kw, 2.0 * pixels * inner * k),
    )


def half_of(problem: Problem) -> Problem:
    """The depthwise half alone."""
    return (*problem[:4], 0, *problem[5:19], 0)


def steps(problem: Problem, phase: str, path: str, asked: Asked = ALL) -> list[Step]:
    """The launches of a path. Without a pointwise half the depthwise kernel is all there is to fuse."""
    if phase == FORWARD:
        return _fused(problem, path) if path in _TILE_CHANNELS else _unfused(problem, path, asked)
    if path == FUSED:
        again = _fused(problem) if problem[19] != 0 and not asked.saved else []
        return again + own_backward(problem, asked.needed)
    return (_torch_backward if path == TORCH else _depthwise_backward)(problem, asked)


def _fused(problem: Problem, path: str = FUSED) -> list[Step]:
    x, _, y, weights, depthwise, pointwise = sizes(problem)
    again = math.ceil(problem[4] / _TILE_CHANNELS[path])
    return [Step(path, x + y + weights, depthwise * again, pointwise)]


def _unfused(problem: Problem, path: str, asked: Asked) -> list[Step]:
    made = _torch_depthwise(problem, asked) if path == TORCH else _own_depthwise(problem)
    return made + _torch_pointwise(problem, path, asked.bias)


def _own_depthwise(problem: Problem) -> list[Step]:
    x, u, _, weights, depthwise, _ = sizes(problem)
    return [Step("depthwise", x + u + weights, depthwise)]


def _torch_depthwise(problem: Problem, asked: Asked) -> list[Step]:
    """Uneven padding is a copy. cuDNN, which computes channels-last, has its bias added by another kernel."""
    x, u, _, weights, depthwise, _ = sizes(problem)
    made = [Step("elementwise", 2 * x)] * _uneven(problem)
    made += [Step("torch depthwise", x + u + weights, depthwise)]
    return made + [Step("elementwise", 2 * u)] * (asked.depthwise_bias * problem[17] + (problem[18] != 0))


def _torch_pointwise(problem: Problem, path: str, bias: bool) -> list[Step]:
    """A product, and over its result a pass each for the bias and the activation that the path leaves."""
    if problem[4] == 0:
        return []
    left = problem[19] != 0 and path not in (ADDMM_RELU, CUDNN_RELU)
    made = _torch_product(problem, bias and path in (DEPTHWISE, TORCH))
    return made + [Step("elementwise", 2 * sizes(problem).y)] * left


def _torch_product(problem: Problem, bias: bool) -> list[Step]:
    _, u, y, weights, _, pointwise = sizes(problem)
    return [Step("torch product", u + y + weights, 0, pointwise)] + [Step("elementwise", 2 * y)] * bias


def _uneven(problem: Problem) -> bool:
    return problem[12] != problem[13] or problem[14] != problem[15]


def own_backward(problem: Problem, needed: tuple[bool, ...]) -> list[Step]:
    """The launches of csrc/cuda/backward.cuh, Backward::all(), in their order."""
    need_x, need_dw, need_pw, need_db, need_b = needed
    x, u, y, weights, depthwise, pointwise = sizes(problem)
    whole, mid = problem[4] > 0, problem[18] != 0
    need_dt = need_x or need_dw or need_db
    dv = 2 * y if problem[19] != 0 else y  # the gradient, and for its slope the saved output
    parts = 4.0 * _weight_parts(problem) * problem[4] * (need_pw * problem[1] * problem[5] + need_b)
    made: list[Step] = []
    if whole and (need_pw or (need_dt and mid)):
        made += [Step("depthwise", x + u + weights, depthwise)]  # z
    if whole and (need_pw or need_b):
        # dv' u, with the sums of dv for the bias, or those alone; add_parts
        product = Step("product", dv + need_pw * u + parts, 0, need_pw * pointwise)
        made += [product, Step("elementwise", parts)]
    if need_dt and whole:
        made += [Step("product", dv + (1 + mid) * u + weights, 0, pointwise)]  # dt, where z has been
    elif need_dt and mid:
        made += [Step("depthwise", x + 2 * u, depthwise)]  # depthwise_slope
    if need_x:
        made += [Step("depthwise backward", x + u, depthwise)]
    if need_dw or need_db:
        made += [Step("depthwise backward", x + u, depthwise), Step("elementwise", weights)]  # add_parts
    return made


def _weight_parts(problem: Problem) -> int:
    """Partial sums of the pointwise half's gradients, each of their size: Backward::weight_parts()."""
    n, c, _, _, k, m = problem[:6]
    plane, chunk = math.prod(output_size(problem)), 128 // ITEM_BYTES[problem[16]]
    side = 128 if k > 64 and c * m > 64 else 64
    tiles = math.ceil(k / side) * math.ceil(c * m / side)
    chunks = math.ceil(n * plane / chunk) if problem[17] else n * math.ceil(plane / chunk)
    wanted = max(1, min(math.ceil(1056 / max(1, 2 * tiles)), math.ceil(chunks / 8)))
    return math.ceil(chunks / max(1, math.ceil(chunks / wanted)))


def _depthwise_backward(problem: Problem, asked: Asked) -> list[Step]:
    """Of the pointwise half torch's kernels; before them u again, behind them the depthwise half's own."""
    need_x, need_dw, need_pw, need_db, _ = asked.needed
    made: list[Step] = []
    if problem[4] > 0:
        again = problem[19] != 0 and not asked.saved
        if need_pw or again:
            made += _own_depthwise(problem)
        if again:
            made += _torch_product(problem, asked.bias)
        made += _torch_pointwise_backward(problem, asked)
    half = need_x, need_dw, False, need_db, False
    return made + own_backward(half_of(problem), half)


def _torch_backward(problem: Problem, asked: Asked) -> list[Step]:
    """Each operator of _backward.compose()."""
    need_x, need_dw, _, need_db, _ = asked.needed
    x, u, _, _, depthwise, _ = sizes(problem)
    mid = problem[18] != 0
    made = _torch_depthwise(problem, asked)
    if problem[4] > 0:
        if problem[19] != 0:
            made += _torch_product(problem, asked.bias)
        made += _torch_pointwise_backward(problem, asked)
    if not (need_x or need_dw or need_db):
        return made
    made += [Step("elementwise", 3 * u)] * mid
    made += [Step("torch depthwise backward", x + u, depthwise)] * (need_x + need_dw)
    return (
        made
        + [Step("elementwise", u)] * need_db
        + [Step("elementwise", 2 * x)] * (_uneven(problem) and need_x)
    )


def _torch_pointwise_backward(problem: Problem, asked: Asked) -> list[Step]:
    need_x, need_dw, need_pw, need_db, need_b = asked.needed
    _, u, y, weights, _, pointwise = sizes(problem)
    products = (need_x or need_dw or need_db) + need_pw
    made = [Step("elementwise", 3 * y)] * (problem[19] != 0)
    made += [Step("torch product", u + y + weights, 0, pointwise)] * products
    return made + [Step("elementwise", y)] * need_b


def modelled(problem: Problem, phase: str, path: str, gpu: Gpu, tf32: bool, asked: Asked = ALL) -> float:
    """Seconds that a path takes."""
    products = gpu.fma
    if problem[16] != 0 or tf32:
        products = gpu.matrix / (2 if problem[16] == 0 else 1)
    seconds = sum(step.seconds(gpu, products) for step in steps(problem, phase, path, asked))
    if path != HOPPER or phase != FORWARD:
        return seconds
    # Large tiles: the last ones may leave most of the GPU idle.
    pixels = problem[0] * math.prod(output_size(problem))
    tiles = math.ceil(pixels / _HOPPER_TILE_PIXELS) * math.ceil(problem[4] / _TILE_CHANNELS[HOPPER])
    rounds = math.ceil(tiles / gpu.multiprocessors)
    return (seconds - LAUNCH) * rounds * gpu.multiprocessors / max(1, tiles) + LAUNCH

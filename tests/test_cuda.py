"""The kernels on a GPU: the table of cases against float64, by every path and for every tiling.

pytest -m cuda
"""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from cases import BY_NAME
from commands import ROOT
from gpu_cases import (
    GPU,
    LAYER,
    every_case,
    exactly,
    geometry,
    in_dtype,
    layouts,
    on_gpu,
    parts,
    present,
    rounded,
    varieties,
)

from fastsep import _backward, _native, _ops, _plan
from fastsep._case import DTYPES, LAYOUTS, format_case, parse_case
from fastsep._check import (
    NAMES,
    call,
    error_bound,
    gradient_bounds,
    largest_error,
    operands,
    relative_error,
)
from fastsep._cuda_model import ADDMM, ADDMM_RELU, CUDNN_RELU, DEPTHWISE, FUSED, HOPPER, PATHS

pytestmark = GPU


@every_case
@parts
@varieties
def test_forward_is_within_the_rounding_bound(case, part, variety):
    case = in_dtype(part(case), variety)
    tensors = case.tensors()
    exact, magnitude = exactly(case, tensors)
    bound = error_bound(rounded(case, variety), magnitude)
    for layout in LAYOUTS:
        varied = replace(case, layout=layout)
        for path in (FUSED, DEPTHWISE) if case.k else (DEPTHWISE,):
            with _plan.force(path):
                got = call(varied, on_gpu(varied.tensors()))
            assert got.dtype is DTYPES[case.dtype]
            error = relative_error(got.cpu(), exact, bound)
            assert error <= 1, f"{error:.3g} times its bound, {path} {variety}: {format_case(varied)}"
            assert got.is_contiguous(memory_format=_ops.memory_format(varied.tensors()["input"]))


@every_case
@parts
@varieties
def test_gradients_are_within_the_rounding_bound(case, part, variety):
    case = in_dtype(part(case), variety)
    tensors, grad = case.tensors(), case.gradient()
    wide = [None if t is None else t.double() for t in operands(tensors)]
    gradients = _backward.compose(grad.double(), *wide, *geometry(case), present(tensors))
    exact = dict(zip(NAMES, gradients, strict=True))
    bounds = gradient_bounds(rounded(case, variety), tensors, grad)
    for layout in LAYOUTS:
        varied = replace(case, layout=layout)
        for path in (FUSED, DEPTHWISE) if case.k else (DEPTHWISE,):
            given = on_gpu(varied.tensors())
            inputs = {name: t.requires_grad_() for name, t in given.items() if t is not None}
            with _plan.force(path):
                values = torch.autograd.grad(
                    call(varied, given), list(inputs.values()), varied.gradient().to("cuda")
                )
            got = {name: value.cpu() for name, value in zip(inputs, values, strict=True)}
            error = largest_error(got, exact, bounds)
            assert error <= 1, f"{error:.3g} times its bound, {path} {variety}: {format_case(varied)}"


def tilings():
    """The lines of cuda_tilings.txt: multiprocessors, a tile's pixels and output channels, the case."""
    for line in (ROOT / "tests" / "cuda_tilings.txt").read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            yield pytest.param(
                *map(int, line.split("|")[0].split()), parse_case(line), id=parse_case(line).name
            )


def kernels_of(run):
    """The names of the kernels that a call launches."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        result = run()
        torch.cuda.synchronize()
    device = torch.autograd.DeviceType.CUDA
    return result, [event.name for event in profiler.events() if event.device_type == device]


@pytest.mark.parametrize(("multiprocessors", "pixels", "channels", "case"), tilings())
@varieties
@layouts
def test_every_tiling(multiprocessors, pixels, channels, case, variety, layout):
    case = replace(in_dtype(case, variety), layout=layout)
    if case.name == "short_far" and DTYPES[case.dtype].itemsize == 2:
        pixels, channels = 32, 64
    tensors = case.tensors()
    exact, magnitude = exactly(case, tensors)
    given = on_gpu(tensors)
    _native.cuda.pretend_multiprocessors(multiprocessors)
    try:
        with _plan.force(FUSED):
            got, kernels = kernels_of(lambda: call(case, given))
    finally:
        _native.cuda.pretend_multiprocessors(0)
    assert relative_error(got.cpu(), exact, error_bound(rounded(case, variety), magnitude)) <= 1
    tiles = [re.search(r"separable_forward.*Tiling<(\d+), (\d+)", name) for name in kernels]
    assert [(int(t[1]), int(t[2])) for t in tiles if t] == [(pixels, channels)], kernels


@every_case
@layouts
def test_small_integers_are_exact(case, layout):
    keep = {"identity", "relu", "relu6"}
    mid, act = (name if name in keep else "relu" for name in (case.mid, case.act))
    case = replace(case, layout=layout, mid=mid, act=act)
    tensors = case.tensors(integers=2)
    with _plan.force(FUSED):
        got = call(case, on_gpu(tensors))
    assert torch.equal(got.cpu().double(), exactly(case, tensors)[0])


@varieties
@layouts
def test_equal_calls_give_equal_bits(variety, layout):
    for name in ("bands_stride_2", "channels_129_to_257", "multiplier_3"):
        case = replace(in_dtype(BY_NAME[name], variety), layout=layout, n=9)
        given, grad = on_gpu(case.tensors()), case.gradient().to("cuda")
        inputs = [t.requires_grad_() for t in given.values() if t is not None]
        first = None
        for _ in range(5):
            torch.empty(1 << 24, device="cuda").uniform_()  # what a workspace will find in its memory
            with _plan.force(FUSED):
                y = call(case, given)
                found = [y, *torch.autograd.grad(y, inputs, grad)]
            first = first or found
            assert all(torch.equal(a, b) for a, b in zip(found, first, strict=True))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("path", [path for path in PATHS if path != HOPPER])
@varieties
@layouts
def test_nan_and_infinity_travel(value, path, variety, layout):
    """By every path; where the two products with relu in them swallow NaN, they do not take part."""
    case = replace(in_dtype(BY_NAME["padded_3x3"], variety), layout=layout, b=1, act="relu")
    torch.backends.cudnn.benchmark = True
    tensors = case.tensors()
    tensors["input"][0, 3, 4, 5] = value
    with _plan.force(path):
        got = call(case, on_gpu(tensors)).cpu()
    assert torch.equal(got.isfinite(), exactly(case, tensors)[0].isfinite())


@varieties
def test_torchs_products_behind_the_depthwise_kernel(variety):
    case = replace(in_dtype(LAYER, variety), layout="nhwc", b=1, act="relu")
    tensors = case.tensors()
    exact, magnitude = exactly(case, tensors)
    bound = error_bound(rounded(case, variety), magnitude)
    torch.backends.cudnn.benchmark = True  # so that those with relu in them may be tried
    for path in (ADDMM, ADDMM_RELU, CUDNN_RELU):
        with _plan.force(path):
            assert relative_error(call(case, on_gpu(tensors)).cpu(), exact, bound) <= 1, path


VIEWS = {
    "odd_offset": lambda x: torch.cat([x.new_zeros(3), x.flatten()])[3:].view(x.shape),
    "channel_slice": lambda x: torch.cat([x, x, x], 1)[:, x.shape[1] : 2 * x.shape[1]],
    "column_slice": lambda x: torch.cat([x, x], 3)[..., : x.shape[3]],
    "expanded_batch": lambda x: x[:1].expand(x.shape),
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "odd_offset_channels_last": lambda x: (
        torch.cat([x.new_zeros(3), x.permute(0, 2, 3, 1).flatten()])[3:]
        .view(x.shape[0], *x.shape[2:], x.shape[1])
        .permute(0, 3, 1, 2)
    ),
}


@pytest.mark.parametrize("view", VIEWS)
@varieties
@layouts
def test_views(view, variety, layout):
    case = replace(in_dtype(BY_NAME["both_biases"], variety), layout=layout, n=3)
    given = on_gpu(case.tensors())
    given["input"] = VIEWS[view](given["input"])
    given = {name: t if t is None or name == "input" else VIEWS["odd_offset"](t) for name, t in given.items()}
    dense = {name: None if t is None else t.clone() for name, t in given.items()}
    with _plan.force(FUSED):
        torch.testing.assert_close(call(case, given), call(case, dense))


def test_no_images():
    case = replace(BY_NAME["no_images"], dtype="bfloat16")
    given = on_gpu(case.tensors())
    inputs = [t.requires_grad_() for t in given.values() if t is not None]
    y = call(case, given)
    assert y.shape == case.output
    assert all(not g.any() for g in torch.autograd.grad(y.sum(), inputs))


@pytest.mark.parametrize("dtype", ["float64", "complex64"])
def test_a_dtype_without_kernels_is_composed(dtype):
    case = replace(BY_NAME["both_biases"], dtype=dtype)
    given = on_gpu(case.tensors())
    expected = _ops.compose(*operands(given), *geometry(case))
    torch.testing.assert_close(call(case, given), expected)


def test_gradients_of_gradients():
    case = replace(BY_NAME["both_biases"], mid="silu", act="tanh")
    found = []
    for compute in (call, lambda c, t: _ops.compose(*operands(t), *geometry(c))):
        given = on_gpu(case.tensors())
        inputs = [t.requires_grad_() for t in given.values() if t is not None]
        first = torch.autograd.grad(compute(case, given).square().sum(), inputs, create_graph=True)
        found.append(torch.autograd.grad(sum(g.square().sum() for g in first), inputs))
    for got, expected in zip(*found, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-2)

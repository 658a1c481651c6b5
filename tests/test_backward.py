"""The native gradients: every kernel on the table of cases.

tests/cpp runs the same table between guard pages; what is here is held against torch's own gradients.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from itertools import product

import pytest
import torch
from cases import BY_NAME, CASES, EDGES, VARIETIES, half, random_cases, varied

from fastsep import _backward, _native
from fastsep._activations import ACTIVATIONS
from fastsep._case import LAYOUTS, Case, format_case, parse_case
from fastsep._check import (
    NAMES,
    call,
    gradient_bounds,
    largest_error,
    operands,
    run_native_backward,
)

every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
halves = pytest.mark.parametrize("part", [lambda case: case, half], ids=["separable", "depthwise"])


def composed(case: Case, tensors: dict, grad: torch.Tensor) -> dict:
    """torch's gradients in float64."""
    wide = [None if tensor is None else tensor.double() for tensor in operands(tensors)]
    geometry = (case.sh, case.sw), (case.pt, case.pb, case.pl, case.pr), (case.dh, case.dw)
    needed = [tensor is not None for tensor in wide]
    values = _backward.compose(grad.double(), *wide, *geometry, case.mid, case.act, needed)
    return dict(zip(NAMES, values, strict=True))


def every_kernel(case: Case) -> Iterator[tuple[Case, str]]:
    """The case in every dtype and layout, on every instruction set of this machine."""
    for dtype, layout in VARIETIES:
        for isa in _native.core.isas():
            yield varied(case, dtype, layout), isa


@cache
def expectation(case: Case) -> tuple[dict, dict]:
    """Gradients and how far rounding may move them; the same for both layouts."""
    tensors, grad = case.tensors(), case.gradient()
    return composed(case, tensors, grad), gradient_bounds(case, tensors, grad)


@every_case
@halves
def test_within_the_rounding_bound(case, part):
    for kernels, isa in every_kernel(part(case)):
        got = run_native_backward(kernels, kernels.tensors(), kernels.gradient(), isa)
        error = largest_error(got, *expectation(replace(kernels, layout="nchw")))
        assert error <= 1, f"{error:.3g} times its bound on {isa}: {format_case(kernels)}"


def to_exact(case: Case) -> Case:
    """With activations that keep integers whole, and slopes that are integers."""
    keep = {"identity", "relu", "relu6"}
    mid, act = case.mid if case.mid in keep else "relu", case.act if case.act in keep else "identity"
    return replace(case, mid=mid, act=act)


@every_case
@halves
def test_small_integers_are_exact(case, part):
    case = to_exact(part(case))
    wide = replace(case, dtype="float64")
    expected = composed(wide, wide.tensors(integers=2), wide.gradient(integers=2))
    for kernels, isa in every_kernel(case):
        got = run_native_backward(kernels, kernels.tensors(integers=2), kernels.gradient(integers=2), isa)
        for name in NAMES:
            if got[name] is not None:
                same = torch.equal(got[name].double(), expected[name])
                assert same, f"{name} on {isa}: {format_case(kernels)}"
    weight = expected["depthwise_weight"]
    if weight.numel() > 64 and case.n and case.kh <= case.h:
        assert (weight == 0).double().mean() < 0.9, f"nearly all zeros, proves nothing: {format_case(case)}"


@every_case
@halves
def test_autograd_gives_what_the_kernels_give(case, part):
    for dtype, layout in VARIETIES:
        varied_case = varied(part(case), dtype, layout)
        tensors, grad = varied_case.tensors(), varied_case.gradient()
        expected = (run_native_backward if case.n else composed)(varied_case, tensors, grad)
        for tensor in tensors.values():
            if tensor is not None:
                tensor.requires_grad_()
        call(varied_case, tensors).backward(grad)
        for name, tensor in tensors.items():
            if tensor is not None:
                equal = torch.equal(tensor.grad, expected[name].to(tensor.dtype))
                assert equal, f"{name}: {format_case(varied_case)}"
                assert tensor.grad.shape == tensor.shape
        if case.n > 0 and case.c > 1:  # the rest has both formats
            assert tensors["input"].grad.is_contiguous(memory_format=LAYOUTS[layout])


SUBSETS = list(product([False, True], repeat=5))


@pytest.mark.parametrize(
    "name",
    [
        *("both_biases", "silu", "relu6", "bands", "gelu_of_stride_and_multiplier", "channels_33_to_31"),
        *("two_bands_of_images", "parts_of_images"),
    ],
)
@halves
def test_every_subset_of_gradients_has_the_same_bits(name, part):
    for case, isa in every_kernel(part(replace(BY_NAME[name], db=1, b=1))):
        tensors, grad = case.tensors(), case.gradient()
        full = run_native_backward(case, tensors, grad, isa)
        for subset in SUBSETS:
            needed = tuple(name for name, need in zip(NAMES, subset, strict=True) if need)
            got = run_native_backward(case, tensors, grad, isa, needed)
            for name in needed:
                assert full[name] is None or torch.equal(got[name], full[name]), f"{name} of {needed}"


@pytest.mark.parametrize(
    "name",
    [
        *("stride_2", "multiplier_3", "seven_by_seven", "many_images", "bands", "bands_stride_2"),
        *("bands_of_images", "two_bands_of_images", "parts_of_images"),
    ],
)
@halves
@pytest.mark.usefixtures("threads")
def test_same_bits_for_every_number_of_threads(name, part):
    """And from run to run."""
    for case, isa in every_kernel(part(BY_NAME[name])):
        tensors, grad = case.tensors(), case.gradient()
        torch.set_num_threads(1)
        alone = run_native_backward(case, tensors, grad, isa)
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            for _ in range(2):
                again = run_native_backward(case, tensors, grad, isa)
                for name, gradient in alone.items():
                    assert gradient is None or torch.equal(again[name], gradient), (
                        f"{threads} threads: {name}"
                    )


def test_gradient_of_the_input_does_not_depend_on_the_batch():
    for case, isa in every_kernel(replace(BY_NAME["fourteen_by_fourteen"], n=3)):
        tensors, grad = case.tensors(), case.gradient()
        together = run_native_backward(case, tensors, grad, isa)["input"]
        for i in range(case.n):
            x, g = (t[i : i + 1].clone(memory_format=torch.preserve_format) for t in (tensors["input"], grad))
            alone = run_native_backward(replace(case, n=1), {**tensors, "input": x}, g, isa)["input"]
            assert torch.equal(together[i : i + 1], alone)


# Numbers that are none


def kinds(tensor: torch.Tensor) -> torch.Tensor:
    """0 for a finite number, 1 for NaN, 2 and 3 for the infinities."""
    return tensor.isnan() + 2 * tensor.isposinf() + 3 * tensor.isneginf()


UNPADDED = [
    "n=2 c=18 h=9 w=21 k=20 kh=3 kw=3 b=1 db=1",
    "n=2 c=18 h=9 w=21 k=20 kh=3 kw=3 b=1 db=1 mid=relu act=relu6",
    "c=5 h=9 w=12 k=7 kh=2 kw=3 sh=2 sw=3 m=2 b=1 mid=relu6",
    "c=5 h=9 w=12 k=7 kh=3 kw=3 dh=2 db=1 mid=leaky_relu act=relu",
    "c=9 h=9 w=12 k=0 kh=3 kw=3 db=1 mid=relu",
]


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("where", ["gradient", "input"])
@pytest.mark.parametrize("line", UNPADDED)
def test_nan_and_infinity_reach_what_they_should(line, where, value):
    """The same as in torch's gradients, where no padding is in the way."""
    for case, isa in every_kernel(parse_case(line)):
        tensors, grad = case.tensors(), case.gradient()
        if where == "gradient":
            grad[0, 2, 1, 3] = value
        else:
            tensors["input"][0, 3, 4, 7] = value
        got, expected = run_native_backward(case, tensors, grad, isa), composed(case, tensors, grad)
        assert any(kinds(gradient).any() for gradient in got.values() if gradient is not None)
        for name in NAMES:
            if got[name] is not None:
                same = torch.equal(kinds(got[name]), kinds(expected[name]))
                assert same, f"{name} on {isa}: {format_case(case)}"


LARGE = [
    *(x for x in EDGES if abs(x) < torch.inf),
    *(sign * 10.0**power for sign in (1, -1) for power in (2, 9, 13, 18, 38)),
]


@pytest.mark.parametrize("variety", VARIETIES, ids="-".join)
@pytest.mark.parametrize("place", ["mid", "act"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_slopes_at_the_edges(activation, place, variety, isa):
    """At bends, and at sizes where exponentials and powers overflow, against torch in float64."""
    case = Case(c=1, h=1, w=len(LARGE), k=1, kh=1, kw=1, **{place: activation})
    case = varied(case, *variety)
    dtype = getattr(torch, variety[0])
    x = torch.tensor(LARGE, dtype=dtype).view(1, 1, 1, -1)
    one = torch.ones(1, 1, 1, 1, dtype=dtype)
    tensors = {**case.tensors(), "input": x, "depthwise_weight": one, "pointwise_weight": one}
    wide = x.double()
    expected = ACTIVATIONS[activation].backward(torch.ones_like(wide), wide)
    # Beyond these torch's own formula of it has infinity times zero.
    expected = torch.where(expected.isnan(), (wide > 0).double(), expected)
    eps = torch.finfo(dtype).eps
    got = run_native_backward(case, tensors, torch.ones_like(x), isa)["input"]
    torch.testing.assert_close(got, expected.to(dtype), rtol=16 * eps, atol=16 * eps)


def test_random_sweep():
    """A failure prints the line that replays it."""
    isas = _native.core.isas()
    for i, case in enumerate(random_cases(200)):
        if i % 4 == 0:
            case = half(case)
        tensors, grad = case.tensors(seed=i), case.gradient(seed=i + 1)
        got = run_native_backward(case, tensors, grad, isas[i % len(isas)])
        error = largest_error(got, composed(case, tensors, grad), gradient_bounds(case, tensors, grad))
        assert error <= 1, f"{error:.3g} times its bound on {isas[i % len(isas)]}: {format_case(case)}"


@pytest.mark.parametrize("corner", [(0, 0), (-1, -1), (0, -1)], ids=str)
@halves
def test_infinity_at_the_border_is_not_multiplied_with_padding(corner, part):
    plain = Case(c=17, h=6, w=19, k=5, kh=3, kw=3, pt=1, pb=1, pl=1, pr=1, b=1, db=1)
    for case, isa in every_kernel(part(plain)):
        tensors, grad = case.tensors(), case.gradient()
        grad[:, 1, corner[0], corner[1]] = torch.inf
        got = run_native_backward(case, tensors, grad, isa)
        for name, gradient in got.items():
            assert gradient is None or not gradient.isnan().any(), f"{name} on {isa}: {format_case(case)}"
        # The taps that lie in the padding there see nothing of it.
        row, column = (0 if side == 0 else 2 for side in corner)
        channels = got["depthwise_weight"][:, 0]
        assert channels[:, row].isfinite().all()
        assert channels[:, :, column].isfinite().all()
        assert not channels.isfinite().all()

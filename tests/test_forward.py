"""The kernels on the table of cases, through Python: every instruction set, dtype and layout of this machine.

tests/cpp runs the same table between guard pages; what is here is the way in from tensors.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from cases import BY_NAME, CASES, EDGES, VARIETIES, random_cases, varied

import fastsep
from fastsep import _native
from fastsep._activations import ACTIVATIONS
from fastsep._case import Case, format_case
from fastsep._check import error_bound, oracle, relative_error, run_native

IDS = {"ids": lambda value: value.name if isinstance(value, Case) else "-".join(map(str, value))}
varieties = pytest.mark.parametrize("variety", VARIETIES, **IDS)
every_case = pytest.mark.parametrize("case", CASES, **IDS)


def composed(case: Case, tensors: dict, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Two F.conv2d in float64: an oracle that is not ours."""
    x, dw, pw, b, db = (None if t is None else t.to(dtype) for t in tensors.values())
    x = F.pad(x, (case.pl, case.pr, case.pt, case.pb))
    t = F.conv2d(x, dw, db, (case.sh, case.sw), 0, (case.dh, case.dw), case.c)
    return ACTIVATIONS[case.act].forward(F.conv2d(ACTIVATIONS[case.mid].forward(t), pw, b))


def check(case: Case, isa: str, seed: int = 0) -> None:
    tensors = case.tensors(seed)
    expected = oracle(case, tensors)
    bound = error_bound(case, oracle(case, tensors, magnitude=True))
    error = relative_error(run_native(case, tensors, isa), expected, bound)
    assert error <= 1, f"{error:.3g} times its bound on {isa}: {format_case(case)}"


@every_case
@varieties
def test_within_the_rounding_bound(case: Case, variety: tuple[str, str], isa: str) -> None:
    check(varied(case, *variety), isa)


@every_case
def test_oracle_agrees_with_torch(case: Case) -> None:
    case = replace(case, dtype="float64")
    tensors = case.tensors()
    torch.testing.assert_close(oracle(case, tensors), composed(case, tensors), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    "case", [c for c in CASES if c.n * c.k * c.oh * c.ow * c.c * c.m * c.kh * c.kw < 2e5], **IDS
)
def test_naive_reference_agrees_with_torch(case: Case) -> None:
    case = replace(case, dtype="float64")
    tensors = case.tensors()
    got = fastsep.reference.separable_conv2d(**tensors, **case.options)
    torch.testing.assert_close(got, composed(case, tensors), rtol=1e-10, atol=1e-10)


@every_case
@varieties
def test_small_integers_are_exact(case: Case, variety: tuple[str, str], isa: str) -> None:
    keep = {"identity", "relu", "relu6"}
    case = varied(case, *variety)
    case = replace(
        case, mid=case.mid if case.mid in keep else "relu", act=case.act if case.act in keep else "identity"
    )
    tensors = case.tensors(integers=2)
    expected = composed(case, tensors)
    assert torch.equal(run_native(case, tensors, isa).double(), expected), format_case(case)
    if expected.numel() > 64:
        assert (expected == 0).double().mean() < 0.9, f"nearly all zeros, proves nothing: {format_case(case)}"


@every_case
@varieties
def test_operator_keeps_values_and_format(case: Case, variety: tuple[str, str]) -> None:
    case = varied(case, *variety)
    tensors = case.tensors()
    got = fastsep.separable_conv2d(**tensors, **case.options)
    assert torch.equal(got, run_native(case, tensors)), format_case(case)
    if case.n > 0 and case.c > 1:  # the rest has both formats
        nhwc = case.layout == "nhwc"
        assert got.is_contiguous(memory_format=torch.channels_last if nhwc else torch.contiguous_format)


@pytest.mark.parametrize(
    "name", ["stride_2", "multiplier_3", "seven_by_seven", "xception_19x19", "many_images"]
)
@varieties
@pytest.mark.usefixtures("threads")
def test_same_bits_for_every_number_of_threads(name: str, variety: tuple[str, str], isa: str) -> None:
    case = varied(BY_NAME[name], *variety)
    tensors = case.tensors()
    torch.set_num_threads(1)
    alone = run_native(case, tensors, isa)
    for threads in (2, 3, 7):
        torch.set_num_threads(threads)
        for _ in range(3):
            assert torch.equal(run_native(case, tensors, isa), alone), (
                f"{threads} threads: {format_case(case)}"
            )


@varieties
def test_result_does_not_depend_on_the_batch(variety: tuple[str, str]) -> None:
    case = replace(varied(BY_NAME["fourteen_by_fourteen"], *variety), n=5)
    tensors = case.tensors()
    together = run_native(case, tensors)
    one = replace(case, n=1)
    for i in range(case.n):
        alone = run_native(
            one, {**tensors, "input": tensors["input"][i : i + 1].clone(memory_format=torch.preserve_format)}
        )
        assert torch.equal(together[i : i + 1], alone)


VIEWS = {
    "odd_offset": lambda x: torch.cat([x.new_zeros(3), x.flatten()])[3:].view(x.shape),
    "channel_slice": lambda x: torch.cat([x, x, x], 1)[:, x.shape[1] : 2 * x.shape[1]],
    "column_slice": lambda x: torch.cat([x, x], 3)[..., : x.shape[3]],
    "every_second_column": lambda x: x.repeat_interleave(2, 3)[..., ::2],
    "expanded_batch": lambda x: x[:1].expand(x.shape),
    "expanded_channels": lambda x: x[:, :1].expand(x.shape),
    "transposed_plane": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "channels_last_slice": lambda x: torch.cat([x, x], 1).contiguous(memory_format=torch.channels_last)[
        :, : x.shape[1]
    ],
    "negated_view": lambda x: torch._neg_view(x),
    "weights_too": lambda x: x,
}


@pytest.mark.parametrize("view", VIEWS)
def test_views(view: str) -> None:
    case = replace(BY_NAME["both_biases"], n=2)
    tensors = case.tensors()
    viewed = {**tensors, "input": VIEWS[view](tensors["input"])}
    if view == "weights_too":
        for name, tensor in tensors.items():
            viewed[name] = torch.stack([tensor, tensor], -1)[..., 0]
            assert name == "depthwise_bias" or not viewed[name].is_contiguous() or tensor.numel() == 1
    dense = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in viewed.items()}
    got = fastsep.separable_conv2d(**viewed, **case.options)
    torch.testing.assert_close(got, fastsep.separable_conv2d(**dense, **case.options), rtol=1e-5, atol=1e-5)


@varieties
def test_nan_reaches_what_it_should(variety: tuple[str, str], isa: str) -> None:
    case = varied(Case(c=18, h=9, w=21, k=20, kh=3, kw=3, pt=1, pb=1, pl=1, pr=1, b=1, db=1), *variety)
    for value in (torch.nan, torch.inf):
        tensors = case.tensors()
        tensors["input"][0, 5, 4, 7] = value
        spoilt = ~run_native(case, tensors, isa).isfinite()
        expected = torch.zeros_like(spoilt)
        expected[:, :, 3:6, 6:9] = True
        assert torch.equal(spoilt, expected)


@varieties
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_taps_outside_the_plane_are_left_out(variety: tuple[str, str], value: float, isa: str) -> None:
    """The first row and column of the filter lie in the padding for the first output pixel."""
    case = varied(Case(c=17, h=6, w=19, k=5, kh=3, kw=3, pt=1, pb=1, pl=1, pr=1), *variety)
    tensors = case.tensors()
    tensors["depthwise_weight"][:, :, 0, :] = value
    result = run_native(case, tensors, isa)
    assert result[:, :, 0].isfinite().all()
    assert not result[:, :, 1:].isfinite().any()


@varieties
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_at_the_edges(variety: tuple[str, str], activation: str, isa: str) -> None:
    """Zero, NaN, infinities, and sizes where exponentials overflow, against torch."""
    dtype = getattr(torch, variety[0])
    points = EDGES
    case = varied(Case(c=1, h=1, w=len(points), k=1, kh=1, kw=1, act=activation), *variety)
    x = torch.tensor(points, dtype=dtype).view(1, 1, 1, -1)
    one = torch.ones(1, 1, 1, 1, dtype=dtype)
    tensors = {
        "input": x,
        "depthwise_weight": one,
        "pointwise_weight": one,
        "bias": None,
        "depthwise_bias": None,
    }
    expected = ACTIVATIONS[activation].forward(x.double()).to(dtype)
    eps = torch.finfo(dtype).eps
    got = run_native(case, tensors, isa)
    if activation == "gelu_tanh":  # inf * 0 inside torch's formula as in ours
        got, expected = got[..., 4:], expected[..., 4:]
    torch.testing.assert_close(got, expected, rtol=16 * eps, atol=4 * eps, equal_nan=True)


def test_random_sweep() -> None:
    """A failure prints the line that replays it."""
    isas = _native.core.isas()
    for i, case in enumerate(random_cases(300)):
        check(case, isas[i % len(isas)], seed=i)

"""The forward kernel for compute capability 9.0, on such a GPU: against float64, bit by bit from run to
run, in a graph. benchmarks/gpu_check.sh runs this by itself and within a time limit, since a wrong barrier
hangs.

pytest -m cuda tests/test_cuda_hopper.py
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cases import CASES
from gpu_cases import exactly, on_gpu

from fastsep import _native, _ops, _plan
from fastsep._case import DTYPES, Case, format_case, parse_case
from fastsep._check import call, error_bound, relative_error
from fastsep._cuda_model import FORWARD, HOPPER, PATHS
from fastsep.bench.layers import load

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
        reason="torch finds no GPU of compute capability 9.0",
    ),
]

# The layers that tests/cuda_host runs, and some with many tiles for each block.
LINES = [
    "name=across_images n=2 c=72 h=14 w=14 k=264",
    "name=four_images_in_a_tile n=5 c=136 h=7 w=7 k=40",
    "name=one_chunk n=3 c=64 h=14 w=14 k=256",
    "name=less_than_a_step n=1 c=8 h=9 w=30 k=512",
    "name=two_columns_of_tiles n=1 c=128 h=28 w=28 k=24",
    "name=rests_everywhere n=3 c=200 h=5 w=9 k=520",
    "name=images_of_one_row n=9 c=80 h=1 w=4 k=16",
    "name=wide_rows n=1 c=40 h=3 w=150 k=32",
    "name=many_tiles n=61 c=24 h=56 w=56 k=264",
    "name=many_chunks n=32 c=1024 h=7 w=7 k=1024",
    "name=half_a_tile_less n=33 c=728 h=19 w=19 k=728",
]
ENDS = " kh=3 kw=3 pt=1 pb=1 pl=1 pr=1 db=1 b=1 mid=relu6 act=leaky_relu layout=nhwc"
OWN = [parse_case(line + ENDS) for line in LINES]
ACTIVATIONS = ("relu", "leaky_relu", "hardsigmoid", "silu", "gelu", "tanh")
SIMPLE = "identity", "relu", "relu6", "leaky_relu"
dtypes = pytest.mark.parametrize("dtype", ["float16", "bfloat16"])


def has_kernel(case: Case) -> bool:
    assert _native.cuda is not None, _native.cuda_missing
    return _native.cuda.has_hopper_kernel(case.problem, torch.cuda.current_device())


def check(case: Case, given: dict | None = None) -> torch.Tensor:
    """Twice within the bound, and the same bits; in norm, where only the middle and the output are rounded,
    each by half an eps at most, much nearer. Of tensors of the GPU that are given, or else of copies.
    """
    # On the GPU too, in float64 and by torch's own operators: on a CPU the large layers take seconds.
    exact, magnitude = exactly(case, on_gpu(case.tensors()))
    bound = error_bound(case, magnitude)
    with _plan.force(HOPPER):
        got, again = (call(case, given or on_gpu(case.tensors())) for _ in range(2))
    error = relative_error(got.cpu(), exact.cpu(), bound.cpu())
    assert error <= 1, f"{error:.3g} times its bound: {format_case(case)}"
    assert (got - exact).norm() <= torch.finfo(got.dtype).eps * exact.norm(), format_case(case)
    assert torch.equal(got, again), format_case(case)
    return got


@dtypes
@pytest.mark.parametrize("case", OWN, ids=lambda case: case.name)
def test_forward_is_within_the_rounding_bound(case, dtype):
    case = replace(case, dtype=dtype)
    assert has_kernel(case)
    check(case)


@dtypes
def test_every_case_that_it_takes(dtype):
    cases = [replace(case, dtype=dtype, layout="nhwc") for case in CASES if case.k]
    taken = [case for case in cases if has_kernel(case)]
    assert len(taken) >= 3
    for case in taken:
        check(case)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_on_both_sides(activation):
    case = replace(OWN[0], dtype="bfloat16", mid=activation)
    assert has_kernel(replace(case, act=activation)) == (activation in SIMPLE)
    check(replace(case, act=activation if activation in SIMPLE else "identity"))


@pytest.mark.parametrize("batch", [1, 32, 128])
def test_the_layers_it_is_made_for(batch):
    layers = [replace(case, n=batch, dtype="bfloat16", layout="nhwc") for case in load("mobilenet_v1").layers]
    taken = [case for case in layers if has_kernel(case)]
    assert len(taken) == len([case for case in layers if case.sh == 1])
    for case in {case.problem: case for case in taken}.values():
        check(case)


def test_an_unaligned_input_is_computed_by_another_kernel(monkeypatch, capsys):
    """Which the line says."""
    case = replace(OWN[0], dtype="float16", n=1)
    tensors = on_gpu(case.tensors())
    x = tensors["input"]
    shifted = torch.empty(x.numel() + 1, dtype=x.dtype, device="cuda")[1:]
    n, c, h, w = x.shape
    tensors["input"] = shifted.view(n, h, w, c).permute(0, 3, 1, 2).copy_(x)
    assert tensors["input"].data_ptr() % 16
    monkeypatch.setattr(_ops, "VERBOSE", True)
    got = check(case, tensors)
    line = capsys.readouterr().err.splitlines()[0]
    assert "; hopper left out, it wants addresses that are multiples of 16 |" in line
    taken = line.split()[2]
    assert taken in set(PATHS) - {HOPPER}
    with _plan.force(taken):
        assert torch.equal(got, call(case, tensors))


@dtypes
@pytest.mark.parametrize("odd", [*range(6), None])
def test_what_it_does_not_take_is_refused_and_not_computed_by_another_kernel(dtype, odd):
    """Also by the module itself: an address of each tensor, and a stride."""
    case = replace(OWN[2], dtype=dtype, n=1)
    names = "input", "depthwise_weight", "depthwise_bias", "pointwise_weight", "bias"
    tensors = on_gpu(case.tensors())
    output = torch.full((case.n, case.k, case.oh, case.ow), 7.0, dtype=DTYPES[dtype], device="cuda")
    addresses = [*(tensors[name].data_ptr() for name in names), output.data_ptr()]
    if odd is None:
        case = replace(case, sh=2, sw=2)
    else:
        addresses[odd] += 2
    with pytest.raises(ValueError, match="the kernel asked for is not there for this problem, this device"):
        _native.cuda.forward(case.problem, False, 1, *addresses, 0, 0, 0, 0)
    torch.cuda.synchronize()
    assert (output == 7).all()


def test_a_graph_gives_the_same_bits():
    case = replace(OWN[0], dtype="bfloat16")
    tensors = on_gpu(case.tensors())
    with _plan.force(HOPPER):
        expected = call(case, tensors)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            call(case, tensors)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = call(case, tensors)
    captured.zero_()
    graph.replay()
    assert torch.equal(captured, expected)


@dtypes
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_nan_and_infinity_travel(value, dtype):
    case = replace(OWN[0], dtype=dtype, mid="relu", act="relu")
    tensors = on_gpu(case.tensors())
    tensors["input"][0, 3, 4, 5] = value
    with _plan.force(HOPPER):
        got = call(case, tensors)
    assert torch.equal(got.isfinite(), exactly(case, tensors)[0].isfinite())


@pytest.mark.skipif(_plan.NAMED != "", reason="FASTSEP_CUDA_KERNEL chooses")
def test_nothing_but_its_name_chooses_it_where_it_was_not_measured():
    case = replace(OWN[0], dtype="bfloat16")
    _plan.forget()
    call(case, on_gpu(case.tensors()))
    (choice,) = _plan._choices.values()
    key = _plan.factor_key(case.problem, FORWARD, HOPPER, False)
    assert choice.path != HOPPER or key in _plan.factors()[torch.cuda.get_device_name()]

"""The forward kernel for compute capability 9.0 in calls on a GPU, without one: when it runs, and what the
line of a call says of it. Which path is chosen is in test_plan_hopper.py.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from cases import BY_NAME, half
from cuda_stand_in import backward, forward

from fastsep import _cuda_paths, _plan
from fastsep._case import parse_case
from fastsep._check import NAMES, oracle
from fastsep._cuda_model import HOPPER


def between_vectors(x):
    """As x, at an address that is no multiple of 16."""
    moved = x.new_empty(x.numel() + 1)[1:].as_strided(x.shape, x.stride(), 1).copy_(x)
    assert moved.data_ptr() % 16 == 4
    return moved


@pytest.mark.parametrize(("channels", "calls"), [(16, ["forward hopper"]), (12, [])])
@pytest.mark.parametrize("how", ["forced", "named", "measured"])
def test_the_hopper_kernel_runs_where_it_is_asked_for_or_was_measured(
    on_host, monkeypatch, channels, calls, how
):
    """And where there is one. Nothing was measured of it yet, so the model does not take it by itself."""
    case = replace(BY_NAME["padded_3x3"], c=channels, layout="nhwc")
    tensors = case.tensors()

    def check():
        got = forward(case, tensors)
        torch.testing.assert_close(got, oracle(case, tensors).float(), rtol=1e-4, atol=1e-4)
        return [name for name in on_host.calls if "hopper" in name]

    assert check() == []
    if how == "named":
        monkeypatch.setattr(_plan, "NAMED", HOPPER)
    if how == "measured":
        key = _plan.factor_key(case.problem, "forward", HOPPER, _cuda_paths.allows_tf32())
        monkeypatch.setattr(_plan, "factors", lambda: {"test": {key: 0.01}})
        _plan.forget()
    with _plan.force(HOPPER) if how == "forced" else nullcontext():
        assert check() == calls


def test_addresses_that_the_hopper_kernel_does_not_take_are_seen(on_host, monkeypatch):
    """Of any tensor, a bias too: another path computes the call, also when it is known, and says why."""
    case = replace(BY_NAME["both_biases"], c=16, k=8, layout="nhwc")
    tensors = case.tensors()
    monkeypatch.setattr(_plan, "NAMED", HOPPER)
    expected = oracle(case, tensors).float()
    for odd in [None, *NAMES] * 2:
        given = {name: between_vectors(t) if name == odd else t for name, t in tensors.items()}
        on_host.calls.clear()
        got = forward(case, given)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
        assert ("forward hopper" in on_host.calls) == (odd is None), odd
    assert sum("it wants addresses" in choice.why for choice in _plan._choices.values()) == 1


def test_the_line_says_whether_the_named_kernel_ran(on_host, lines, monkeypatch, capsys):
    case = replace(BY_NAME["relu6"], c=16, layout="nhwc")
    tensors = case.tensors()

    def line_of(case, tensors):
        forward(case, tensors)
        line = capsys.readouterr().err
        assert line.startswith("fastsep: cuda hopper |") == (on_host.calls[-1] == "forward hopper")
        assert parse_case(line) == replace(case, name="")
        return line

    assert "; hopper left out, it was not measured on a test |" in line_of(case, tensors)
    monkeypatch.setattr(_plan, "NAMED", HOPPER)
    assert "cuda hopper | named by FASTSEP_CUDA_KERNEL |" in line_of(case, tensors)
    unaligned = {**tensors, "input": between_vectors(tensors["input"])}
    assert "; hopper left out, it wants addresses that are multiples of 16 |" in line_of(case, unaligned)
    absent = "; hopper, named by FASTSEP_CUDA_KERNEL, is not there for such a call on this GPU |"
    for other in (replace(case, c=12), half(case)):
        assert absent in line_of(other, other.tensors())
    with _plan.force(HOPPER):
        assert absent.replace("named by FASTSEP_CUDA_KERNEL", "forced") in line_of(other, other.tensors())
    backward(case, tensors)
    gradients = absent.replace(" |", ", gradients of ")
    line = capsys.readouterr().err
    assert line.startswith("fastsep: backward cuda ")
    assert gradients in line


@pytest.mark.parametrize("run_phase", [forward, backward])
def test_an_unknown_path_in_the_environment_is_an_error_of_each_call(on_host, monkeypatch, run_phase):
    monkeypatch.setattr(_plan, "NAMED", "ampere")
    case = BY_NAME["both_biases"]
    for _ in range(2):
        with pytest.raises(ValueError, match=r"^FASTSEP_CUDA_KERNEL is 'ampere', expected fused, hopper, "):
            run_phase(case, case.tensors())
    assert on_host.calls == []

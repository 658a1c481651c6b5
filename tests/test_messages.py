"""What a wrong call is told."""

import re
import warnings
from importlib.metadata import PackageNotFoundError, distribution

import pytest
import torch
from commands import run
from optimizing import Block, made

import fastsep
from fastsep import DepthwiseConv2d, SeparableConv2d, __version__, _native

X = torch.randn(2, 8, 9, 10)


def nested():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that they are a prototype
        return torch.nested.nested_tensor([X[0], X[1]])


CALLS = {
    "rank": (
        lambda: SeparableConv2d(8, 4, 3)(torch.randn(1, 1, 3, 4, 4)),
        RuntimeError, r"input must be \[N, C, H, W\] or \[C, H, W\], got \[1, 1, 3, 4, 4\]",
    ),
    "rank of a half": (
        lambda: DepthwiseConv2d(8, 8, 3)(torch.randn(3, 4)),
        RuntimeError, r"input must be \[N, C, H, W\] or \[C, H, W\], got \[3, 4\]",
    ),
    "depthwise_bias": (
        lambda: SeparableConv2d(8, 4, 3, depthwise_bias=torch.ones(8)),
        TypeError, "depthwise_bias must be True or False, got a Tensor",
    ),
    "bias": (
        lambda: SeparableConv2d(8, 4, 3, bias="False"), TypeError, "bias must be True or False, got 'False'",
    ),
    "bias of a half": (
        lambda: DepthwiseConv2d(8, 8, 3, bias=None), TypeError, "bias must be True or False, got None",
    ),
    "size": (
        lambda: fastsep.optimize(made(Block()), (1, 3, 224, 224)),
        TypeError, r"got \(1, 3, 224, 224\): give a tensor of that size, torch.randn\(1, 3, 224, 224\)",
    ),
    "float for bfloat16": (
        lambda: SeparableConv2d(8, 4, 3).bfloat16()(X),
        RuntimeError, "input must have the weights' dtype, torch.bfloat16, got torch.float32",
    ),
    "float for a half in bfloat16": (
        lambda: DepthwiseConv2d(8, 8, 3).bfloat16()(X),
        RuntimeError, "input must have the weights' dtype, torch.bfloat16, got torch.float32",
    ),
    "another device": (
        lambda: SeparableConv2d(8, 4, 3, device="meta")(X),
        RuntimeError, "input must be on the weights' device, meta, got cpu",
    ),
    "sparse": (
        lambda: SeparableConv2d(8, 4, 3)(X.to_sparse()),
        RuntimeError, "input must be a dense tensor, got a torch.sparse_coo one",
    ),
    "nested": (
        lambda: DepthwiseConv2d(8, 8, 3)(nested()),
        RuntimeError, "input must be a dense tensor, got a nested one",
    ),
    "cost": (
        lambda: fastsep.cost(SeparableConv2d(8, 4, 3)),
        ValueError, r"input_size must be given where the model has none of its own: \(C, H, W\)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CALLS)
def test_call(case):
    call, error, message = CALLS[case]
    with pytest.raises(error, match=message):
        call()


def test_commands_are_listed():
    result = run("python -m fastsep")
    assert result.returncode == 0
    for name in ("info", "bench", "optimize", "cost", "replay"):
        assert re.search(rf"^ +{name} ", result.stdout, re.M)


def test_version():
    assert run("python -m fastsep --version").stdout.split() == ["fastsep", __version__]


def test_console_script():
    try:
        files = distribution("fastsep").entry_points
    except PackageNotFoundError:
        pytest.skip("fastsep is not installed")
    assert [(point.group, point.value) for point in files] == [("console_scripts", "fastsep.__main__:main")]


def test_a_network_of_torchvision_is_suggested():
    result = run("python -m fastsep bench --network resnet18")
    assert result.returncode == 2
    assert "--whole --network torchvision/resnet18" in result.stderr


@pytest.mark.skipif(_native.core is None, reason="the native module is missing")
def test_instruction_sets_in_any_case():
    name = _native.core.isas()[-1]
    program = "import fastsep; print(fastsep._native.core.best_isa())"
    assert run(f"python -c '{program}'", FASTSEP_ISA=name.upper()).stdout.strip() == name
    result = run("python -m fastsep info", FASTSEP_ISA="SSE9")
    assert result.returncode == 2
    known = ", ".join(_native.core.isas())
    assert (
        f"FASTSEP_ISA is 'SSE9', expected one that is compiled in and runs on this processor: {known}"
        in result.stderr
    )

"""What contenders compute is compared before it is timed: right results pass, and wrong ones never do."""

from contextlib import ExitStack, contextmanager
from dataclasses import replace

import pytest
import torch

from fastsep import _native
from fastsep._case import parse_case
from fastsep.bench import contenders
from fastsep.bench.contenders import Subject, Task
from fastsep.bench.task import without_tf32

pytestmark = pytest.mark.skipif(_native.core is None, reason="the native module is missing")
DTYPES = ["float32", "float64", "float32 on cuda", "tf32", "float16", "bfloat16"]
LINES = [
    "c=8 h=14 w=15 k=16 kh=3 kw=3 pt=1 pb=1 pl=1 pr=1 db=1 b=1 mid=relu act=silu",
    "n=2 c=32 h=16 w=16 k=24 kh=5 kw=5 sh=2 sw=2 pt=2 pb=2 pl=2 pr=2 db=1 b=1 mid=relu6 act=relu",
    "n=2 c=64 h=14 w=14 k=64 kh=3 kw=3 dh=2 dw=2 pt=2 pb=2 pl=2 pr=2 db=1 b=1 mid=hardswish act=relu6",
    "n=2 c=32 h=15 w=15 k=0 kh=7 kw=7 pt=3 pb=3 pl=3 pr=3",
]
PHASES = ["forward", "training", "input-gradient", "weight-gradient"]


def task_of(line, dtype, phase, monkeypatch):
    """A task on the CPU, in a dtype that is measured on GPUs alone verified as there."""
    case = replace(parse_case(line), dtype="float32" if dtype in ("tf32", "float32 on cuda") else dtype)
    if dtype not in ("float32", "float64"):
        monkeypatch.setattr(Task, "is_native", False)
    if dtype == "tf32":
        monkeypatch.setattr(Task, "eps", 2.0**-10)
    return Task.of(case, phase, "cpu", 1)


@contextmanager
def contenders_of(task):
    """torch's convolutions among contenders: the results that all are held against, and the others'."""
    with contenders.context(task.phase), ExitStack() as stack:
        subjects = contenders.build(task, ["torch"], stack)
        yield subjects["torch nchw"], subjects["torch nhwc"]


def first_channels_missing(results):
    """An eighth of the first of the results is not there."""
    results[0][:, : max(1, results[0].shape[1] // 8)] = 0
    return results


WRONG = {
    "zeros": lambda results: [torch.zeros_like(tensor) for tensor in results],
    "negated": lambda results: [-tensor for tensor in results],
    "larger": lambda results: [tensor * 1.1 for tensor in results],
    "smaller": lambda results: [tensor * 0.9 for tensor in results],
    "not a number": lambda results: [tensor * torch.nan for tensor in results],
    "incomplete": first_channels_missing,
}


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("line", LINES)
def test_right_results_pass_and_wrong_ones_do_not(line, dtype, phase, monkeypatch):
    task = task_of(line, dtype, phase, monkeypatch)
    with contenders_of(task) as (first, second):
        contenders.verify(task, {"torch nchw": first, "other": second})
        right = second.outputs()
        for name, change in WRONG.items():
            results = change([tensor.clone() for tensor in right])
            wrong = Subject(second.contender, lambda results=results: results)
            with pytest.raises(ArithmeticError) as error:
                contenders.verify(task, {"torch nchw": first, "other": wrong})
            assert "other differs from torch by" in str(error.value), name


def test_a_slope_that_rounding_decides_passes():
    """One output so near a bend that its sign is another one with another order of the sum."""
    case = parse_case("c=8 h=14 w=15 k=16 kh=3 kw=3 pt=1 pb=1 pl=1 pr=1 b=1 act=relu")
    task = Task.of(case, "training", "cpu", 1)
    x, dw, pw = (task.tensors[name].double() for name in ("input", "depthwise_weight", "pointwise_weight"))
    argument = torch.conv2d(torch.conv2d(x, dw, padding=1, groups=8), pw)
    task.tensors["bias"].copy_(-argument[0, :, 7, 7])
    below, above = ([tensor.float() for tensor in task._exact(shift)] for shift in (-1e-7, 1e-7))
    with contenders_of(task) as (first, _):
        below, above = (replace(first, outputs=lambda results=results: results) for results in (below, above))
        contenders.verify(task, {"torch nchw": below, "other": above})
        contenders.verify(task, {"torch nchw": above, "other": below})
        for name, change in WRONG.items():
            wrong = change([tensor.clone() for tensor in above.outputs()])
            with pytest.raises(ArithmeticError):
                contenders.verify(
                    task, {"torch nchw": below, name: replace(first, outputs=lambda w=wrong: w)}
                )
        # It is more than rounding without a bend.
        bias = [subject.outputs()[-1] for subject in (below, above)]
        assert torch.linalg.vector_norm(bias[0] - bias[1]) > 0.01 * torch.linalg.vector_norm(bias[0])


def rounded_to_tf32(tensor):
    """To 10 bits behind the point."""
    bits = tensor.view(torch.int32)
    return torch.bitwise_and(bits + (1 << 12), ~((1 << 13) - 1)).view(torch.float32)


@pytest.mark.parametrize("phase", ["forward", "training"])
@pytest.mark.parametrize("line", LINES)
def test_factors_in_tensorfloat32_pass(line, phase, monkeypatch):
    """A contender that rounds input and weights, as a GPU's tensor cores do."""
    task = task_of(line, "tf32", phase, monkeypatch)
    with contenders.context(phase), ExitStack() as stack:
        rough = {name: None if t is None else rounded_to_tf32(t) for name, t in task.tensors.items()}
        subjects = contenders.build(replace(task, tensors=rough), ["torch"], stack)
        contenders.verify(task, subjects)
        monkeypatch.setattr(Task, "eps", torch.finfo(torch.float32).eps)
        with pytest.raises(ArithmeticError):
            contenders.verify(replace(task), subjects)


def test_tensorfloat32_is_given_back():
    before = torch.backends.cudnn.allow_tf32
    with without_tf32():
        assert not torch.backends.cudnn.allow_tf32
    assert torch.backends.cudnn.allow_tf32 == before

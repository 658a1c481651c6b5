"""One layer by fastsep and by others: the same numbers in, the same numbers out."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import _native
from .._case import DTYPES, LAYOUTS, Case, format_case
from .._check import Tensors, error_bound, relative_error
from ..functional import depthwise_conv2d
from ..modules import SeparableConv2d
from . import peers
from .baselines import Call, compiled, given, naive, own_parameters, two_convolutions, two_modules
from .engine import Contender, Local, OnGpu
from .layers import operations, sizes
from .machine import last_level_cache

# Plain loops, for a sense of proportion; above this many operations they would take the whole day.
NAIVE_OPERATIONS = 60e6
# Copies of an input are made until they exceed the last-level cache so many times, up to so many bytes.
CACHES, COPIES_BYTES = 2, 1 << 30

TORCH = [f"torch {layout}" for layout in LAYOUTS]
OWN = ["fastsep", "unfrozen"]
AGAINST = ["torch", "compile", "naive", *peers.RUNTIMES]


@dataclass(frozen=True)
class Subject:
    """What takes part in a comparison."""

    contender: Contender
    outputs: Callable[[], Sequence[Tensor]]  # the result, or the gradients that the phase asks for


@dataclass(frozen=True)
class Task:
    """A layer, what of it is measured, and the numbers that go in."""

    case: Case
    phase: str
    device: str
    threads: int
    tensors: Tensors

    @classmethod
    def of(cls, case: Case, phase: str, device: str, threads: int) -> Task:
        return cls(case, phase, device, threads, case.tensors(device=device))

    @property
    def input(self) -> Tensor:
        x = self.tensors["input"]
        assert x is not None
        return x

    @property
    def is_cold(self) -> bool:
        """Whether a network no longer finds its input in the last-level cache, where it was written."""
        x, y, _ = sizes(self.case)
        return x + y > last_level_cache(self.device) / 2

    @property
    def copies(self) -> int:
        """Inputs to take in turn."""
        size = sizes(self.case)[0]
        if not self.is_cold:
            return 1
        return max(1, min(CACHES * last_level_cache(self.device) // size + 1, COPIES_BYTES // size))


def context(phase: str) -> AbstractContextManager[Any]:
    """What the calls of a phase run in."""
    return torch.inference_mode() if phase == "forward" else nullcontext()


def unavailable(name: str, case: Case, phase: str, device: str) -> str:
    """Why a contender cannot take part in this; empty where it can."""
    if name in peers.RUNTIMES:
        if phase != "forward" or device != "cpu" or case.dtype != "float32":
            return f"{name} takes part in the forward pass, on the CPU, in float32"
        return peers.missing(name)
    if name == "naive":
        if phase != "forward" or device != "cpu" or DTYPES[case.dtype] not in _native.DTYPES:
            return "naive takes part in the forward pass, on the CPU, in float32 and float64"
        if operations(case) > NAIVE_OPERATIONS:
            return f"naive takes part up to {NAIVE_OPERATIONS / 1e6:.0f} million operations"
    if name == "unfrozen" and (phase != "forward" or not case.k):
        return "unfrozen differs from fastsep only in the forward pass of a whole layer"
    return ""


def build(task: Task, against: Sequence[str], stack: ExitStack) -> dict[str, Subject]:
    """fastsep, torch in both layouts, and those of the others that can take part; ``stack`` ends them."""
    others = [name for name in against if name != "torch"]
    made = {}
    for name in [*OWN, *TORCH, *others]:
        if not unavailable(name, task.case, task.phase, task.device):
            made[name] = _peer(name, task, stack) if name in peers.RUNTIMES else _local(name, task)
    return made


def _peer(name: str, task: Task, stack: ExitStack) -> Subject:
    module = two_modules(task.case, task.tensors).eval()
    inputs = [task.input.contiguous() for _ in range(1)]
    remote = stack.enter_context(peers.Remote(name, module, inputs[0], task.threads, task.copies))
    return Subject(remote, lambda: [remote.output()])


def _local(name: str, task: Task) -> Subject:
    call, parameters, layout = _call(name, task)
    run, outputs = _phase(task, call, parameters, layout)
    contender = OnGpu if task.device == "cuda" else Local
    return Subject(contender(run), outputs)


def _call(name: str, task: Task) -> tuple[Call, list[Tensor], str]:
    """The layer as a function of its input, its parameters in Case.tensors()' order, and its layout."""
    case, tensors = task.case, task.tensors
    if name in OWN:
        if not case.k:
            return _depthwise_half(case, tensors)
        made = layer(case, tensors)
        if name == "fastsep" and task.phase == "forward":
            made.freeze()
        parameters = dict(made.named_parameters())
        keys = "depthwise.weight", "pointwise.weight", "pointwise.bias", "depthwise.bias"
        return made, [parameters[key] for key in keys if key in parameters], case.layout
    if name == "naive":
        return partial(naive, case, tensors), [], case.layout
    if name == "compile":
        return compiled(case, tensors, task.phase)
    layout = name.removeprefix("torch ")
    weights = own_parameters(replace(case, layout=layout), tensors)
    return two_convolutions(replace(case, layout=layout), *weights, phase=task.phase), given(weights), layout


def _phase(
    task: Task, call: Call, parameters: list[Tensor], layout: str
) -> tuple[Callable[[], object], Callable[[], Sequence[Tensor]]]:
    """One call as it is timed, and its results."""
    phase = task.phase
    x = task.input.contiguous(memory_format=LAYOUTS[layout])
    needs_x, needs_weights = phase in ("training", "input-gradient"), phase in ("training", "weight-gradient")
    inputs = [x.clone().requires_grad_(needs_x) for _ in range(task.copies)]
    for parameter in parameters:
        parameter.requires_grad_(needs_weights)
    turns: Iterator[Any] = itertools.cycle(inputs)
    if phase == "forward":
        return lambda: call(next(turns)), lambda: [call(inputs[0])]
    grad = task.case.gradient(device=task.device).contiguous(memory_format=LAYOUTS[layout])

    def leaves(x: Tensor) -> list[Tensor]:
        return [x] * needs_x + parameters * needs_weights

    if phase == "training":

        def step(x: Tensor) -> Sequence[Tensor]:
            return torch.autograd.grad(call(x), leaves(x), grad)

        return lambda: step(next(turns)), lambda: step(inputs[0])

    def backward(graph: tuple[Tensor, Tensor]) -> Sequence[Tensor]:
        x, y = graph
        return torch.autograd.grad(y, leaves(x), grad, retain_graph=True)

    graphs = [(x, call(x)) for x in inputs]
    turns = itertools.cycle(graphs)
    return lambda: backward(next(turns)), lambda: backward(graphs[0])


def layer(case: Case, tensors: Tensors) -> SeparableConv2d:
    """fastsep's layer with the case's weights."""
    dw, pw, b, db = (
        tensors[key] for key in ("depthwise_weight", "pointwise_weight", "bias", "depthwise_bias")
    )
    assert dw is not None
    made = SeparableConv2d(
        *(case.c, case.k, (case.kh, case.kw)),
        depth_multiplier=case.m,
        bias=b is not None,
        depthwise_bias=db is not None,
        device=dw.device,
        dtype=dw.dtype,
        **case.options,  # type: ignore[arg-type]
    )
    weights = {"depthwise.weight": dw, "depthwise.bias": db, "pointwise.weight": pw, "pointwise.bias": b}
    made.load_state_dict({key: weight for key, weight in weights.items() if weight is not None})
    return made.eval()


def _depthwise_half(case: Case, tensors: Tensors) -> tuple[Call, list[Tensor], str]:
    dw, _, _, db = own_parameters(case, tensors)
    assert dw is not None
    options: Any = case.options
    return lambda x: depthwise_conv2d(x, dw, db, **options), given((dw, db)), case.layout


def verify(task: Task, subjects: dict[str, Subject]) -> None:
    """ArithmeticError where a contender differs from torch by more than the rounding of both allows."""
    expected = [tensor.double() for tensor in subjects["torch nchw"].outputs()]
    check = _check_forward if task.phase == "forward" else _check_gradients
    compare = check(task)
    for name, subject in subjects.items():
        got = subject.outputs()
        error = max(compare(value, exact) for value, exact in zip(got, expected, strict=True))
        if error > 1:
            line = format_case(task.case)
            raise ArithmeticError(
                f"{name} differs from torch by {error:.3g} times what rounding allows: {line}"
            )


def _check_forward(task: Task) -> Callable[[Tensor, Tensor], float]:
    case = replace(task.case, mid="identity", act="identity")
    sized: Tensors = {name: None if t is None else t.abs() for name, t in task.tensors.items()}
    magnitude = two_convolutions(case, *own_parameters(case, sized), phase="forward")(task.input.abs())
    bound = 2 * error_bound(case, magnitude)
    if task.device == "cuda" and task.case.dtype == "float32" and torch.backends.cudnn.allow_tf32:
        bound *= 2**13  # TensorFloat-32 has 10 bits behind the point, float32 has 23
    return lambda got, expected: relative_error(got.to(expected.device), expected, bound)


def _check_gradients(task: Task) -> Callable[[Tensor, Tensor], float]:
    """By the norm: where an activation bends, rounding alone decides which slope a single number has."""
    eps = torch.finfo(DTYPES[task.case.dtype]).eps
    if task.device == "cuda" and task.case.dtype == "float32" and torch.backends.cudnn.allow_tf32:
        eps *= 2**13
    bends = any(name in ("relu", "relu6", "leaky_relu", "hardswish", "hardsigmoid")
                for name in (task.case.mid, task.case.act))  # fmt: skip
    tolerance = 1e3 * eps + (4 * eps**0.5 if bends else 0.0)

    def compare(got: Tensor, expected: Tensor) -> float:
        difference = torch.linalg.vector_norm(got.double() - expected)
        size = torch.linalg.vector_norm(expected)
        return float((difference / (tolerance * size + 1e-30)).nan_to_num(nan=torch.inf))

    return compare

"""One layer by fastsep and by others: the same numbers in, the same numbers out."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import _native
from .._case import DTYPES, LAYOUTS, Case
from .._check import Tensors
from ..functional import depthwise_conv2d
from ..modules import SeparableConv2d
from . import peers
from .baselines import (
    Call,
    compiled,
    given,
    naive,
    naive_gradients,
    own_parameters,
    two_convolutions,
    two_modules,
)
from .engine import Local, OnGpu
from .layers import phase_operations
from .task import Subject as Subject
from .task import Task as Task
from .task import context as context
from .task import verify as verify

# Plain loops, for a sense of proportion; above this many operations they would take the whole day.
NAIVE_OPERATIONS = 60e6

TORCH = [f"torch {layout}" for layout in LAYOUTS]
OWN = ["fastsep", "unfrozen"]
AGAINST = ["torch", "compile", "naive", *peers.RUNTIMES]


def unavailable(name: str, case: Case, phase: str, device: str) -> str:
    """Why a contender cannot take part in this; empty where it can."""
    if name in peers.RUNTIMES:
        if phase != "forward" or device != "cpu" or case.dtype != "float32":
            return f"{name} takes part in the forward pass, on the CPU, in float32"
        return peers.missing(name)
    if name == "naive":
        if phase not in ("forward", "training"):
            return "naive takes part in the forward pass and in training"
        if device != "cpu" or DTYPES[case.dtype] not in _native.DTYPES:
            return "naive takes part on the CPU, in float32 and float64"
        if phase_operations(case, phase) > NAIVE_OPERATIONS:
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
    run, outputs = _phase(task, call, parameters, layout, is_naive=name == "naive")
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
    task: Task, call: Call, parameters: list[Tensor], layout: str, *, is_naive: bool = False
) -> tuple[Callable[[], object], Callable[[], Sequence[Tensor]]]:
    """One call as it is timed, and its results."""
    phase, (needs_x, needs_weights) = task.phase, task.needs
    x = task.input.contiguous(memory_format=LAYOUTS[layout])
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
            if is_naive:
                return naive_gradients(task.case, task.tensors, x, grad)
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

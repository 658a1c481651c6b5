"""optimize(), report() and revert()."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_map_only

from .._native import has_memory
from ..modules import SeparableConv2d
from .forward import Forward
from .plans import FILTERED, Filter, Maker, Mode
from .randomness import RandomState
from .regions import regions
from .report import Candidate, Report
from .trace import inference_tensor
from .verify import largest_error, tolerance

Model = TypeVar("Model", bound=nn.Module)

_RECORD = "_fastsep"  # the attribute of an optimized model


@dataclass
class Training:
    """Stands in for the method train() of a model that was optimized for inference."""

    model: nn.Module
    warned: bool = False

    def __call__(self, mode: bool = True) -> nn.Module:
        if mode and not self.warned:
            self.warned = True
            warnings.warn(
                f"this {type(self.model).__name__} was optimized for inference, and its parameters require "
                "no gradients: revert() it to train",
                stacklevel=2,
            )
        return type(self.model).train(self.model, mode)


@dataclass
class _Record:
    """What an optimized model keeps of how it became one."""

    report: Report
    taken_over: list[nn.Module] = field(default_factory=list)
    required_grad: dict[str, bool] = field(default_factory=dict)


def optimize(
    model: Model,
    example_inputs: Any = None,
    *,
    mode: Mode = "inference",
    filter_fn: Filter | None = None,
    verify: bool = True,
    inplace: bool = False,
) -> Model:
    """The model with its depthwise and pointwise convolutions computed in one pass, wherever that is safe.

    >>> model = optimize(torchvision.models.mobilenet_v2().eval(), torch.randn(1, 3, 224, 224))
    >>> print(report(model))
    >>> model(torch.randn(1, 3, 224, 224)).shape
    torch.Size([1, 1000])

    It finds depthwise -> [norm] -> [activation] -> pointwise -> [norm] -> [activation], however the model
    writes it. For inference it also folds the norms of the other convolutions, packs the weights and has the
    parameters require no gradient. Nothing is chosen by timing: all that a kernel takes goes to it, and every
    model computes in channels-last, in which the kernels are faster, unless its forward could tell. Where no
    depthwise convolution is called it stays as it is.

    The module, its children and the keys of its state dict stay as they are: what is swapped is its forward,
    and for any call but a plain inference on the CPU (training, autocast, a compiler or exporter, hooks that
    came later) the model's own forward runs. Results have the strides that it gives them.

    Weights, buffers and attributes that change later count. Each call looks at where the tensors lie, at
    their versions and at up to 64 numbers of each, which takes 0.3 ms of MobileNetV2's 10 on a Zen 3;
    where something is not as it was the model's own forward runs, and where that lasts it is read anew. Only
    a write that leaves the version and those numbers as they were is not seen, nor what changes inside an
    attribute that is no tensor, a list say: optimize again then. What a forward does beside computing its
    result (it appends to a global list, say), and what it makes of `type(x)`, it does once, while optimize()
    reads it.

    model: any nn.Module, its weights on the CPU.
    example_inputs: a tensor or a tuple of arguments to run both models on. (A forward that branches on the
        sizes of its input cannot be taken over with them either: its children are, each by itself.)
    mode: "inference", or "training": then only pairs without a norm between them are fused, nothing is
        folded or packed, and gradients flow.
    filter_fn: called with each depthwise convolution and its name; False leaves it as it is.
    verify: compare each fused pair with what it replaces, and with example_inputs the whole model, in the
        mode it is in.
    inplace: change this model instead of a copy.

    ValueError for a model that trains or was made in torch.inference_mode() where the mode is "inference",
    that has no weights yet (lazy layers, the meta device), or that is optimized already; TypeError for
    something that is no nn.Module, or a ScriptModule, and for a list of inputs; RuntimeError where the
    results differ. A warning where nothing could be taken over, and of train() on the optimized model.
    The given model is unharmed in every case.
    """
    _check(model, mode)
    _check_inputs(example_inputs)
    # What is made in inference mode counts no versions, and autograd could have none of it.
    with torch.inference_mode(False):
        optimized = model if inplace else copy.deepcopy(model)
        try:
            _optimize(optimized, example_inputs, mode, filter_fn, verify)
        except BaseException:
            _give_back(optimized)
            raise
    record = _record(optimized)
    reasons = [f"{left.name}: {left.reason}" for left in record.report.left if left.reason != FILTERED]
    if not record.taken_over and (reasons or not record.report.candidates):
        reason = reasons[0] if reasons else "it has no depthwise convolution"
        warnings.warn(
            f"optimize() could take over nothing of this {type(model).__name__}: {reason}", stacklevel=2
        )
    return optimized


def _check_inputs(example_inputs: Any) -> None:
    if isinstance(example_inputs, list):
        raise TypeError(
            "example_inputs must be a tensor or a tuple of arguments, got list: one argument that is a list "
            "goes into a tuple"
        )
    if isinstance(example_inputs, tuple) and example_inputs and all(type(x) is int for x in example_inputs):
        size = ", ".join(map(str, example_inputs))
        raise TypeError(
            f"example_inputs must be a tensor or a tuple of arguments, got ({size}): give a tensor of that "
            f"size, torch.randn({size})"
        )


def _check(model: nn.Module, mode: str) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError("model must be an nn.Module with a forward in Python, got a ScriptModule")
    if mode not in ("inference", "training"):
        raise ValueError(f'mode must be "inference" or "training", got {mode!r}')
    for name, module in model.named_modules():
        if _RECORD in module.__dict__:
            which = f"its {name}" if name else "it"
            raise ValueError(f"model must not be optimized already, got one where {which} is: revert() that")
        if mode == "inference" and module.training:
            which = f"its {name}" if name else "it"
            raise ValueError(f'model must be in eval mode for mode="inference", got one where {which} trains')
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if is_lazy(tensor):
            raise ValueError(f"model must have been called once, got {name} of a lazy layer")
        if tensor.is_meta:
            raise ValueError(f"model must have its weights in memory, got {name} on the meta device")
        if not has_memory(tensor):
            raise ValueError(f"model must have its weights in memory, got {name} whose storage was freed")
    if mode == "inference" and (name := inference_tensor(model)):
        raise ValueError(
            f"model must have weights whose changes can be seen, got {name} made in torch.inference_mode()"
        )


def _optimize(
    model: nn.Module, example_inputs: Any, mode: Mode, filter_fn: Filter | None, verify: bool
) -> None:
    found, untraceable = regions(model, gradients=mode == "training")
    summary = Report(type(model).__name__, mode, [])
    record = _Record(summary)
    forwards: list[Forward] = []
    for region in found:
        maker = Maker(region.name, mode, verify=verify)
        plan, candidates = maker.plan(region, filter_fn)
        summary.candidates += candidates
        if plan.programs is not None:
            forwards.append(Forward(region.module, mode, maker, plan))
            summary.channels_last |= plan.programs.is_converted
    summary.candidates += _hidden(model, summary.candidates, untraceable)

    inputs = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
    compared = verify and example_inputs is not None and bool(forwards)
    expected = _try(model, inputs) if compared else None
    for forward in forwards:
        forward.root.__dict__.update(forward=forward, _apply=forward.apply)
        record.taken_over.append(forward.root)
    model.__dict__[_RECORD] = record
    if forwards and mode == "inference":
        model.__dict__["train"] = Training(model)
    for forward in forwards:
        forward.settle()
    if forwards and mode == "inference":
        record.required_grad = {name: p.requires_grad for name, p in model.named_parameters()}
        model.requires_grad_(False)
    if compared:
        summary.error = largest_error(_try(model, inputs), expected)
        if not summary.error <= tolerance(expected):
            raise RuntimeError(
                "model must give the same result when it is optimized, got a difference of "
                f"{summary.error:.1e} of the largest output"
            )


def _try(model: nn.Module, inputs: tuple[Any, ...]) -> Any:
    """The model's result, and no trace of the call: a model that trains writes to its buffers and may draw
    random numbers, which here are the same in each call."""
    numbers = RandomState()
    buffers = [(module._buffers, dict(module._buffers)) for module in model.modules()]
    values = [(b, b.clone()) for _, held in buffers for b in held.values() if b is not None]
    with torch.no_grad():
        try:
            return model(*_copies(inputs))
        finally:
            for slots, held in buffers:
                slots.update(held)
            for buffer, value in values:
                if not torch.equal(buffer, value):
                    buffer.copy_(value)
            numbers.restore()


def _copies(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Of tensors, too, that autograd has computed and deepcopy() refuses."""
    tensors = tree_map_only(Tensor, lambda x: x.detach().clone(), inputs)
    return copy.deepcopy(tensors)


def _hidden(model: nn.Module, known: list[Candidate], untraceable: Mapping[str, str]) -> Iterator[Candidate]:
    """Depthwise convolutions that no graph shows."""
    names = {candidate.name for candidate in known}
    for name, module in model.named_modules():
        if not isinstance(module, nn.Conv2d) or not 1 < module.groups == module.in_channels or name in names:
            continue
        if module is model or isinstance(model, SeparableConv2d):
            yield Candidate(name or "the model", False, f"the model itself is one {type(model).__name__}")
            continue
        reason = "the model's forward does not call it"
        for ancestor in [*_ancestors(name), ""]:
            if ancestor in untraceable:
                reason = f"{ancestor or 'the model'} {untraceable[ancestor]}"
                break
        yield Candidate(name, False, reason)


def _ancestors(name: str) -> list[str]:
    """The modules that hold one, from the inside."""
    parts = name.split(".")[:-1]
    return [".".join(parts[:count]) for count in range(len(parts), 0, -1)]


def report(model: nn.Module) -> Report:
    """What optimize() did with a model: print() shows each depthwise convolution, fused or left, and why.

    >>> print(report(optimize(model)))

    model: one that optimize() returned.

    ValueError for another.
    """
    return _record(model).report


def revert(model: Model) -> Model:
    """Undoes optimize(), in place: the model's own forward and requires_grad are back.

    >>> model = revert(optimize(model))

    model: one that optimize() returned.

    ValueError for another.
    """
    _record(model)
    _give_back(model)
    return model


def _record(model: nn.Module) -> _Record:
    record = getattr(model, "__dict__", {}).get(_RECORD)
    if not isinstance(record, _Record):
        raise ValueError(f"model must be one that optimize() returned, got {type(model).__name__}")
    return record


def _give_back(model: nn.Module) -> None:
    record = model.__dict__.pop(_RECORD, None)
    if record is None:
        return
    if isinstance(model.__dict__.get("train"), Training):
        del model.__dict__["train"]
    for module in record.taken_over:
        if isinstance(module.__dict__.get("forward"), Forward):  # and not somebody's who came later
            del module.__dict__["forward"]
        module.__dict__.pop("_apply", None)
    for name, parameter in model.named_parameters():
        if name in record.required_grad:
            parameter.requires_grad_(record.required_grad[name])

"""From a module to graphs of it, by torch.fx; where a forward cannot be traced, from its children."""

from __future__ import annotations

import inspect
import operator
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.fx.proxy import Attribute

from ..modules import SeparableConv2d
from .randomness import RandomState


def why_opaque(module: nn.Module) -> str:
    """Why a module has to be called as it is, in words; empty where its forward may be taken apart."""
    if module._forward_hooks or module._forward_pre_hooks:
        return "a hook"
    if module._backward_hooks or module._backward_pre_hooks:
        return "a backward hook"
    if "forward" in module.__dict__:
        return "a forward of its own"
    if hasattr(module, "parametrizations"):
        return "a parametrization"
    return ""


def inputs_of(forward: Callable[..., Any]) -> list[str]:
    """The arguments of a forward that have no default; ValueError where there are none or keywords.

    What has a default is left at it: `if mask is not None` would be true of any stand-in for a tensor.
    """
    names = []
    for parameter in list(inspect.signature(inspect.unwrap(forward)).parameters.values())[1:]:
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        if parameter.default is parameter.empty:
            if parameter.kind is parameter.KEYWORD_ONLY:
                raise ValueError(f"its argument {parameter.name} is a keyword without a default")
            names.append(parameter.name)
    if not names:
        raise ValueError("it has no argument without a default")
    return names


class _Careful:
    """A stand-in that refuses what it would answer wrongly, and records `x += y` as what it is: without this
    that would be traced as `x = x + y`."""

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        """What isinstance() asks for: torch.fx does, and in a forward nobody knows the answer."""
        if sys._getframe(1).f_globals.get("__name__", "").startswith("torch."):
            return type(self)
        raise TypeError("it asks for the type of what it computes with")

    def __getattr__(self, name: str) -> _Attribute:
        if name.startswith("__") or name == "_fields":
            raise AttributeError(name)
        if not hasattr(Tensor, name):
            raise TypeError(f"it asks for {name}, which a tensor does not have")
        return _Attribute(cast("fx.Proxy", self), name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in ("node", "tracer", "root", "attr", "_node"):
            raise TypeError(f"it sets {name} of a tensor")
        object.__setattr__(self, name, value)


class _Proxy(_Careful, fx.Proxy):
    """A tensor, or what else is computed from the arguments."""


class _Attribute(_Careful, Attribute):
    """An attribute of one."""


def _record(name: str) -> Callable[[fx.Proxy, Any], Any]:
    target = getattr(operator, name)

    def method(self: fx.Proxy, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", target, (self, other), {})

    return method


IN_PLACE = "iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor"
for _name in IN_PLACE:
    setattr(_Careful, f"__{_name}__", _record(_name))


class Tracer(fx.Tracer):
    """Stops where a module is torch's own, ours, a kind of convolution, or must be called as it is.

    A graph does not tell under which modes of torch its nodes ran, so all must run under the same. With
    `gradients` whether autograd records is one of them.
    """

    def __init__(self, *, gradients: bool) -> None:
        super().__init__()
        self.gradients = gradients

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        if torch.is_autocast_enabled("cpu"):
            raise TypeError("it uses autocast")
        if self.gradients and not torch.is_grad_enabled():
            raise TypeError("it computes a part without gradients")
        return super().create_node(*args, **kwargs)

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> Any:
        names = inputs_of(root_fn)
        return root_fn, [self.root, *(self.create_proxy("placeholder", name, (), {}) for name in names)]

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return (
            isinstance(m, (SeparableConv2d, nn.Conv2d))
            or bool(why_opaque(m))
            or super().is_leaf_module(m, module_qualified_name)
        )


@dataclass
class Region:
    """A module that can be traced, and its graph. `name` is the module's, "" for the model itself."""

    name: str
    module: nn.Module
    graph: fx.Graph


class _Unchanged:
    """What tracing must leave alone: a forward that writes to its module means more than its graph says."""

    def __init__(self, module: nn.Module) -> None:
        self._attributes = [(child, dict(child.__dict__)) for child in module.modules()]
        self._versions = [(t, _version(t)) for t in (*module.parameters(), *module.buffers())]

    def restore(self) -> bool:
        """Puts attributes back; False where there was something to put back, or a tensor was written to."""
        unchanged = all(_version(tensor) == version for tensor, version in self._versions)
        for child, before in self._attributes:
            now = child.__dict__
            if len(now) != len(before) or any(now.get(k, child) is not v for k, v in before.items()):
                now.clear()
                now.update(before)
                unchanged = False
        return unchanged


def inference_tensor(module: nn.Module) -> str:
    """The name of a parameter or buffer that was made in torch.inference_mode(), or "".

    A write to one leaves no trace, so what was made of its numbers may be out of date at any time.
    """
    tensors = *module.named_parameters(), *module.named_buffers()
    return next((name for name, tensor in tensors if tensor.is_inference()), "")


def _version(tensor: Any) -> int:
    return 0 if tensor.is_inference() else int(tensor._version)


def trace(module: nn.Module, *, gradients: bool) -> fx.Graph:
    """The graph of a module's forward; TypeError or ValueError where there is none that means the same.

    gradients: whether autograd is to watch the graph, as it watches the forward.
    """
    unchanged, numbers = _Unchanged(module), RandomState()
    try:
        with torch.autocast("cpu", enabled=False), torch.enable_grad():
            graph = Tracer(gradients=gradients).trace(module)
    except Exception as error:
        unchanged.restore()
        numbers.restore()
        raise TypeError(str(error).strip().split("\n")[0] or type(error).__name__) from error
    if not numbers.restore():
        unchanged.restore()
        raise ValueError("it draws random numbers")
    if not unchanged.restore():
        raise ValueError("it writes to the module")
    return graph


def regions(model: nn.Module, *, gradients: bool) -> tuple[list[Region], dict[str, str]]:
    """Graphs that cover as much of the model as can be, and for modules without one the reason."""
    found: list[Region] = []
    reasons: dict[str, str] = {}
    seen: set[nn.Module] = set()

    def visit(name: str, module: nn.Module) -> None:
        if module in seen or not any(isinstance(child, nn.Conv2d) for child in module.modules()):
            return
        seen.add(module)
        if isinstance(module, (SeparableConv2d, nn.Conv2d)):
            return
        inner: list[tuple[str, nn.Module]] = []
        if isinstance(module, (nn.ModuleList, nn.ModuleDict)):
            inner = list(module.named_children())
        elif name and "forward" in module.__dict__:
            reasons[name] = "has a forward of its own"
        else:
            try:
                graph = trace(module, gradients=gradients)
            except (TypeError, ValueError) as error:
                reasons[name] = f"could not be traced: {error}"
                inner = list(module.named_children())
            else:
                found.append(Region(name, module, graph))
                called = {str(node.target) for node in graph.nodes if node.op == "call_module"}
                inner = [(target, module.get_submodule(target)) for target in sorted(called)]
        for child_name, child in inner:
            visit(f"{name}.{child_name}" if name else child_name, child)

    visit("", model)
    return found, reasons

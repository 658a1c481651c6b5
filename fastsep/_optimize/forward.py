"""Takes the forward of a module over, and gives it back for every call that is not a plain inference."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from operator import attrgetter, getitem, is_
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as torch_module
from torch.utils._pytree import tree_map_only

from .._ops import memory_format
from .series import SeriesStep
from .trace import inputs_of

_version = attrgetter("_version")
_training = attrgetter("training")
_HOOKS = "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"
_GLOBAL_HOOKS = (
    torch_module._global_forward_hooks,
    torch_module._global_forward_pre_hooks,
    torch_module._global_backward_hooks,
    torch_module._global_backward_pre_hooks,
)


# What a stand-in of the trace may stand for: of anything else the forward may ask what a tensor lacks.
_ARGUMENTS = Tensor, int, float


class State:
    """All that a plan was made of: it holds for as long as this is unchanged.

    Which parameters, buffers and children the modules have, what was written to them, whether they train, and
    that no hook is on them. (A write by way of `.data` cannot be seen.)
    """

    def __init__(self, root: nn.Module, called: set[nn.Module], *, weights: bool = True) -> None:
        """`called` are modules that are still called, hooks and all. Without `weights` those may change."""
        modules = list(root.modules())
        kinds = ("_parameters", "_buffers", "_modules") if weights else ("_modules",)
        self._slots: list[dict[str, Any]] = []
        self._names: list[str] = []
        for module in modules:
            for kind in kinds:
                slots = getattr(module, kind)
                self._slots += [slots] * len(slots)
                self._names += slots
        self._held = list(map(getitem, self._slots, self._names))
        self._tensors = [x for x in self._held if isinstance(x, Tensor) and not x.is_inference()]
        self._versions = list(map(_version, self._tensors))
        self._modules = modules
        self._training = list(map(_training, modules))
        inner = [module for module in modules if module is not root and module not in called]
        self._hooks = [getattr(module, hooks) for hooks in _HOOKS for module in inner]

    def holds(self) -> bool:
        """Whether nothing has changed. (In loops of the interpreter's own, for this runs in each call.)"""
        try:
            held = all(map(is_, map(getitem, self._slots, self._names), self._held))
        except KeyError:
            return False
        return (
            held
            and list(map(_version, self._tensors)) == self._versions
            and list(map(_training, self._modules)) == self._training
            and not any(self._hooks)
        )


@dataclass
class Plan:
    """A graph that computes what a module's forward does while the state holds, or None if none does."""

    state: State
    graph: fx.GraphModule | None = None
    channels_last: bool = False


class Forward:
    """Stands in for the forward of `root`. `make` makes a plan of the module as it is now."""

    def __init__(self, root: nn.Module, mode: str, make: Callable[[nn.Module], Plan], plan: Plan) -> None:
        self.root, self.mode, self.make = root, mode, make
        self.names = inputs_of(type(root).forward)
        self._plans = [plan]  # the newest first, and the one before it
        self._seen: State | None = None

    def forget(self) -> None:
        self._plans, self._seen = [], None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return type(self.root).forward(self.root, *args, **kwargs)
        if kwargs and len(args) + len(kwargs) == len(self.names):
            rest = self.names[len(args) :]
            if all(name in kwargs for name in rest):
                args, kwargs = (*args, *(kwargs[name] for name in rest)), {}
        plan = None
        fits = not kwargs and len(args) == len(self.names) and not any(_GLOBAL_HOOKS)
        if fits and (self._is_training(args) if self.mode == "training" else self._is_plain_inference(args)):
            plan = self._plan()
        if plan is None or plan.graph is None:
            return type(self.root).forward(self.root, *args, **kwargs)
        return _run(plan, args)

    def _plan(self) -> Plan | None:
        """The plan for the module's present state. A new state has to be seen twice before one is made, for
        it may last for one call only, as in torch.func.functional_call."""
        for plan in self._plans:
            if plan.state.holds():
                return plan
        if self._plans and not (self._seen is not None and self._seen.holds()):
            self._seen = State(self.root, set(), weights=self.mode == "inference")
            return None
        plan = self.make(self.root)
        self._plans = [plan, *self._plans[:1]]
        return plan

    def _is_training(self, args: tuple[Any, ...]) -> bool:
        """Whether the arguments are such as the trace took them for, in a call without autocast."""
        return all(isinstance(x, _ARGUMENTS) for x in args) and not torch.is_autocast_enabled("cpu")

    def _is_plain_inference(self, args: tuple[Any, ...]) -> bool:
        """Whether nothing watches the call, and its tensors are such as the steps can take."""
        watched = torch.is_grad_enabled()
        for x in args:
            if type(x) is not Tensor and (isinstance(x, Tensor) or not isinstance(x, _ARGUMENTS)):
                return isinstance(x, nn.Parameter) and self._is_plain_inference((x.detach(),))
            if type(x) is Tensor and (
                not x.is_cpu or x.layout is not torch.strided or x.is_neg() or (watched and x.requires_grad)
            ):
                return False
        if watched and any(parameter.requires_grad for parameter in self.root.parameters()):
            return False
        return not (
            torch.is_autocast_enabled("cpu")
            or forward_ad._current_level >= 0
            or torch._C._are_functorch_transforms_active()
            or torch._C._len_torch_dispatch_stack()
            or torch._C._is_torch_function_mode_enabled()
            or torch._C._get_tracing_state() is not None
        )

    # What exporters ask of a function.

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(type(self.root).forward.__get__(self.root))

    @property
    def __code__(self) -> Any:
        forward: Any = inspect.unwrap(type(self.root).forward)
        return forward.__code__

    # The module's `_apply`, which to() and its like call: it can put other numbers where the weights were.

    def apply(self, fn: Any, recurse: bool = True) -> nn.Module:
        self.forget()
        module: Any = self.root
        return type(module)._apply(module, fn, recurse)  # type: ignore[no-any-return]

    # Plans belong to this process and processor; copies and pickles make their own.

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_plans": [], "_seen": None}


class _Profiled(fx.Interpreter):
    """Names each step for torch's profiler, which cannot see into native calls."""

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if isinstance(target, SeriesStep):
            return target.one_by_one(lambda step, *inputs: self.call_function(step, inputs, {}), *args)
        with torch.profiler.record_function(f"fastsep: {getattr(target, '__name__', target)}"):
            return super().call_function(target, args, kwargs)


def _run(plan: Plan, args: tuple[Any, ...]) -> Any:
    graph: Any = plan.graph
    run = _Profiled(graph).run if torch._C._autograd._profiler_enabled() else graph.forward
    if not plan.channels_last:
        return run(*args)
    formats = [memory_format(x) for x in args if isinstance(x, Tensor) and x.dim() == 4]
    inputs = [
        x.contiguous(memory_format=torch.channels_last) if isinstance(x, Tensor) and x.dim() == 4 else x
        for x in args
    ]
    y = run(*inputs)
    if not formats or formats[0] is torch.channels_last:
        return y
    return tree_map_only(Tensor, lambda t: t.contiguous() if t.dim() == 4 else t, y)

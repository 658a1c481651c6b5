"""Takes the forward of a module over, and gives it back for every call that is not a plain inference."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as torch_module

from .. import _native
from .layouts import Programs
from .steps import is_native
from .trace import inputs_of

_requires_grad = attrgetter("requires_grad")
_HOOKS = "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"
_GLOBAL_HOOKS = (
    torch_module._global_forward_hooks,
    torch_module._global_forward_pre_hooks,
    torch_module._global_backward_hooks,
    torch_module._global_backward_pre_hooks,
)

# Layers that do the same in training and in inference.
_MODELESS = (
    nn.Conv2d,
    nn.Linear,
    nn.Identity,
    nn.Flatten,
    nn.ReLU,
    nn.ReLU6,
    nn.Hardswish,
    nn.SiLU,
    nn.AdaptiveAvgPool2d,
)

# What a stand-in of the trace may stand for: of anything else the forward may ask what a tensor lacks.
_ARGUMENTS = Tensor, int, float


class State:
    """All that a plan was made of: it holds for as long as this is unchanged.

    The modules' attributes, among them whether they train, their parameters, buffers and children, where
    those tensors lie, what was written to them as far as a Snapshot sees (csrc/tensors.h), and that no hook
    is on the modules. What is inside an attribute that is no tensor, a list say, cannot be seen.
    """

    def __init__(
        self,
        root: nn.Module,
        attributes: Iterable[str] = (),
        read: Iterable[Tensor] = (),
        *,
        weights: bool = True,
    ) -> None:
        """`attributes` are the names of further tensors, `read` tensors that the plan has numbers of. Without
        `weights` what parameters and buffers are and hold may change, but for those."""
        self._modules = list(root.modules())
        children: list[dict[str, Any]] = [module._modules for module in self._modules]
        numbers: list[dict[str, Any]]
        numbers = [values for module in self._modules for values in (module._parameters, module._buffers)]
        slots = _slots_of(root, attributes)
        seen = [x for values in numbers for x in values.values()] + [values[name] for values, name in slots]
        watched = [x for x in seen if weights and isinstance(x, Tensor)]
        self._tensors = list({id(x): x for x in (*watched, *read)}.values())
        # As long as this memory is held no new tensor can come to lie at its address.
        self._memory = [x.detach() for x in self._tensors if _native.stored(x)]
        held, partly = ([*children, *numbers], []) if weights else (children, numbers)
        # What native code looks at, which keeps none of it alive.
        values = [list(known.values()) for known in held], [known[name] for known, name in slots]
        self._kept = held, partly, slots, values
        self._unchanged = _native.core and _native.core.Unchanged(
            held=held, partly=partly, slots=slots, tensors=self._tensors
        )
        self._called: set[nn.Module] = set()
        self.settle()

    def release(self, called: set[nn.Module]) -> None:
        """Hooks and attributes may come onto these: they are called as they are."""
        self._called = called
        self.settle()

    def settle(self) -> None:
        """Takes the modules' attributes as they are now for what they have to be."""
        modules = [module for module in self._modules if module not in self._called]
        self._attributes: list[dict[str, Any]] = [module.__dict__ for module in modules]
        self._values = [list(attributes.values()) for attributes in self._attributes]
        modeless = [module.__dict__ for module in modules if type(module) in _MODELESS]
        others = [module.__dict__ for module in modules if type(module) not in _MODELESS]
        # The stand-in for its forward runs behind the hooks of the module that it is for.
        self._hooks = [getattr(module, hooks) for module in modules[1:] for hooks in _HOOKS]
        if self._unchanged is not None:
            self._unchanged.set_surroundings(empty=self._hooks, held=others, modeless=modeless)

    def holds(self) -> bool:
        """Whether nothing has changed. Without native code there is no plan that this matters to."""
        return self._unchanged is None or self._unchanged.holds()

    def requires_grad(self) -> bool:
        return any(map(_requires_grad, self._tensors))


def _slots_of(root: nn.Module, attributes: Iterable[str]) -> list[tuple[dict[str, Any], str]]:
    """Where a module keeps its attributes."""
    slots = []
    for attribute in attributes:
        path, _, name = attribute.rpartition(".")
        owner = root.get_submodule(path)
        slots += [
            (kind, name) for kind in (owner.__dict__, owner._parameters, owner._buffers) if name in kind
        ]
    return slots


@dataclass
class Plan:
    """Programs that compute what a module's forward does while the state holds, or None if none does."""

    state: State
    programs: Programs | None = None


class Forward:
    """Stands in for the forward of `root`. `make` makes a plan of the module as it is now."""

    def __init__(self, root: nn.Module, mode: str, make: Callable[[nn.Module], Plan], plan: Plan) -> None:
        self.root, self.mode, self.make = root, mode, make
        self.names = inputs_of(type(root).forward)
        self._plans = [plan]  # the newest first, and the one before it
        self._seen: State | None = None

    def settle(self) -> None:
        """To be called when all forwards are in their modules, whose attributes they are."""
        for plan in self._plans:
            plan.state.settle()

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
        program = None if plan is None or plan.programs is None else plan.programs.of(args)
        if program is None:
            return type(self.root).forward(self.root, *args, **kwargs)
        return program.profiled(*args) if torch._C._autograd._profiler_enabled() else program(*args)

    def _plan(self) -> Plan | None:
        """The plan for the module's present state; None where its tensors want gradients of inference. A new
        state has to be seen twice before a plan is made, for it may last for one call only, as in
        torch.func.functional_call."""
        plans, seen = self._plans, self._seen  # once, for other threads set them, too
        watched = self.mode == "inference" and torch.is_grad_enabled()
        for plan in plans:
            if plan.state.holds():
                return None if watched and plan.state.requires_grad() else plan
        if watched and any(map(_requires_grad, self.root.parameters())):
            return None
        if plans and not (seen is not None and seen.holds()):
            self._seen = State(self.root, weights=self.mode == "inference")
            return None
        plan = self.make(self.root)
        self._plans = [plan, *plans[:1]]
        return plan

    def _is_training(self, args: tuple[Any, ...]) -> bool:
        """Whether the arguments are such as the trace took them for, in a call without autocast."""
        return all(isinstance(x, _ARGUMENTS) for x in args) and not torch.is_autocast_enabled("cpu")

    def _is_plain_inference(self, args: tuple[Any, ...]) -> bool:
        """Whether nothing watches the call, and its tensors are such as the steps can take."""
        watched = torch.is_grad_enabled()
        if (
            torch.is_autocast_enabled("cpu")
            or forward_ad._current_level >= 0
            or torch._C._are_functorch_transforms_active()
            or torch._C._len_torch_dispatch_stack()
            or torch._C._is_torch_function_mode_enabled()
            or torch._C._get_tracing_state() is not None
        ):
            return False
        for x in args:
            if isinstance(x, Tensor):
                if not is_native(x) or (watched and x.requires_grad):
                    return False
            elif not isinstance(x, _ARGUMENTS):
                return False
        return True

    # What exporters ask of a function.

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(type(self.root).forward.__get__(self.root))

    @property
    def __code__(self) -> Any:
        forward: Any = inspect.unwrap(type(self.root).forward)
        return forward.__code__

    @property
    def __globals__(self) -> Any:
        """torch.jit.script asks for them first, and then for source code."""
        raise AttributeError("an optimized model cannot be scripted: revert() it, or use torch.jit.trace")

    # The module's `_apply`, which to() and its like call: it can put other numbers where the weights were.

    def apply(self, fn: Any, recurse: bool = True) -> nn.Module:
        self.forget()
        module: Any = self.root
        return type(module)._apply(module, fn, recurse)  # type: ignore[no-any-return]

    # Plans belong to this process and processor; copies and pickles make their own.

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_plans": [], "_seen": None}

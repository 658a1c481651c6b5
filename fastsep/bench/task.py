"""A layer with the numbers that go in, and whether what contenders make of them is right."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _native
from .._activations import ACTIVATIONS
from .._case import DTYPES, Case, format_case
from .._check import Tensors, error_bound, relative_error
from .baselines import given, own_parameters, two_convolutions
from .engine import Contender
from .layers import sizes
from .machine import last_level_cache

# Copies of an input are made until they exceed the last-level cache so many times, up to so many bytes.
CACHES, COPIES_BYTES = 2, 1 << 30
BENT = {"relu", "relu6", "leaky_relu", "hardswish", "hardsigmoid"}  # activations whose slope jumps


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

    @property
    def needs(self) -> tuple[bool, bool]:
        """Whether the phase asks for the gradient of the input, and for those of the parameters."""
        return self.phase in ("training", "input-gradient"), self.phase in ("training", "weight-gradient")

    @property
    def is_native(self) -> bool:
        """Whether kernels for the CPU take it; all others compute in reduced precision, or may."""
        return self.device == "cpu" and DTYPES[self.case.dtype] in _native.DTYPES

    @property
    def eps(self) -> float:
        """Of the numbers that are multiplied: TensorFloat-32 has 10 bits behind the point."""
        tf32 = self.device == "cuda" and self.case.dtype == "float32" and torch.backends.cudnn.allow_tf32
        return 2.0**-10 if tf32 else torch.finfo(DTYPES[self.case.dtype]).eps

    @property
    def rounding_of_sums(self) -> float:
        """Of an output, as a share of its size: a random walk, in float32 at least."""
        digits = torch.finfo(torch.float64 if self.case.dtype == "float64" else torch.float32).eps
        return float(digits * (self.case.kh * self.case.kw + self.case.c * self.case.m) ** 0.5)

    @property
    def is_bent(self) -> bool:
        """Whether a slope jumps somewhere, so that rounding alone can decide which one a gradient meets."""
        return bool(BENT & {self.case.mid, self.case.act})

    @cached_property
    def exact(self) -> list[Tensor]:
        """The results of the phase, from sums in more digits."""
        return self._exact()

    @cached_property
    def margins(self) -> list[float]:
        """By how much of its norm each result may move because slopes jump where an activation bends.

        The argument of an activation errs by eps / 2 of its size at most, by 0.4 eps with both factors of
        each product rounded, and by what the sums add: all that lie within 2 eps and that, beyond four
        standard deviations, are moved across. More than half of the norm is never allowed.
        """
        if self.phase == "forward" or not self.is_bent:
            return [0.0] * len(self.exact)
        shift = 2 * self.eps + self.rounding_of_sums
        below, above = self._exact(-shift), self._exact(shift)
        norm = torch.linalg.vector_norm
        return [
            min(0.5, float(norm(high - low) / norm(exact).clamp_min(1e-30)))
            for low, high, exact in zip(below, above, self.exact, strict=True)
        ]

    def _exact(self, shift: float = 0.0) -> list[Tensor]:
        """``shift`` moves each activation's argument by that share of its channel's root mean square."""
        case, (needs_x, needs_weights) = self.case, self.needs
        dtype = torch.float64 if case.dtype in ("float32", "float64") else torch.float32
        names = "input", "depthwise_weight", "pointwise_weight", "bias", "depthwise_bias"
        x, dw, pw, b, db = (None if (t := self.tensors[name]) is None else t.to(dtype) for name in names)

        def activated(name: str, at: Tensor) -> Tensor:
            size = at.detach().square().mean((0, 2, 3), keepdim=True).sqrt()
            return ACTIVATIONS[name].forward(at + shift * size if shift else at)

        def leaf(tensor: Tensor | None, needed: bool) -> Tensor | None:
            return None if tensor is None else tensor.clone().requires_grad_(needed)

        with torch.inference_mode(False), torch.set_grad_enabled(needs_x or needs_weights), without_tf32():
            x, dw, pw, b, db = leaf(x, needs_x), *(leaf(tensor, needs_weights) for tensor in (dw, pw, b, db))
            assert x is not None
            assert dw is not None
            leaves = [x] * needs_x + given((dw, pw, b, db)) * needs_weights
            padded = F.pad(x, (case.pl, case.pr, case.pt, case.pb))
            y = F.conv2d(padded, dw, db, (case.sh, case.sw), 0, (case.dh, case.dw), case.c)
            y = activated(case.mid, y)
            y = y if pw is None else activated(case.act, F.conv2d(y, pw, b))
            if not leaves:
                return [y]
            return list(torch.autograd.grad(y, leaves, case.gradient(device=self.device).to(dtype)))


@contextmanager
def without_tf32() -> Iterator[None]:
    """Convolutions of float32 in float32."""
    cudnn: Any = torch.backends.cudnn
    before, cudnn.allow_tf32 = cudnn.allow_tf32, False
    try:
        yield
    finally:
        cudnn.allow_tf32 = before


def context(phase: str) -> AbstractContextManager[Any]:
    """What the calls of a phase run in."""
    return torch.inference_mode() if phase == "forward" else nullcontext()


def verify(task: Task, subjects: dict[str, Subject]) -> None:
    """ArithmeticError where a contender's result is farther from the right one than rounding allows.

    The right one is that of torch's convolutions: in the dtypes with kernels for the CPU their own, in
    others, whose sums may be rounded to eight bits, that from sums in more digits.
    """
    if task.is_native:
        expected = [tensor.double() for tensor in subjects["torch nchw"].outputs()]
        errors = (_forward_error if task.phase == "forward" else _gradient_error)(task)
        compares = [errors] * len(expected)
    else:
        expected = [tensor.double() for tensor in task.exact]
        compares = [partial(_share_of_norm, task, margin) for margin in task.margins]
    for name, subject in subjects.items():
        got = subject.outputs()
        error = max(
            compare(value, exact) for compare, value, exact in zip(compares, got, expected, strict=True)
        )
        if error > 1 and task.is_native and task.phase != "forward" and task.is_bent:
            # Of few numbers, one slope that rounding decided is more than the tolerance.
            error = max(map(partial(_moved_share, task), task.margins, got, task.exact))
        if error > 1:
            line = format_case(task.case)
            raise ArithmeticError(
                f"{name} differs from torch by {error:.3g} times what rounding allows: {line}"
            )


def _forward_error(task: Task) -> Callable[[Tensor, Tensor], float]:
    case = replace(task.case, mid="identity", act="identity")
    sized: Tensors = {name: None if t is None else t.abs() for name, t in task.tensors.items()}
    magnitude = two_convolutions(case, *own_parameters(case, sized), phase="forward")(task.input.abs())
    bound = 2 * error_bound(case, magnitude)
    return lambda got, expected: relative_error(got, expected, bound)


def _gradient_error(task: Task) -> Callable[[Tensor, Tensor], float]:
    """By the norm: where an activation bends, rounding alone decides which slope a single number has."""
    tolerance = 1e3 * task.eps + (4 * task.eps**0.5 if task.is_bent else 0.0)

    def compare(got: Tensor, expected: Tensor) -> float:
        difference = torch.linalg.vector_norm(got.double() - expected)
        size = torch.linalg.vector_norm(expected)
        return float((difference / (tolerance * size + 1e-30)).nan_to_num(nan=torch.inf))

    return compare


def _moved_share(task: Task, margin: float, got: Tensor, exact: Tensor) -> float:
    """The norm of the difference, as a share of what rounding and the slopes that it may change allow."""
    difference = torch.linalg.vector_norm(got.to(exact) - exact)
    allowed = (1e3 * task.eps + margin) * torch.linalg.vector_norm(exact) + 1e-30
    return float((difference / allowed).nan_to_num(nan=torch.inf))


def _share_of_norm(task: Task, margin: float, got: Tensor, exact: Tensor) -> float:
    """The norm of the difference, and the factor between the two, as shares of what is allowed.

    Input, intermediate result and output are rounded, each by about eps / 4 in the norm, and gradients pass
    twice as many steps; sums of many numbers are in float32 at least. What slopes change (see Task.margins)
    is a third of the margin in the norm, and of random sign: it changes the factor by less.
    """
    got = got.to(exact)
    rounding = (4 if task.phase == "forward" else 8) * task.eps + task.rounding_of_sums
    size = torch.linalg.vector_norm(exact).clamp_min(1e-30)
    difference = torch.linalg.vector_norm(got - exact) / size
    factor = torch.linalg.vecdot(got.flatten(), exact.flatten()) / size**2 - 1
    allowed = rounding / 2 + margin**2 / 8 + 1.5 * margin / exact.numel() ** 0.5
    worst = torch.maximum(difference / (rounding + margin), factor.abs() / allowed)
    return float(worst.nan_to_num(nan=torch.inf))

"""Cases: one line of text for all of a call but its numbers. Tests, benchmarks and bug reports share it.

A line holds ``key=value`` tokens; what it leaves out has the default below, and '#' begins a comment:

    name=tf_same c=8 h=7 w=5 k=16 kh=3 kw=3 sh=2 sw=2 pb=1 pr=1 b=1 mid=relu6

With k=0 it is the depthwise half alone, depthwise_conv2d, whose bias and activation are db and mid.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from torch import Tensor

from . import _native
from ._activations import ACTIVATIONS

DTYPES = {str(d)[6:]: d for d in (torch.float32, torch.float64, torch.float16, torch.bfloat16,
                                  torch.complex64, torch.complex128)}  # fmt: skip
LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}


@dataclass(frozen=True)
class Case:
    c: int  # input channels
    h: int
    w: int
    k: int  # output channels, 0 for the depthwise half alone
    kh: int  # depthwise kernel
    kw: int
    n: int = 1
    m: int = 1  # depthwise filters per channel
    sh: int = 1
    sw: int = 1
    dh: int = 1
    dw: int = 1
    pt: int = 0
    pb: int = 0
    pl: int = 0
    pr: int = 0
    db: int = 0  # has a depthwise bias
    b: int = 0  # has a bias
    mid: str = "identity"
    act: str = "identity"
    dtype: str = "float32"
    layout: str = "nchw"
    name: str = ""

    @property
    def oh(self) -> int:
        return (self.h + self.pt + self.pb - self.dh * (self.kh - 1) - 1) // self.sh + 1

    @property
    def ow(self) -> int:
        return (self.w + self.pl + self.pr - self.dw * (self.kw - 1) - 1) // self.sw + 1

    @property
    def output(self) -> tuple[int, int, int, int]:
        """The shape of the result."""
        return self.n, self.k or self.c * self.m, self.oh, self.ow

    @property
    def problem(self) -> tuple[int, ...]:
        """The 20 integers that the native module's functions take (see _core.pyi)."""
        return (
            *(self.n, self.c, self.h, self.w, self.k, self.m, self.kh, self.kw, self.sh, self.sw),
            *(self.dh, self.dw, self.pt, self.pb, self.pl, self.pr),
            *(_native.NUMBERS.get(DTYPES[self.dtype], -1), int(self.layout == "nhwc")),
            *(ACTIVATIONS[self.mid].code, ACTIVATIONS[self.act].code),
        )

    @property
    def options(self) -> dict[str, object]:
        """The arguments of separable_conv2d, or with k=0 of depthwise_conv2d, that are not tensors."""
        mid, act = (None if name == "identity" else name for name in (self.mid, self.act))
        activations = {"mid_activation": mid, "activation": act} if self.k else {"activation": mid}
        return {
            "stride": (self.sh, self.sw),
            "padding": ((self.pt, self.pb), (self.pl, self.pr)),
            "dilation": (self.dh, self.dw),
            **activations,
        }

    def tensors(self, seed: int = 0, integers: int = 0, device: str = "cpu") -> dict[str, Tensor | None]:
        """separable_conv2d's tensors, some perhaps None: normal numbers, or integers up to `integers`."""
        draw = self._numbers(seed, integers, device)
        inner = self.c * self.m
        return {
            "input": draw(self.n, self.c, self.h, self.w).contiguous(memory_format=LAYOUTS[self.layout]),
            "depthwise_weight": draw(inner, 1, self.kh, self.kw),
            "pointwise_weight": draw(self.k, inner, 1, 1) if self.k else None,
            "bias": draw(self.k) if self.k and self.b else None,
            "depthwise_bias": draw(inner) if self.db else None,
        }

    def gradient(self, seed: int = 1, integers: int = 0, device: str = "cpu") -> Tensor:
        """Of some loss with respect to the result: numbers of the same kind."""
        return self._numbers(seed, integers, device)(*self.output).contiguous(
            memory_format=LAYOUTS[self.layout]
        )

    def _numbers(self, seed: int, integers: int, device: str) -> Callable[..., Tensor]:
        """Drawn on the device, where a batch of many images takes no time."""
        dtype = DTYPES[self.dtype]
        given: Any = {"generator": torch.Generator(device).manual_seed(seed), "device": device}

        def draw(*shape: int) -> Tensor:
            if integers:
                return torch.randint(-integers, integers + 1, shape, **given).to(dtype)
            return torch.randn(shape, dtype=torch.float64, **given).to(dtype)

        return draw


_FIELDS = {field.name: field for field in dataclasses.fields(Case)}
_REQUIRED = [name for name, field in _FIELDS.items() if field.default is dataclasses.MISSING]
_FROM_ONE = "c", "h", "w", "kh", "kw", "m", "sh", "sw", "dh", "dw"
_WORDS: dict[str, Iterable[str]] = {
    "mid": ACTIVATIONS,
    "act": ACTIVATIONS,
    "dtype": DTYPES,
    "layout": LAYOUTS,
}


def parse_case(line: str) -> Case:
    """The case that a line describes, also a whole line of FASTSEP_VERBOSE; ValueError where it is none."""
    values: dict[str, int | str] = {}
    for token in line.split("#")[0].rpartition("|")[2].split():
        key, equals, text = token.partition("=")
        if not equals or key not in _FIELDS:
            keys = ", ".join(_FIELDS)
            raise ValueError(f"expected key=value with one of {keys}, got {token!r} in {line.strip()!r}")
        if key in values:
            raise ValueError(f"{key} is given twice in {line.strip()!r}")
        if key in _WORDS and text not in list(_WORDS[key]):
            raise ValueError(f"{key} must be one of {', '.join(_WORDS[key])}, got {text!r}")
        if key == "name" or key in _WORDS:
            values[key] = text
        elif text.isdecimal():
            values[key] = int(text)
        else:
            raise ValueError(f"{key} must be a whole number, got {text!r}")
        if values[key] == 0 and key in _FROM_ONE:
            raise ValueError(f"{key} must be at least 1, got 0 in {line.strip()!r}")
    lacking = [name for name in _REQUIRED if name not in values]
    if lacking:
        raise ValueError(f"{', '.join(lacking)} missing in {line.strip()!r}")
    case = Case(**values)  # type: ignore[arg-type]
    if case.k == 0 and (case.b or case.act != "identity"):
        raise ValueError(f"b and act must be left out with k=0, got {line.strip()!r}")
    return case


def parse_call(line: str) -> Case:
    """parse_case() of a call that can be made; ValueError also for a case that has no output."""
    case = parse_case(line)
    if min(case.n, case.oh, case.ow) < 1:
        raise ValueError(f"the case has no output: {format_case(case)}")
    return case


def format_case(case: Case) -> str:
    """The line that parse_case() reads back to the same case, defaults left out."""
    tokens = {name: getattr(case, name) for name in ("name", *_FIELDS)}
    return " ".join(f"{k}={v}" for k, v in tokens.items() if k in _REQUIRED or v != _FIELDS[k].default)


def case_of(
    input: Tensor,
    depthwise_weight: Tensor,
    pointwise_weight: Tensor | None,
    depthwise_bias: Tensor | None,
    bias: Tensor | None,
    stride: tuple[int, int],
    padding: tuple[int, int, int, int],
    dilation: tuple[int, int],
    mid_activation: str,
    activation: str,
    *,
    nhwc: bool,
) -> Case:
    """The case of a call."""
    n, c, h, w = input.shape
    inner, _, kh, kw = depthwise_weight.shape
    (sh, sw), (dh, dw), (pt, pb, pl, pr) = stride, dilation, padding
    k = 0 if pointwise_weight is None else pointwise_weight.shape[0]
    return Case(
        n=n, c=c, h=h, w=w, k=k, m=inner // c, kh=kh, kw=kw,
        sh=sh, sw=sw, dh=dh, dw=dw, pt=pt, pb=pb, pl=pl, pr=pr,
        db=int(depthwise_bias is not None), b=int(bias is not None), mid=mid_activation, act=activation,
        dtype=str(input.dtype)[6:], layout="nhwc" if nhwc else "nchw",
    )  # fmt: skip

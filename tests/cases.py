"""The table of cases: what must work (cases.txt), and what must be refused and in which words."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from fastsep._activations import ACTIVATIONS
from fastsep._case import Case, parse_case

_TABLE = Path(__file__).with_name("cases.txt")

CASES = [
    parse_case(line) for line in _TABLE.read_text(encoding="utf-8").splitlines() if line.split("#")[0].strip()
]

BY_NAME = {case.name: case for case in CASES}

# Every native variety of a case.
VARIETIES = [(dtype, layout) for dtype in ("float32", "float64") for layout in ("nchw", "nhwc")]


# Arguments of activations: zero, bends, where exponentials overflow, and what is no number.
EDGES = [
    *(0.0, -0.0, torch.nan, torch.inf, -1.0, 1e-8, -1e-8, 3.0, -3.0, 6.0),
    *(20.0, -20.0, 88.0, -88.0, 1e4, -1e4),
]


def varied(case: Case, dtype: str, layout: str) -> Case:
    return replace(case, dtype=dtype, layout=layout)


def half(case: Case) -> Case:
    """The depthwise half of a case alone."""
    return replace(case, k=0, b=0, act="identity")


def random_case(source: random.Random) -> Case:
    """A case of moderate size with everything drawn at once."""
    while True:
        draw = source.randint
        case = Case(
            n=draw(1, 3), c=source.choice([1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 48, 65]), m=draw(1, 2),
            h=draw(1, 24), w=draw(1, 40), k=source.choice([1, 3, 8, 15, 16, 17, 24, 31, 32, 33, 64, 70]),
            kh=draw(1, 7), kw=draw(1, 7), sh=draw(1, 4), sw=draw(1, 4), dh=draw(1, 3), dw=draw(1, 3),
            pt=draw(0, 5), pb=draw(0, 5), pl=draw(0, 5), pr=draw(0, 5), db=draw(0, 1), b=draw(0, 1),
            mid=source.choice(list(ACTIVATIONS)), act=source.choice(list(ACTIVATIONS)),
            dtype=source.choice(["float32", "float64"]), layout=source.choice(["nchw", "nhwc"]),
        )  # fmt: skip
        if case.oh > 0 and case.ow > 0 and case.n * case.c * case.m * case.oh * case.ow * case.k < 2e6:
            return case


def random_cases(count: int) -> Iterator[Case]:
    """Drawn with FASTSEP_SEED (default 0)."""
    source = random.Random(int(os.environ.get("FASTSEP_SEED", "0")))
    return (random_case(source) for _ in range(count))


@dataclass(frozen=True)
class WrongCall:
    """A call of separable_conv2d that must raise: a good one but for ``change``."""

    name: str
    change: dict[str, Any]
    error: type[Exception]
    message: str  # a regular expression


def good_call() -> dict[str, Any]:
    return {
        "input": torch.randn(2, 4, 6, 5),
        "depthwise_weight": torch.randn(8, 1, 3, 3),
        "pointwise_weight": torch.randn(5, 8, 1, 1),
        "bias": torch.randn(5),
        "depthwise_bias": torch.randn(8),
    }


class Unordered:
    """Neither a tensor nor a number."""


_HUGE = 2**62

WRONG = [
    WrongCall("input_rank_2", {"input": torch.randn(4, 6)}, RuntimeError, r"input must be \[N, C, H, W\] or"),
    WrongCall(
        "input_rank_5",
        {"input": torch.randn(1, 1, 4, 6, 5)},
        RuntimeError,
        r"input must be \[N, C, H, W\] or",
    ),
    WrongCall("input_no_tensor", {"input": [1.0]}, TypeError, "input must be a Tensor, got list"),
    WrongCall(
        "weight_no_tensor", {"depthwise_weight": Unordered()}, TypeError, "depthwise_weight must be a Tensor"
    ),
    WrongCall(
        "weight_none", {"pointwise_weight": None}, TypeError, "pointwise_weight must be a Tensor, got None"
    ),
    WrongCall(
        "channels", {"input": torch.randn(2, 3, 6, 5)}, RuntimeError, "depthwise_weight must be .* C = 3"
    ),
    WrongCall(
        "no_channels",
        {"input": torch.randn(2, 0, 6, 5)},
        RuntimeError,
        "input must have at least one channel",
    ),
    WrongCall(
        "no_rows",
        {"input": torch.randn(2, 4, 0, 5)},
        RuntimeError,
        "input must have at least one channel, row",
    ),
    WrongCall(
        "depthwise_rank",
        {"depthwise_weight": torch.randn(8, 3, 3)},
        RuntimeError,
        "depthwise_weight must have 4",
    ),
    WrongCall(
        "depthwise_shape",
        {"depthwise_weight": torch.randn(8, 2, 3, 3)},
        RuntimeError,
        "depthwise_weight must be",
    ),
    WrongCall(
        "depthwise_none",
        {"depthwise_weight": torch.randn(0, 1, 3, 3)},
        RuntimeError,
        "depthwise_weight must be",
    ),
    WrongCall(
        "kernel_empty",
        {"depthwise_weight": torch.randn(8, 1, 0, 3)},
        RuntimeError,
        "depthwise_weight must be",
    ),
    WrongCall(
        "pointwise_rank",
        {"pointwise_weight": torch.randn(5, 8)},
        RuntimeError,
        "pointwise_weight must have 4",
    ),
    WrongCall(
        "pointwise_inner",
        {"pointwise_weight": torch.randn(5, 4, 1, 1)},
        RuntimeError,
        r"must be \[K, 8, 1, 1\]",
    ),
    WrongCall(
        "pointwise_3x3",
        {"pointwise_weight": torch.randn(5, 8, 3, 3)},
        RuntimeError,
        r"must be \[K, 8, 1, 1\]",
    ),
    WrongCall("bias_shape", {"bias": torch.randn(4)}, RuntimeError, r"bias must be \[5\], got \[4\]"),
    WrongCall(
        "depthwise_bias_shape",
        {"depthwise_bias": torch.randn(4)},
        RuntimeError,
        r"depthwise_bias must be \[8\]",
    ),
    WrongCall("stride_zero", {"stride": 0}, RuntimeError, r"stride must be at least 1, got \(0, 0\)"),
    WrongCall(
        "stride_negative", {"stride": (1, -2)}, RuntimeError, r"stride must be at least 1, got \(1, -2\)"
    ),
    WrongCall("stride_triple", {"stride": (1, 1, 1)}, TypeError, "stride must be an int or a pair of ints"),
    WrongCall("stride_float", {"stride": 1.5}, TypeError, "stride must be an int or a pair of ints, got 1.5"),
    WrongCall(
        "dilation_zero", {"dilation": (0, 1)}, RuntimeError, r"dilation must be at least 1, got \(0, 1\)"
    ),
    WrongCall("dilation_word", {"dilation": "same"}, TypeError, "dilation must be an int or a pair of ints"),
    WrongCall("padding_negative", {"padding": -1}, RuntimeError, "padding must be at least 0"),
    WrongCall(
        "padding_one_negative", {"padding": ((0, 0), (1, -1))}, RuntimeError, "padding must be at least 0"
    ),
    WrongCall("padding_word", {"padding": "full"}, RuntimeError, 'padding must be "valid" or "same".*full'),
    WrongCall("padding_triple", {"padding": (1, 2, 3)}, TypeError, "padding must be an int, a pair of ints"),
    WrongCall(
        "no_output",
        {"dilation": 3},
        RuntimeError,
        "padded input must be at least as large as .* 7 x 7, got 6 x 5",
    ),
    WrongCall(
        "dtype_mixed",
        {"input": torch.randn(2, 4, 6, 5).double()},
        RuntimeError,
        "input must have the weights' dtype, torch.float32, got torch.float64",
    ),
    WrongCall(
        "dtype_of_bias", {"bias": torch.randn(5).double()}, RuntimeError, "bias must have the input's dtype"
    ),
    WrongCall(
        "device_mixed",
        {"bias": torch.randn(5, device="meta")},
        RuntimeError,
        "bias must be on the input's device",
    ),
    WrongCall(
        "integers",
        {"input": torch.ones(2, 4, 6, 5, dtype=torch.int32)},
        RuntimeError,
        "input must be floating",
    ),
    WrongCall(
        "activation", {"activation": "swish"}, ValueError, "activation must be None or one of relu.*'swish'"
    ),
    WrongCall(
        "mid_activation",
        {"mid_activation": torch.relu},
        ValueError,
        "mid_activation must be None or one of relu",
    ),
    WrongCall("padding_overflow", {"padding": _HUGE}, RuntimeError, "too large to address"),
    WrongCall(
        "size_overflow",
        {"input": torch.randn(1, 4, 1, 1).expand(2**20, 4, 2**20, 2**20)},
        RuntimeError,
        "too large to address",
    ),
]

"""Layers one by one: fastsep and torch's two convolutions in both layouts, plain loops for a small one.

pytest benchmarks/ [--network other] [--quick], and pytest-benchmark's options. A group is a layer.
"""

from dataclasses import replace
from functools import partial

import pytest
import torch

from fastsep import reference
from fastsep._case import LAYOUTS, parse_case
from fastsep.bench.compare import candidates, verify

SMALL = "name=small c=8 h=14 w=14 k=16 kh=3 kw=3 pt=1 pb=1 pl=1 pr=1 db=1 b=1 mid=relu act=relu"


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("library", ["fastsep", "torch"])
def test_layer(benchmark, case, library, layout):
    benchmark.group = case.name
    case = replace(case, layout=layout)
    with torch.inference_mode():
        runs = candidates(case)
        verify(case, runs)
        benchmark(runs["fastsep" if library == "fastsep" else f"torch {layout}"])


@pytest.mark.parametrize("library", ["fastsep", "torch nhwc", "plain loops"])
def test_small_layer(benchmark, library):
    benchmark.group = "small"
    case = parse_case(f"{SMALL} layout=nhwc")
    with torch.inference_mode():
        runs = candidates(case)
        runs["plain loops"] = partial(reference.separable_conv2d, **case.tensors(), **case.options)
        verify(case, runs)
        benchmark(runs[library])

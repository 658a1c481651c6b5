"""What the tests of calls on a GPU share, with one or without: marks, cases by dtype, and what is exact."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cases import BY_NAME, CASES, half

from fastsep import SeparableConv2d, _ops
from fastsep._case import LAYOUTS, Case
from fastsep._check import operands

# On a GPU, float32 as it is, and with the model alone to choose a path.
GPU = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU"),
    pytest.mark.usefixtures("exact_gpu"),
]

# Dtypes with kernels; "tf32" is float32 where torch allows that.
VARIETIES = ["float32", "tf32", "float16", "bfloat16"]
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
parts = pytest.mark.parametrize("part", [lambda case: case, half], ids=["separable", "depthwise"])
varieties = pytest.mark.parametrize("variety", VARIETIES)
layouts = pytest.mark.parametrize("layout", LAYOUTS)


def in_dtype(case: Case, variety: str) -> Case:
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = variety == "tf32"
    return replace(case, dtype="float32" if variety == "tf32" else variety)


def rounded(case: Case, variety: str) -> Case:
    """A case whose eps is that of the products: TF32 has as many bits as float16."""
    return replace(case, dtype="float16") if variety == "tf32" else case


def on_gpu(tensors, device="cuda"):
    """Copies there, in their formats."""
    return {name: None if t is None else t.to(device) for name, t in tensors.items()}


def geometry(case):
    """The operators' arguments behind the tensors."""
    return (case.sh, case.sw), (case.pt, case.pb, case.pl, case.pr), (case.dh, case.dw), case.mid, case.act


def present(tensors):
    """Of the operators' tensors, whether each is there."""
    return [tensor is not None for tensor in operands(tensors)]


def exactly(case, tensors):
    """Output and the sum of its terms' absolute values, in float64 where the tensors are."""
    wide = [None if t is None else t.double() for t in operands(tensors)]
    sizes = [None if t is None else t.abs() for t in wide]
    plain = replace(case, mid="identity", act="identity")
    return _ops.compose(*wide, *geometry(case)), _ops.compose(*sizes, *geometry(plain))


def layer(case, dtype=torch.float32, **options):
    torch.manual_seed(0)
    made = SeparableConv2d(
        *(case.c, case.k, (case.kh, case.kw)),
        depth_multiplier=case.m,
        bias=bool(case.b),
        depthwise_bias=bool(case.db),
        **case.options | options,
    )
    return made.to("cuda", dtype)


LAYER = replace(BY_NAME["fourteen_by_fourteen"], n=4, mid="relu6", act="silu")


def image(case=LAYER, dtype=torch.float32, layout="nhwc", device="cuda", seed=1):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(case.n, case.c, case.h, case.w, generator=generator)
    return x.to(device, dtype).contiguous(memory_format=LAYOUTS[layout])

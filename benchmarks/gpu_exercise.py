"""Small problems through every kernel, for the sanitizers of benchmarks/gpu_check.sh; with --hopper through
the forward kernel for compute capability 9.0 and nothing else. By `gpu_matrix.py exercise`.
"""

import argparse
import itertools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastsep import _cuda_kernels, _native, _plan
from fastsep._case import DTYPES, LAYOUTS, Case, parse_case
from fastsep._check import SELF_TEST, operands
from fastsep._cuda_model import DEPTHWISE, FUSED, HOPPER

# What the table of a self-test leaves out: every depthwise kernel that is laid out for its size and stride.
EXERCISES = [
    "name=wide n=2 c=136 h=9 w=10 k=136 kh=3 kw=3 pt=1 pb=1 pl=1 pr=1 db=1 b=1 mid=relu6 act=relu",
    "name=stride_2 n=2 c=40 h=17 w=18 k=24 kh=3 kw=3 sh=2 sw=2 pt=1 pb=1 pl=1 pr=1 db=1 b=1 act=relu",
    "name=kernel_5 c=40 h=13 w=18 k=24 kh=5 kw=5 pt=2 pb=2 pl=2 pr=2 db=1 b=1 mid=silu act=silu",
    "name=kernel_5_stride_2 c=40 h=17 w=18 k=0 kh=5 kw=5 sh=2 sw=2 pt=2 pb=2 pl=2 pr=2 db=1 mid=relu",
    "name=kernel_7 c=40 h=15 w=18 k=24 kh=7 kw=7 pt=3 pb=3 pl=3 pr=3 b=1 act=gelu",
    "name=dilation_2 c=40 h=13 w=18 k=0 kh=3 kw=3 dh=2 dw=2 pt=2 pb=2 pl=2 pr=2 db=1",
    "name=sides_that_differ c=40 h=17 w=18 k=0 kh=3 kw=3 sh=2 sw=2 pb=1 pr=1 mid=relu",
]
# For the kernel of compute capability 9.0: tiles across images and with rests, several for each block.
HOPPER_EXERCISES = [
    "name=images_share_tiles n=5 c=136 h=7 w=7 k=264 kh=3 kw=3 pt=1 pb=1 pl=1 pr=1 db=1 b=1 act=relu",
    "name=rows_share_tiles n=2 c=72 h=14 w=14 k=24 kh=3 kw=3 pt=1 pb=1 pl=1 pr=1 mid=silu act=leaky_relu",
    "name=one_chunk c=8 h=9 w=30 k=512 kh=3 kw=3 pt=1 pb=1 pl=1 pr=1 db=1 mid=relu6",
]
TILINGS = Path(__file__).resolve().parent.parent / "tests" / "cuda_tilings.txt"


def exercises() -> Iterator[tuple[int, Case]]:
    """Problems, and for how many multiprocessors their tilings are chosen: 0 for the GPU's."""
    for line in [*SELF_TEST, *EXERCISES]:
        yield 0, parse_case(line)
    for line in TILINGS.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            yield int(line.split()[0]), parse_case(line)


def set_tf32(allowed: bool) -> None:
    torch.backends.cudnn.allow_tf32 = allowed
    torch.backends.cuda.matmul.allow_tf32 = allowed


def exercise(arguments: argparse.Namespace) -> int:
    """Forward and all gradients of small problems, by the native kernels and nothing of torch's."""
    if arguments.dry_run:
        print(f"exercise: {len(list(exercises()))} problems, and no GPU to run them")
        return 0
    exercised = exercise_hopper() if arguments.hopper else exercise_all()
    torch.cuda.synchronize()
    print(f"exercised, {exercised} problems")
    return 0 if exercised else 1


def geometry_of(case: Case) -> tuple[Any, ...]:
    sizes = (case.sh, case.sw), (case.pt, case.pb, case.pl, case.pr), (case.dh, case.dw)
    return *sizes, case.mid, case.act


def tensors_of(case: Case) -> list[Tensor | None]:
    return operands({name: None if t is None else t.cuda() for name, t in case.tensors().items()})


def exercise_hopper() -> int:
    """The forward kernel for compute capability 9.0, on a GPU that has it."""
    lines = [(count, parse_case(line)) for line in HOPPER_EXERCISES for count in (1, 0)]
    for (multiprocessors, line), dtype in itertools.product(lines, ("float16", "bfloat16")):
        case = replace(line, dtype=dtype, layout="nhwc")
        _native.cuda.pretend_multiprocessors(multiprocessors)
        if not _native.cuda.has_hopper_kernel(case.problem, 0):
            return 0
        with _plan.force(HOPPER), torch.no_grad():
            _cuda_kernels.forward_kernel(*tensors_of(case), None, *geometry_of(case))
    _native.cuda.pretend_multiprocessors(0)
    return 2 * len(lines)


def exercise_all() -> int:
    exercised = 0
    dtypes = ("float32", "tf32", "float16", "bfloat16")
    for (multiprocessors, line), dtype, layout in itertools.product(exercises(), dtypes, LAYOUTS):
        case = replace(line, dtype="float32" if dtype == "tf32" else dtype, layout=layout)
        set_tf32(dtype == "tf32")
        tensors, geometry = tensors_of(case), geometry_of(case)
        needed = [tensor is not None for tensor in tensors]
        _native.cuda.pretend_multiprocessors(multiprocessors)
        with _plan.force(FUSED if case.k else DEPTHWISE), torch.no_grad():
            y = _cuda_kernels.forward_kernel(*tensors, None, *geometry)
            _cuda_kernels.backward_kernel(case.gradient().cuda(), *tensors, None, *geometry, needed)
            assert y.dtype is DTYPES[case.dtype]
        exercised += 1
    _native.cuda.pretend_multiprocessors(0)
    return exercised

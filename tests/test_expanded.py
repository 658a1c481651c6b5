"""fastsep::expanded_separable_conv2d against torch's convolutions; its kernels are tested in tests/cpp."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastsep import _expanded, _native
from fastsep._ops import is_channels_last


def arguments(
    expand: int = 6,
    inner: int = 20,
    out: int = 6,
    size: tuple[int, int, int] = (2, 9, 8),
    kernel: int = 3,
    stride: int = 1,
    activation: str = "identity",
    residual: bool = True,
    dense: tuple[int, int, int] = (1, 1, 0),
    dtype: torch.dtype = torch.float64,
    layout: torch.memory_format = torch.channels_last,
) -> list[Any]:
    generator = torch.Generator().manual_seed(3)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    n, h, w = size
    tensors = [
        draw(n, expand, h, w).contiguous(memory_format=layout),
        *(draw(inner, expand, dense[0], dense[0]), draw(inner, 1, kernel, kernel), draw(out, inner, 1, 1)),
        *(draw(inner), draw(inner), draw(out)),
    ]
    pad = kernel // 2
    first = [[dense[1]] * 2, [dense[2]] * 4]
    geometry = [*first, [stride] * 2, [pad] * 4, [1, 1], "relu6", "hardswish", activation, residual]
    return [*tensors, None, *geometry]


CASES: dict[str, dict[str, Any]] = {
    "residual": {},
    "activated": {"activation": "relu6"},
    "strided": {"stride": 2, "out": 11, "residual": False},
    "5x5": {"kernel": 5, "expand": 17, "inner": 40, "out": 17},
    "one pixel": {"size": (1, 1, 1)},
    "no images": {"size": (0, 5, 4)},
    "stem": {"dense": (3, 2, 1), "expand": 3, "inner": 32, "out": 24, "size": (2, 20, 17), "residual": False},
    "nchw": {"layout": torch.contiguous_format},
    "bfloat16": {"dtype": torch.bfloat16},
}


@pytest.mark.parametrize("name", CASES)
def test_equals_three_convolutions(name: str) -> None:
    args = arguments(**CASES[name])
    expected = _expanded.compose(*args[:7], *args[8:])
    got = _expanded.op(*args)
    torch.testing.assert_close(got, expected, rtol=1e-9 if got.dtype == torch.float64 else 0.02, atol=1e-9)
    assert is_channels_last(got) == is_channels_last(args[0])


def test_packed_weights_give_the_same_bits() -> None:
    args = arguments(dtype=torch.float32)
    x, ew, dw, pw, eb, db, b = args[:7]
    packed = _native.pack(dw.shape[0], dw, pw, db, b, ew, eb)
    assert torch.equal(_expanded.op(*args), _expanded.op(x, ew, dw, pw, eb, db, b, packed, *args[8:]))


def test_packed_weights_of_another_block_are_not_used() -> None:
    args = arguments(dtype=torch.float32)
    x, ew, dw, pw, eb, db, b = args[:7]
    packed = _native.pack(dw.shape[0], dw, pw, db, b)
    assert torch.equal(_expanded.op(x, ew, dw, pw, eb, db, b, packed, *args[8:]), _expanded.op(*args))


def test_gradients_by_composition() -> None:
    args = arguments()
    for tensor in args[:7]:
        tensor.requires_grad_()
    assert torch.autograd.gradcheck(lambda *x: _expanded.op(*x, *args[7:]), args[:7])


def test_no_gradient_runs_native_and_compiles() -> None:
    args = arguments(dtype=torch.float32)
    torch.library.opcheck(_expanded.op, args, test_utils=("test_schema", "test_faketensor"))
    step = torch.compile(lambda *x: _expanded.op(*x, *args[7:]), backend="eager", fullgraph=True)
    assert torch.equal(step(*args[:7]), _expanded.op(*args))


@pytest.mark.parametrize(
    ("index", "value", "message"),
    [
        (0, torch.ones(6, 9, 8), r"input must be \[N, E, H, W\]"),
        (1, torch.ones(20, 5, 1, 1), r"expand_weight must be \[20, 6, kernel_h, kernel_w\]"),
        (3, torch.ones(6, 19, 1, 1), r"pointwise_weight must be \[K, 20, 1, 1\]"),
        (4, torch.ones(19), r"expand_bias must be \[20\]"),
        (1, torch.ones(20, 6, 1, 1), "expand_weight must be torch.float64"),
        (10, [2, 2], "residual must be False"),
        (8, [0, 1], "expand_stride must be at least 1"),
        (9, [0, 0, -1, 0], "expand_padding at least 0"),
    ],
)
def test_misfits(index: int, value: Any, message: str) -> None:
    args = arguments()
    args[index] = value
    if index in (3, 4):
        args[index] = value.double()
    with pytest.raises(RuntimeError, match=message):
        _expanded.op(*args)


def test_infinite_weights_beyond_the_plane() -> None:
    args = arguments(dense=(3, 1, 1), residual=False, out=4)
    args[1][0, 0, 0, 0] = torch.inf
    args[0].abs_()
    expected = _expanded.compose(*args[:7], *args[8:])
    assert torch.equal(_expanded.op(*args).isnan(), expected.isnan())
    _x, ew, dw, pw, eb, db, b = args[:7]
    assert _native.pack(dw.shape[0], dw, pw, db, b, ew, eb) is None

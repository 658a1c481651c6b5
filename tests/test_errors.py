"""Bad input is refused in words before native code sees it, and the next call works."""

from __future__ import annotations

import pytest
import torch
from cases import WRONG, WrongCall, good_call
from commands import run

import fastsep
from fastsep import _native


@pytest.mark.parametrize("wrong", WRONG, ids=lambda wrong: wrong.name)
def test_wrong_call(wrong: WrongCall) -> None:
    with pytest.raises(wrong.error, match=wrong.message):
        fastsep.separable_conv2d(**{**good_call(), **wrong.change})
    assert fastsep.separable_conv2d(**good_call()).shape == (2, 5, 4, 3)


@pytest.mark.parametrize("wrong", [w for w in WRONG if "stride" not in w.name], ids=lambda wrong: wrong.name)
def test_wrong_call_under_autograd(wrong: WrongCall) -> None:
    call = good_call()
    call["pointwise_weight"].requires_grad_()
    with pytest.raises(wrong.error, match=wrong.message):
        fastsep.separable_conv2d(**{**call, **wrong.change})
    fastsep.separable_conv2d(**call).sum().backward()


def test_operator_checks_for_itself() -> None:
    """torch.ops reaches the kernel past the function's checks."""
    x, dw, pw = torch.randn(1, 4, 5, 5), torch.randn(4, 1, 3, 3), torch.randn(2, 4, 1, 1)
    with pytest.raises(RuntimeError, match="stride must be at least 1"):
        torch.ops.fastsep.separable_conv2d(
            x, dw, pw, None, None, None, [0, 1], [0] * 4, [1, 1], "relu", "relu"
        )
    with pytest.raises(RuntimeError, match="depthwise_weight must be"):
        torch.ops.fastsep.separable_conv2d(
            x[:, :3], dw, pw, None, None, None, [1, 1], [0] * 4, [1, 1], "relu", "relu"
        )


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        (0, -1, "at least"),
        (1, 0, "at least 1"),
        (8, 0, "at least 1"),
        (12, -1, "at least"),
        (6, 99, "larger than the padded input"),
        (2, 2**62, "64 bits"),
        (16, 7, "unknown dtype"),
        (19, 11, "unknown dtype, layout or activation"),
    ],
)
def test_native_module_checks_for_itself(field: int, value: int, message: str) -> None:
    problem = [1, 4, 6, 6, 5, 1, 3, 3, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0]
    problem[field] = value
    with pytest.raises(ValueError, match=message):
        _native.core.forward(tuple(problem), "", 0, 0, 0, 0, 0, 0)


def test_packed_weights_of_other_weights() -> None:
    """They are not used: the result is that of the weights given."""
    packed = _native.pack(4, torch.randn(4, 1, 3, 3), torch.randn(5, 4, 1, 1), None, None)
    args = torch.randn(1, 8, 6, 6), torch.randn(8, 1, 3, 3), torch.randn(5, 8, 1, 1), None, None
    geometry = [1, 1], [0] * 4, [1, 1], "relu", "relu"
    got, expected = (torch.ops.fastsep.separable_conv2d(*args, p, *geometry) for p in (packed, None))
    assert torch.equal(got, expected)


def test_unknown_isa_argument() -> None:
    with pytest.raises(ValueError, match="isa is 'sse9', which is not known"):
        _native.core.fma_peak("sse9", 0, 0.01)


def test_unknown_isa_in_the_environment() -> None:
    """Not at import, but at the first call, and at each that follows."""
    program = (
        "import torch, fastsep\n"
        "for _ in range(2):\n"
        "    try: fastsep.SeparableConv2d(4, 4, 3)(torch.randn(1, 4, 5, 5))\n"
        "    except ValueError as error: print(error)\n"
    )
    result = run(f'python -c "{program}"', FASTSEP_ISA="avx1024")
    assert result.returncode == 0, result.stderr
    expected = "FASTSEP_ISA is 'avx1024', expected one that is compiled in and runs on this processor: "
    assert result.stdout.splitlines() == [expected + ", ".join(_native.core.isas())] * 2

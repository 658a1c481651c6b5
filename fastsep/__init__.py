"""Depthwise-separable convolution in one pass.

>>> layer = SeparableConv2d(32, 64, 3, padding=1, mid_activation="relu6")
>>> layer(torch.randn(1, 32, 112, 112)).shape
torch.Size([1, 64, 112, 112])
"""

from typing import TYPE_CHECKING

from . import _cuda_kernels as _cuda_kernels  # which registers them
from . import models, reference
from ._decompositions import decompositions
from ._weights import load_from
from .depthwise import DepthwiseConv2d
from .functional import depthwise_conv2d, separable_conv2d
from .modules import SeparableConv2d

if TYPE_CHECKING:
    from ._cost import Cost, Machine, cost
    from ._optimize.api import optimize, report, revert
    from ._optimize.report import Report

__version__ = "0.1.0"
__all__ = [
    "Cost",
    "DepthwiseConv2d",
    "Machine",
    "Report",
    "SeparableConv2d",
    "__version__",
    "cost",
    "decompositions",
    "depthwise_conv2d",
    "load_from",
    "models",
    "optimize",
    "reference",
    "report",
    "revert",
    "separable_conv2d",
]

_LATER = {
    "Cost": "_cost",
    "Machine": "_cost",
    "Report": "_optimize",
    "cost": "_cost",
    "optimize": "_optimize",
    "report": "_optimize",
    "revert": "_optimize",
}


def __getattr__(name: str) -> object:
    """What works on whole models is imported at its first use: half of the library's import time."""
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(f".{_LATER[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

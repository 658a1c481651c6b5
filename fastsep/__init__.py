"""Depthwise-separable convolution in one pass.

>>> layer = SeparableConv2d(32, 64, 3, padding=1, mid_activation="relu6")
>>> layer(torch.randn(1, 32, 112, 112)).shape
torch.Size([1, 64, 112, 112])
"""

from . import models, reference
from ._cost import Cost, Machine, cost
from ._decompositions import decompositions
from ._optimize import Report, optimize, report, revert
from ._weights import load_from
from .depthwise import DepthwiseConv2d
from .functional import depthwise_conv2d, separable_conv2d
from .modules import SeparableConv2d

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

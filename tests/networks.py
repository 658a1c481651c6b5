"""torchvision's and timm's networks, with random weights."""

from __future__ import annotations

import torch
from torch import nn

# The wheel of torchvision on PyPI is made for CUDA. Beside a torch for the CPU its own operators, which no
# network here uses, cannot be loaded, and then it expects to find them declared.
LIBRARY = torch.library.Library("torchvision", "FRAGMENT")
for operator in ("nms", "qnms"):
    try:
        import torchvision
    except RuntimeError as error:
        if f"torchvision::{operator} does not exist" not in str(error):
            raise
        LIBRARY.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
import timm  # noqa: E402
import torchvision  # noqa: E402


def network(name: str) -> nn.Module:
    """ "torchvision/NAME" or "timm/NAME", for inference, with norms that do something."""
    torch.manual_seed(0)
    source, _, name = name.partition("/")
    model = timm.create_model(name) if source == "timm" else torchvision.models.get_model(name, weights=None)
    randomize_norms(model)
    return model.eval()


def randomize_norms(model: nn.Module) -> None:
    """Statistics and factors such as training leaves behind, instead of zeros and ones."""
    generator = torch.Generator().manual_seed(1)

    def draw(tensor: torch.Tensor, low: float, high: float) -> None:
        tensor.copy_(torch.rand(tensor.shape, generator=generator) * (high - low) + low)

    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d) and module.track_running_stats:
                draw(module.running_mean, -0.2, 0.2)
                draw(module.running_var, 0.5, 1.5)
                draw(module.weight, 0.5, 1.5)
                draw(module.bias, -0.2, 0.2)

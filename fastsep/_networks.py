"""Networks by name, for the commands."""

from __future__ import annotations

import argparse
import importlib
from typing import Any

import torch
from torch import nn

from .models import NETWORKS

LIBRARIES = "torchvision", "timm"


def load(name: str) -> tuple[nn.Module, tuple[int, int, int]]:
    """A network with random weights, for inference, and the size of its input.

    ValueError for an unknown one, and where its library is not installed.
    """
    library, slash, rest = name.partition("/")
    if not slash:
        if name not in NETWORKS:
            raise ValueError(f"network must be {_known()}, got {name!r}")
        model: Any = NETWORKS[name]()
        return model.eval(), model.input_size
    if library not in LIBRARIES:
        raise ValueError(f"network must be {_known()}, got {name!r}")
    try:
        source = import_library(library)
    except (ImportError, RuntimeError) as error:
        raise ValueError(f"{library} is needed for {name}: {error}") from error
    try:
        if library == "timm":
            model = source.create_model(rest)
        else:
            model = source.models.get_model(rest, weights=None)
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"network must be one of {library}'s, got {name!r}: {error}") from error
    size = model.pretrained_cfg.get("input_size", (3, 224, 224)) if library == "timm" else (3, 224, 224)
    return model.eval(), tuple(size)


def import_library(name: str) -> Any:
    """torchvision or timm, which imports it.

    torchvision's wheel on PyPI is made for CUDA. Beside a torch for the CPU its own operators, which none of
    its networks for classification uses, cannot be loaded, and importing it fails unless they are declared.
    """
    for operator in ("nms", "qnms"):
        try:
            importlib.import_module("torchvision")
        except RuntimeError as error:
            if f"torchvision::{operator} does not exist" not in str(error):
                raise
            _declarations.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return importlib.import_module(name)


_library: Any = torch.library  # Any, for its functions have no types
_declarations = _library.Library("torchvision", "FRAGMENT")


def _known() -> str:
    return f"one of {', '.join(NETWORKS)}, torchvision/NAME or timm/NAME"


def add_network_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("network", help=_known())

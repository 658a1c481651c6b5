"""The random numbers that a model's forward may draw, put back as they were."""

from __future__ import annotations

import random
import sys
from typing import Any

import torch


class RandomState:
    """The states of Python's, torch's and NumPy's generators; NumPy's where somebody has imported it."""

    def __init__(self) -> None:
        self._python, self._torch, self._numpy = random.getstate(), torch.get_rng_state(), _numpy_state()

    def restore(self) -> bool:
        """Puts the states back; False where there was something to put back."""
        now = RandomState()
        unchanged = True
        if self._python != now._python:
            random.setstate(self._python)
            unchanged = False
        if not torch.equal(self._torch, now._torch):
            torch.set_rng_state(self._torch)
            unchanged = False
        if self._numpy is not None and self._numpy != now._numpy:
            sys.modules["numpy"].random.set_state(self._numpy)
            unchanged = False
        return unchanged


def _numpy_state() -> Any:
    """A tuple that can be compared."""
    numpy = sys.modules.get("numpy")
    if numpy is None:
        return None
    name, key, *rest = numpy.random.get_state()
    return name, tuple(key.tolist()), *rest

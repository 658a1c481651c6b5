"""What the commands' arguments have in common: a wrong one ends with a sentence and the exit status 2."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def checked(parse: Callable[[str], T]) -> Callable[[str], T]:
    """The same for argparse, which shows the message of an ArgumentTypeError but not of a ValueError."""

    def parse_argument(text: str) -> T:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return parse_argument


@checked
def count(text: str) -> int:
    """A whole number from 1."""
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"must be a whole number from 1, got {text!r}")
    return int(text)


@checked
def duration(text: str) -> float:
    """Seconds from 0."""
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds < math.inf:
        raise ValueError(f"must be seconds from 0, got {text!r}")
    return seconds

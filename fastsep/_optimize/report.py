"""What was found in a model, what became of it, and how exact the result is."""

from __future__ import annotations

import io
from dataclasses import dataclass

from rich import box
from rich.console import Console
from rich.table import Table


@dataclass
class Candidate:
    """A depthwise convolution. `reason` says what it was fused into, or why it was left."""

    name: str
    fused: bool
    reason: str
    error: float | None = None  # the largest, relative to the largest output, on random numbers


@dataclass
class Report:
    """What optimize() did. str() of it is the table that print() shows.

    error: of the whole model on the example inputs, relative to the largest output; None without any.
    """

    model: str
    mode: str
    candidates: list[Candidate]
    channels_last: bool = False
    error: float | None = None

    @property
    def fused(self) -> list[Candidate]:
        return [candidate for candidate in self.candidates if candidate.fused]

    @property
    def left(self) -> list[Candidate]:
        return [candidate for candidate in self.candidates if not candidate.fused]

    def __str__(self) -> str:
        text = io.StringIO()
        console = Console(file=text, width=110, color_system=None)
        console.print(self.summary(), highlight=False, soft_wrap=True)
        if self.candidates:
            table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
            table.add_column("depthwise convolution")
            table.add_column("")
            table.add_column("how, or why not")
            table.add_column("largest error", justify="right")
            for candidate in self.candidates:
                error = "" if candidate.error is None else f"{candidate.error:.1e}"
                word = "fused" if candidate.fused else "left"
                table.add_row(candidate.name, word, candidate.reason, error)
            console.print(table)
        return text.getvalue().rstrip()

    def summary(self) -> str:
        if not self.candidates:
            return f"{self.model}: no depthwise convolution, nothing to fuse"
        parts = [f"{self.model}: {len(self.fused)} of {len(self.candidates)} fused for {self.mode}"]
        if self.channels_last:
            parts.append("channels-last")
        if self.error is not None:
            parts.append(f"largest error {self.error:.1e} of the largest output")
        return ", ".join(parts)

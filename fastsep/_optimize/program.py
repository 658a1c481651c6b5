"""A rewritten graph as a Python function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn

from .series import SeriesStep


class Program:
    """What runs a graph. (An fx.GraphModule leaves its source text behind in the process for good.)"""

    def __init__(self, root: nn.Module, graph: fx.Graph) -> None:
        self.root, self.graph = root, graph
        code = graph.python_code(root_module="self")
        names = dict(code.globals)
        exec(compile(code.src, "<optimized by fastsep>", "exec"), names)
        self._forward: Callable[..., Any] = names["forward"]

    def __call__(self, *inputs: Any) -> Any:
        return self._forward(self.root, *inputs)

    def profiled(self, *inputs: Any) -> Any:
        return _Profiled(self.root, graph=self.graph).run(*inputs)


class _Profiled(fx.Interpreter):
    """Names each step for torch's profiler, which cannot see into native calls."""

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if isinstance(target, SeriesStep):
            return target.one_by_one(lambda step, *inputs: self.call_function(step, inputs, {}), *args)
        with torch.profiler.record_function(f"fastsep: {getattr(target, '__name__', target)}"):
            return super().call_function(target, args, kwargs)

"""Times to compare, on a machine that has other work."""

import time
from collections.abc import Callable


def best_in_turns(*functions: Callable[[], object], turns: int = 200) -> list[float]:
    """The least seconds of each, called in turns: a slow while of the machine is a slow one for all."""
    best = [float("inf")] * len(functions)
    for _ in range(turns):
        for i, function in enumerate(functions):
            begin = time.perf_counter()
            function()
            best[i] = min(best[i], time.perf_counter() - begin)
    return best

"""What the machine can do at most, and what else it is doing."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from .. import __version__, _native
from .engine import OnGpu

# More than one core in ten at other work, and times begin to depend on it.
BUSY_CORES = 0.1
UNKNOWN_CACHE = 32 << 20


def device_name(device: str) -> str:
    """The name of the processor or GPU, as the operating system or the driver tells it."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def versions(device: str) -> dict[str, str]:
    """Of what decides the times."""
    found = {"fastsep": __version__, "torch": str(torch.__version__)}
    if device == "cuda":
        cudnn: Any = torch.backends.cudnn
        found |= {"CUDA": str(torch.version.cuda), "cuDNN": str(cudnn.version())}
    return found


def cores() -> int:
    """Processors that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@lru_cache
def last_level_cache(device: str = "cpu") -> int:
    """Bytes; a guess where the system does not tell."""
    if device == "cuda":
        return int(torch.cuda.get_device_properties(0).L2_cache_size)
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text(encoding="ascii").strip()
        if text.endswith("K"):
            sizes.append(int(text[:-1]) << 10)
    return max(sizes, default=UNKNOWN_CACHE)


@contextmanager
def fixed_threads(threads: int) -> Iterator[None]:
    """torch's threads, and with them fastsep's; given back afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
        if torch.get_num_threads() != threads:
            raise RuntimeError(f"torch ran on {torch.get_num_threads()} threads in the end, not {threads}")
    finally:
        torch.set_num_threads(before)


@dataclass(frozen=True)
class Roof:
    """The most that the device was seen to do, in the same run: operations and bytes per second."""

    operations: float
    bytes: float

    def seconds(self, operations: float, bytes_: float) -> float:
        """No less can so much take; bytes_ are those that no cache holds."""
        return max(operations / self.operations, bytes_ / self.bytes)


def measure_bandwidth(device: str) -> float:
    """Bytes per second, read and written, of a copy far larger than the last-level cache."""
    if device == "cpu":
        return _native.core.memory_bandwidth(max(8 * last_level_cache(), 256 << 20), 0.3)
    source, target = (torch.empty(1 << 28, dtype=torch.uint8, device=device) for _ in range(2))
    copy = OnGpu(lambda: target.copy_(source))
    copy.sample(3)
    return 2 * 10 * source.numel() / min(copy.sample(10).seconds for _ in range(5))


def measure_peak(device: str, isa: str, dtype: str, threads: int) -> float:
    """Operations per second: of the CPU's FMA units in registers, of the GPU in a matrix product."""
    if device == "cpu":
        return _native.core.fma_peak(isa, int(dtype == "float64"), 0.05) * threads
    size = 4096
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32  # as the convolutions may
    a, b = (torch.randn(size, size, device=device, dtype=getattr(torch, dtype)) for _ in range(2))
    product = OnGpu(lambda: a @ b)
    product.sample(3)
    return 2 * size**3 * 10 / min(product.sample(10).seconds for _ in range(5))


class Load:
    """How many cores others keep busy while this process and its children measure.

    >>> with Load() as load:
    ...     measure()
    >>> load.others
    0.02
    """

    others: float = 0.0

    def __enter__(self) -> Load:
        self._begin = _busy_seconds()
        return self

    def __exit__(self, *_: object) -> None:
        begin, end = self._begin, _busy_seconds()
        if begin is not None and end is not None:
            elapsed, all_, own = (after - before for after, before in zip(end, begin, strict=True))
            self.others = max(0.0, (all_ - own) / max(elapsed, 1e-9))

    @property
    def doubts(self) -> list[str]:
        if self.others <= BUSY_CORES:
            return []
        return [f"other programs kept {self.others:.1f} cores busy meanwhile"]


def _busy_seconds() -> tuple[float, float, float] | None:
    """Of the clock, of all processors, of this process and its children that ended; None off Linux."""
    try:
        fields = Path("/proc/stat").read_text(encoding="ascii").split("\n", 1)[0].split()[1:]
    except OSError:
        return None
    user, nice, system, _idle, _wait, irq, softirq, steal = (int(field) for field in fields[:8])
    own = os.times()
    everything = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
    return time.monotonic(), everything, own.user + own.system + own.children_user + own.children_system

"""Loads the native modules and lends torch's thread pool. Nothing is built, downloaded or searched for."""

from __future__ import annotations

import ctypes
import os
import re
import sys
from types import ModuleType

import torch
from torch import Tensor

try:
    from . import _core

    core = _core
    missing = ""
except ImportError as error:  # no compiler, or another platform: torch's operators do the work
    core = None  # type: ignore[assignment]
    missing = str(error)


def _load_cuda() -> tuple[ModuleType | None, str]:
    """The CUDA kernels, or why there are none."""
    if torch.version.cuda is None:  # no tensor can be on a GPU of NVIDIA
        return None, "this torch was built without CUDA"
    try:
        from . import _cuda
    except ImportError as error:
        return None, str(error)
    return _cuda, ""


cuda, cuda_missing = _load_cuda()

# True where the native module runs threads of its own, which have to be told of torch.set_num_threads.
own_pool = True


def lend_pool() -> bool:
    """Has the native code run on torch's threads; False where torch hides its pool (before 2.10)."""
    global own_pool
    if core is None:
        return False
    suffix = {"darwin": ".dylib", "win32": ".dll"}.get(sys.platform, ".so")
    library = os.path.join(os.path.dirname(torch.__file__), "lib", "libtorch_cpu" + suffix)
    for name in (library, None):  # None: all that the process has loaded, for a torch laid out otherwise
        try:
            handle = ctypes.CDLL(name)
            symbols = handle.torch_parallel_for, handle.torch_get_num_threads
        except (AttributeError, OSError, TypeError):
            continue
        run, count = (ctypes.cast(symbol, ctypes.c_void_p).value or 0 for symbol in symbols)
        core.set_thread_pool(run, count)
        own_pool = False
        return True
    return False


def take_pool_back() -> None:
    """Has the native code run on threads of its own."""
    global own_pool
    if core is not None:
        core.set_thread_pool(0, 0)
    own_pool = True


lend_pool()

# GNU OpenMP, and torch's pool with it, hangs in a forked child once the parent has used it. Own threads
# do not.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=take_pool_back)


# The native number of each dtype: of those with kernels for the CPU, and of those with kernels for CUDA.
DTYPES = {torch.float32: 0, torch.float64: 1}
CUDA_DTYPES = {torch.float32: 0, torch.float16: 2, torch.bfloat16: 3}
NUMBERS = DTYPES | CUDA_DTYPES


def serving(tensor: Tensor) -> ModuleType | None:
    """The native module that has kernels for the device and dtype of a tensor."""
    if tensor.is_cpu:
        return core if tensor.dtype in DTYPES else None
    return cuda if tensor.is_cuda and tensor.dtype in CUDA_DTYPES else None


_reasons: dict[int, str] = {}


def why_not_on(device: int) -> str:
    """Why the CUDA kernels cannot run on a GPU; empty where they can."""
    if device not in _reasons:
        _reasons[device] = _why_not_on(device)
    return _reasons[device]


def _why_not_on(device: int) -> str:
    if cuda is None:
        return f"CUDA kernels missing: {cuda_missing}"
    if cuda.device_count() == 0:
        version = cuda.runtime_version()
        return f"the CUDA kernels want a driver for CUDA {version // 1000}.{version % 1000 // 10}"
    capability = torch.cuda.get_device_capability(device)
    architectures: str = cuda.architectures()
    if not any(_runs(architecture, capability) for architecture in architectures.split()):
        major, minor = capability
        return f"the CUDA kernels were compiled for {architectures}, the GPU is of {major}.{minor}"
    return ""


def _runs(architecture: str, capability: tuple[int, int]) -> bool:
    """Whether a GPU runs code for an architecture, as CMAKE_CUDA_ARCHITECTURES names it."""
    match = re.fullmatch(r"(\d+)(\d)([af]?)(-real|-virtual)?", architecture)
    if match is None:  # a word such as native
        return True
    major, minor, variant, kind = int(match[1]), int(match[2]), match[3], match[4]
    if variant:
        return capability == (major, minor)
    if kind != "-real" and capability >= (major, minor):  # the driver makes its code from PTX
        return True
    return kind != "-virtual" and capability[0] == major and capability[1] >= minor


def pack(
    channels: int,
    depthwise_weight: Tensor,
    pointwise_weight: Tensor | None,
    depthwise_bias: Tensor | None,
    bias: Tensor | None,
    expand_weight: Tensor | None = None,
    expand_bias: Tensor | None = None,
) -> Tensor | None:
    """The weights as the native kernels want them, or None where no native kernel would use them.

    A uint8 tensor at a multiple of 64 bytes. It serves every input of that many channels, every layout,
    stride and activation; with an expand_weight, the operator
    expanded_separable_conv2d; None then also where that weight is not finite and reaches beyond the
    plane. Without a pointwise_weight they are those of the depthwise half alone.
    """
    code = DTYPES.get(depthwise_weight.dtype)
    weights = (depthwise_weight, depthwise_bias, pointwise_weight, bias, expand_weight, expand_bias)
    if core is None or code is None or any(w is not None and w.device.type != "cpu" for w in weights):
        return None
    if expand_weight is not None and expand_weight[0, 0].numel() > 1 and not expand_weight.isfinite().all():
        return None
    inner, _, kh, kw = depthwise_weight.shape
    # What is packed does not depend on the input's size, so the smallest will do.
    k = 0 if pointwise_weight is None else pointwise_weight.shape[0]
    sizes = 1, channels, kh, kw, k, inner // channels, kh, kw
    problem: tuple[int, ...] = (*sizes, 1, 1, 1, 1, 0, 0, 0, 0, code, 0, 0, 0)
    if expand_weight is not None:
        _, channels, eh, ew = expand_weight.shape
        expansion = channels, 0, eh, ew, eh, ew, 1, 1, 0, 0, 0
        problem = (1, inner, *problem[2:5], 1, *problem[6:17], 1, 0, 0, 0, 0, *expansion)
    size = core.packed_bytes(problem, "")
    room = torch.empty(size + 63, dtype=torch.uint8)
    packed = room[-room.data_ptr() % 64 :][:size]
    dense = [None if w is None else w.detach().contiguous() for w in weights]
    dw, db, pw, b, ew, eb = (0 if w is None else w.data_ptr() for w in dense)
    core.pack(problem, "", dw, db, pw, b, packed.data_ptr(), size, ew, eb)
    return packed

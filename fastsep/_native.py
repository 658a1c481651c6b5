"""Loads the native modules and lends torch's thread pool. Nothing is built, downloaded or searched for."""

from __future__ import annotations

import ctypes
import os
import re
import sys
from collections.abc import Callable, Iterable
from types import ModuleType

import torch
from torch import Tensor, nn

try:
    from . import _core

    core = _core
    missing = ""
except ImportError as error:  # no compiler, or another platform: torch's operators do the work
    core = None  # type: ignore[assignment]
    missing = str(error)

# Parameters are tensors like others here; any further subclass may have a mind of its own.
PLAIN = (Tensor, nn.Parameter)

CPU = torch.device("cpu")


def _functions(names: Iterable[str]) -> dict[str, int] | None:
    """Addresses of C functions of torch; None where it has not all of them."""
    suffix = {"darwin": ".dylib", "win32": ".dll"}.get(sys.platform, ".so")
    library = os.path.join(os.path.dirname(torch.__file__), "lib", "libtorch_cpu" + suffix)
    for path in (library, None):  # None: all that the process has loaded, for a torch laid out otherwise
        try:
            handle = ctypes.CDLL(path)
            return {name: ctypes.cast(getattr(handle, name), ctypes.c_void_p).value or 0 for name in names}
        except (AttributeError, OSError, TypeError):
            continue
    return None


_ASKED = (
    *("get_data_ptr", "get_storage_size", "get_storage_offset", "get_dim", "get_sizes", "get_strides"),
    *("get_dtype", "get_device_type", "device_type_cpu", "device_type_cuda"),
)
_SEEN = (
    *(torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.complex64, torch.complex128),
    *(torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.bool),
)


def lend_tensors() -> bool:
    """Tells the native code how to ask torch what a tensor is; False where torch has nothing for that."""
    functions = _functions([f"aoti_torch_{name}" for name in _ASKED])
    if core is None or functions is None:
        return False
    # With strides and an offset that the functions have to tell apart.
    rooms = [torch.zeros(3, 5, 7, dtype=dtype, device=CPU)[1:, 1:] for dtype in _SEEN]
    return core.lend_tensors(
        functions=functions,
        base=torch._C.TensorBase,
        plain=PLAIN,
        strided=torch.strided,
        examples=[(room, room.element_size()) for room in rooms],
    )


if core is not None and not lend_tensors():
    core = None  # type: ignore[assignment]
    missing = f"torch {torch.__version__} does not export what tells where a tensor lies"


def _nothing(*_tensors: Tensor | None) -> int:
    return 0


# The one place that decides whether native code may have tensors: 1 where the numbers of all of them are what
# lies at their addresses on the CPU, 2 where they are on a GPU, else 0. They are of plain types, strided, not
# lazily negated or zero, and their elements are inside their storages.
stored: Callable[..., int] = _nothing if core is None else core.stored


def has_memory(tensor: Tensor | None) -> bool:
    """Whether a tensor's storage holds its elements. (That of another device is not looked at.)"""
    strided = tensor is not None and tensor.is_cpu and tensor.layout is torch.strided
    return core is None or not strided or core.have_memory(tensor)


def require_memory(names: Iterable[str], *tensors: Tensor | None) -> None:
    """RuntimeError for a tensor whose storage was freed, of those that torch's dispatcher brings."""
    if core is None or core.have_memory(*tensors):
        return
    for name, tensor in zip(names, tensors, strict=False):
        if tensor is not None and not has_memory(tensor):
            raise RuntimeError(
                f"{name} must have memory for its elements, {list(tensor.shape)} of {tensor.dtype}, got a "
                f"storage of {tensor.untyped_storage().nbytes()} bytes"
            )


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
    functions = _functions(["torch_parallel_for", "torch_get_num_threads"])
    if functions is None:
        return False
    core.set_thread_pool(functions["torch_parallel_for"], functions["torch_get_num_threads"])
    own_pool = False
    return True


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


def as_stored(x: Tensor, name: str = "weight") -> Tensor:
    """A dense tensor on the CPU with its numbers at its address; RuntimeError for one without memory."""
    if stored(x):
        return x
    x = torch.zeros_like(x) if x._is_zerotensor() else x.resolve_conj().resolve_neg()
    require_memory([name], x)
    return x


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

    A uint8 tensor at a multiple of 64 bytes, whose attribute `made_of` is a Snapshot of the weights, and
    `calls` what is known of calls with them. It serves every input of that many channels, every layout,
    stride and activation; with an expand_weight, the operator expanded_separable_conv2d; None then also where
    that weight is not finite and reaches beyond the plane. Without a pointwise_weight they are those of the
    depthwise half alone.
    """
    code = DTYPES.get(depthwise_weight.dtype)
    weights = (depthwise_weight, depthwise_bias, pointwise_weight, bias, expand_weight, expand_bias)
    if core is None or code is None or any(w is not None and w.device.type != "cpu" for w in weights):
        return None
    made_of = core.Snapshot(weights if expand_weight is not None else weights[:4])  # before anything is read
    dense = [None if w is None else as_stored(w.detach()).contiguous() for w in weights]
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
    room = torch.empty(size + 63, dtype=torch.uint8, device=CPU)
    packed = room[-room.data_ptr() % 64 :][:size]
    dw, db, pw, b, ew, eb = (0 if w is None else w.data_ptr() for w in dense)
    core.pack(problem, "", dw, db, pw, b, packed.data_ptr(), size, ew, eb)
    packed.made_of, packed.calls = made_of, {}  # type: ignore[attr-defined]
    return packed

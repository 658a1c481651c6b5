"""Types of the native module; its sources are csrc/bindings.cpp, tensors.h, unchanged.h and fastsep.h."""

from collections.abc import Sequence
from typing import Any

def isas() -> list[str]:
    """Names of the instruction sets that run here, best first."""

def compiled_isas() -> list[str]:
    """Names of the instruction sets that were compiled in, best first."""

def best_isa() -> str:
    """The one in use. Raises ValueError where FASTSEP_ISA names none that runs here."""

def kernels() -> list[str]:
    """Names of all compiled kernels, ``op_dtype_isa``."""

def set_thread_pool(parallel_for: int, get_num_threads: int) -> None:
    """Lends torch's pool: addresses of torch_parallel_for and torch_get_num_threads; 0, 0 takes it back."""

def thread_pool() -> str:
    """``"torch"`` or ``"own"``."""

def set_num_threads(threads: int) -> None:
    """Size of the own pool; without effect while torch's is lent."""

def last_isa() -> str:
    """The instruction set that the calling thread's last call ran on; empty before the first."""

# A problem is 20 integers, in this order:
#   batch, channels, height, width, out_channels, multiplier,
#   kernel_h, kernel_w, stride_h, stride_w, dilation_h, dilation_w,
#   pad_top, pad_bottom, pad_left, pad_right,
#   dtype (0 float32, 1 float64), layout (0 NCHW, 1 channels-last), mid_activation, activation
# where there is more, residual and gate (0 or 1),
# and with an expansion of that channels, activation, height, width, kernel_h, kernel_w, stride_h, stride_w,
#   pad_top, pad_left, planar (1: the input is NCHW, of three channels by a stride of 2).
# `isa` is a name, or "" for the best. Addresses are integers, 0 for a bias that is not there.
# With out_channels = 0 a problem is the depthwise half alone: no pointwise_weight, bias or activation.
# All raise ValueError for a problem that csrc/fastsep.h's validate() refuses.

def packed_bytes(problem: tuple[int, ...], isa: str) -> int: ...
def pack(
    problem: tuple[int, ...],
    isa: str,
    depthwise_weight: int,
    depthwise_bias: int,
    pointwise_weight: int,
    bias: int,
    packed: int,
    packed_size: int,
    expand_weight: int = 0,
    expand_bias: int = 0,
) -> None: ...
def forward(
    problem: tuple[int, ...],
    isa: str,
    input: int,
    depthwise_weight: int,
    depthwise_bias: int,
    pointwise_weight: int,
    bias: int,
    output: int,
    expand_weight: int = 0,
    expand_bias: int = 0,
) -> None: ...
def forward_packed(
    problem: tuple[int, ...],
    isa: str,
    input: int,
    packed: int,
    packed_size: int,
    output: int,
    gate: int = 0,
    residual: int = 0,
) -> None:
    """Weights as pack() made them, at a multiple of 64. ValueError where made for another problem or ISA.

    A residual of 0 is the input.
    """

class Series:
    """Calls of forward_packed() one after the other, on values: the inputs, then the results of the calls.

    calls: a problem, the address and the size of its packed weights, and the numbers of the values that it
    reads, input, gate and residual, -1 for none. The weights must outlive this. Or the channel shuffle of two
    values alike, their channels in turn: dtype, batch, channels and pixels of one of them, the first channel
    wanted of the shuffled ones and the one behind the last; 0, 0; the two values, -1.
    outputs: the values that are wanted, results of calls.

    ValueError where one takes another number of bytes than a value has.
    """

    def __init__(
        self, calls: list[tuple[tuple[int, ...], int, int, int, int, int]], inputs: int, outputs: list[int]
    ) -> None: ...
    def run(self, inputs: list[int], outputs: list[int]) -> None: ...

def lend_tensors(
    *,
    functions: dict[str, int],
    base: type,
    plain: tuple[type, type],
    strided: Any,
    examples: list[tuple[Any, int]],
) -> bool:
    """Lends torch's C functions that tell of a tensor, addresses by names. False where they answer wrongly.

    base: the type with the attributes _cdata, layout, is_nested and _version and the method is_neg; plain:
    types whose objects are what they seem; examples: tensors of the layout `strided` on the CPU, and the
    bytes of an element.
    """

def stored(*tensors: Any) -> int:
    """1 or 2 where the numbers of all are what lies at their addresses, on the CPU or by CUDA, else 0.

    Of plain types, strided, not lazily negated or zero, their elements inside their storages. None passes.
    """

def have_memory(*tensors: Any) -> bool:
    """Whether the elements of all are inside their storages, for tensors that are dense. None passes."""

class Snapshot:
    """Tensors as they are: where they lie, how, which version, and up to 64 of the numbers of each."""

    def __init__(self, tensors: Sequence[Any]) -> None: ...
    def holds(self) -> bool:
        """Whether they are as they were; keeps none of them alive."""

    def matches(self, *tensors: Any) -> bool:
        """Whether these are as those were; other objects may stand for the same memory."""

class Unchanged:
    """Whether Python objects are what they were.

    held: dicts that shall have the same values, in their order; partly: of those only which ones are None.
    slots: dicts and names, of the same values. tensors: of which a Snapshot shall hold.
    """

    def __init__(
        self,
        *,
        held: list[dict[str, Any]],
        partly: list[dict[str, Any]],
        slots: list[tuple[dict[str, Any], str]],
        tensors: list[Any],
    ) -> None: ...
    def set_surroundings(
        self, *, empty: list[dict[int, Any]], held: list[dict[str, Any]], modeless: list[dict[str, Any]]
    ) -> None:
        """Dicts that shall have no entries, or the same values; of `modeless` but for that of "training"."""

    def holds(self) -> bool: ...

def backward(
    problem: tuple[int, ...],
    isa: str,
    input: int,
    depthwise_weight: int,
    depthwise_bias: int,
    pointwise_weight: int,
    saved: int,
    grad_output: int,
    grad_input: int,
    grad_depthwise_weight: int,
    grad_depthwise_bias: int,
    grad_pointwise_weight: int,
    grad_bias: int,
) -> None:
    """Writes the gradients whose address is not 0. `saved` is the output where derivative_from_output(),
    else the pointwise half's result before the activation; unused, perhaps 0, for the identity."""

def derivative_from_output(activation: int) -> bool: ...
def reference_backward(
    problem: tuple[int, ...],
    input: int,
    depthwise_weight: int,
    depthwise_bias: int,
    pointwise_weight: int,
    bias: int,
    grad_output: int,
    grad_input: int,
    grad_depthwise_weight: int,
    grad_depthwise_bias: int,
    grad_pointwise_weight: int,
    grad_bias: int,
    magnitude: bool = False,
) -> None:
    """The double-precision oracle; the gradients are float64, and all of them are written."""

def reference_forward(
    problem: tuple[int, ...],
    input: int,
    depthwise_weight: int,
    depthwise_bias: int,
    pointwise_weight: int,
    bias: int,
    output: int,
    magnitude: bool = False,
    expand_weight: int = 0,
    expand_bias: int = 0,
) -> None:
    """The double-precision oracle; output is always float64, in the problem's layout."""

def fma_peak(isa: str, dtype: int, seconds: float) -> float:
    """Floating-point operations per second of one thread that does nothing but FMAs."""

def memory_bandwidth(bytes: int, seconds: float) -> float:
    """Bytes read and written per second by threads that copy one half of so large a buffer over the other.

    ValueError for less than 1 MB; MemoryError where there is no memory for it.
    """

"""Types of the native module with the CUDA kernels; see csrc/cuda/bindings.cpp and csrc/fastsep_cuda.h."""

def device_count() -> int:
    """Of the GPUs that the kernels' own CUDA runtime finds; 0 where there is no driver, or too old a one."""

def architectures() -> str:
    """What the kernels were compiled for, as CMAKE_CUDA_ARCHITECTURES names it, with blanks between."""

def runtime_version() -> int:
    """Of the CUDA runtime in the module: 13000 for 13.0."""

def pretend_multiprocessors(count: int, /) -> None:
    """For tests: has tilings chosen as on a GPU of so many, 0 for its own number; ValueError below that."""

def derivative_from_output(activation: int) -> bool: ...

# A problem is the 20 integers of _core.pyi, its dtype 0 float32, 2 float16 or 3 bfloat16. With tf32, products
# of float32 may be rounded to it. Addresses are integers, 0 for a tensor that is not there; the stream is one
# of the device. Calls are queued on the stream and never waited for.
# All raise ValueError for a problem that the kernels refuse, and RuntimeError for an error of CUDA.

def why_refused(problem: tuple[int, ...]) -> str:
    """Why the kernels refuse a problem; empty where they do not."""

def forward_kernel_name(problem: tuple[int, ...], tf32: bool) -> str: ...
def forward_workspace_bytes(problem: tuple[int, ...], tf32: bool) -> int: ...
def forward(
    problem: tuple[int, ...],
    tf32: bool,
    kernel: int,
    input: int,
    depthwise_weight: int,
    depthwise_bias: int,
    pointwise_weight: int,
    bias: int,
    output: int,
    workspace: int,
    workspace_size: int,
    device: int,
    stream: int,
    /,
) -> None:
    """Kernel 0 is the portable one, 1 that for compute capability 9.0: ValueError where that is not there for
    the problem, the device or the addresses."""

def has_hopper_kernel(problem: tuple[int, ...], device: int) -> bool:
    """Whether kernel 1 is there for the problem, and the device can run it. All its addresses have to be
    multiples of 16."""

def backward_workspace_bytes(
    problem: tuple[int, ...],
    tf32: bool,
    grad_input: int,
    grad_depthwise_weight: int,
    grad_depthwise_bias: int,
    grad_pointwise_weight: int,
    grad_bias: int,
    /,
) -> int: ...
def backward(
    problem: tuple[int, ...],
    tf32: bool,
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
    workspace: int,
    workspace_size: int,
    device: int,
    stream: int,
    /,
) -> None:
    """Writes the gradients whose address is not 0, and nothing else; `saved` as in _core.pyi."""

"""What is queued on a GPU for each path that fastsep/_plan.py may choose.

Everything goes to the current stream of the tensors' device, and memory comes from torch's allocator. A
Forward or a Backward serves all calls of its kind: what does not depend on the tensors is found out once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _backward, _native, _ops, _plan
from ._activations import ACTIVATIONS, IN_PLACE
from ._cuda_model import ADDMM, ADDMM_RELU, CUDNN_RELU, DEPTHWISE, FUSED, HOPPER, TORCH, Problem, half_of
from ._ops import address

Weight = Tensor | None
Five = tuple[Tensor, Tensor, Weight, Weight, Weight]  # input, weights and biases, in the operator's order
ForwardPath = Callable[[Five], Tensor]
BackwardPath = Callable[
    [Tensor, Five, Weight], list[Tensor]
]  # of the gradient, the tensors, the saved output

# The kernels of _cuda.forward().
_PORTABLE, _SM_90A = 0, 1

# Activations of which the slope at v is the same as at their value.
_SAME_SLOPE_AT_OUTPUT = ("identity", "relu", "relu6", "leaky_relu")


# Where torch's newer names tell its parts different things, the older ones raise.


def allows_tf32() -> bool:
    """Whether torch's convolutions of float32 may be rounded to TF32."""
    cudnn: Any = torch.backends.cudnn
    try:
        return bool(cudnn.allow_tf32)
    except RuntimeError:
        return bool(cudnn.conv.fp32_precision == "tf32")


def products_allow_tf32() -> bool:
    """Whether torch's matrix products may."""
    matmul: Any = torch.backends.cuda.matmul
    try:
        return bool(matmul.allow_tf32)
    except RuntimeError:
        return bool(matmul.fp32_precision == "tf32")


# The stream's number without an object around it, where torch has that.
_raw_stream: Callable[[int], int] | None = getattr(torch._C, "_cuda_getCurrentRawStream", None)


def stream_of(device: torch.device) -> int:
    if _raw_stream is not None:
        return _raw_stream(device.index)
    return int(torch.cuda.current_stream(device).cuda_stream)


def workspace_of(size: int, device: torch.device) -> Tensor | None:
    return torch.empty(size, dtype=torch.uint8, device=device) if size else None


def activate(x: Tensor, activation: str) -> Tensor:
    return IN_PLACE.get(activation, ACTIVATIONS[activation].forward)(x)


def compose_in_place(tensors: Five, geometry: tuple[Any, ...]) -> Tensor:
    """As compose(), for tensors that nobody watches: activations overwrite the convolutions' results."""
    input, depthwise_weight, pointwise_weight, depthwise_bias, bias = tensors
    *sizes, mid_activation, activation = geometry
    half: Any = depthwise_weight, None, depthwise_bias, None, *sizes, "identity", "identity"
    u = activate(_ops.compose(input, *half), mid_activation)
    return u if pointwise_weight is None else activate(F.conv2d(u, pointwise_weight, bias), activation)


# ---- torch's products behind the depthwise kernel, each activation(pointwise(u) + bias)


def convolution(u: Tensor, weight: Tensor, bias: Weight, activation: str) -> Tensor:
    return activate(F.conv2d(u, weight, bias), activation)


def _matrices(u: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """[N*H*W, I] of a channels-last [N, I, H, W], and the weight as [I, K]."""
    return u.permute(0, 2, 3, 1).view(-1, u.shape[1]), weight.reshape(weight.shape[:2]).t()


def _planes(rows: Tensor, u: Tensor) -> Tensor:
    """[N, K, H, W], channels-last, of [N*H*W, K]."""
    n, _, h, w = u.shape
    return rows.view(n, h, w, -1).permute(0, 3, 1, 2)


def addmm(u: Tensor, weight: Tensor, bias: Weight, activation: str) -> Tensor:
    """The bias is added where the product is stored: a pass over memory less than behind a convolution."""
    rows, columns = _matrices(u, weight)
    y = torch.mm(rows, columns) if bias is None else torch.addmm(bias, rows, columns)
    return activate(_planes(y, u), activation)


def addmm_relu(u: Tensor, weight: Tensor, bias: Weight, _activation: str) -> Tensor:
    """And the activation, too."""
    assert bias is not None
    return _planes(torch._addmm_activation(bias, *_matrices(u, weight)), u)


def cudnn_relu(u: Tensor, weight: Tensor, bias: Weight, _activation: str) -> Tensor:
    fused: Any = torch.cudnn_convolution_relu
    y: Tensor = fused(u, weight, bias, (1, 1), (0, 0), (1, 1), 1)
    return y


Product = Callable[[Tensor, Tensor, Weight, str], Tensor]
_RELU_PRODUCTS: dict[str, tuple[str, Product]] = {
    ADDMM_RELU: ("_addmm_activation", addmm_relu),
    CUDNN_RELU: ("cudnn_convolution_relu", cudnn_relu),
}

_keeps_nan: dict[tuple[str, torch.device, torch.dtype], bool] = {}


def keeps_nan(path: str, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a product with relu in it gives NaN for NaN, as relu does; cuDNN and cuBLASLt promise nothing.

    It is tried once, where the device may be waited for; until then it counts as one that does not.
    """
    key = path, device, dtype
    if key not in _keeps_nan:
        if not _plan.may_measure(device.index):
            return False
        u = torch.full((1, 64, 8, 8), torch.nan, dtype=dtype, device=device)
        weight, bias = u.new_ones(64, 64, 1, 1), u.new_zeros(64)
        y = _RELU_PRODUCTS[path][1](u.contiguous(memory_format=torch.channels_last), weight, bias, "relu")
        _keeps_nan[key] = bool(y.isnan().all())
    return _keeps_nan[key]


# ---- the forward pass


@dataclass(frozen=True)
class Forward:
    """Forward passes of one problem, with the native kernels' answers to it."""

    problem: Problem
    shape: tuple[int, ...]
    format: torch.memory_format
    tf32: bool
    workspace: int
    strides: tuple[int, ...]  # of the output

    @classmethod
    def of(cls, problem: Problem, shape: Sequence[int], format: torch.memory_format, tf32: bool) -> Forward:
        cuda: Any = _native.cuda
        strides = torch.empty(shape, device="meta", memory_format=format).stride()
        size = cuda.forward_workspace_bytes(problem, tf32)
        return cls(problem, tuple(shape), format, tf32, size, strides)

    def half(self) -> Forward:
        """Of the depthwise half alone."""
        n, _, h, w = self.shape
        return Forward.of(
            half_of(self.problem), (n, self.problem[1] * self.problem[5], h, w), self.format, self.tf32
        )

    def native(self, tensors: Five) -> Tensor:
        return self._run(_PORTABLE, tensors)

    def hopper(self, tensors: Five) -> Tensor:
        return self._run(_SM_90A, tensors)

    def has_hopper(self, device: int) -> bool:
        """Whether the kernel for compute capability 9.0 takes such calls. Where that decides nothing, no GPU
        is asked: it would load the kernel's code."""
        decides = _ops.VERBOSE or _plan.forced() == HOPPER or _plan.was_measured(HOPPER)
        cuda: Any = _native.cuda
        return decides and bool(cuda.has_hopper_kernel(self.problem, device))

    def _run(self, kernel: int, tensors: Five) -> Tensor:
        cuda: Any = _native.cuda
        format = self.format
        # Named, so that a dense copy lives until all is queued.
        input, device = tensors[0].contiguous(memory_format=format), tensors[0].device
        dw, pw, db, b = _ops.dense_weights(*tensors[1:])
        output = input.new_empty_strided(self.shape, self.strides)  # torch.empty() takes 1.5 us more
        workspace = workspace_of(self.workspace, device)
        cuda.forward(
            *(self.problem, self.tf32, kernel),
            *(input.data_ptr(), address(dw), address(db), address(pw), address(b), output.data_ptr()),
            *(address(workspace), self.workspace, device.index, stream_of(device)),
        )
        return output

    def paths(self, tensors: Five, geometry: tuple[Any, ...]) -> dict[str, ForwardPath]:
        """Those that calls like this one have, the likeliest first."""

        def by_torch(given: Five) -> Tensor:
            return compose_in_place(given, geometry).contiguous(memory_format=self.format)

        if tensors[2] is None:
            return {DEPTHWISE: self.native, TORCH: by_torch}
        half, activation = self.half(), geometry[-1]

        def behind(product: Product) -> ForwardPath:
            def run(given: Five) -> Tensor:
                input, depthwise_weight, pointwise_weight, depthwise_bias, bias = given
                assert pointwise_weight is not None
                u = half.native((input, depthwise_weight, None, depthwise_bias, None))
                return product(u, pointwise_weight, bias, activation).contiguous(memory_format=self.format)

            return run

        products = self._products(tensors, activation)
        behind_own = {path: behind(product) for path, product in products.items()}
        found: dict[str, ForwardPath] = {FUSED: self.native, **behind_own, TORCH: by_torch}
        if self.has_hopper(tensors[0].device.index):
            found[HOPPER] = self.hopper
        return found

    def _products(self, tensors: Five, activation: str) -> dict[str, Product]:
        products: dict[str, Product] = {DEPTHWISE: convolution}
        input = tensors[0]
        if self.format is not torch.channels_last:
            return products
        n, _, h, w = self.shape  # of whose product torch counts rows in 32 bits
        if n * h * w < 1 << 31 and (input.dtype is not torch.float32 or products_allow_tf32() == self.tf32):
            products[ADDMM] = addmm
        if activation == "relu" and tensors[4] is not None:
            for path, (operator, product) in _RELU_PRODUCTS.items():
                fits = ADDMM in products or path == CUDNN_RELU
                if fits and hasattr(torch, operator) and keeps_nan(path, input.device, input.dtype):
                    products[path] = product
        return products


# ---- the backward pass


@dataclass(frozen=True)
class Backward:
    """Backward passes of one problem, for the gradients that are needed."""

    forward: Forward
    needed: tuple[bool, ...]  # in the operator's order
    geometry: tuple[Any, ...]

    def paths(self, tensors: Five) -> dict[str, BackwardPath]:
        """Those that calls like this one have."""
        if tensors[2] is None:
            return {DEPTHWISE: self.fused(), TORCH: self.by_torch}
        return {FUSED: self.fused(), DEPTHWISE: self.depthwise(), TORCH: self.by_torch}

    def by_torch(self, grad: Tensor, tensors: Five, saved: Weight) -> list[Tensor]:
        return _backward.composed_kernel(grad, *tensors, saved, *self.geometry, self.needed)

    def native(
        self, problem: Problem, needed: Sequence[bool]
    ) -> Callable[[Tensor, Five, Weight, Sequence[Weight]], None]:
        """A function that fills the gradients which are there."""
        cuda: Any = _native.cuda
        format, tf32 = self.forward.format, self.forward.tf32
        x, dw, pw, db, b = needed
        asked = (int(need) for need in (x, dw, db, pw, b))
        size = cuda.backward_workspace_bytes(problem, tf32, *asked) if any(needed) else 0

        def run(grad: Tensor, tensors: Five, saved: Weight, gradients: Sequence[Weight]) -> None:
            device = grad.device
            input, grad = tensors[0].contiguous(memory_format=format), grad.contiguous(memory_format=format)
            saved = None if saved is None else saved.contiguous(memory_format=format)
            dw, pw, db = _ops.dense_weights(*tensors[1:4])
            grad_x, grad_dw, grad_pw, grad_db, grad_b = (address(gradient) for gradient in gradients)
            workspace = workspace_of(size, device)
            cuda.backward(
                *(problem, tf32, input.data_ptr(), address(dw), address(db), address(pw), address(saved)),
                *(grad.data_ptr(), grad_x, grad_dw, grad_db, grad_pw, grad_b),
                *(address(workspace), size, device.index, stream_of(device)),
            )

        return run

    def fused(self) -> BackwardPath:
        forward, needed = self.forward, self.needed
        native, problem = self.native(forward.problem, needed), forward.problem
        # Without the value that a forward pass keeps, it is computed again where the slope can be had from
        # it, else what goes into the activation.
        cuda: Any = _native.cuda
        by_value = cuda.derivative_from_output(problem[-1])
        again = forward if by_value else Forward.of((*problem[:-1], 0), *_rest(forward))

        def run(grad: Tensor, tensors: Five, saved: Weight) -> list[Tensor]:
            if problem[-1] != 0 and saved is None:
                saved = again.native(tensors)
            wanted = _backward.empty_gradients(tensors, forward.format, needed)
            room = iter(wanted)
            native(grad, tensors, saved, [next(room) if need else None for need in needed])
            return wanted

        return run

    def depthwise(self) -> BackwardPath:
        """The pointwise half's gradients by torch, from a depthwise output that is computed again."""
        forward, activation = self.forward, self.geometry[-1]
        need_x, need_dw, need_pw, need_db, need_b = self.needed
        need_u = need_x or need_dw or need_db
        half, half_needed = forward.half(), (need_x, need_dw, False, need_db, False)
        native = self.native(half.problem, half_needed)

        def run(grad: Tensor, tensors: Five, saved: Weight) -> list[Tensor]:
            input, depthwise_weight, pointwise_weight, depthwise_bias, bias = tensors
            assert pointwise_weight is not None
            part: Five = input, depthwise_weight, None, depthwise_bias, None
            at = saved if activation in _SAME_SLOPE_AT_OUTPUT else None
            need_v = activation != "identity" and at is None
            u = half.native(part) if need_pw or need_v else grad.new_empty(half.shape)
            if activation != "identity":
                v = F.conv2d(u, pointwise_weight, bias) if at is None else at
                grad = ACTIVATIONS[activation].backward(grad, v)
            grad_u, grad_pw, grad_b = _backward.convolution_backward(
                *(grad, u, pointwise_weight, [forward.shape[1]], [1, 1], [0, 0], [1, 1], False, [0, 0], 1),
                [need_u, need_pw, need_b],
            )
            room = iter(_backward.empty_gradients(part, forward.format, half_needed))
            grad_x, grad_dw, grad_db = (next(room) if need else None for need in (need_x, need_dw, need_db))
            if need_u:
                native(grad_u, part, None, (grad_x, grad_dw, None, grad_db, None))
            grad_pw = grad_pw.contiguous() if need_pw else None
            made = grad_x, grad_dw, grad_pw, grad_db, grad_b
            return [g for g, need in zip(made, self.needed, strict=True) if need and g is not None]

        return run


def _rest(forward: Forward) -> tuple[tuple[int, ...], torch.memory_format, bool]:
    return forward.shape, forward.format, forward.tf32

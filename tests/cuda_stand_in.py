"""The module _cuda where there is no GPU, and calls as on one."""

from __future__ import annotations

from gpu_cases import geometry, present

from fastsep import _cuda_kernels, _native
from fastsep._check import operands


class OnHost:
    """The module _cuda, as far as the kernels for the CPU can stand in for it: float32, no GPU, no stream."""

    def __init__(self):
        self.calls = []

    derivative_from_output = staticmethod(lambda code: _native.core.derivative_from_output(code))

    def why_refused(self, problem):
        return "too large" if problem[0] == 33 else ""

    def forward_workspace_bytes(self, problem, tf32):
        return 192

    def forward(self, problem, tf32, kernel, x, dw, db, pw, b, output, workspace, size, device, stream):
        assert size == 192
        assert workspace
        assert stream == 17
        if kernel == 1 and (
            not self.has_hopper_kernel(problem, device) or (x | dw | db | pw | b | output) % 16
        ):
            raise ValueError("the kernel asked for is not there")
        name = "forward hopper" if kernel == 1 else "forward"
        self.calls.append(name if problem[4] else "depthwise forward")
        _native.core.forward(problem, "", x, dw, db, pw, b, output)

    def has_hopper_kernel(self, problem, device):
        return problem[1] % 8 == 0

    def backward_workspace_bytes(self, problem, tf32, *asked):
        assert any(asked)
        return 0

    def backward(self, problem, tf32, x, dw, db, pw, saved, grad, *rest):
        *asked, workspace, size, _device, stream = rest
        assert (workspace, size, stream) == (0, 0, 17)
        self.calls.append("backward" if problem[4] else "depthwise backward")
        _native.core.backward(problem, "", x, dw, db, pw, saved, grad, *asked)


def forward(case, tensors):
    """A forward pass as on a GPU, of tensors by name."""
    return _cuda_kernels.forward_kernel(*operands(tensors), None, *geometry(case))


def backward(case, tensors, *, saved=None, needed=None):
    """And a backward pass, for all gradients that there are where none are named."""
    needed = present(tensors) if needed is None else needed
    grad = case.gradient()
    return _cuda_kernels.backward_kernel(grad, *operands(tensors), saved, *geometry(case), needed)

"""Dedicated runtimes: a torch module is exported to each and runs there in a process of its own.

In torch's process the pools of threads would meet; and ExecuTorch's can hang there.
"""

from __future__ import annotations

import importlib.metadata
import json
import logging
import os
import select
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor, nn

from .engine import Contender, Sample

# Of each runtime, the distributions that it is, and that exporting takes.
RUNTIMES = {
    "onnxruntime": ["onnxruntime", "onnx", "onnxscript"],
    "openvino": ["openvino"],
    "xnnpack": ["executorch"],
    "ncnn": ["ncnn", "pnnx"],
}
WORKER = Path(__file__).with_name("worker.py")
# Seconds that a runtime has for an answer. The longest is a large network's compilation, of half a minute.
DEADLINE = 180.0


def missing(runtime: str) -> str:
    """Why a runtime cannot be used here; empty where it can."""
    lacking = [name for name in RUNTIMES[runtime] if version(name) is None]
    if not lacking:
        return ""
    return f'{runtime} needs {", ".join(lacking)}, which is not installed: pip install ".[peers]"'


def version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _export_onnxruntime(module: nn.Module, x: Tensor, folder: Path) -> Path:
    path = folder / "model.onnx"
    torch.onnx.export(module, (x,), path, dynamo=True, verbose=False)
    return path


def _export_openvino(module: nn.Module, x: Tensor, folder: Path) -> Path:
    import openvino

    path = folder / "model.xml"
    converted = openvino.convert_model(module, example_input=x, input=[tuple(x.shape)])
    openvino.save_model(converted, path, compress_to_fp16=False)
    return path


def _export_xnnpack(module: nn.Module, x: Tensor, folder: Path) -> Path:
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    path = folder / "model.pte"
    program = to_edge_transform_and_lower(
        torch.export.export(module, (x,)), partitioner=[XnnpackPartitioner()]
    )
    path.write_bytes(program.to_executorch().buffer)
    return path


def _export_ncnn(module: nn.Module, x: Tensor, folder: Path) -> Path:
    import pnnx

    torch.jit.trace(module, x).save(folder / "model.pt")  # type: ignore[no-untyped-call]
    shape = ",".join(map(str, x.shape))
    command: list[str | Path] = [
        Path(pnnx.__file__).with_name("pnnx"),
        "model.pt",
        f"inputshape=[{shape}]f32",
        "fp16=0",
    ]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    return folder / "model.ncnn.param"


EXPORTERS = {
    "onnxruntime": _export_onnxruntime,
    "openvino": _export_openvino,
    "xnnpack": _export_xnnpack,
    "ncnn": _export_ncnn,
}


@contextmanager
def _silence() -> Iterator[None]:
    """What exporters warn and log, about themselves."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


class Remote(Contender):
    """A module in a runtime, timed by the process that runs it. A context manager, which ends that process.

    >>> with Remote("onnxruntime", module, torch.randn(1, 3, 224, 224), threads=1) as remote:
    ...     remote.sample(10)
    """

    def __init__(self, runtime: str, module: nn.Module, x: Tensor, threads: int, copies: int = 1) -> None:
        self.runtime = self.pool = runtime
        self._module, self._x, self._threads, self._copies = module, x, threads, copies
        self._stack = ExitStack()

    def __enter__(self) -> Remote:
        with ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            path = self._export(folder)
            np.save(folder / "input.npy", self._x.numpy())
            self._log = stack.enter_context((folder / "log").open("w+", encoding="utf-8"))
            arguments = [self.runtime, path, folder / "input.npy", self._threads, self._copies]
            process = subprocess.Popen(
                [sys.executable, WORKER, *map(str, arguments)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._log,
                env={
                    **os.environ,
                    "OMP_NUM_THREADS": str(self._threads),
                },  # of a torch that a runtime brings along
                text=True,
            )
            stack.callback(_end, process)
            assert process.stdin is not None
            assert process.stdout is not None
            self._process, self._requests, self._replies = process, process.stdin, process.stdout
            self._folder = folder
            self._reply()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def sample(self, calls: int) -> Sample:
        return Sample(**self._ask({"calls": calls}))

    def output(self) -> Tensor:
        """The result for the input."""
        path = self._folder / "output.npy"
        self._ask({"output": str(path)})
        return torch.from_numpy(np.load(path))

    def _export(self, folder: Path) -> Path:
        """RuntimeError in a sentence where the runtime's own exporter fails, in whatever way it does."""
        try:
            with _silence(), torch.no_grad():
                return EXPORTERS[self.runtime](self._module.eval(), self._x, folder)
        except Exception as error:
            text = error.stderr if isinstance(error, subprocess.CalledProcessError) else str(error)
            lines = (text.decode(errors="replace") if isinstance(text, bytes) else text or "").split("\n")
            said = [line.strip() for line in lines if line.strip()]
            # A program's last line tells what ended it, an exception's first what is wrong.
            which = -1 if isinstance(error, subprocess.CalledProcessError) else 0
            reason = said[which] if said else type(error).__name__
            raise RuntimeError(f"{self.runtime} does not take the model: {reason}") from error

    def _ask(self, request: dict[str, Any]) -> dict[str, float]:
        try:
            print(json.dumps(request), file=self._requests, flush=True)
        except BrokenPipeError:
            raise self._ended() from None
        return self._reply()

    def _reply(self) -> dict[str, float]:
        """One line; none is in the stream's buffer, as each request is answered by one."""
        if not select.select([self._replies], [], [], DEADLINE)[0]:
            self._process.kill()
            raise RuntimeError(
                f"{self.runtime} gave no answer in {DEADLINE:g} seconds: {_last_line(self._log)}"
            )
        line = self._replies.readline()
        if not line:
            raise self._ended()
        reply: dict[str, float] = json.loads(line)
        return reply

    def _ended(self) -> RuntimeError:
        try:
            status = self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:  # it closed its output alone
            self._process.kill()
            status = self._process.wait()
        return RuntimeError(f"{self.runtime} ended with status {status}: {_last_line(self._log)}")


def _end(process: subprocess.Popen[str]) -> None:
    """Closes its input, at which it ends, and waits, so that its seconds are counted with ours."""
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            with suppress(BrokenPipeError):  # what it was not there to read
                stream.close()
    try:
        process.wait(timeout=10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _last_line(log: IO[str]) -> str:
    log.seek(0)
    lines = [line.strip() for line in log if line.strip()]
    return lines[-1] if lines else "it said nothing"

"""One model in a dedicated runtime, in a process of its own: run by peers.Remote, never imported.

    python worker.py RUNTIME MODEL INPUT.npy THREADS COPIES

It answers each line of JSON on its standard input with one on its standard output: {"calls": 7} with the
seconds that so many took, {"output": "file.npy"} by writing the result there.
"""

import itertools
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

sys.path.pop(0)  # this file's folder, whose names are not for the runtimes to find

import numpy as np

Run = Callable[[Any], Any]

# The runtimes print what they like: their standard output becomes standard error.
replies = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)


def onnxruntime(path: str, threads: int) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    (name,) = (given.name for given in session.get_inputs())
    return lambda x: session.run(None, {name: x})[0]


def openvino(path: str, threads: int) -> Run:
    import openvino

    settings = {
        "INFERENCE_NUM_THREADS": threads,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",
    }
    request = openvino.Core().compile_model(path, "CPU", settings).create_infer_request()
    return lambda x: request.infer([x], share_inputs=True, share_outputs=True)[0]


def xnnpack(path: str, threads: int) -> Run:
    import torch
    from executorch.extension.pybindings import portable_lib
    from executorch.runtime import Runtime

    portable_lib._unsafe_reset_threadpool(threads)
    program = Runtime.get().load_program(path)
    method = program.load_method("forward")  # of which it is a part

    def run(x: Any) -> Any:
        (y,) = method.execute([torch.from_numpy(x)])
        return y

    return run


def ncnn(path: str, threads: int) -> Run:
    import ncnn

    net = ncnn.Net()
    net.opt.num_threads = threads
    for name in ("fp16_packed", "fp16_storage", "fp16_arithmetic", "bf16_storage"):
        setattr(net.opt, f"use_{name}", False)
    if net.load_param(path) or net.load_model(path.removesuffix(".param") + ".bin"):
        raise RuntimeError("ncnn does not load the model")

    def run(x: Any) -> Any:
        extractor = net.create_extractor()
        extractor.input("in0", ncnn.Mat(x[0]))
        return np.array(extractor.extract("out0")[1])[None]

    return run


def main(runtime: str, path: str, array: str, threads: str, copies: str) -> None:
    load = {"onnxruntime": onnxruntime, "openvino": openvino, "xnnpack": xnnpack, "ncnn": ncnn}[runtime]
    run = load(path, int(threads))
    first = np.load(array)
    inputs = [first, *(first.copy() for _ in range(int(copies) - 1))]
    turns = itertools.cycle(inputs)
    print(json.dumps({"ready": True}), file=replies, flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        answer: dict[str, float] = {}
        if "output" in asked:
            np.save(asked["output"], np.asarray(run(first)))
        else:
            cpu_begin, begin = time.process_time(), time.perf_counter()
            for _ in range(asked["calls"]):
                run(next(turns))
            answer["seconds"] = time.perf_counter() - begin
            answer["cpu_seconds"] = time.process_time() - cpu_begin
        print(json.dumps(answer), file=replies, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])

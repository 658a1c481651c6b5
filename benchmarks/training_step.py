"""A training step of a network's separable layers in a row: time and memory, fastsep against torch.

    python benchmarks/training_step.py mobilenet_v1 --batch 32
    python benchmarks/training_step.py xception_71 --batch 8

A step is forward, backward, and an update by SGD. Between layers of different size lies a max-pool, between
the halves of a layer an activation and no norm: fastsep keeps a layer's input, torch also what lies between.

Times are those of steps that take turns in one process. Memory is the largest resident set during three
steps, less that before the first, each contender in a process of its own. The system's count is taken rather
than torch's profiler because the workspaces of oneDNN and of fastsep do not come from torch's allocator.
There malloc gives back what is freed, instead of keeping it for who asks next: else the count is of its holes
too, which vary by a fifth from run to run.
"""

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from fastsep._case import LAYOUTS, Case
from fastsep.bench.arguments import checked, count, duration
from fastsep.bench.baselines import two_modules
from fastsep.bench.contenders import layer
from fastsep.bench.engine import Local, Race
from fastsep.bench.layers import Network, load, phase_operations
from fastsep.bench.machine import Load, cores, device_name, fixed_threads, measure_peak, versions

# Of the results, which `benchmarks/update_readme.py` reads. A change of their meaning is another number.
KIND, FORMAT = "training step", 1
CONTENDERS = ["fastsep nhwc", "fastsep nchw", "torch nhwc", "torch nchw"]
STEPS = 3  # of which the peak is taken: the second finds what the first left behind


@checked
def chain(text: str) -> Network:
    """Layers of which each takes what the one before gives, with at most a max-pool between."""
    network = load(text)
    for case in network.layers:
        if not case.k:
            raise ValueError(f"must be of whole layers, got {text!r}: {case.name} is a depthwise half alone")
    for before, case in zip(network.layers, network.layers[1:], strict=False):
        given, pooled = (
            (before.k, before.oh, before.ow),
            (before.k, *((n - 1) // 2 + 1 for n in before.output[2:])),
        )
        if (case.c, case.h, case.w) not in (given, pooled):
            sizes = " x ".join(map(str, given)), " x ".join(map(str, (case.c, case.h, case.w)))
            raise ValueError(
                f"must be of layers that follow each other, got {text!r}: {before.name} gives {sizes[0]}, "
                f"{case.name} takes {sizes[1]}"
            )
    return network


def body(cases: list[Case], library: str) -> nn.Sequential:
    """The layers with weights that keep the numbers' size."""
    parts: list[nn.Module] = []
    for before, case in zip([None, *cases[:-1]], cases, strict=True):
        if before is not None and (before.oh, before.ow) != (case.h, case.w):
            parts.append(nn.MaxPool2d(3, stride=2, padding=1))
        tensors = case.tensors()
        for name, terms in (("depthwise_weight", case.kh * case.kw), ("pointwise_weight", case.c * case.m)):
            tensors[name] *= (2 / terms) ** 0.5
        fused = library == "fastsep"
        parts.append(layer(case, tensors).train() if fused else two_modules(case, tensors, in_place=True))
    return nn.Sequential(*parts)


class Step:
    """One training step, again and again."""

    def __init__(self, cases: list[Case], contender: str) -> None:
        library, layout = contender.split()
        self.model = body(cases, library).to(memory_format=LAYOUTS[layout])
        shape = cases[0].n, cases[0].c, cases[0].h, cases[0].w
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        # In a network there is a layer before the first, which needs the gradient of its output.
        self.x = x.contiguous(memory_format=LAYOUTS[layout]).requires_grad_()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-4)

    def backward(self) -> None:
        self.x.grad = None
        self.optimizer.zero_grad()
        self.model(self.x).square().mean().backward()

    def __call__(self) -> None:
        self.backward()
        self.optimizer.step()

    def gradients(self) -> list[torch.Tensor]:
        self.backward()
        return [self.x.grad, *(parameter.grad for parameter in self.model.parameters())]


def verify(steps: dict[str, Step]) -> None:
    """ArithmeticError where gradients differ by more than rounding does at the activations' bends."""
    expected = steps["torch nchw"].gradients()
    names = ["input", *dict(steps["torch nchw"].model.named_parameters())]
    for contender, step in steps.items():
        for name, got, exact in zip(names, step.gradients(), expected, strict=True):
            error = torch.linalg.vector_norm(got - exact) / torch.linalg.vector_norm(exact)
            if not error < 0.02:
                raise ArithmeticError(
                    f"{contender}: the gradient of {name} differs from torch's by {error:.2g}"
                )


def resident(kind: str) -> int:
    """Bytes: VmRSS, now, or VmHWM, the most since the last reset."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(re.search(rf"{kind}:\s+(\d+) kB", status)[1]) << 10


def measure_memory(cases: list[Case], contender: str) -> int:
    """Bytes that a step takes at its peak beyond model and input. In a fresh process."""
    small = [replace(case, n=1, h=8, w=8) for case in cases[:1]]
    Step(small, contender)()  # loads libraries, starts threads
    step = Step(cases, contender)
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # resets the peak
    for _ in range(STEPS):
        step()
    return resident("VmHWM") - before


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("network", type=chain, help="a name of benchmarks/shapes/, or a file of layers")
    parser.add_argument("--batch", type=count, default=32, help="images (default: %(default)s)")
    parser.add_argument("--threads", type=count, default=1, help="(default: %(default)s)")
    parser.add_argument(
        "--seconds", type=duration, default=60.0, help="to measure for (default: %(default)s)"
    )
    parser.add_argument("--layouts", nargs="+", choices=list(LAYOUTS), default=list(LAYOUTS))
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--memory", choices=CONTENDERS, help=argparse.SUPPRESS)  # a process of its own
    arguments = parser.parse_args()
    if arguments.threads > cores():
        print(f"threads must be at most {cores()}, got {arguments.threads}", file=sys.stderr)
        return 2
    cases = [replace(case, n=arguments.batch) for case in arguments.network.layers]
    with fixed_threads(arguments.threads):
        if arguments.memory:
            print(measure_memory(cases, arguments.memory))
            return 0
        contenders = [name for name in CONTENDERS if name.split()[1] in arguments.layouts]
        try:
            result = compare(cases, contenders, arguments)
        except (ArithmeticError, RuntimeError) as error:
            print(error, file=sys.stderr)
            return 1
    if arguments.json:
        print(json.dumps(result, indent=1))
    else:
        show(result)
    return 0


def memory_of(contender: str) -> int:
    """measure_memory() in a process of its own; RuntimeError where that fails."""
    command = [sys.executable, __file__, *sys.argv[1:], "--memory", contender]
    # glibc gives freed blocks of this size back, so that what counts is what is in use.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(1 << 16)}
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    if result.returncode != 0:
        said = result.stderr.strip().splitlines()
        reason = said[-1] if said else f"the process ended with status {result.returncode}"
        raise RuntimeError(f"the memory of {contender} was not measured: {reason}")
    return int(result.stdout)


def compare(cases: list[Case], contenders: list[str], arguments: argparse.Namespace) -> dict:
    memory = {name: memory_of(name) for name in contenders}
    steps = {name: Step(cases, name) for name in dict.fromkeys(["torch nchw", *contenders])}
    verify(steps)
    operations = sum(phase_operations(case, "training") for case in cases)
    peak = measure_peak("cpu", "", "float32", arguments.threads)
    with Load() as load:
        times = Race({name: Local(steps[name]) for name in contenders}).run(arguments.seconds)
    rows = {
        name: {
            "seconds": times[name].median,
            "spread": times[name].spread,
            "share_of_peak": operations / times[name].median / peak,
            "memory": memory[name],
        }
        for name in contenders
    }
    typed = [word for word in sys.argv[1:] if word != "--json"]
    return {
        "kind": KIND,
        "format": FORMAT,
        "network": arguments.network.name,
        "batch": arguments.batch,
        "threads": arguments.threads,
        "machine": device_name("cpu"),
        "versions": versions("cpu"),
        "peak": peak,
        "others": load.others,
        "rows": rows,
        "command": shlex.join(["python", "benchmarks/training_step.py", *typed]),
    }


def show(result: dict) -> None:
    console = Console()
    threads = "1 thread" if result["threads"] == 1 else f"{result['threads']} threads"
    table = Table(
        title=f"A training step of {result['network']}'s layers, batch {result['batch']}, {threads}"
    )
    for head in ("", "ms", "\u00b1%", "of peak", "MB"):
        table.add_column(head, justify="right" if head else "left")
    rows = result["rows"]
    for name, row in rows.items():
        spread = f"{row['spread'] * 50:.1f}"
        share = f"{row['share_of_peak']:.0%}"
        table.add_row(name, f"{row['seconds'] * 1e3:.1f}", spread, share, f"{row['memory'] / 1e6:.0f}")
    console.print(table)
    best = {
        (library, what): min(row[what] for name, row in rows.items() if name.startswith(library))
        for library in ("fastsep", "torch")
        for what in ("seconds", "memory")
    }
    faster = best["torch", "seconds"] / best["fastsep", "seconds"]
    less = 1 - best["fastsep", "memory"] / best["torch", "memory"]
    console.print(
        f"fastsep against torch, each in its better layout: {faster:.2f} times as fast, "
        f"{less:.0%} less memory."
    )
    if result["others"] > 0.1:
        console.print(f"Other programs kept {result['others']:.1f} cores busy meanwhile.")


if __name__ == "__main__":
    sys.exit(main())

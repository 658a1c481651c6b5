"""What is installed here, what of it runs, and whether it computes what it should."""

from __future__ import annotations

import argparse
import importlib.util
import json
from dataclasses import asdict
from typing import Any

import torch

from . import __version__, _native
from ._check import self_test


def collect() -> dict[str, Any]:
    """All that ``python -m fastsep info`` tells; ValueError where FASTSEP_ISA names none that runs here."""
    information: dict[str, Any] = {
        "fastsep": __version__,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "native": _native.core is not None,
        "cuda": importlib.util.find_spec("fastsep._cuda") is not None,
        "gpus": [
            {"name": torch.cuda.get_device_name(index), "why_not": _native.why_not_on(index)}
            for index in range(torch.cuda.device_count())
        ],
    }
    core = _native.core
    if core is None:
        return information | {"missing": _native.missing}
    return information | {
        "isa": core.best_isa(),
        "available": core.isas(),
        "compiled": core.compiled_isas(),
        "kernels": core.kernels(),
        "pool": core.thread_pool(),
        "self_test": [asdict(result) | {"passed": result.passed} for result in self_test()],
    }


def show(information: dict[str, Any]) -> None:
    def line(title: str, text: str) -> None:
        print(f"{title:<18}{text}")

    line("fastsep", information["fastsep"])
    line("torch", information["torch"])
    line("CUDA kernels", "compiled in" if information["cuda"] else "not compiled in")
    for gpu in information["gpus"]:
        line("  on", gpu["name"] + (f": none, {gpu['why_not']}" if gpu["why_not"] else ""))
    if not information["native"]:
        line("native module", f"missing, torch's operators do the work: {information['missing']}")
        return
    line("instruction set", information["isa"])
    line("  available", ", ".join(information["available"]))
    line("  compiled in", ", ".join(information["compiled"]))
    line("kernels", ", ".join(information["kernels"]))
    line("threads", f"{information['threads']}, of {information['pool']} pool".replace("torch", "torch's"))
    print("\nself-test: the largest error, as a share of what rounding may cause")
    worst: dict[tuple[str, str, str], float] = {}
    for result in information["self_test"]:
        key = result["isa"], result["dtype"], result["layout"]
        worst[key] = max(worst.get(key, 0.0), result["error"])
    for (isa, dtype, layout), error in worst.items():
        print(f"  {isa:<8} {dtype:<8} {layout}  {error:.4f}  {'passed' if error <= 1 else 'FAILED'}")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(arguments: argparse.Namespace) -> int:
    """0 where the native module is there and its self-test passes, else 1."""
    information = collect()
    if arguments.json:
        print(json.dumps(information, indent=2))
    else:
        show(information)
    return 0 if information["native"] and all(result["passed"] for result in information["self_test"]) else 1

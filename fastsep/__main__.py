"""python -m fastsep info | bench | optimize | cost | replay"""

from __future__ import annotations

import argparse
import sys

from . import __version__, _cost_table, _info, _native
from ._optimize import command as optimize
from .bench import command, replay


def main(arguments: list[str] | None = None) -> int:
    """The exit status: 0, 1 where something computed wrong, 2 where something was asked that cannot be."""
    parser = argparse.ArgumentParser(
        prog="python -m fastsep", description="Fused depthwise-separable convolution."
    )
    parser.add_argument("--version", action="version", version=f"fastsep {__version__}")
    commands = parser.add_subparsers(metavar="command")
    for name, module, text in (
        ("info", _info, "what is installed, what of it runs here, and a self-test"),
        ("bench", command, "the layers of a network, against torch's own convolutions"),
        ("optimize", optimize, "what fastsep.optimize fuses in a network, and why not the rest"),
        ("cost", _cost_table, "multiply-adds, parameters and memory traffic of a network's layers"),
        ("replay", replay, "run a call again that FASTSEP_VERBOSE=1 printed, and check it"),
    ):
        subparser = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        module.add_arguments(subparser)
        subparser.set_defaults(run=module.run)
    typed = sys.argv[1:] if arguments is None else arguments
    parsed = parser.parse_args(typed)
    parsed.typed = typed
    if not hasattr(parsed, "run"):
        parser.print_help()
        return 0
    if _native.core is not None:
        try:
            _native.core.best_isa()
        except ValueError as error:
            print(f"fastsep: {error}", file=sys.stderr)
            return 2
    status: int = parsed.run(parsed)
    return status


if __name__ == "__main__":
    sys.exit(main())

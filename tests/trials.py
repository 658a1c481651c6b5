"""Random trials for some seconds, each of which can be run again: what sweep.py and random_networks.py do."""

from __future__ import annotations

import argparse
import random
import time
import traceback
from collections.abc import Callable


def run_trials(description: str | None, what: str, attempt: Callable[[random.Random, int, str], str]) -> int:
    """The exit status of a script: 0, or 1 where a trial failed.

    attempt: makes of a source of randomness, a number and the options that draw the same again what is wrong,
    or "". An exception is wrong, too.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**32))
    parser.add_argument("--trial", type=int, help="this one alone")
    options = parser.parse_args()
    end, number, failures = time.monotonic() + options.seconds, options.trial or 0, 0
    first = number
    while time.monotonic() < end or number == first:
        again = f"--seed {options.seed} --trial {number}"
        try:
            wrong = attempt(random.Random(f"{options.seed} {number}"), number, again)
        except Exception:
            wrong = traceback.format_exc()
        if wrong:
            failures += 1
            print(f"{again}: FAILED: {wrong}", flush=True)
        number += 1
        if options.trial is not None:
            break
    print(f"--seed {options.seed}: {number - first} {what}, {failures} failed")
    return 1 if failures else 0

"""Some seconds of random geometry, drawn anew in each run: see sweep.py."""

import random

import pytest
from commands import run

from fastsep import _native

pytestmark = pytest.mark.skipif(_native.core is None, reason="the native module is missing")


def test_random_geometry():
    seed = random.SystemRandom().randrange(2**32)
    # More threads than processors: they shall not spin while they wait for each other.
    done = run(f"python tests/sweep.py --seconds 10 --seed {seed}", OMP_WAIT_POLICY="PASSIVE")
    assert done.returncode == 0, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    assert done.stdout.splitlines()[-1].endswith(" trials, 0 failed")


def test_one_trial_can_be_run_again():
    first, second = (
        run("python tests/sweep.py --seed 7 --trial 3", OMP_WAIT_POLICY="PASSIVE") for _ in range(2)
    )
    assert first.returncode == 0, first.stderr
    assert first.stdout == second.stdout
    assert first.stdout.startswith("--seed 7 --trial 3: ")

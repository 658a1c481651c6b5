"""Some seconds of random networks, drawn anew in each run: see random_networks.py."""

import random

import pytest
from commands import run

from fastsep import _native

pytestmark = pytest.mark.skipif(_native.core is None, reason="the native module is missing")


def test_random_networks():
    seed = random.SystemRandom().randrange(2**32)
    done = run(f"python tests/random_networks.py --seconds 8 --seed {seed}", OMP_WAIT_POLICY="PASSIVE")
    assert done.returncode == 0, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    assert done.stdout.splitlines()[-1].endswith(" networks, 0 failed")


def test_one_network_can_be_run_again():
    first, second = (run("python tests/random_networks.py --seed 7 --trial 3") for _ in range(2))
    assert first.returncode == 0, first.stdout
    assert first.stdout == second.stdout

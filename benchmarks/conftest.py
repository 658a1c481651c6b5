"""Options of `pytest benchmarks/`."""

import pytest
import torch

from fastsep.bench.layers import load, names


def pytest_addoption(parser):
    group = parser.getgroup("fastsep")
    group.addoption("--network", default="mobilenet_v1", help=f"{', '.join(names())} or a file of layers")
    group.addoption("--quick", action="store_true", help="one small layer, one round: only whether it runs")


def pytest_generate_tests(metafunc):
    if "case" in metafunc.fixturenames:
        config = metafunc.config
        layers = load(config.getoption("network")).layers
        distinct = {tuple(case.problem): case for case in reversed(layers)}  # the first of equal ones stays
        cases = sorted(distinct.values(), key=layers.index)
        metafunc.parametrize(
            "case", cases[-1:] if config.getoption("quick") else cases, ids=lambda case: case.name
        )


def pytest_configure(config):
    if config.getoption("quick"):
        config.option.benchmark_min_rounds = 1
        config.option.benchmark_max_time = 0.0


@pytest.fixture(autouse=True)
def one_thread():
    """One thread, as `python -m fastsep bench` has it by default."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)

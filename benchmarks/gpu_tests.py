"""Tests for benchmarks/gpu_check.sh, which goes on where a time limit cut them off.

    python benchmarks/gpu_tests.py FILE PYTEST-ARGUMENT ...

FILE is a list of the tests that have passed: they are left out, and each that passes is added at once.
"""

import sys
from pathlib import Path

try:
    import pytest
except ImportError:
    sys.exit("pytest is not installed for this Python: its tests cannot run here")


class Passed:
    """A plugin of pytest."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.names = set(path.read_text(encoding="utf-8").splitlines()) if path.exists() else set()
        self.before = 0

    def pytest_collection_modifyitems(self, config, items) -> None:
        done = [item for item in items if item.nodeid in self.names]
        self.before = len(done)
        items[:] = [item for item in items if item.nodeid not in self.names]
        config.hook.pytest_deselected(items=done)

    def pytest_runtest_logreport(self, report) -> None:
        skipped = report.skipped and report.when != "teardown"
        if skipped or (report.passed and report.when == "call"):
            with self.path.open("a", encoding="utf-8") as file:
                file.write(report.nodeid + "\n")


def main(path: str, *arguments: str) -> int:
    passed = Passed(Path(path))
    status = pytest.main(["-q", "-p", "no:cacheprovider", *arguments], plugins=[passed])
    if status == pytest.ExitCode.NO_TESTS_COLLECTED and passed.before:
        print(f"all {passed.before} passed before")
        return 0
    return int(status)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))

"""`pytest --cpu-times SECONDS`: lists the tests that take more processor time, and whether each is marked slow.

Processor time of the test and of the programs it starts, which a busy machine changes little; unlike `--durations`.
What a test shares (an import, a fixture of the session) is counted in the first that needs it.
"""

import resource
from collections import defaultdict
from collections.abc import Iterator

import forked
import pytest


def cpu_seconds() -> float:
    """Processor time of this process, of the children it has waited for, and of the forks of `forked`."""
    usages = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return forked.spent + sum(usage.ru_utime + usage.ru_stime for usage in usages)


class CpuTimes:
    """Measures in each worker of pytest-xdist; the reports carry the times to the process that prints."""

    def __init__(self, limit: float) -> None:
        self.limit = limit
        self.last = 0.0
        self.seconds: dict[str, float] = defaultdict(float)
        self.slow: set[str] = set()

    def pytest_runtest_logstart(self) -> None:
        self.last = cpu_seconds()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self) -> Iterator[None]:
        report = yield
        now = cpu_seconds()
        report.cpu_seconds, self.last = now - self.last, now
        return report

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.seconds[report.nodeid] += report.cpu_seconds
        if "slow" in report.keywords:
            self.slow.add(report.nodeid)

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        terminalreporter.section(f"processor time above {self.limit:g} s, of {sum(self.seconds.values()):.0f} s in all")
        for name, seconds in sorted(self.seconds.items(), key=lambda entry: -entry[1]):
            if seconds > self.limit:
                mark = "slow" if name in self.slow else "not marked"
                terminalreporter.write_line(f"{seconds:7.2f} s  {mark:10}  {name}")

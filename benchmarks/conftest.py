import pytest

from benchmarks.workloads import refuse_interpreter


def pytest_configure(config: pytest.Config) -> None:
    try:
        refuse_interpreter()
    except ValueError as error:
        raise pytest.UsageError(str(error)) from error

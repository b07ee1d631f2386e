"""The versions of PyTorch, Triton and diffusers that the tests ran on.

Some of what makes calls cheap is private there: `ops/dispatch.py`, `ops/quick.py`, `ops/plan.py`, `ops/registry.py`,
`support/transforms.py` and `kernels/launch.py` use it. A later version may change it. What stands for a class of
diffusers repeats its arithmetic, which a later version may change too.
"""

import re
import warnings

# The first version that was not tested.
UNTESTED = {"torch": (2, 15), "triton": (3, 10), "diffusers": (0, 43)}


def numbers(version: str) -> tuple[int, int]:
    """The first two numbers of a version; (0, 0) if it has none."""
    found = re.match(r"(\d+)\.(\d+)", version)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def warn_if_untested(package: str, version: str) -> None:
    """Warn if the version is later than those that were tested."""
    if numbers(version) >= UNTESTED[package]:
        last = ".".join(map(str, UNTESTED[package]))
        warnings.warn(
            f"fastdiff was tested with {package} below {last}, and {package} is {version}: if something fails, install "
            f"'{package}<{last}'",
            stacklevel=2,
        )

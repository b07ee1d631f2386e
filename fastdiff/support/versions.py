"""The versions of PyTorch, Triton and diffusers that the tests ran on.

Some of what makes calls cheap is private there: `ops/dispatch.py`, `ops/quick.py`, `ops/plan.py`, `ops/registry.py`,
`support/transforms.py` and `kernels/launch.py` use it. `interop/diffusers/` repeats the arithmetic of diffusers. A
later version may change it.
"""

import re
import warnings

# The first version that was not tested.
UNTESTED = {"torch": (2, 15), "triton": (3, 9), "diffusers": (0, 43)}


def warn_if_untested(package: str, version: str) -> None:
    """Warn if the version is later than those that were tested."""
    numbers = re.match(r"(\d+)\.(\d+)", version)
    if numbers and (int(numbers[1]), int(numbers[2])) >= UNTESTED[package]:
        last = ".".join(map(str, UNTESTED[package]))
        warnings.warn(
            f"fastdiff was tested with {package} below {last}, and {package} is {version}: if something fails, install "
            f"'{package}<{last}'",
            stacklevel=2,
        )

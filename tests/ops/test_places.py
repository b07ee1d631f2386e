"""Each operation stands in every place that measures or watches all of them."""

from pathlib import Path

from benchmarks.static.variants import COMMON
from fastdiff import ops
from fastdiff.ops.dispatch import TRITON

ROOT = Path(__file__).resolve().parents[2]
# Operations that launch the kernel of another one, which stands in the places of kernels.
SAME_KERNEL = {"combine", "layer_norm"}
FOR_ALL = ("benchmarks/host_time.py", "tests/ops/test_quick.py")
FOR_KERNELS = (
    *("benchmarks/kernel_workloads.py benchmarks/workloads.py", "benchmarks/gpu/launches.py"),
    *("tests/kernels/test_sanitizer.py", "tests/ops/test_transforms.py"),
)


def test_every_operation_has_its_places() -> None:
    page = (ROOT / "docs" / "api" / "ops.md").read_text(encoding="utf-8")
    missing = []
    for name in (name for name in ops.__all__ if callable(getattr(ops, name))):
        if f".{name}\n" not in page:
            missing.append((name, "docs/api/ops.md"))
        for places in FOR_ALL if name in SAME_KERNEL else FOR_ALL + FOR_KERNELS:
            text = "".join((ROOT / place).read_text(encoding="utf-8") for place in places.split())
            if f"ops.{name}(" not in text:
                missing.append((name, places))
    assert not missing, "\n" + "\n".join(f"{name} is not in {place}" for name, place in missing)


def test_every_operation_has_a_static_variant() -> None:
    launchers = {name.rstrip("_") for names in TRITON.values() for name in names}
    # Reduce sums what the programs of a loss have left. It is launched with it.
    assert {*launchers, "reduce"} == {kernel for kernel, *_ in COMMON}

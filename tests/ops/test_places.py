"""Each operation stands in every place that measures or watches all of them."""

from pathlib import Path

from benchmarks import kernel_workloads, workloads
from benchmarks.calls import CALLS, MEASURED, Source
from benchmarks.static.variants import COMMON
from fastdiff import ops
from fastdiff.ops.dispatch import TRITON

ROOT = Path(__file__).resolve().parents[2]
# Operations that launch the kernel of another one, with which it is measured.
SAME_KERNEL = {"combine", "layer_norm"}


def test_every_operation_has_its_places() -> None:
    names = {name for name in ops.__all__ if callable(getattr(ops, name))}
    page = (ROOT / "docs" / "api" / "ops.md").read_text(encoding="utf-8")
    calls = {name: make(Source((1, 4, 2, 2))) for name, make in CALLS.items()}
    assert all(call.op is getattr(ops, name.partition(",")[0]) for name, call in calls.items())
    written = "".join(Path(module.__file__).read_text(encoding="utf-8") for module in (workloads, kernel_workloads))
    places = {
        "docs/api/ops.md": {name for name in names if f".{name}\n" in page},
        "CALLS, beside eager PyTorch": {call.op.__name__ for call in calls.values() if call.eager},
        "CALLS, with a gradient": {call.op.__name__ for call in calls.values() if call.by} | {"normal"},
        "MEASURED": {calls[row.call].op.__name__ for row in MEASURED.values()} | SAME_KERNEL,
    }
    places["MEASURED"] |= {name for name in names if f"ops.{name}(" in written}
    missing = [f"{name} is not in {place}" for place, found in places.items() for name in sorted(names - found)]
    assert not missing, "\n".join(["CALLS and MEASURED are in benchmarks/calls.py", *missing])


def test_every_operation_has_a_static_variant() -> None:
    launchers = {name.rstrip("_") for names in TRITON.values() for name in names}
    # Reduce sums what the programs of a loss have left. It is launched with it.
    missing = {*launchers, "reduce"} ^ {kernel for kernel, *_ in COMMON}
    assert not missing, f"{sorted(missing)}: in one alone of TRITON of ops/dispatch.py and COMMON of static/variants.py"

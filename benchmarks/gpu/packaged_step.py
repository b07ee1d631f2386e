"""Does a packaged step run in another process, and where does that process end if it does not?

`python -m benchmarks.gpu.packaged_step DEVICE stock|fastdiff [quickly]` exports a step, packages it by AOTInductor, and
loads the package in another process. "stock" is PyTorch alone: if its process dies, the fault is PyTorch's own.
"fastdiff" is the same step by the operator `fastdiff::update`, which is implemented in Python.

If the loading process dies, it is started again, each time with one thing changed. What is said at the end names how
far each of them came, and the last lines of Python that ran.
"""

import importlib
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

SHAPE = (2, 3, 4, 4)
# A package that is loaded once. More optimisation around its kernels, kernels in vectors, headers compiled ahead and
# programs that try the processor would take longer than they save.
QUICKLY = {
    "aot_inductor.compile_wrapper_opt_level": "O0",
    "aot_inductor.enable_line_tables": False,
    "aot_inductor.precompile_headers": False,
    "cpp.simdlen": 0,
    "cpp.vec_isa_ok": True,
}
# As a user compiles, with kernels in vectors, but for what only takes time.
USUAL = {"aot_inductor.precompile_headers": False, "aot_inductor.compile_wrapper_opt_level": "O0"}
CONSUMER = """
import faulthandler, gc, sys, torch
package, out, device, kind = sys.argv[1:]
faulthandler.enable()
if kind == "fastdiff":
    import fastdiff
print("import", flush=True)
step = torch._inductor.aoti_load_package(package)
print("load", flush=True)
x = torch.linspace(-1, 1, 96, device=device).reshape(2, 3, 4, 4)
k = torch.tensor([3], device=device)
y = step(x, k).detach().cpu()
print("run", flush=True)
torch.save(y, out)
del step
gc.collect()
print("unload", flush=True)
assert ("fastdiff" in sys.modules) == (kind == "fastdiff")
"""
# What may matter where the process dies, beside how the package was compiled.
CHANGES = {
    "one OpenMP thread": {"OMP_NUM_THREADS": "1"},
    "no GPU in sight": {"CUDA_VISIBLE_DEVICES": ""},
    "fastdiff in plain PyTorch": {"FASTDIFF_BACKEND": "reference"},
}
# Lines of what a process says as it dies.
SAID = 12


def known(config: dict[str, Any]) -> dict[str, Any]:
    """Those options of AOTInductor that this PyTorch has: 2.11 lacks one."""
    options = torch._inductor.config.get_config_copy()
    return {name: value for name, value in config.items() if name in options}


class Step(nn.Module):
    """A step of a sampler: a network, and a row of a table that a number on the device chooses."""

    rows: Tensor

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.network = nn.Conv2d(3, 3, 3, padding=1)
        self.register_buffer("rows", torch.linspace(0.1, 1, 90).reshape(10, 9))
        self.ops: Any = importlib.import_module("fastdiff.ops") if kind == "fastdiff" else None

    def forward(self, x: Tensor, k: Tensor) -> Tensor:
        if self.ops is not None:
            updated: Tensor = self.ops.update(x, self.network(x), self.rows, k, noisy=False)
            return updated
        from_x, from_pred, noise = self.rows[k][0, :3]
        return from_x * x + from_pred * self.network(x) + noise * torch.cos(x)


def consume(package: str, device: str, kind: str, want: Tensor, **environment: str) -> str:
    """How the loading process ended: "" if it gave what it should."""
    out = Path(package).with_suffix(".out")
    command = [sys.executable, "-c", CONSUMER, package, str(out), device, kind]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})
    if done.returncode == 0:
        got = torch.load(out)
        return "" if torch.allclose(got, want, rtol=1e-4, atol=1e-4) else f"{(got - want).abs().max():.1e} off"
    how = signal.Signals(-done.returncode).name if done.returncode < 0 else f"exit code {done.returncode}"
    said = " / ".join(line.strip() for line in done.stderr.strip().splitlines()[-SAID:])
    return f"{how}, the last that it did: {(done.stdout.split() or ['nothing'])[-1]}. {said}"


def main(device: str, kind: str, config: dict[str, Any] = USUAL) -> None:
    """Raises RuntimeError that says how the loading process ended, and how with one thing changed.

    config: of AOTInductor.
    """
    step = Step(kind).eval().to(device)
    x, k = torch.linspace(-1, 1, 96, device=device).reshape(SHAPE), torch.tensor([3], device=device)
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        program = torch.export.export(step, (x, k), dynamic_shapes=({0: torch.export.Dim.DYNAMIC}, None))
        want = step(x, k).cpu()

        def packaged(name: str, config: dict[str, Any]) -> str:
            path = str(Path(folder) / f"{name}.pt2")
            return str(
                torch._inductor.aoti_compile_and_package(program, package_path=path, inductor_configs=known(config))
            )

        package = packaged("package", config)
        ended = consume(package, device, kind, want)
        if not ended:
            return
        changes = {name: consume(package, device, kind, want, **change) for name, change in CHANGES.items()}
        changes["compiled plainly"] = consume(packaged("plain", QUICKLY), device, kind, want)
        cured = ", ".join(name for name, how in changes.items() if not how) or "nothing"
        raise RuntimeError(
            f"{ended}\nIt is cured by: {cured}. " + ". ".join(f"{n}: {h[:120]}" for n, h in changes.items())
        )


if __name__ == "__main__":
    device, kind, *how = sys.argv[1:]
    main(device, kind, QUICKLY if how == ["quickly"] else USUAL)

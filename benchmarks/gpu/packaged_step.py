"""Does a packaged step run in another process? The same steps as fastdiff's test of it, on stock PyTorch alone.

`python -m benchmarks.gpu.packaged_step DEVICE` exports a step, packages it by AOTInductor and loads the package in
another process. If that process dies here too, the fault is PyTorch's own.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

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
CONSUMER = """
import sys, torch
step = torch._inductor.aoti_load_package(sys.argv[1])
x = torch.linspace(-1, 1, 96, device=sys.argv[3]).reshape(2, 3, 4, 4)
k = torch.tensor([3], device=sys.argv[3])
torch.save(step(x, k).detach().cpu(), sys.argv[2])
"""


class Step(nn.Module):
    """A step of a sampler: a network, and a row of a table that a number on the device chooses."""

    rows: Tensor

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.network = nn.Conv2d(3, 3, 3, padding=1)
        self.register_buffer("rows", torch.linspace(0.1, 1, 30).reshape(10, 3))

    def forward(self, x: Tensor, k: Tensor) -> Tensor:
        from_x, from_pred, noise = self.rows[k][0]
        return from_x * x + from_pred * self.network(x) + noise * torch.cos(x)


def main(device: str) -> None:
    """Raises RuntimeError that says in which process the fault was."""
    step = Step().eval().to(device)
    x, k = torch.linspace(-1, 1, 96, device=device).reshape(SHAPE), torch.tensor([3], device=device)
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        program = torch.export.export(step, (x, k), dynamic_shapes=({0: torch.export.Dim.DYNAMIC}, None))
        path = str(Path(folder) / "package.pt2")
        package = torch._inductor.aoti_compile_and_package(program, package_path=path, inductor_configs=QUICKLY)
        out = Path(folder) / "out.pt"
        command = [sys.executable, "-c", CONSUMER, str(package), str(out), device]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(f"the loading process ended with {done.returncode}: {done.stderr.strip()[-500:]}")
        torch.testing.assert_close(torch.load(out), step(x, k).cpu(), rtol=1e-4, atol=1e-4)


if __name__ == "__main__":
    main(sys.argv[1])

"""How long each op holds up the program: microseconds on the host, beside the eager PyTorch that it replaces.

    python benchmarks/host_time.py [--json FILE]

On a GPU both launch their kernels. Elsewhere a driver that does nothing (host_driver.c, built by gcc) lets Triton
compile for an H100 and launch; the tensors lie on the CPU. Then eager PyTorch pays for no launch at all, but computes.
The tensors are small, so that the host decides.
"""

import argparse
import gc
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F
from torch import Tensor

import fastdiff
from benchmarks.without_gpu import without_gpu
from fastdiff import ops, reference
from fastdiff.files import writable, write_json
from fastdiff.rows import WIDTH

CALLS, ROUNDS = 50, 200  # calls of a round; rounds, of which the second fastest counts
BATCH, IMAGE, CHANNELS, GROUPS, LEVELS = 4, (3, 8, 8), 32, 8, 1000
Case = tuple[Callable[[], Any], Callable[[], Any]]  # ours, and what it replaces


# --- the calls --------------------------------------------------------------------------------------------------


def cases(device: str) -> dict[str, Case]:
    """The ops and their eager twins, by name."""
    torch.manual_seed(0)
    x0, noise, pred, raw = (torch.randn(BATCH, *IMAGE, device=device) for _ in range(4))
    t = torch.randint(1, LEVELS, (BATCH,), device=device)
    seed = torch.ones(1, dtype=torch.int64, device=device)
    levels, targets, terms, rows = (torch.rand(LEVELS, n, device=device) for n in (2, 3, 6, WIDTH))
    alphas, sigmas = (column.contiguous() for column in levels.unbind(1))
    step = torch.full((1,), LEVELS // 2, device=device)
    wanted = pred.clone().requires_grad_()

    def eager_noising() -> Tensor:
        alpha, sigma = alphas[t].view(-1, 1, 1, 1), sigmas[t].view(-1, 1, 1, 1)
        return alpha * x0 + sigma * torch.randn_like(x0)

    def eager_update() -> Tensor:
        a, b, c, d, _, f, *_ = rows[LEVELS // 2].unbind()
        return c * (a * x0 + b * pred).clamp(-1, 1) + d * x0 + f * torch.randn_like(x0)

    def eager_combine() -> Tensor:
        a, b, c, d, *_ = rows[LEVELS // 2].unbind()
        return c * (a * x0 + b * pred).clamp(-1, 1) + d * x0

    def eager_gate() -> Tensor:
        hidden, gate = pred.chunk(2, -1)
        return hidden * F.gelu(gate)

    angles = torch.rand(2, IMAGE[0], IMAGE[2], device=device).unbind()

    def eager_rotate() -> Tensor:
        cos, sin = (t[:, None] for t in angles)
        a, b = pred.unflatten(-1, (-1, 2)).unbind(-1)
        return pred * cos + torch.stack([-b, a], -1).flatten(3) * sin

    def both(value: Tensor) -> Tensor:
        return torch.autograd.grad(value, wanted)[0]

    def eager_loss(pred: Tensor) -> Tensor:
        return F.mse_loss(pred.float(), noise.float())

    def loss(pred: Tensor) -> Tensor:
        return ops.loss(pred, t, targets, seed=seed)

    def eager_vlb(pred: Tensor) -> Tensor:
        return reference.vlb(pred, raw, x0, noise, t, terms, 1.0)[0].mean()

    def vlb(pred: Tensor) -> Tensor:
        return ops.vlb(pred, x0, noise, t, terms, raw_variance=raw, clip=1.0, reduction="mean")

    return {
        "normal": (lambda: ops.normal(x0.shape, seed, device=device), lambda: torch.randn(x0.shape, device=device)),
        "noising": (lambda: ops.noising(x0, t, levels, seed=seed), eager_noising),
        "update": (lambda: ops.update(x0, pred, rows, step, seed=seed, clip=1.0), eager_update),
        "combine": (lambda: ops.combine(x0, pred, rows, step, clip=1.0), eager_combine),
        "inner": (lambda: ops.inner(pred, noise), lambda: reference.inner(pred, noise, None, False)),
        "gated_gelu": (lambda: ops.gated_gelu(pred), eager_gate),
        "rotate": (lambda: ops.rotate(pred, angles[0], angles[1]), eager_rotate),
        "loss": (lambda: loss(pred), lambda: eager_loss(pred)),
        "loss, forward and backward": (lambda: both(loss(wanted)), lambda: both(eager_loss(wanted))),
        "vlb": (lambda: vlb(pred), lambda: eager_vlb(pred)),
        "vlb, forward and backward": (lambda: both(vlb(wanted)), lambda: both(eager_vlb(wanted))),
        **norms(device),
        **layer_norms(device),
    }


def norms(device: str) -> dict[str, Case]:
    x, grad = (torch.randn(BATCH, CHANNELS, *IMAGE[1:], device=device) for _ in range(2))
    weight, bias = torch.rand(CHANNELS, device=device), torch.rand(CHANNELS, device=device)
    scale, shift = torch.randn(BATCH, CHANNELS, device=device), torch.randn(BATCH, CHANNELS, device=device)
    plain, scaled = (x, weight, bias), (x, weight, bias, scale, shift)

    def ours(x: Tensor, weight: Tensor, bias: Tensor, *rows: Tensor) -> Tensor:
        return ops.group_norm_silu(x, GROUPS, weight, bias, 1e-5, *rows)

    def eager(x: Tensor, weight: Tensor, bias: Tensor, *rows: Tensor) -> Tensor:
        y = F.group_norm(x, GROUPS, weight, bias, 1e-5)
        if rows:
            y = y * (1 + rows[0][:, :, None, None]) + rows[1][:, :, None, None]
        return F.silu(y)

    def gradients(f: Callable[..., Tensor], leaves: list[Tensor]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(f(*leaves), leaves, grad)

    found: dict[str, Case] = {}
    for name, operands in (("group_norm_silu", plain), ("group_norm_silu, scale and shift", scaled)):
        leaves = [t.clone().requires_grad_() for t in operands]
        calls = [partial(gradients, f, leaves) for f in (ours, eager)]
        found[name] = (partial(ours, *operands), partial(eager, *operands))
        found[f"{name}, forward and backward"] = (calls[0], calls[1])
    return found


def layer_norms(device: str) -> dict[str, Case]:
    """Those of a transformer, without a gradient: they have no kernel for one."""
    x, y = (torch.randn(BATCH, 16, CHANNELS, device=device) for _ in range(2))
    gate, scale, shift = torch.randn(BATCH, 3 * CHANNELS, device=device).chunk(3, 1)
    weight, bias = torch.rand(CHANNELS, device=device), torch.rand(CHANNELS, device=device)

    def eager(x: Tensor) -> Tensor:
        return F.layer_norm(x, (CHANNELS,)) * (1 + scale[:, None]) + shift[:, None]

    def eager_sum() -> tuple[Tensor, Tensor]:
        total = x + gate[:, None] * y
        return total, eager(total)

    return {
        "layer_norm": (lambda: ops.layer_norm(x, weight, bias), lambda: F.layer_norm(x, (CHANNELS,), weight, bias)),
        "layer_norm, scale and shift": (lambda: ops.layer_norm(x, scale=scale, shift=shift), lambda: eager(x)),
        "add_layer_norm": (lambda: ops.add_layer_norm(x, y, gate=gate, scale=scale, shift=shift), eager_sum),
    }


# --- measuring --------------------------------------------------------------------------------------------------


def measure(case: Case, device: str, rounds: int = ROUNDS) -> list[float]:
    """Microseconds a call of each of the two, in turns, so that both meet the same machine."""
    # On the CPU other processes do not count. On a GPU the backward pass runs in a thread of its own.
    clock = time.thread_time if device == "cpu" else time.perf_counter
    taken: list[list[float]] = [[] for _ in case]
    for call in case:
        call()
    gc.disable()
    try:
        for _ in range(rounds):
            for call, times in zip(case, taken, strict=True):
                start = clock()
                for _ in range(CALLS):
                    call()
                times.append((clock() - start) / CALLS * 1e6)
                if device != "cpu":
                    torch.cuda.synchronize()
    finally:
        gc.enable()
    return [sorted(times)[min(1, rounds - 1)] for times in taken]


def launches_of(call: Callable[[], Any]) -> int:
    """The launches of Triton's kernels in one call."""
    from triton import knobs

    seen: list[Any] = []
    call()
    knobs.runtime.launch_enter_hook.add(seen.append)
    try:
        call()
    finally:
        knobs.runtime.launch_enter_hook.remove(seen.append)
    return len(seen)


def table(rows: list[dict[str, Any]]) -> str:
    lines = [f"{'microseconds of the host':44s}{'ours':>8s}{'eager':>8s}{'ratio':>8s}{'launches':>10s}"]
    for r in rows:
        ratio = r["ours_us"] / r["eager_us"]
        lines.append(f"{r['op']:44s}{r['ours_us']:8.1f}{r['eager_us']:8.1f}{ratio:8.2f}{r['launches']:10d}")
    return "\n".join(lines)


def run(rounds: int) -> list[dict[str, Any]]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        if device == "cpu":
            without_gpu(Path(folder))
        rows = []
        with fastdiff.backend("triton"):
            for name, case in cases(device).items():
                ours, eager = measure(case, device, rounds)
                rows.append({"op": name, "ours_us": ours, "eager_us": eager, "launches": launches_of(case[0])})
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows to FILE too")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="(default: %(default)s)")
    args = parser.parse_args()
    if args.json:
        writable(args.json)
    rows = run(args.rounds)
    print(table(rows))
    if args.json:
        write_json(args.json, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())

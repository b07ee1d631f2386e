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
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

import fastdiff
from benchmarks.calls import CALLS, Source
from benchmarks.without_gpu import unchecked, without_gpu
from fastdiff.files import writable, write_json

TIMES, ROUNDS = 50, 200  # calls in a round; rounds, of which the second fastest counts
SHAPE = (4, 16, 8, 8)
Case = tuple[Callable[[], Any], Callable[[], Any]]  # ours, and what it replaces


# --- the calls --------------------------------------------------------------------------------------------------


def cases(device: str) -> dict[str, Case]:
    """The ops and their eager twins, by name; those with kernels for the gradient also with that."""
    found: dict[str, Case] = {}
    for name, make in CALLS.items():
        call = make(Source(SHAPE, device=device))
        if eager := call.eager:
            found[name] = (call.bound(call.op), call.bound(eager))
            if call.backward:
                found[f"{name}, forward and backward"] = (call.with_gradients(call.op), call.with_gradients(eager))
    return found


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
                for _ in range(TIMES):
                    call()
                times.append((clock() - start) / TIMES * 1e6)
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
            unchecked()
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

"""What a training changes in its process while it runs: settings of a GPU, and what signals do."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch


def has_bfloat16(device: torch.device) -> bool:
    """Whether a device is a GPU that computes in bfloat16. Older ones only imitate it."""
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))


@contextmanager
def gpu_settings(device: torch.device) -> Iterator[None]:
    """Settings of the process that training on a GPU wants: TF32 products, and convolutions that are tried out."""
    if device.type != "cuda":
        yield
        return
    benchmark, precision = torch.backends.cudnn.benchmark, None
    with suppress(RuntimeError):  # set by PyTorch's newer names, beside which it does not know these: it stays
        precision = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        if precision is not None:
            torch.set_float32_matmul_precision(precision)
        torch.backends.cudnn.benchmark = benchmark


@contextmanager
def interrupts() -> Iterator[list[int]]:
    """Yield a list that collects SIGINT, SIGTERM, SIGHUP and SIGUSR1, which then do not end the process.

    A SIGHUP that is ignored, as nohup arranges, stays ignored. In a thread, where Python takes no signals, the list
    stays empty.
    """
    caught: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield caught
        return
    numbers = [signal.SIGINT, signal.SIGTERM]
    hangup, user = (getattr(signal, name, None) for name in ("SIGHUP", "SIGUSR1"))  # Windows has none
    if hangup is not None and signal.getsignal(hangup) != signal.SIG_IGN:
        numbers.append(hangup)
    if user is not None:
        numbers.append(user)
    old = {number: signal.signal(number, lambda n, _: caught.append(n)) for number in numbers}
    try:
        yield caught
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)

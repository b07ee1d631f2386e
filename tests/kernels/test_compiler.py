"""What may fail around the compiled kernels for CPU tensors: interrupts, an import that fails, a cache, versions."""

import os
import shutil
import signal
import subprocess
import sys
import threading
import warnings

import forked
import pytest
import torch

import fastdiff
from fastdiff import ops
from fastdiff.ops import dispatch
from fastdiff.ops.dispatch import uninterrupted
from fastdiff.support import versions

# The operation that is compiled soonest.
CALL = """
import torch
from fastdiff import ops
grad = torch.ones(2, 8)
torch.ops.fastdiff.scale_(grad, torch.tensor([3.0]), 0.1)
print(grad.sum().item())
"""
RIGHT = "import fastdiff; fastdiff.backend('reference')\n" + CALL


def run(code: str, cache: object, **more: str) -> subprocess.CompletedProcess[str]:
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("FASTDIFF", "TRITON", "NUMBA"))}
    # With few of the passes of LLVM the code has the same bits and is compiled sooner.
    environment = {**plain, "NUMBA_CACHE_DIR": str(cache), "NUMBA_OPT": "1", **more}
    done = forked.run("-c", code, env=environment)
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def shared_cache(tmp_path_factory):
    return tmp_path_factory.mktemp("numba")


def value(done: subprocess.CompletedProcess[str]) -> float:
    return float(done.stdout.split()[-1])


@pytest.fixture(scope="module")
def compiled(shared_cache):
    """What the compiled kernels give; from here on their code is in the cache."""
    return value(run(CALL, shared_cache))


@pytest.fixture(scope="module")
def plain(shared_cache):
    """What plain PyTorch gives."""
    return value(run(RIGHT, shared_cache))


@pytest.mark.slow
def test_a_damaged_cache_is_one_warning_and_is_mended(tmp_path, shared_cache, compiled):
    shutil.copytree(shared_cache, tmp_path, dirs_exist_ok=True)
    files = list(tmp_path.rglob("*.nb*"))
    assert files
    for k, file in enumerate(files):
        file.write_bytes((b"", file.read_bytes()[:40], b"no pickle")[k % 3])
    damaged = run(CALL, tmp_path)
    assert value(damaged) == compiled
    assert damaged.stderr.count("numba's cache cannot be used") == 1 and str(tmp_path) in damaged.stderr
    mended = run(CALL, tmp_path)
    assert value(mended) == compiled and "numba" not in mended.stderr


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="sets a limit that Linux has")
def test_a_full_disk_is_one_warning(tmp_path, plain):
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))\n"
    full = run(limit + CALL, tmp_path)
    assert full.stderr.count("numba's cache cannot be used") == 1 and "OSError" in full.stderr
    assert value(full) == pytest.approx(plain, rel=1e-5)


@pytest.mark.slow
def test_numba_that_cannot_be_imported_is_one_warning(tmp_path, plain):
    (tmp_path / "numba").mkdir()
    (tmp_path / "numba" / "__init__.py").write_text("raise SystemError('initialization of _internal failed')\n")
    broken = run(CALL + CALL, tmp_path, PYTHONPATH=os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", ".")]))
    assert broken.stderr.count("numba cannot be imported (SystemError: initialization of _internal failed)") == 1
    assert value(broken) == plain


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs a timer that interrupts")
@pytest.mark.parametrize("delay", [0.02, 0.1, 0.3])
def test_an_interrupt_of_the_first_op_leaves_the_process_whole(shared_cache, compiled, delay):
    interrupted = f"""
import signal, torch
from fastdiff import ops
def interrupt(*_): raise KeyboardInterrupt
signal.signal(signal.SIGALRM, interrupt)
signal.setitimer(signal.ITIMER_REAL, {delay})
try: torch.ops.fastdiff.scale_(torch.ones(2, 8), torch.tensor([3.0]), 0.1)
except KeyboardInterrupt: pass
signal.setitimer(signal.ITIMER_REAL, 0)
"""
    assert value(run(interrupted + CALL, shared_cache)) == compiled


def test_uninterrupted_work_ends():
    begun, ended, free = threading.Event(), threading.Event(), threading.Event()

    def work():
        begun.set()
        free.wait(30)
        ended.set()
        return 5

    def interrupt(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGUSR1, interrupt)
    threading.Thread(target=lambda: (begun.wait(30), os.kill(os.getpid(), signal.SIGUSR1))).start()
    try:
        with pytest.raises(KeyboardInterrupt):
            uninterrupted(work)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert not ended.is_set()
    free.set()
    assert ended.wait(30)
    assert uninterrupted(lambda: 7) == 7
    with pytest.raises(ZeroDivisionError):
        uninterrupted(lambda: 1 / 0)


def test_a_launcher_that_cannot_be_imported(monkeypatch):
    def fail(name):
        raise OSError("libllvmlite.so")

    monkeypatch.setattr(dispatch, "launchers", fail)
    dispatch.has_numba.cache_clear()
    try:
        with fastdiff.backend(None), monkeypatch.context() as m:
            m.setattr(dispatch, "interpreting", lambda: False)
            with pytest.warns(UserWarning, match=r"numba cannot be imported \(OSError: libllvmlite\.so\)"):
                first = ops.normal((2, 3), 1, device="cpu")
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                assert torch.equal(ops.normal((2, 3), 1, device="cpu"), first)
    finally:
        dispatch.has_numba.cache_clear()


@pytest.mark.parametrize("package", versions.UNTESTED)
def test_versions_beyond_the_tested_ones_are_named(package):
    major, minor = versions.UNTESTED[package]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for tested in (f"{major}.{minor - 1}.9+cpu", f"{major}.{minor - 1}", f"{major}.0.0", "unknown"):
            versions.warn_if_untested(package, tested)
    for later in (f"{major}.{minor}.0a0+git", f"{major}.{minor + 7}", f"{major + 1}.0.0"):
        with pytest.warns(UserWarning, match=rf"tested with {package} below {major}\.{minor}"):
            versions.warn_if_untested(package, later)

"""The kernels for CPU tensors as guests of a process: threads, forks, caches, and that none of them changes a bit."""

import os
import platform
import re
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import forked
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from llvmlite import binding
from numba import njit
from strategies import WORDS, random_words, salts, table, tensor
from tolerance import NORMAL, assert_close, assert_same_bits
from torch import Tensor

import fastdiff
from fastdiff import ops, reference
from fastdiff.kernels import cpu, cpu_compiled, openmp
from fastdiff.ops import dispatch as _backend
from fastdiff.rows import WIDE

ROOT = Path(__file__).parents[2]
ROWS = 6


@pytest.fixture(autouse=True)
def cpu_backend():
    with fastdiff.backend("cpu"):
        yield


@pytest.fixture
def threads():
    """torch.set_num_threads, undone afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def every_op(seed: int, n: int = 40001) -> tuple[Tensor, ...]:
    """What each op returns for three samples of n elements, enough for several threads."""
    x, t = tensor((3, n), salt=seed).cpu(), torch.tensor([1, 4, 2])
    rows = [table(ROWS, columns, columns).cpu() for columns in (2, 3, 9)]
    pred = ops.noising(x, t, rows[0], seed=seed).requires_grad_()
    value = ops.loss(pred, t, rows[1], x0=x, seed=seed)
    (3 * value).backward()
    hist = x.clone()
    out = ops.update(x, pred.detach(), rows[2], t, seed=seed, clip=1.0, hist=hist, keep="x0hat")
    return pred.detach(), value.detach(), pred.grad, out, hist, ops.normal(x.shape, seed)


# --- the noise, against the oracle --------------------------------------------------------------------------------


@njit
def words_of(block, sample, step, stream, key0, key1, out):
    cpu_compiled.philox(block, sample, step, stream, key0, key1, out[0], out[1], out[2], out[3])


@njit
def normals_of(words, z):
    cpu_compiled.normals_of(words[0], words[1], words[2], words[3], z)


@pytest.mark.slow
@given(salt=salts)
def test_words_are_those_of_the_reference(salt):
    block, sample, step, stream, key0, key1 = (int(w) for w in random_words(salt, 6).cpu())
    out = np.empty((4, 46), np.uint32)
    words_of(*(np.uint32(w) for w in (block, sample, step, stream, key0, key1)), out)
    lanes = [torch.arange(block, block + 46) & 0xFFFFFFFF, *(torch.tensor(w) for w in (sample, step, stream))]
    want = reference.philox4x32(tuple(lanes), (torch.tensor(key0), torch.tensor(key1)))
    assert torch.equal(torch.from_numpy(out.astype(np.int64)), torch.stack(want))


def check_normals(words: Tensor) -> None:
    """words: (blocks, 4)."""
    z = np.empty(words.numel(), np.float32)
    normals_of(words.T.contiguous().numpy().astype(np.uint32), z)
    assert_close(torch.from_numpy(z), reference.box_muller(words, torch.float64).flatten(), NORMAL, roundings=0)


@pytest.mark.slow
@given(salt=salts)
def test_box_muller(salt):
    check_normals(random_words(salt, 128, 4).cpu())


def test_box_muller_of_extreme_words():
    check_normals(torch.cartesian_prod(*[torch.tensor(WORDS)] * 4))


def test_llvm_rounds_as_the_source_says():
    """What it may fuse, it fuses for some processors in the remainder of a loop and not in all of its vectors."""
    check_normals(random_words(0, 8, 4).cpu())
    (code,) = normals_of.inspect_llvm().values()
    assert "fmul" in code and not re.search(r"\b(contract|reassoc|fast)\b", code)


@pytest.mark.slow
@given(salt=salts, clip=st.sampled_from([None, 0.5]), noisy=st.booleans(), keep=st.sampled_from(ops.KEEPS))
def test_noising_and_update_give_the_bits_of_plain_pytorch(salt, clip, noisy, keep):
    """No multiply-add is fused and no zero changes its sign."""
    x, pred, noise, hist = (tensor((2, 70), salt=salt + i, extreme=True).cpu().nan_to_num() for i in range(4))
    rows, steps = table(ROWS, 2, salt).cpu(), table(ROWS, WIDE if keep.endswith("mix") else 9, salt).cpu()
    results = []
    for backend in ("cpu", "reference"):
        past = None if keep == "none" else hist.clone()
        options = {"noise": noise if noisy else None, "noisy": noisy, "hist": past, "keep": keep, "clip": clip}
        with fastdiff.backend(backend):
            results.append((ops.noising(x, 1, rows, noise=noise), ops.update(x, pred, steps, 2, **options), past))
    for got, want in zip(*results, strict=True):
        if got is not None:
            assert_same_bits(torch.where(got.isnan(), 0, got), torch.where(want.isnan(), 0, want))


def test_float16_without_a_processor_that_converts_it(monkeypatch):
    """Such tensors are left to plain PyTorch, and such operands of other tensors are widened first."""
    half, single = torch.randn(2, 5).half(), torch.randn(2, 5)
    rows, steps = table(ROWS, 2, 1).cpu(), table(ROWS, 9, 1).cpu()
    monkeypatch.delitem(cpu.CODES, torch.float16)
    assert _backend.kernels_of(half) is None and _backend.kernels_of(single) is cpu
    for x, noise in ((half, half), (half, None), (single, half)):
        got = ops.noising(x, 1, rows, noise=noise, seed=None if noise is not None else 1)
        step = ops.update(x, half, steps, 2, noise=noise, noisy=noise is not None)
        with fastdiff.backend("reference"):
            want = ops.noising(x, 1, rows, noise=noise, seed=None if noise is not None else 1)
            assert_same_bits(got, want)
            assert_same_bits(step, ops.update(x, half, steps, 2, noise=noise, noisy=noise is not None))


@pytest.mark.slow
@pytest.mark.parametrize("n", [1, 4, 7, cpu_compiled.SHORT, cpu_compiled.SHORT + 1])
@pytest.mark.parametrize("count", [1, 3])
def test_short_samples_have_the_noise_of_samples_alone(n, count, threads):
    """More of them than are drawn together, each of its own number and level, in every op."""
    threads(count)
    batch = 40_000 // n
    ids, t = torch.arange(batch).flip(0), torch.arange(batch) % ROWS
    x, pred = tensor((batch, n), salt=1).cpu(), tensor((batch, n), salt=2).cpu()
    tables = {columns: table(ROWS, columns, columns).cpu() for columns in (2, 3, 9)}
    key: dict[str, Any] = {"seed": 3, "sample_ids": ids}
    for stream in (ops.FORWARD, ops.REVERSE):
        z = ops.normal(x.shape, step=t, stream=stream, **key)
        want = reference.normal(x.shape, torch.tensor([3]), ids, t, stream, torch.float64)
        assert_close(z, want, NORMAL, roundings=0)
        for i in (0, 1, batch // 2, batch - 1):
            one = ops.normal((1, n), 3, sample_ids=ids[i : i + 1], step=t[i : i + 1], stream=stream)
            assert_same_bits(z[i : i + 1], one)
        if stream == ops.FORWARD:
            assert_same_bits(ops.noising(x, t, tables[2], **key), ops.noising(x, t, tables[2], noise=z))
            for wanted in (False, True):
                losses = []
                for noise in (key, {"noise": z}):
                    leaf = pred.clone().requires_grad_(wanted)
                    losses.append([ops.loss(leaf, t, tables[3], x0=x, reduction="none", **noise)])
                    if wanted:
                        losses[-1][0].sum().backward()
                        losses[-1].append(leaf.grad)
                for got, expected in zip(*losses, strict=True):
                    assert_same_bits(got.detach(), expected.detach())
        else:
            got = ops.update(x, pred, tables[9], t, clip=1.0, **key)
            assert_same_bits(got, ops.update(x, pred, tables[9], t, clip=1.0, noise=z))


# --- threads ------------------------------------------------------------------------------------------------------


@pytest.fixture
def team(monkeypatch):
    """The size of the team that a call takes, of those that OpenMP may give it; 1 without one."""

    def size(elements: int) -> int:
        sizes = [1]
        parallel = openmp._parallel()

        def counted(function: int, argument: int, threads: int, flags: int) -> None:
            sizes.append(threads)
            parallel(function, argument, threads, flags)

        with monkeypatch.context() as patched:
            patched.setattr(openmp, "_parallel", lambda: counted)
            ops.normal((1, elements), 1)
        return sizes[-1]

    return size


def test_set_num_threads_is_respected(threads, team):
    for n in (1, 2, 3):
        threads(n)
        assert team(cpu.PARALLEL_FROM) == n


def test_small_tensors_stay_on_one_thread(threads, team):
    threads(4)
    assert team(cpu.PARALLEL_FROM - 1) == 1


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc")
def test_the_team_is_that_of_pytorch():
    """Its threads, none beside them: a kernel adds none to those of PyTorch's loops, and ends none of them."""
    script = (
        "import os, torch\n"
        "from fastdiff import ops\n"
        "threads = lambda: set(os.listdir('/proc/self/task'))\n"
        "ops.normal((1, 10), 1)\n"  # numba compiles, on a thread of its own, which may end at any later moment
        "before = threads()\n"
        "torch.set_num_threads(3)\n"
        "torch.ones(1_000_000).exp()\n"
        "team = threads() - before\n"
        "ops.normal((4, 100_000), 1)\n"
        "print(len(team) > 0, len(threads() - before - team), len(team - threads()))"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=own_variables(), capture_output=True, text=True)
    assert done.stdout.split() == ["True", "0", "0"], done.stderr


def test_without_openmp_a_call_stays_on_its_thread(threads, monkeypatch):
    threads(2)
    want = every_op(1)
    monkeypatch.setattr(openmp, "_parallel", lambda: None)
    assert openmp.team_size() == 1
    for got, expected in zip(every_op(1), want, strict=True):
        assert_same_bits(got, expected)


def test_threads_change_nothing(threads):
    """Neither a block of work is left out nor is one summed in another order."""
    threads(1)
    one = every_op(1)
    threads(4)
    for _ in range(5):
        for a, b in zip(one, every_op(1), strict=True):
            assert_same_bits(a, b)
    want = reference.normal(one[-1].shape, torch.tensor([1]), None, torch.tensor([0]), ops.PRIOR, torch.float64)
    assert_close(one[-1], want, NORMAL)


@given(n=st.integers(1, 3 * cpu_compiled.CHUNK), split=st.integers(1, 7))
def test_elements_do_not_depend_on_the_size(n, split):
    """A chunk that is cut short holds the same noise as a whole one."""
    whole = ops.normal((1, 3 * cpu_compiled.CHUNK), 5)
    assert_same_bits(ops.normal((1, n), 5), whole[:, :n])
    ids = torch.arange(split)
    assert_same_bits(ops.normal((split, n), 5, sample_ids=ids), ops.normal((split, n), 5))
    x, pred, other, raw = (tensor(whole.shape, salt=i).cpu() for i in range(4))
    rows = table(ROWS, 9, 9).cpu()
    cut, want = (
        ops.update(x[:, :m], pred[:, :m], rows, 1, seed=5, uncond=other[:, :m], raw_variance=raw[:, :m])
        for m in (n, whole.shape[1])
    )
    assert_same_bits(cut, want[:, :n])


@pytest.mark.slow
def test_calls_from_many_threads_beside_openmp(threads):
    """Each Python thread has its own operands and PyTorch's own parallel loops in between."""
    threads(2)
    alone = [every_op(seed) for seed in range(4)]
    start = threading.Barrier(8)
    cpu._entry.cache_clear()  # all eight find them missing

    def work(number: int) -> list[tuple[Tensor, ...]]:
        start.wait()
        results = []
        for _ in range(3):
            results.append(every_op(number % 4))
            torch.randn(100_000).sin().sum()
        return results

    with ThreadPoolExecutor(8) as pool:
        for number, results in enumerate(pool.map(work, range(8))):
            for result in results:
                for got, want in zip(result, alone[number % 4], strict=True):
                    assert_same_bits(got, want)


# --- processes ----------------------------------------------------------------------------------------------------


def own_variables() -> dict[str, str]:
    hidden = ("TRITON_INTERPRET", "FASTDIFF_BACKEND", "NUMBA_CACHE_DIR")
    return {k: v for k, v in os.environ.items() if k not in hidden}


def run(script: str, folder: Path = ROOT, **variables: str) -> str:
    """Standard output of a fresh process in the folder."""
    done = forked.run("-c", script, cwd=folder, env=own_variables() | variables)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_runs_on_its_one_thread():
    """The parent's threads do not exist in it: waiting for them would never end."""
    done = run(
        "import os, torch\n"
        "from fastdiff import ops\n"
        "torch.set_num_threads(2)\n"
        "draw = lambda: ops.normal((4, 100_000), 1)\n"
        "want = draw().numpy()\n"
        "same = lambda: bool((draw().numpy() == want).all())\n"  # PyTorch's own comparison would wait
        "child = os.fork()\n"
        "if child == 0:\n"
        "    os._exit(0 if all(same() for _ in range(5)) else 3)\n"
        "print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), same())"
    )
    assert done.split() == ["0", "True"]


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_workers_of_a_data_loader():
    done = run(
        "import torch\n"
        "from fastdiff import ops\n"
        "torch.set_num_threads(2)\n"
        "table = torch.tensor([[0.6, 0.8]])\n"
        "class Noised(torch.utils.data.Dataset):\n"
        "    def __len__(self): return 6\n"
        "    def __getitem__(self, i): return ops.noising(torch.ones(1, 70_000), 0, table, seed=i)[0]\n"
        "alone = torch.stack([Noised()[i] for i in range(6)])\n"
        "loader = torch.utils.data.DataLoader(Noised(), 3, num_workers=2, multiprocessing_context='fork')\n"
        "print(torch.equal(torch.cat(list(loader)), alone))"
    )
    assert done.split() == ["True"]


# Processors without multiply-adds and with vectors of half the registers' width; what the code for them needs.
ELSEWHERE = {"generic": [], "skylake-avx512": ["fma", *(f"avx512{part}" for part in ("f", "bw", "cd", "dq", "vl"))]}


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() != "x86_64", reason="names processors of x86")
@pytest.mark.parametrize("name", ELSEWHERE)
def test_elements_do_not_depend_on_the_size_elsewhere(name, tmp_path):
    """As compiled for other processors."""
    known = binding.get_host_cpu_features()
    if not all(known.get(feature) for feature in ELSEWHERE[name]):
        pytest.skip("this processor lacks instructions of that one")
    done = run(
        "import torch\n"
        "from fastdiff import ops\n"
        "whole = ops.normal((1, 300), 5)\n"
        "print(all(torch.equal(ops.normal((1, n), 5), whole[:, :n]) for n in range(1, 300)))\n"
        "print(*whole[0].tolist())",
        NUMBA_CPU_NAME=name, NUMBA_CACHE_DIR=str(tmp_path),
    )  # fmt: skip
    same, *whole = done.split()
    assert same == "True"
    got = torch.tensor([[float(z) for z in whole]])
    want = reference.normal(got.shape, torch.tensor([5]), None, torch.tensor([0]), ops.PRIOR, torch.float64)
    assert_close(got, want, NORMAL, roundings=0)
    if ELSEWHERE[name] and cpu_compiled.FUSES:
        assert_same_bits(got, ops.normal(got.shape, 5))


# The operation that is compiled soonest.
SCALE = """
import torch
from fastdiff import ops
grad = torch.arange(4.0)[None]
torch.ops.fastdiff.scale_(grad, torch.tensor([3.0]), 0.1)
print(grad[0].tolist())
"""


@pytest.fixture
def installed(tmp_path):
    """A copy of the packages where Python can write no __pycache__; a folder would not stop root."""
    for package in ("fastdiff", "kernels"):
        copied = shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
        (copied / "__pycache__").touch()
    return tmp_path


def cached(folder: Path) -> bool:
    return any("scale_chunks" in path.name for path in folder.rglob("*.nbi"))


@pytest.mark.slow
def test_a_folder_that_cannot_be_written_to(installed, tmp_path):
    want = str((torch.arange(4.0) * (torch.tensor(3.0) * 0.1)).tolist())
    nowhere = installed / "file"
    nowhere.touch()
    sooner = {"NUMBA_OPT": "1"}  # few of the passes of LLVM
    assert run(SCALE, installed, HOME=str(nowhere), XDG_CACHE_HOME=str(nowhere), **sooner).strip() == want
    assert not cached(tmp_path)
    user = {"HOME": str(tmp_path / "home"), "XDG_CACHE_HOME": str(tmp_path / "user")}
    assert run(SCALE, installed, **user, **sooner).strip() == want
    assert cached(tmp_path / "user") or cached(tmp_path / "home")


# --- memory -------------------------------------------------------------------------------------------------------


def in_huge_pages(x: Tensor) -> bool:
    """Whether the kernel knows that it should back the middle of x with huge pages."""
    middle, here = x.data_ptr() + x.numel() * x.element_size() // 2, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, _, rest = line.partition(" ")
        if "-" in first and not first.endswith(":"):
            low, high = (int(part, 16) for part in first.split("-"))
            here = low <= middle < high
        elif here and first == "VmFlags:":
            return "hg" in rest.split()
    raise LookupError(f"no mapping at {middle:#x}")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="needs huge pages of Linux")
def test_large_results_come_in_huge_pages():
    x, rows = torch.zeros(40, 2**18), [table(ROWS, n, n).cpu() for n in (2, 3, 9)]
    assert not in_huge_pages(x)
    assert in_huge_pages(ops.noising(x, 1, rows[0], seed=1))
    assert in_huge_pages(ops.update(x, x, rows[2], 1, seed=1))
    pred = torch.zeros_like(x).requires_grad_()
    ops.loss(pred, 1, rows[1], seed=1).backward()
    assert in_huge_pages(pred.grad)
    assert in_huge_pages(ops.normal(x.shape, 1))


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of the GNU C library")
def test_freed_memory_is_kept_for_the_next_tensors():
    """They fault in the first rounds, not in every one."""
    done = run(
        "import resource, torch\n"
        "from fastdiff import ops\n"
        "ops.normal((1, 4), 1)\n"
        "def faults():\n"
        "    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "    kept = [torch.zeros(2**21) for _ in range(3)]\n"
        "    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before\n"
        "rounds = [faults() for _ in range(10)]\n"
        "print(rounds[0], rounds[-1])"
    )
    first, last = map(int, done.split())
    assert first > 1000 and last < 100

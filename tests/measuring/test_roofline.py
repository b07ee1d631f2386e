"""The compiled kernels: budgets of bytes and instructions, what the code must and must not contain, exact addresses.

One run of `benchmarks/static_roofline.py` compiles the common launches for GPUs that need not be here. Every test reads
its rows and its dump. It is another process because this one has Triton's interpreter in the place of its compiler.
"""

import itertools
import json
import os
import re
import runpy
from pathlib import Path
from types import SimpleNamespace

import forked
import pytest
import torch
import triton
from fastdiff.kernels.launch import on_nvidia
from PIL import Image

from benchmarks import pictures
from benchmarks.static import roofline
from benchmarks.static.variants import COMMON, MORE, TENSORS

pytestmark = pytest.mark.slow  # all wait for one compilation of everything
SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "static_roofline.py"
SIZE = {"float32": 4, "bfloat16": 2, "float16": 2}


@pytest.fixture(scope="session")
def dump(tmp_path_factory):
    return tmp_path_factory.mktemp("roofline")


@pytest.fixture(scope="session")
def run(dump):
    environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "FASTDIFF_BACKEND")}
    done = forked.run(SCRIPT, "--size", "quick", "--json", dump / "rows.json", "--dump", dump, env=environment)
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="session")
def all_rows(run, dump):
    return json.loads((dump / "rows.json").read_text())


@pytest.fixture(scope="session")
def rows(all_rows):
    """Those of the library."""
    return [r for r in all_rows if r["source"] != "inductor"]


def chosen(rows, **what):
    found = [r for r in rows if all(r[key] == value for key, value in what.items())]
    assert found, f"no row has {what}"
    return found


def shown(rows):
    return "\n" + roofline.table(rows)


# --- budgets ----------------------------------------------------------------------------------------------------

# Instructions per element on sm_90: kernel, options, noise: float32, bfloat16.
BUDGETS = {
    ("noising", "plain", "generated"): (26, 29),
    ("update", "plain", "generated"): (36, 36),
    ("update", "clip", "generated"): (36, 36),
    ("loss", "plain", "generated"): (36, 36),
    ("loss", "grad", "generated"): (36, 36),
    ("noising", "plain", "given"): (14, 14),
    ("loss", "plain", "given"): (14, 14),
    ("loss", "grad", "given"): (14, 14),
    ("update", "plain", "given"): (14, 14),
    ("update", "clip", "given"): (14, 14),
    # Terms of the bound: the branch of the decoder, which one level takes, is beside the way counted here.
    ("vlb", "clip", "none"): (24, 25),
    ("vlb", "clip+raw", "none"): (44, 46),
    ("vlb", "raw+by_raw", "none"): (48, 50),
    ("vlb", "raw+by_pred+by_raw", "none"): (52, 54),
    ("inner", "plain", "none"): (12, 13),
    ("inner", "guidance+centred", "none"): (23, 23),
    ("gated_gelu", "plain", "none"): (40, 39),
    ("layer_norm", "add+gate+scale", "none"): (16, 20),
    ("rotate", "plain", "none"): (17, 19),
    # A large image, whose groups are read twice, takes moments and norm_sums besides (the full table).
    ("norm", "plain", "none"): (21, 14),
    ("norm", "channels_last", "none"): (21, 15),
    ("norm", "scale", "none"): (21, 14),
    ("norm", "concat", "none"): (22, 15),
    ("norm", "concat+channels_last", "none"): (24, 17),
    ("norm", "concat+skip", "none"): (24, 16),
    ("norm", "concat+skip+channels_last", "none"): (26, 18),
    ("norm", "64x64", "none"): (21, 14),
    ("norm", "64x64+channels_last", "none"): (21, 15),
    ("norm", "128x128", "none"): (26, 14),
    ("norm", "128x128+channels_last", "none"): (28, 16),
    ("norm", "scale+add+channels_last", "none"): (22, 16),
    ("norm_grad", "plain", "none"): (32, 21),
    ("norm_grad", "channels_last", "none"): (32, 24),
    ("norm_grad", "scale", "none"): (32, 21),
    ("norm_grad", "concat", "none"): (48, 25),
    ("norm_grad", "concat+channels_last", "none"): (32, 24),
    ("norm_grad", "concat+skip", "none"): (41, 26),
    ("norm_grad", "concat+skip+channels_last", "none"): (34, 26),
    ("norm_grad", "64x64", "none"): (34, 22),
    ("norm_grad", "64x64+channels_last", "none"): (32, 25),
    ("norm_grad", "128x128", "none"): (32, 21),
    ("norm_grad", "128x128+channels_last", "none"): (34, 24),
    ("norm_grad", "scale+add+channels_last", "none"): (36, 27),
}
# Triton 3.8 needs one more instruction to sum an element of a block. Memory stays the limit: while it moves a byte, an
# H100 issues 9.2 instructions, so 8 x 9.2 = 74 in float32 and half of that in bfloat16.
if tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 8):
    BUDGETS["inner", "plain", "none"] = (13, 14)


@pytest.mark.parametrize(("kernel", "variant", "noise"), BUDGETS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_instructions(rows, kernel, variant, noise, dtype):
    what = {"kernel": kernel, "variant": variant, "noise": noise, "dtype": dtype, "target": "sm_90"}
    found = chosen(rows, source="fastdiff", **what)
    budget = BUDGETS[kernel, variant, noise][dtype == "bfloat16"]
    assert all(r["instructions_per_element"] <= budget for r in found), f"budget {budget}" + shown(found)


def test_every_kernel_of_elements_has_a_budget():
    assert {kernel for kernel, *_ in BUDGETS} == {kernel for kernel, *_ in COMMON} - {"normal", "reduce", "scale"}


@pytest.mark.parametrize(("dtype", "budget"), [("float32", 42), ("bfloat16", 45)])
def test_instructions_of_the_polynomials(rows, dtype, budget):
    found = chosen(rows, source="fastdiff polynomials", kernel="noising", dtype=dtype, target="sm_90")
    assert all(r["instructions_per_element"] <= budget for r in found), f"budget {budget}" + shown(found)


NORMS = ("norm", "norm_grad")


def minimum_bytes(row):
    """What has to be read and written at least: the tensors, once each."""
    tensors = TENSORS[row["kernel"]] + (row["noise"] == "given") + len(MORE & set(row["variant"].split("+")))
    return tensors * SIZE[row["dtype"]]


def test_bytes_are_the_fewest(rows):
    wrong = [r for r in rows if r["bytes_per_element"] != minimum_bytes(r)]
    assert not wrong, shown(wrong)


def test_a_norm_that_fits_a_program_reads_its_maps_once(rows):
    norms = [r for r in rows if r["kernel"] in NORMS]
    assert {r["fits"] for r in norms} == {"yes", "no"}
    wrong = [r for r in norms if r["reads"] not in ((1,) if r["fits"] == "yes" else (1, 2))]
    assert not wrong, shown(wrong)


def test_accesses_are_128_bits_wide(rows):
    wrong = [r for r in rows if not {r["load_bits"], r["store_bits"]} <= {128, None}]
    wrong += [r for r in rows if r["load_bits"] is None and r["kernel"] != "normal"]
    wrong += [r for r in rows if r["store_bits"] is None and r["kernel"] in ("normal", "noising", "update", "scale")]
    assert not wrong, shown(wrong)


def test_nothing_spills(rows):
    wrong = [r for r in rows if r["spills"] or r["stack"]]
    assert not wrong, shown(wrong)


def test_elementwise_kernels_have_no_barrier(rows):
    others = ("loss", "reduce", "vlb", "inner", "layer_norm", *NORMS)
    wrong = [r for r in rows if r["kernel"] not in others and (r["barriers"] or r["shared"])]
    assert not wrong, shown(wrong)


def test_sixteen_elements_a_thread_where_noise_is_drawn(rows):
    found = chosen(rows, target="sm_90", noise="generated")
    assert all(r["elements_per_thread"] == 16 for r in found), shown(found)


# The H100's multiprocessors issue 9.2 instructions in the time that its memory takes for a byte: what moves two bytes
# an element and draws noise cannot keep up with it.
BELOW = {("loss", "plain", "bfloat16", "generated"): 0.60, ("normal", "plain", "bfloat16", "generated"): 0.80}


def test_predicted_roofline_of_the_h100(rows):
    def bound(r):
        return BELOW.get((r["kernel"], r["variant"], r["dtype"], r["noise"]), 0.95)

    found = chosen(rows, source="fastdiff", target="sm_90")
    wrong = [r for r in found if r["predicted_roofline"]["H100"] < bound(r)]
    assert not wrong, shown(wrong)


# --- what the code contains -------------------------------------------------------------------------------------


def test_every_kernel_for_every_target(rows):
    kernels = {kernel for kernel, *_ in COMMON}
    for target in ("sm_80", "sm_90", "sm_100", "gfx942"):
        assert {r["kernel"] for r in chosen(rows, source="fastdiff", target=target)} == kernels


def test_philox_is_where_noise_is_drawn_and_nowhere_else(rows):
    """Ten rounds of two multiplications serve four elements; the first few are the same for all of a program."""
    wrong = [r for r in rows if r["philox"] != (r["noise"] == "generated")]
    wrong += [r for r in rows if r["philox"] and not 4 <= r["integer_multiply_per_element"] <= 8]
    assert not wrong, shown(wrong)


def test_approximations_on_nvidia_alone(rows):
    """log2, sin, cos and sqrt of half an element each; the polynomials leave a square root for two elements."""
    for r in chosen(rows, noise="generated"):
        fast = r["source"] == "fastdiff" and r["target"] != "gfx942"
        assert r["mufu_per_element"] == (2.0 if fast else 0.5), shown([r])


def test_the_norm_takes_an_approximate_sigmoid_for_16_bit_types_on_nvidia_alone(rows, dump):
    for r in (r for r in rows if r["kernel"] in NORMS and r["target"] != "gfx942"):
        names = [r[key] for key in ("source", "kernel", "variant", "target", "dtype", "noise")]
        ptx = (dump / (re.sub(r"\W+", "-", "-".join(names)) + ".ptx")).read_text()
        assert ("rcp.approx.ftz.f32" in ptx) == (r["dtype"] != "float32"), shown([r])


@pytest.mark.parametrize(("cuda", "hip", "fast"), [(True, None, True), (True, "6.4", False), (False, None, False)])
def test_launchers_take_approximations_on_nvidia_alone(monkeypatch, cuda, hip, fast):
    monkeypatch.setattr(torch.version, "hip", hip)
    assert on_nvidia(SimpleNamespace(is_cuda=cuda)) is fast


STEPS = """
import torch
from benchmarks.static import machine_code, roofline
from fastdiff.kernels.layer_norm import layer_norm
from fastdiff.kernels.loss import loss
from fastdiff.kernels.noising import noising
from fastdiff.kernels.rotate import rotate
from fastdiff.kernels.update import update

NONE = dict.fromkeys(("total", "y", "weight", "bias", "gate"))

with machine_code.compile_only(machine_code.target_of("sm_90")) as compiled:
    for batch, rows, k in ((1, 50, 0), (2, 50, 1), (16, 64, 2), (3, 1, 0)):
        x = torch.empty(batch, 3, 64, 64)
        index = torch.arange(rows)[k : k + 1]  # 16-byte aligned or not
        seed, table = torch.zeros(2, dtype=torch.int64)[k % 2 :][:1], torch.zeros(rows + 1, 9)[1:]
        noising(x, x, index, table[:, :2], seed, None, None, 1)
        loss(torch.empty(1), x, x, x, index, table[:, :3], seed, None, None, None, 1, "mse", 1.0, 0.5, 0.5)
        update(x, x, x, table, index, seed, None, None, None, None, None, 1.0, "none", 2)
        heads, row, angles = torch.empty(batch, 16 + rows, 2, 32), torch.empty(batch, 64), torch.empty(16 + rows, 32)
        layer_norm(out=heads, x=heads.flatten(2), scale=row, shift=row, eps=1e-5, **NONE)
        rotate(heads, heads, angles, angles, None, 1e-6)
launched = [k for k, _ in compiled if k.metadata.name != "reduce_kernel"]  # whose work is the number of samples
print(len({k.hash for k in launched}), len(launched))
"""


def test_a_kernel_is_compiled_once_for_all_steps_batches_tokens_and_tables():
    """Else it would be in the middle of a sampling loop, or of the capture of a CUDA graph."""
    environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "FASTDIFF_BACKEND")}
    done = forked.run("-c", STEPS, env=environment)
    assert done.stdout.split() == ["5", "20"], done.stdout + done.stderr


def test_the_generators_in_their_order():
    """benchmarks/noise_cost.py: one Philox block for one element, for four, by polynomials, by the approximations."""
    environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "FASTDIFF_BACKEND")}
    script = SCRIPT.with_name("noise_cost.py")
    done = forked.run(script, env=environment)
    lines = [line.strip("|").split("|") for line in done.stdout.splitlines()[2:]]
    assert [line[0].strip() for line in lines] == [
        "tl.randn", "tl.randn4x and tl.join", "fastdiff polynomials", "fastdiff"
    ], done.stderr  # fmt: skip
    for column in range(2):
        costs = [float(line[1].split("/")[column]) for line in lines]
        assert all(a > 1.3 * b for a, b in itertools.pairwise(costs)), done.stdout
        assert costs[0] > 4 * costs[3], done.stdout


# --- addresses --------------------------------------------------------------------------------------------------


def wrapped(value, bits):
    """Two's complement."""
    return (value + (1 << (bits - 1))) % (1 << bits) - (1 << (bits - 1))


class Addresses:
    """Offsets in elements, by name of the pointer argument, of the tensor accesses of a kernel in Triton's IR.

    The integer arithmetic is evaluated for one program as a machine would, wrapping at the width of its type.
    """

    def __init__(self, ttir, program, **arguments):
        self.values = {f"%{name}": value for name, value in arguments.items()}
        self.program = program
        self.accesses = []
        for line in ttir.splitlines():
            self.evaluate(line.split(" loc(")[0].strip())

    def evaluate(self, line):
        if access := re.match(r"(?:(%\S+) = )?tt\.(?:load|store) (%\w+).*: tensor<", line):
            self.accesses.append(self.values[access[2]])
        if not (operation := re.match(r"(%\S+) = ([\w.]+) (.*)", line)):
            return
        name, kind, rest = operation.groups()
        width = re.search(r"i(\d+)>?$", rest)
        operands = [self.values.get(o) for o in re.findall(r"%[\w-]+", rest)]
        if kind == "arith.constant" and (number := re.match(r"(-?\d+) : i\d+$", rest)):
            self.values[name] = int(number[1])
        elif kind == "tt.get_program_id":
            self.values[name] = self.program["xyz".index(rest[0])]
        elif kind == "tt.make_range":
            self.values[name] = range(*(int(re.search(rf"{end} = (\d+)", rest)[1]) for end in ("start", "end")))
        elif kind in ("arith.extsi", "tt.splat"):
            self.values[name] = operands[0]
        elif kind in ("arith.muli", "arith.addi") and all(type(o) is int for o in operands):
            exact = operands[0] * operands[1] if kind == "arith.muli" else sum(operands)
            self.values[name] = wrapped(exact, int(width[1]))
        elif kind == "tt.addptr":
            base, offset = re.findall(r"%[\w-]+", rest)
            pointer = self.values.get(base) or (base, 0)
            amount = self.values.get(offset)
            if type(amount) is int and len(pointer) == 2:
                self.values[name] = (pointer[0], pointer[1] + amount)
            elif type(amount) is range and len(pointer) == 2:
                self.values[name] = (*pointer, amount)


@pytest.mark.parametrize("kernel", ["normal", "noising", "loss", "scale", "update", "vlb", "inner"])
@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_addresses_are_exact_beyond_32_bits(rows, dump, kernel, target):
    """Sample 70,000 of 2^30 - 16 elements lies at 7.5e13: its element of block i is element i BLOCK + lane of it."""
    row = next(r for r in chosen(rows, kernel=kernel, target=target) if r["noise"] != "given")
    names = [row[key] for key in ("source", "kernel", "variant", "target", "dtype", "noise")]
    ttir = (dump / (re.sub(r"\W+", "-", "-".join(names)) + ".ttir")).read_text()
    n, block, sample, stride = 2**30 - 16, 200_001, 70_000, 2**31 - 16
    program = (block, sample % 32768, sample // 32768)
    accesses = Addresses(ttir, program, size=n, batch=sample + 1, pred_stride=stride, sample_stride=stride).accesses
    assert len(accesses) >= {"noising": 2, "scale": 2, "update": 3, "vlb": 3, "inner": 2}.get(kernel, 1)
    for name, start, lanes in accesses:
        size = len(lanes)
        assert lanes == range(size)
        sliced = (name in ("%pred_ptr", "%raw_ptr") and kernel in ("update", "vlb")) or kernel == "inner"
        assert start == sample * (stride if sliced else n) + block * size


# --- the tool ---------------------------------------------------------------------------------------------------


def test_rows_have_the_promised_keys(all_rows):
    keys = "source kernel target dtype noise bytes_per_element instructions_per_element registers spills load_bits"
    for r in all_rows:
        assert set(keys.split()) | {"store_bits", "barriers", "predicted_roofline"} <= r.keys()
        assert list(r["predicted_roofline"]) == ["A100", "H100", "B200"]
        assert 0 < r["registers"] <= (512 if r["target"] == "gfx942" else 255) and 0 < r["occupancy"] <= 1


def test_the_table_is_printed(run, all_rows):
    lines = run.stdout.splitlines()
    assert sum(line.startswith(("fastdiff", "inductor")) for line in lines) == len(all_rows)
    assert any("predicted" in line for line in lines) and any("3.35 TB/s" in line for line in lines)


def test_dump_has_every_stage(all_rows, dump):
    for r in all_rows:
        binary = "hsaco" if r["target"] == "gfx942" else "cubin"
        names = [r[key] for key in ("source", "kernel", "variant", "target", "dtype", "noise")]
        for ending in ("ttir", "ttgir", "llir", "amdgcn" if binary == "hsaco" else "ptx", binary, "s"):
            assert (dump / (re.sub(r"\W+", "-", "-".join(names)) + f".{ending}")).stat().st_size > 0


def test_prediction_is_the_larger_of_two_times():
    """8 bytes at 3.35 TB/s are 2.39 ps; 132 multiprocessors at 1.83 GHz issue 30.9 instructions a picosecond."""
    assert roofline.predicted(8, 25)["H100"] == 1.0
    assert roofline.predicted(8, 100)["H100"] == pytest.approx(0.738, abs=1e-3)
    assert roofline.predicted(2, 30.9)["A100"] == pytest.approx(0.619, abs=1e-3)
    assert roofline.predicted(2, 30.9)["B200"] == pytest.approx(0.284, abs=1e-3)


def test_plot(all_rows, tmp_path):
    """A bar for each common kernel on sm_90 and for each of torch.compile's."""
    bars = roofline.bars(all_rows)
    own = [r for r in chosen(all_rows, target="sm_90") if r["source"] != "inductor"]
    theirs = [r for r in all_rows if r["source"] == "inductor"]
    assert len(bars) == len(own) + len(theirs)
    assert bars[0] == ("fastdiff", "normal plain, float32, noise generated", own[0]["predicted_roofline"]["H100"])
    path = tmp_path / "roofline.png"
    pictures.save(pictures.roofline(bars), path)
    with Image.open(path) as image:
        colours = {colour for _, colour in image.convert("RGB").getcolors(1 << 20)}
    assert {(255, 255, 255), (0x34, 0x65, 0xA4)} <= colours


@pytest.fixture
def script():
    """benchmarks/static_roofline.py as a module."""
    return runpy.run_path(str(SCRIPT))


def test_unknown_options_are_refused(capsys, script):
    with pytest.raises(SystemExit):
        script["main"](["--static"])
    assert "unrecognized arguments: --static" in capsys.readouterr().err


@pytest.mark.parametrize("key", ["stack", "spills"])
def test_a_kernel_that_spills_fails_the_full_table(monkeypatch, capsys, all_rows, rows, key):
    worse = [r | {key: 4} if r is rows[0] else r for r in all_rows]
    monkeypatch.setattr(roofline, "all_rows", lambda size, dump: worse)
    with pytest.raises(RuntimeError, match="1 kernels spill"):
        roofline.main(SimpleNamespace(size="full", json=None, dump=None, plot=None))
    assert roofline.table(worse) in capsys.readouterr().out


def test_the_interpreter_is_refused(capsys, monkeypatch, script):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert script["main"](["--size", "quick"]) == 1
    assert capsys.readouterr().err.startswith("benchmarks: error: TRITON_INTERPRET")


def test_torch_compile_stands_in_the_same_table(run, all_rows, rows):
    """Its noising and update are one kernel each that moves what ours does, in twice the instructions and more."""
    theirs = [r for r in all_rows if r["source"] == "inductor"]
    if not theirs and not torch.__version__.startswith(("2.13", "2.14")):
        assert f"torch {torch.__version__}: no rows of torch.compile" in run.stderr
        return
    for dtype in ("float32", "bfloat16"):
        for kernel, variant in (("noising", "plain"), ("update", "clip")):
            what = {"kernel": kernel, "variant": variant, "dtype": dtype, "noise": "generated", "target": "sm_90"}
            (other,), (own,) = chosen(theirs, **what), chosen(rows, source="fastdiff", **what)
            assert other["philox"] and other["bytes_per_element"] == own["bytes_per_element"], shown([own, other])
            assert other["instructions_per_element"] > 2 * own["instructions_per_element"], shown([own, other])
    assert {r["kernel"] for r in theirs} == {"noising", "loss", "update"}

"""out=: the result of a call without it, in the tensor that is given, and nothing of its size allocated beside it."""

import pytest
import torch
from strategies import BACKENDS, DEVICE
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import fastdiff
from fastdiff import DDPM, NCSN, Edm, FlowMatching, ScoreSDE, ops

SHAPE = (2, 3, 4, 6)
T = torch.tensor([1, 3])


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.full((), 0.3))

    def forward(self, x: Tensor, t: Tensor, bias: Tensor | float = 0.0) -> Tensor:
        return self.weight * x + bias


def data(k: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(k)).to(DEVICE, dtype)


def rows(columns: int) -> Tensor:
    return torch.linspace(-1, 1, 5 * columns, device=DEVICE).reshape(5, columns)


X, PRED = data(0), data(1)
OPS = {
    "normal": lambda **out: ops.normal(SHAPE, 7, device=DEVICE, **out),
    "noising": lambda **out: ops.noising(X, T.to(DEVICE), rows(2), seed=3, **out),
    "noising_given": lambda **out: ops.noising(X, 2, rows(2), noise=PRED, **out),
    "update": lambda **out: ops.update(X, PRED, rows(9), 2, seed=3, clip=1.0, **out),
    "update_hist": lambda **out: ops.update(X, PRED, rows(9), 2, seed=3, hist=PRED.clone(), keep="x0hat", **out),
}


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", OPS)
def test_ops(name, backend, layout):
    with fastdiff.backend(backend):
        out = torch.full(SHAPE, torch.nan, device=DEVICE).contiguous(memory_format=layout)
        assert OPS[name](out=out) is out
        assert torch.equal(out, OPS[name]())
        assert out.is_contiguous(memory_format=layout)


def test_types_of_out():
    out = torch.empty(SHAPE, dtype=torch.bfloat16)
    assert torch.equal(ops.normal(SHAPE, 7, out=out), ops.normal(SHAPE, 7, dtype=torch.bfloat16))
    x = X.cpu().bfloat16()
    assert torch.equal(ops.noising(x, 2, rows(2).cpu(), seed=1, out=out), ops.noising(x, 2, rows(2).cpu(), seed=1))


class Sizes(TorchDispatchMode):
    """Storages of the size of the data that are made inside."""

    def __init__(self):
        super().__init__()
        self.made = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        given = {a.untyped_storage().data_ptr() for a in args if isinstance(a, Tensor)}
        for t in made if isinstance(made, tuple | list) else (made,):
            if isinstance(t, Tensor) and t.numel() >= X.numel() and t.untyped_storage().data_ptr() not in given:
                self.made.add(t.untyped_storage().data_ptr())
        return made


@pytest.mark.parametrize("name", [name for name in OPS if name != "update_hist"])
def test_nothing_of_the_size_of_the_data_is_made(name):
    call, out = OPS[name], torch.empty(SHAPE, device=DEVICE)
    with fastdiff.backend("triton"):
        call(out=out)
        with Sizes() as sizes:
            call(out=out)
        assert not sizes.made
        with Sizes() as sizes:
            call()
        assert len(sizes.made) == 1


MODELS = {
    "ddpm": (lambda: DDPM(Net(), "cosine", 8, "v"), 5),
    "ncsn": (lambda: NCSN(Net(), levels=8), 5),
    "vp": (lambda: ScoreSDE(Net(), "vp", "v"), 0.5),
    "flow": (lambda: FlowMatching(Net()), 0.5),
    "edm": (lambda: Edm(Net()), 0.5),
}
CALLS = {
    "q_sample": lambda m, t, **out: m.q_sample(data(0).cpu(), t, seed=1, **out),
    "predict": lambda m, t, **out: m.predict(data(0).cpu(), t, "score", **out),
    "predict_x0": lambda m, t, **out: m.predict_x0(data(0).cpu(), t, **out),
    "sample": lambda m, t, **out: m.sample(SHAPE, sampler="ddpm", steps=4, seed=1, **out),
    "sample_from": lambda m, t, **out: m.sample(SHAPE, sampler="dpm++2m", steps=4, x_T=data(3).cpu(), **out),
    "q_step": lambda m, t, **out: m.q_step(data(0).cpu(), t, seed=1, **out),
    "p_sample": lambda m, t, **out: m.p_sample(data(0).cpu(), t, seed=1, **out),
    "encode": lambda m, t, **out: m.encode(data(0).cpu(), steps=4, **out),
    "ode": lambda m, t, **out: m.sample(SHAPE, sampler="ode", seed=1, **out),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("model", MODELS)
def test_modules(model, call):
    make, t = MODELS[model]
    m = make()
    if call in ("q_step", "p_sample") and not hasattr(m, call):
        return
    if call == "encode" and model == "ncsn":  # the score says nothing of the noise in data
        return
    out = torch.full(SHAPE, torch.nan)
    with torch.no_grad():
        assert CALLS[call](m, t, out=out) is out
        assert torch.equal(out, CALLS[call](m, t)) and not out.isnan().any()


# Each takes a tensor that overlaps `out`.
SHARED = {
    "q_sample": lambda m, t, x, out: m.q_sample(x, t, seed=1, out=out),
    "q_sample noise": lambda m, t, x, out: m.q_sample(data(0).cpu(), t, noise=x, out=out),
    "predict": lambda m, t, x, out: m.predict(x, t, "score", out=out),
    "predict_x0": lambda m, t, x, out: m.predict_x0(x, t, out=out),
    "sample x_T": lambda m, t, x, out: m.sample(SHAPE, steps=4, seed=1, x_T=x, out=out),
    "sample noise": lambda m, t, x, out: m.sample(SHAPE, sampler="ddpm", steps=1, noise=x[None], out=out),
    "sample kwarg": lambda m, t, x, out: m.sample(SHAPE, sampler="ddpm", steps=4, bias=x, out=out),
    "sample uncond": lambda m, t, x, out: m.sample(
        SHAPE, sampler="ddpm", steps=4, guidance=2.0, bias=data(5).cpu(), uncond={"bias": x}, out=out
    ),
    "ode": lambda m, t, x, out: m.sample(SHAPE, sampler="ode", x_T=x, out=out),
    "q_step": lambda m, t, x, out: m.q_step(x, t, seed=1, out=out),
    "p_sample": lambda m, t, x, out: m.p_sample(x, t, seed=1, out=out),
    "p_sample noise": lambda m, t, x, out: m.p_sample(data(0).cpu(), t, noise=x, out=out),
    "encode": lambda m, t, x, out: m.encode(x, steps=4, out=out),
    "encode kwarg": lambda m, t, x, out: m.encode(data(0).cpu(), steps=4, bias=x, out=out),
}
# What may be `out` itself: it is read before the same element is written.
ITSELF = ("sample x_T", "ode", "encode")


@pytest.mark.parametrize("call", SHARED)
@pytest.mark.parametrize("model", MODELS)
def test_out_shares_no_memory_with_what_a_method_reads(model, call):
    make, t = MODELS[model]
    m = make()
    if not hasattr(m, call.split()[0]) and call != "ode":
        return
    if call.startswith("encode") and model == "ncsn":  # the score says nothing of the noise in data
        return
    size, memory = X.numel(), torch.randn(2 * X.numel(), generator=torch.Generator().manual_seed(1))
    for first, second in ((0, 7), (7, 0)):
        x, out = (memory[at : at + size].view(SHAPE) for at in (first, second))
        before = memory.clone()
        with torch.no_grad(), pytest.raises(ValueError, match=r"out: expected memory that .+ does not use"):
            SHARED[call](m, t, x, out)
        assert torch.equal(memory, before)
    if call in ITSELF:
        x = memory[:size].view(SHAPE)
        want = SHARED[call](m, t, x.clone(), torch.empty(SHAPE))
        torch.testing.assert_close(SHARED[call](m, t, x, x), want, rtol=0, atol=0)


WRONG = [
    ({"out": torch.empty(2, 3, 4)}, ValueError, r"out: expected shape \(2, 3, 4, 6\)"),
    ({"out": torch.empty(SHAPE, dtype=torch.int64)}, TypeError, "out: expected one of float32"),
    ({"out": torch.empty(SHAPE, device="meta")}, ValueError, "out: expected device"),
    ({"out": torch.empty(SHAPE, dtype=torch.float64)}, TypeError, "out: expected torch.float32, got torch.float64"),
    ({"out": X.cpu()}, ValueError, "out: expected a tensor of its own, got one of the operands"),
    ({"out": torch.empty(SHAPE, requires_grad=True)}, ValueError, "out: expected no gradient"),
    ({"out": [0.0]}, TypeError, "out: expected a tensor, got list"),
]


@pytest.mark.parametrize(("options", "error", "said"), WRONG)
def test_wrong_out(options, error, said):
    x = X.cpu() if options["out"] is not WRONG[4][0]["out"] else options["out"]
    with pytest.raises(error, match=said):
        ops.noising(x, 2, rows(2).cpu(), seed=1, **options)
    with pytest.raises(error, match=said):
        ops.update(x, PRED.cpu(), rows(9).cpu(), 2, seed=1, **options)


def test_out_and_what_it_excludes():
    pred, out = PRED.cpu().clone().requires_grad_(), torch.empty(SHAPE)
    with pytest.raises(ValueError, match="out: expected no gradient"):
        ops.update(X.cpu(), pred, rows(9).cpu(), 2, seed=1, out=out)
    with pytest.raises(ValueError, match="out: expected None with inplace=True"):
        ops.update(X.cpu(), PRED.cpu(), rows(9).cpu(), 2, seed=1, out=out, inplace=True)
    with pytest.raises(ValueError, match=r"out: expected shape \(2, 3, 4, 6\) without gradient"):
        ops.normal(SHAPE, 1, out=torch.empty(SHAPE, requires_grad=True))
    ddpm = DDPM(Net(), "cosine", 8)
    for wrong, said in (
        ({"out": out, "return_trajectory": True}, "out: expected None with return_trajectory"),
        ({"out": out.double()}, "out: expected torch.float32 on cpu without gradient, got torch.float64 on cpu"),
        ({"out": out[:1]}, r"out: expected shape \(2, 3, 4, 6\), got \(1, 3, 4, 6\)"),
    ):
        with pytest.raises(ValueError, match=said):
            ddpm.sample(SHAPE, **wrong)
    with pytest.raises(ValueError, match=r"out: expected torch\.float32"):
        ddpm.encode(X.cpu(), out=out.double())

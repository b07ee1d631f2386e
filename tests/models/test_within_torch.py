"""Methods within PyTorch's own contexts and transforms: the same result, shapes, or an error that says why not."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jvp, vmap
from torch.utils.flop_counter import FlopCounterMode

from fastdiff import DDPM, NCSN, Edm, FlowMatching
from fastdiff.flow import optimal_coupling
from fastdiff.interop.k_diffusion import as_k_diffusion
from fastdiff.recipes import own_estimate, self_conditioned

pytestmark = pytest.mark.filterwarnings("ignore:schedule. alpha_bar_T")
SHAPE = (2, 3)
X, Z = (torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed)).double() / 3 for seed in (0, 1))
SIGMA = torch.tensor([0.3, 0.2])


class Net(nn.Module):
    self_condition = True

    def __init__(self, outputs: int = 3) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.told, self.class_embedding = nn.Linear(3, outputs), nn.Linear(3, outputs), nn.Embedding(4, 3)

    def forward(
        self, x: Tensor, t: Tensor, class_labels: Tensor | None = None, x_self_cond: Tensor | None = None
    ) -> Tensor:
        x = x if class_labels is None else x + self.class_embedding(class_labels)
        h = self.linear(x) * (1 + t.to(x.dtype)[:, None] / 100)
        return h if x_self_cond is None else h + self.told(x_self_cond.to(x.dtype))


class Method(nn.Module):
    """A method of a model, as the forward of a module."""

    def __init__(self, model: nn.Module, call: Callable[[Any], Tensor]) -> None:
        super().__init__()
        self.model, self.call = model, call

    def forward(self) -> Tensor:
        return self.call(self.model)


WALKS: dict[str, Callable[[Any], Tensor]] = {
    "sample": lambda m: m.sample(SHAPE, steps=3, seed=1),
    "its last steps": lambda m: m.sample(SHAPE, steps=3, seed=1, sampler="ddim", grad_steps=2),
    "encode": lambda m: m.encode(X, steps=2),
    "interpolate": lambda m: m.interpolate(X, -X, sampler="ddim", steps=2),
    "bits_per_dim": lambda m: m.bits_per_dim(X, steps=2, seed=1).total,
    "own_estimate": lambda m: own_estimate(m, X, torch.tensor([3, 4]), seed=1),
    "self_conditioned": lambda m: self_conditioned(m, X, t=3, seed=1, share=1.0),
}


@pytest.mark.parametrize("walk", WALKS)
def test_what_has_no_gradient_has_no_tangent(walk):
    """no_grad() lets tangents of forward mode through."""
    method = Method(DDPM(Net(), "cosine", 12, "v").double(), WALKS[walk])
    weights = {name: p.detach() for name, p in method.named_parameters()}
    call = lambda weights: functional_call(method, weights, ()).sum()  # noqa: E731
    value, tangent = jvp(call, (weights,), (weights,))
    want = sum((grad(call)(weights)[name] * p).sum() for name, p in weights.items())
    torch.testing.assert_close(tangent.double(), torch.as_tensor(want).double(), rtol=1e-4, atol=1e-9)
    torch.testing.assert_close(value, method().sum())
    assert (walk in ("its last steps", "self_conditioned")) == bool(tangent)


def test_dual_tensors_of_a_callback_keep_their_tangents():
    seen = []

    def look(k: int, level: float, x: Tensor) -> None:
        with forward_ad.dual_level():
            seen.append(forward_ad.unpack_dual(2 * forward_ad.make_dual(x, torch.ones_like(x))).tangent)

    DDPM(Net(), "cosine", 12, "v").sample(SHAPE, steps=2, callback=look)
    assert all(torch.equal(tangent, torch.full(SHAPE, 2.0)) for tangent in seen) and len(seen) == 2


@pytest.mark.parametrize("make", [lambda net: DDPM(net, "cosine", 12, "v"), lambda net: NCSN(net, levels=6)])
def test_gradients_of_each_sample_with_its_level_and_label(make):
    model, levels, labels = make(Net()).double(), torch.tensor([2, 5]), torch.tensor([3, 1])
    weights = {name: p.detach() for name, p in model.named_parameters() if "told" not in name}

    def loss(weights: Any, x: Tensor, z: Tensor, t: Tensor, label: Tensor) -> Tensor:
        options = {"t": t[None], "noise": z[None], "class_labels": label[None]}
        return functional_call(model, weights, (x[None],), options)

    each = vmap(grad(loss), in_dims=(None, 0, 0, 0, 0))(weights, X, Z, levels, labels)
    model(X, t=levels, noise=Z, class_labels=labels).backward()
    for name in weights:
        torch.testing.assert_close(each[name].mean(0), model.get_parameter(name).grad, rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match="class_labels: expected values from 0 to 3, got 4"):
        vmap(loss, in_dims=(None, 0, 0, 0, 0))(weights, X, Z, levels, labels + 1)


def test_the_denoiser_of_k_diffusion_under_vmap():
    module = as_k_diffusion(DDPM(Net(), "cosine", 12, "v"))
    x, sigma = torch.stack((X, Z)).float(), torch.stack((SIGMA, 2 * SIGMA))
    torch.testing.assert_close(vmap(module)(x, sigma), torch.stack([*map(module, x, sigma)]))
    with pytest.raises(ValueError, match="sigma: expected levels from"):
        vmap(module)(x, 1e9 * sigma)


@pytest.mark.parametrize("make", [FlowMatching, Edm, lambda net: DDPM(net, "cosine", 12, "v")])
def test_times_under_vmap(make):
    model = make(Net()).double()
    times = (
        torch.tensor([[2, 5], [3, 1]]) if isinstance(model, DDPM) else torch.tensor([[0.2, 0.5], [0.3, 0.1]]).double()
    )
    for method in (
        model.predict_x0,
        lambda x, t: model.predict(x, t, "eps"),
        lambda x, t: model.q_sample(x, t, noise=Z),
    ):
        each = [method(x, t) for x, t in zip((X, Z), times, strict=True)]
        torch.testing.assert_close(vmap(method)(torch.stack((X, Z)), times), torch.stack(each))


@pytest.mark.slow
def test_the_denoiser_of_k_diffusion_is_one_graph():
    module = as_k_diffusion(DDPM(Net(), "cosine", 12, "v"))
    whole = torch.compile(module, backend="eager", fullgraph=True)
    torch.testing.assert_close(whole(X.float(), SIGMA), module(X.float(), SIGMA))


def test_a_coupling_within_transforms():
    """The order has no gradient, the noise has one."""
    want = optimal_coupling(X, Z)
    assert torch.equal(grad(lambda x: (optimal_coupling(X, Z) * x).sum())(X), want)
    assert torch.equal(jvp(lambda z: optimal_coupling(X, z), (Z,), (Z,))[1], want)
    with pytest.raises(ValueError, match="x0, noise: expected one batch"):
        vmap(lambda z: optimal_coupling(X, z))(torch.stack((Z, X)))


def test_a_likelihood_within_inference_mode():
    pytest.importorskip("torchdiffeq")
    model, labels = FlowMatching(Net()), torch.tensor([1, 2])
    want = model.log_likelihood(X.float(), seed=1, tolerance=0.1, class_labels=labels)
    with torch.inference_mode():
        got = model.log_likelihood(X.float(), seed=1, tolerance=0.1, class_labels=labels.clone())
        with pytest.raises(ValueError, match=r"grad_steps: expected 0 within torch\.inference_mode"):
            model.sample(SHAPE, steps=2, grad_steps=1)
    assert torch.equal(got, want)


def test_where_an_adaptive_solver_cannot_look():
    pytest.importorskip("torchdiffeq")
    for model in (FlowMatching(Net()), DDPM(Net(), "linear", 12, "v")):
        for call in (model.log_likelihood, lambda x, model=model: model.sample(SHAPE, x_T=x, sampler="ode")):
            with pytest.raises(ValueError, match=r"expected no torch\.func transform"):
                grad(lambda x, call=call: call(x).sum())(X.float())
            model.to("meta")
            with pytest.raises(ValueError, match=r"device: .* got the meta device"):
                call(X.float().to("meta"))
            model = model.to_empty(device="cpu")


def test_the_meta_device_gives_shapes_between_samples_too():
    x = torch.empty(SHAPE, device="meta")
    for model in (DDPM(Net(), "cosine", 12, "v").to("meta"), FlowMatching(Net()).to("meta"), Edm(Net()).to("meta")):
        if not isinstance(model, Edm):
            assert model.interpolate(x, x, 0.3, steps=2, **model_options(model)).is_meta
        assert as_k_diffusion(model)(x, SIGMA.to("meta")).shape == SHAPE
    assert optimal_coupling(x, x).is_meta


def model_options(model: Any) -> dict[str, Any]:
    return {"sampler": "ddim"} if isinstance(model, DDPM) else {}


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["mse", "vlb"])
def test_traces_without_a_compiler(loss):
    """No value is looked at, and tables are built outside of the trace."""
    from torch.fx.experimental.proxy_tensor import make_fx

    options = {"variance": "learned", "loss": "vlb"} if loss == "vlb" else {}
    model = DDPM(Net(6 if options else 3), "linear", 12, **options)
    call = lambda x, t: model(x, t=t, noise=Z.float(), reduction="none")  # noqa: E731
    traced = make_fx(call)(X.float(), torch.tensor([2, 3]))
    t = torch.tensor([5, 9])
    torch.testing.assert_close(traced(Z.float(), t), call(Z.float(), t))
    assert len([n for n in traced.graph.nodes if "log" in str(n.target)]) == 0


FAKE: dict[str, Callable[[], Any]] = {
    "chain": lambda: DDPM(Net(), "cosine", 12, "v", importance=True),
    "ladder": lambda: NCSN(Net()),
    "flow": lambda: FlowMatching(Net()),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FAKE)
def test_fake_tensors_have_the_shapes_and_the_cost_of_others(name):
    """Numbers of levels keep their values where weights and data have none."""

    def shapes(x: Tensor) -> Any:
        model, labels, levels = FAKE[name](), torch.tensor([1, 2]), []
        given = {"class_labels": labels, "guidance": 2.0, "uncond": {"class_labels": labels}}
        seen = lambda k, level, x, x0: levels.append(level)  # noqa: E731
        results = [
            model.sample(x.shape, steps=2, x_init=x, known=x.abs() < 1, callback=seen, **given),
            model.sample(x.shape, steps=2, sampler="heun", return_trajectory=True),
            model.predict_x0(x, 1.0 if name == "flow" else 3),
            model(x, reduction="none"),
        ]
        results[-1].sum().backward()
        return [r.shape for r in results], levels

    x = X.float()
    with FlopCounterMode(display=False) as real:
        want = shapes(x)
    with FakeTensorMode() as mode, FlopCounterMode(display=False) as fake:
        got = shapes(mode.from_tensor(x))
    assert got == want
    assert fake.get_total_flops() == real.get_total_flops()


def test_an_adaptive_solver_looks_at_no_fake_tensor():
    pytest.importorskip("torchdiffeq")
    with FakeTensorMode(), pytest.raises(ValueError, match="expected numbers to look at, got fakes or a trace"):
        FlowMatching(Net()).sample(SHAPE, sampler="ode")


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["real", "fake"])
def test_a_trace_of_a_walk_has_the_numbers_of_its_levels(mode):
    from torch.fx.experimental.proxy_tensor import make_fx

    model = DDPM(Net(), "cosine", 12, "v")
    call = lambda x: model.sample(SHAPE, steps=2, x_T=x, sampler="ddim") + model.predict_x0(x, 3)  # noqa: E731
    traced = make_fx(call, tracing_mode=mode, _allow_non_fake_inputs=True)(X.float())
    torch.testing.assert_close(traced(Z.float()), call(Z.float()))

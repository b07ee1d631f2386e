"""The whole model and update as one graph: captured and replayed as a CUDA graph is, and exported.

A capture here records the operators that run, with the tensors that they read and wrote; a replay runs them on those
tensors again, without Python. What a CUDA graph would freeze or overwrite, this does too.
"""

import re
from pathlib import Path

import forked
import pytest
import torch
from small_models import TINY
from tape import tensors, waits
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import fastdiff
from benchmarks.gpu.packaged_step import QUICKLY, known
from fastdiff import DDPM, UNet, ops
from fastdiff.objective import OBJECTIVES

SHAPE = (2, 3, 4, 4)


class Net(nn.Module):
    """A convolution with a bias per timestep."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.bias = nn.Embedding(1000, 3)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.conv(x) + self.bias(t)[:, :, None, None]


@pytest.fixture(autouse=True)
def fresh():
    torch.manual_seed(0)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Capture(TorchDispatchMode):
    """The operators that run inside, as (operator, args, kwargs, the tensors that it made); none may read a scalar."""

    def __init__(self):
        super().__init__()
        self.recorded = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        assert not waits(func, args), f"{func} waits for the device"
        out = func(*args, **kwargs)
        given = {t.untyped_storage().data_ptr() for t in tensors(args, kwargs)}
        made = [None if t.untyped_storage().data_ptr() in given else t for t in tensors(out)]
        self.recorded.append((func, args, kwargs, made))
        return out


class Graph:
    """A function of tensors, captured at its first call. Each call returns the same tensors."""

    def __init__(self, function, inputs):
        self.inputs = [i.clone() for i in inputs]
        before = [i.clone() for i in inputs]
        with Capture() as capture:
            self.outputs = tensors(function(*self.inputs))
        self.recorded = capture.recorded
        changed = [k for k, (a, b) in enumerate(zip(self.inputs, before, strict=True)) if not torch.equal(a, b)]
        assert not changed, f"inputs {changed} were changed in place"

    def __call__(self, *inputs):
        for own, new in zip(self.inputs, inputs, strict=True):
            own.copy_(new)
        for func, args, kwargs, made in self.recorded:
            for old, new in zip(made, tensors(func(*args, **kwargs)), strict=True):
                if old is not None:
                    old.copy_(new)
        return self.outputs

    def overwrite(self):
        for output in self.outputs:
            output.fill_(torch.nan)


class Graphs:
    """A backend of torch.compile that makes a Graph of what it is given."""

    def __init__(self):
        self.compiled, self.made, self.steps = 0, [], 0

    def __call__(self, module, example_inputs):
        self.compiled += 1
        graphs = {}

        def run(*inputs):
            key = tuple(i for i in inputs if not isinstance(i, Tensor))
            assert len({t.device for t in tensors(inputs)}) == 1
            if key not in graphs:
                places = [k for k, i in enumerate(inputs) if isinstance(i, Tensor)]

                def function(*given):
                    return module(*[given[places.index(k)] if k in places else i for k, i in enumerate(inputs)])

                graphs[key] = Graph(function, tensors(inputs))
                self.made.append(graphs[key])
            return list(graphs[key](*tensors(inputs)))

        return run

    def begin_step(self):
        """From here on the memory of the outputs may be used again."""
        self.steps += 1
        for graph in self.made:
            graph.overwrite()


@pytest.fixture
def graphs(monkeypatch):
    made = Graphs()
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", made.begin_step)
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield made


# --- replays ----------------------------------------------------------------------------------------------------

CHAINS = [
    {"sampler": "ddpm"},
    {"sampler": "ddim"},
    {"sampler": "ddim", "eta": 0.5},
    {"sampler": "dpm++2m"},
    {"sampler": "heun"},
    {"sampler": "probability_flow"},
]
# All chains are captured with a network of one level, the first with one of two.
SHALLOW = {**TINY, "block_out_channels": (8,), "down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
MODELS = {"net": [Net] * 6, "unet": [lambda: UNet(**TINY), *[lambda: UNet(**SHALLOW)] * 5]}
# heun asks between the levels of a chain, where an embedding of indices has no answer.
ON_CHAINS = pytest.mark.parametrize(
    ("model", "options"),
    [
        pytest.param(make, options, id=f"{name}-{options}")
        for name, makes in MODELS.items()
        for make, options in zip(makes, CHAINS, strict=True)
        if name == "unet" or options["sampler"] != "heun"
    ],
)


@pytest.mark.slow
@ON_CHAINS
def test_one_captured_step_serves_all_steps_and_seeds(graphs, model, options):
    net = model()
    plain, compiled = DDPM(net, "cosine", 20), DDPM(net, "cosine", 20)
    compiled.compile(backend=graphs, fullgraph=True)
    for seed in range(2):
        chain = {"steps": 5, "seed": seed, "return_trajectory": True, **options}
        assert torch.equal(compiled.sample(SHAPE, **chain), plain.sample(SHAPE, **chain))
    table = plain.step_table(options["sampler"], 5, options.get("eta", 0.0))
    assert (graphs.compiled, len(graphs.made), graphs.steps) == (1, 1, 2 * len(table))


@pytest.mark.slow
def test_captured_steps_take_their_ids_and_given_noise(graphs):
    net = Net()
    plain, compiled = DDPM(net, "cosine", 20), DDPM(net, "cosine", 20)
    compiled.compile(backend=graphs, fullgraph=True)
    for ids in ([0, 1], [7, 3]):
        chain = {"steps": 4, "seed": 1, "sample_ids": ids}
        assert torch.equal(compiled.sample(SHAPE, **chain), plain.sample(SHAPE, **chain))
    assert len(graphs.made) == 1
    with torch._dynamo.config.patch(error_on_recompile=False):
        for salt in range(2):
            chain = {"steps": 4, "x_T": ops.normal(SHAPE, salt), "noise": ops.normal((4, *SHAPE), 9 + salt)}
            assert torch.equal(compiled.sample(SHAPE, **chain), plain.sample(SHAPE, **chain))
    assert len(graphs.made) == 2


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_captured_training_step_draws_anew_at_each_replay(objective):
    """Levels and seed come from PyTorch's generator, which goes on from replay to replay as it does on a GPU."""
    net = Net()
    ddpm = DDPM(net, "cosine", 20, objective)
    parameters = list(net.parameters())

    def step(x0: Tensor) -> tuple[Tensor, ...]:
        value = ddpm(x0)
        return value, *torch.autograd.grad(value, parameters)

    graph = Graph(step, [torch.zeros(SHAPE)])
    seen = []
    for k in range(3):
        x0 = ops.normal(SHAPE, k)
        torch.manual_seed(k)
        want = step(x0)
        torch.manual_seed(k)
        with torch.no_grad():
            got = graph(x0)
        for g, w in zip(got, want, strict=True):
            torch.testing.assert_close(g, w, rtol=1e-6, atol=1e-7)
        seen.append(got[0].item())
        with torch.no_grad():
            assert graph(x0)[0].item() != seen[-1]
    assert len(set(seen)) == 3


def test_a_graph_is_what_it_is_taken_for():
    """It freezes what Python read, reuses its outputs, and is refused for a change in place or a look at a number."""
    graph = Graph(lambda x, k: x + torch.full((1,), float(k.shape[0])), [torch.ones(2), torch.ones(3)])
    first = graph(torch.ones(2), torch.ones(3))[0]
    assert first.tolist() == [4, 4]
    assert graph(torch.zeros(2), torch.ones(3))[0] is first and first.tolist() == [3, 3]
    with pytest.raises(AssertionError, match=r"inputs \[0\] were changed in place"):
        Graph(lambda x: x.add_(1), [torch.ones(2)])
    for look in (lambda x: x * x.sum().item(), lambda x: x if bool((x > 0).all()) else -x, lambda x: x[x > 0]):
        with pytest.raises(AssertionError, match="waits for the device"):
            Graph(look, [torch.ones(2)])


def test_reduce_overhead_on_a_gpu(monkeypatch):
    """The sampling step alone: a CUDA graph of the loss would tie the caller to its memory."""
    asked = []
    monkeypatch.setattr(torch, "compile", lambda function, **options: asked.append(options) or function)
    net = Net()
    ddpm = DDPM(net)
    ddpm.compile(fullgraph=True)
    assert asked == [{"fullgraph": True}] * 2
    asked.clear()
    with FakeTensorMode() as fake:
        net.conv.weight = nn.Parameter(torch.empty(3, 3, 3, 3, device="cuda"))
        ddpm.compile(fullgraph=True)
    assert net.conv.weight.is_contiguous(memory_format=torch.channels_last)
    assert asked == [{"fullgraph": True}, {"mode": "reduce-overhead", "fullgraph": True}]
    asked.clear()
    with fake:
        ddpm.compile(mode="default")
    assert asked == [{"mode": "default"}] * 2


@pytest.mark.gpu
@pytest.mark.parametrize("options", CHAINS, ids=str)
def test_cuda_graphs_of_the_compiled_step(options):
    """The same by PyTorch's own CUDA graphs, which it must not have given up."""
    net = UNet(**TINY).cuda()
    plain, compiled = DDPM(net, "cosine", 20), DDPM(net, "cosine", 20)
    compiled.compile(fullgraph=True)
    torch._dynamo.utils.counters.clear()
    with fastdiff.backend("triton"), torch._dynamo.config.patch(error_on_recompile=True):
        for seed in range(3):
            chain = {"steps": 5, "seed": seed, "return_trajectory": True, **options}
            got, want = compiled.sample(SHAPE, **chain), plain.sample(SHAPE, **chain)
            torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)
    assert torch._dynamo.utils.counters["inductor"]["cudagraph_skips"] == 0


# --- no wait for the device -------------------------------------------------------------------------------------


class Watch(TorchDispatchMode):
    """Refuses to read a scalar and counts the copies from one device to another."""

    def __init__(self):
        super().__init__()
        self.operators = self.copies = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert not waits(func, args) or tensors(args)[0].is_cpu, f"{func} waits for the device"
        out = func(*args, **(kwargs or {}))
        self.operators += 1
        self.copies += len({t.device for t in tensors(args, kwargs or {}, out)}) > 1
        return out


@pytest.fixture
def meta(monkeypatch):
    """Autocast does not know the device."""
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: False)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("loss", ops.LOSSES)
def test_training_reads_no_scalar_and_copies_nothing(meta, objective, loss):
    """Tensors on "meta", which have no values to read, stand for those of a GPU. The first call brings the tables."""
    ddpm = DDPM(Net().to("meta"), "cosine", 20, objective, loss, "min_snr")
    x0, t, seed = torch.empty(SHAPE, device="meta"), *(torch.ones(n, dtype=torch.int64, device="meta") for n in (2, 1))
    ddpm(x0)
    with Watch() as watch:
        for options in ({}, {"t": t, "seed": seed}, {"noise": x0}, {"reduction": "none"}):
            ddpm(x0, **options).sum().backward()
    assert ddpm.model.conv.weight.grad.shape == (3, 3, 3, 3)
    assert watch.operators > 50 and watch.copies == 0
    with Watch(), pytest.raises(AssertionError, match="waits"):
        _ = x0.sum().item()


@pytest.mark.slow
@ON_CHAINS
def test_sampling_reads_no_scalar_and_copies_nothing_in_a_step(meta, model, options):
    ddpm = DDPM(model().to("meta"), "cosine", 20)
    ids = torch.ones(2, dtype=torch.int64, device="meta")
    counts = []
    for steps in (2, 5):
        count = len(ddpm.step_table(options["sampler"], steps, options.get("eta", 0.0)))
        with Watch() as watch:
            assert ddpm.sample(SHAPE, steps=steps, sample_ids=ids, **options).device.type == "meta"
            ddpm.sample(SHAPE, steps=steps, noise=torch.empty(count, *SHAPE, device="meta"), **options)
        counts.append((watch.operators, watch.copies))
    assert counts[1][0] - counts[0][0] > 2 * 3 * 5 and counts[1][1] == counts[0][1]  # in both runs, 3 steps more


# --- export -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def documented():
    """What the code in docs/graphs.md defines."""
    text = (Path(__file__).resolve().parents[2] / "docs" / "graphs.md").read_text(encoding="utf-8")
    names: dict = {}
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(block, names)
    return names


@pytest.fixture(scope="module")
def exported(documented):
    torch.manual_seed(0)
    net = Net()
    return net, documented["export"](net, SHAPE)


def fifty_steps(step, x: Tensor, seed: int) -> Tensor:
    with torch.no_grad():
        for k in range(50):
            x = step(x, torch.tensor([k]), torch.tensor([seed]))
    return x


@pytest.mark.slow
def test_an_exported_step_samples_as_the_module_does(exported, documented, tmp_path):
    net, program = exported
    assert [str(n.target) for n in program.graph.nodes if "fastdiff" in str(n.target)] == ["fastdiff.update.default"]
    assert not program.graph_signature.user_inputs_to_mutate
    torch.export.save(program, tmp_path / "step.pt2")
    portable = documented["without_fastdiff"](program)
    assert not [n for n in portable.graph.nodes if "fastdiff" in str(n.target)]
    ddpm = DDPM(net)
    for step in (torch.export.load(tmp_path / "step.pt2"), portable):
        for batch, seed in ((2, 3), (5, -1)):
            shape = (batch, *SHAPE[1:])
            got = fifty_steps(step.module(), ops.normal(shape, seed), seed)
            torch.testing.assert_close(got, ddpm.sample(shape, steps=50, seed=seed), rtol=0, atol=1e-5)


CONSUMER = """
import sys, torch
{imports}
step = torch._inductor.aoti_load_package(sys.argv[1])
x = torch.linspace(-1, 1, 96).reshape(2, 3, 4, 4)
torch.save(step(x, torch.tensor([3]), torch.tensor([7])).detach(), sys.argv[2])
assert ("fastdiff" in sys.modules) == {with_fastdiff}
"""


@pytest.mark.slow
@pytest.mark.parametrize("with_fastdiff", [True, False])
def test_a_packaged_step_runs_in_another_process(exported, documented, tmp_path, with_fastdiff):
    """AOTInductor's package, with the operator and with PyTorch's own in its place."""
    _, program = exported
    chosen = program if with_fastdiff else documented["without_fastdiff"](program)
    path = str(tmp_path / "package.pt2")
    package = torch._inductor.aoti_compile_and_package(chosen, package_path=path, inductor_configs=known(QUICKLY))
    script = CONSUMER.format(imports="import fastdiff" if with_fastdiff else "", with_fastdiff=with_fastdiff)
    done = forked.run("-c", script, package, tmp_path / "out.pt")
    assert done.returncode == 0, done.stderr
    x = torch.linspace(-1, 1, 96).reshape(SHAPE)
    with torch.no_grad(), fastdiff.backend("reference"):
        want = program.module()(x, torch.tensor([3]), torch.tensor([7]))
    torch.testing.assert_close(torch.load(tmp_path / "out.pt"), want, rtol=1e-5, atol=1e-5)

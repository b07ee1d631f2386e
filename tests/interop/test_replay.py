"""accelerate(graph=True) and accelerate(compile=True): the results of the plain network, whatever happens to it.

On a CPU a tape stands for a CUDA graph; the tests marked `gpu` use CUDA's own.
"""

import copy
import functools
import inspect
import io
import threading
from typing import Any

import diffusers
import pytest
import torch
from replayed import Looking, both, conditional, counted, draw, inputs, made, same, transformer, unet
from torch import Tensor, nn

import fastdiff
from fastdiff.graphs import MOST_CAPTURES, WARM_UP
from fastdiff.interop.replay import replay_of


@pytest.mark.parametrize("make", [unet, conditional, transformer])
def test_a_replay_gives_the_bits_of_the_network(taped, make):
    net, plain = both(make)
    same(net, plain)
    assert len(taped) == taped.recorded == 1 and taped[0].replayed == 2
    assert type(net(**inputs(net))) is type(plain(**inputs(net)))
    assert type(net(**inputs(net), return_dict=False)) is tuple


def guided(unet: nn.Module, scheduler: Any, callback: Any = None, residuals: bool = False) -> Tensor:
    """The loop of StableDiffusionPipeline and its ControlNet variant."""
    scheduler.set_timesteps(6)
    x, text, more = draw(0, 1, 4, 4, 4), draw(1, 2, 3, 4), {}
    for k, t in enumerate(scheduler.timesteps):
        if residuals:
            shapes = ((2, 4, 4, 4), (2, 4, 4, 4), (2, 4, 2, 2), (2, 8, 2, 2))
            more["down_block_additional_residuals"] = [draw(10 * k + i, *shape) for i, shape in enumerate(shapes)]
            more["mid_block_additional_residual"] = draw(k, 2, 8, 2, 2)
        pair = scheduler.scale_model_input(torch.cat([x, x]), t)
        pred = unet(pair, t, encoder_hidden_states=text, return_dict=False, cross_attention_kwargs=None, **more)[0]
        without, prompted = pred.chunk(2)
        x = scheduler.step(without + 7.5 * (prompted - without), t, x, return_dict=False)[0]
        if callback is not None:
            x = callback(k, x)
    return x


class Parts:
    """As a pipeline is, with these components."""

    def __init__(self, **components: Any) -> None:
        self.__dict__.update(components)

    @property
    def components(self) -> dict[str, Any]:
        return vars(self)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["DDIMScheduler", "DPMSolverMultistepScheduler"])
@pytest.mark.parametrize("residuals", [False, True])
def test_guidance_residuals_and_callbacks(taped, name, residuals):
    others = {"text_encoder": nn.Linear(2, 2), "transformer_2": nn.Linear(2, 2)}  # the latter as of Wan 2.2
    pipeline = Parts(unet=made(conditional), scheduler=getattr(diffusers, name)(), **others)
    changes = [None, lambda k, x: x * 0.5 if k == 3 else x]
    fastdiff.accelerate(pipeline)
    want = [guided(pipeline.unet, pipeline.scheduler, change, residuals) for change in changes]
    assert fastdiff.accelerate(pipeline, graph=True) == ["unet.forward", "transformer_2.forward"]
    for change, wanted in zip(changes, want, strict=True):
        assert torch.equal(guided(pipeline.unet, pipeline.scheduler, change, residuals), wanted)
    assert taped.recorded == 1 and taped[0].replayed == 12 - WARM_UP
    assert "unet.forward" in fastdiff.restore(pipeline) and "forward" not in vars(pipeline.unet)


def test_a_whole_pipeline(taped):
    pipeline = diffusers.DiTPipeline(made(transformer), made(diffusers.AutoencoderKL), diffusers.DDIMScheduler())
    pipeline.set_progress_bar_config(disable=True)

    def images() -> Any:
        random = torch.Generator().manual_seed(0)
        return pipeline([1, 2], num_inference_steps=5, generator=random, output_type="np").images

    fastdiff.accelerate(pipeline)
    want = images()
    assert fastdiff.accelerate(pipeline, graph=True) == ["transformer.forward"]
    assert (images() == want).all() and (images() == want).all()
    assert taped.recorded == 1


@pytest.mark.slow
def test_times_are_inputs_in_every_form(taped):
    """Integers and tensors of the host, by position and by name."""
    net, plain = both(conditional)
    text, x = draw(1, 2, 3, 4), draw(2, 2, 4, 4, 4)
    for time in (5, 900, torch.tensor(7), torch.tensor(950), 20, torch.tensor(30), 40, 50):
        assert torch.equal(net(x, time, text)[0], plain(x, time, text)[0])
        assert torch.equal(net(x, encoder_hidden_states=text, timestep=time)[0], plain(x, time, text)[0])
    assert taped.recorded == 2  # two structures of arguments


def test_results_are_the_callers_own(taped):
    net, _ = both(unet)
    results = [net(**inputs(net, seed), return_dict=False)[0] for seed in range(6)]
    copies = [result.clone() for result in results]
    net(**inputs(net, 7))
    assert all(map(torch.equal, results, copies)) and len({r.sum().item() for r in results}) == 6


@pytest.mark.slow
def test_each_kind_of_arguments_is_captured(taped):
    net, plain = both(unet)
    for batch in range(1, MOST_CAPTURES + 2):
        for seed in range(WARM_UP + 2):
            given = inputs(net, seed, batch)
            assert torch.equal(net(**given)[0], plain(**given)[0])
    assert taped.recorded == MOST_CAPTURES + 1 and len(taped) == 1
    same(net, plain)
    assert taped.recorded == MOST_CAPTURES + 1
    same(net, plain, sample=draw(0, 2, 3, 4, 4).double().float().to(memory_format=torch.channels_last))
    assert taped.recorded == MOST_CAPTURES + 2


@pytest.mark.slow
def test_a_hook_around_the_network_runs(taped):
    """As the one of enable_model_cpu_offload, which comes and goes."""
    from accelerate.hooks import add_hook_to_module, remove_hook_from_module

    net, plain = both(unet)
    hook = counted()
    add_hook_to_module(net, hook)
    same(net, plain, 5)
    assert hook.calls == 5 and taped.recorded == 1
    remove_hook_from_module(net)
    same(net, plain)
    add_hook_to_module(net, hook)
    assert fastdiff.restore(net)[-1] == "forward"
    same(net, stock := made(unet), 2)
    assert hook.calls == 7
    remove_hook_from_module(net)
    same(net, stock, 1)
    assert replay_of(net) is None and vars(net).keys() - vars(made(unet)).keys() == {"forward"}  # of Accelerate
    assert fastdiff.accelerate(net, graph=True)[-1] == "forward"
    same(net, plain)
    assert taped.recorded == 3


def test_a_wrapped_or_compiled_network_is_left():
    net = made(Looking)
    net.forward = functools.partial(Looking.forward, net)
    compiled = made(Looking)
    compiled.compile(backend="eager")
    for one, reason in ((net, "it is wrapped, as offloading does"), (compiled, "it is compiled already")):
        with pytest.warns(UserWarning, match=reason):
            assert fastdiff.accelerate(one, graph=True).left == {"forward": reason}
    with pytest.warns(UserWarning, match="the pipeline has no unet or transformer"):
        assert fastdiff.accelerate(Parts(prior=made(Looking)), compile=True).left.keys() == {"forward"}


@pytest.mark.slow
def test_copies_and_pickles_are_of_their_own_network(taped):
    net, plain = both(unet)
    same(net, plain)
    buffer = io.BytesIO()
    torch.save(net, buffer)
    buffer.seek(0)
    twins = copy.deepcopy(net), torch.load(buffer, weights_only=False)
    for p in net.parameters():
        p.zero_()
    for twin in twins:
        assert replay_of(twin).network is twin
        same(twin, plain)
        assert "forward" in fastdiff.restore(twin)
    assert taped.recorded == 3
    assert inspect.signature(net.forward) == inspect.signature(plain.forward)


def test_threads_take_turns(taped):
    net, plain = both(unet)
    given = [inputs(net, seed) for seed in range(8)]
    want, got = [plain(**one)[0] for one in given], [None] * 8

    def run(k: int) -> None:
        with torch.no_grad():
            got[k] = net(**given[k])[0]

    threads = [threading.Thread(target=run, args=(k,)) for k in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(map(torch.equal, got, want))


def test_inference_mode(taped):
    net, plain = both(unet)
    with torch.inference_mode():
        same(net, plain)
    same(net, plain)
    with torch.inference_mode():
        same(net, plain)
    assert taped.recorded == 1


class Timed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor, timestep: Tensor | int) -> Tensor:
        if isinstance(timestep, int):  # not a network of diffusers: it gets the number
            return self.layer(x)
        return self.layer(x) + timestep + torch.compiler.is_compiling()


def test_compiled_and_captured(taped, monkeypatch):
    """Each option may come later. Code runs uncompiled while the stand-in for a graph records it."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    torch.compiler.reset()
    net, x = made(Timed), draw(0, 2, 4)
    plain = net.layer(x)
    assert fastdiff.accelerate(net, compile=True) == ["forward"] and fastdiff.accelerate(net, compile=True) == []
    three = torch.tensor(3.0)
    assert torch.equal(net(x, three), plain + 4)
    twin = copy.deepcopy(net)
    net.layer = nn.Linear(4, 4)
    assert torch.equal(net(x, three), net.layer(x) + 4) and torch.equal(twin(x, three), plain + 4)
    assert fastdiff.accelerate(net, graph=True) == ["forward"] and fastdiff.accelerate(net, graph=True) == []
    assert torch.equal(net(x, three), net.layer(x) + 4) and replay_of(net).compile
    for number in range(WARM_UP + 1):
        net(x, torch.tensor(float(number)))
        assert torch.equal(net(x, number), net.layer(x))
    assert taped.recorded == 1
    assert fastdiff.restore(net) == ["forward"] and torch.equal(net(x, three), net.layer(x) + 3)


def test_a_program_that_is_compiled_as_a_whole_passes_by(taped):
    net, x = made(Timed), draw(0, 2, 4)
    fastdiff.accelerate(net, graph=True)
    torch.compiler.reset()
    whole = torch.compile(lambda x, t: net(x, t), backend="eager", fullgraph=True)
    assert torch.equal(whole(x, torch.tensor(3)), net.layer(x) + 4) and not taped


def test_channels_last_comes_and_goes():
    net, plain = made(unet), made(unet)
    fastdiff.accelerate(net, channels_last=True)
    weight = net.conv_out.weight
    assert weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()
    with torch.no_grad(), fastdiff.backend("reference"):
        torch.testing.assert_close(net(**inputs(net))[0], plain(**inputs(net))[0], rtol=1e-4, atol=1e-5)
    fastdiff.restore(net)
    assert all(p.is_contiguous() for p in net.parameters()) and vars(net).keys() == vars(plain).keys()
    fastdiff.accelerate(net)
    assert all(p.is_contiguous() for p in net.parameters())


@pytest.mark.parametrize("option", ["graph", "compile", "channels_last"])
def test_options_are_bools(option):
    with pytest.raises(TypeError, match=f"^{option}: expected True or False, got 'yes'$"):
        fastdiff.accelerate(made(Looking), **{option: "yes"})


@pytest.mark.gpu
@pytest.mark.parametrize("make", [unet, conditional, transformer])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cuda_graphs_give_the_bits_of_the_network(make, dtype):
    net, plain = (made(make).cuda().to(dtype) for _ in range(2))
    fastdiff.accelerate(plain)
    fastdiff.accelerate(net, graph=True)

    def on_gpu(seed: int) -> dict[str, Any]:
        return {
            name: value.to("cuda", dtype if value.is_floating_point() else value.dtype)
            for name, value in inputs(net, seed).items()
        }

    with torch.no_grad():
        for round_ in range(2):
            for seed in range(5):
                assert torch.equal(net(**on_gpu(seed))[0], plain(**on_gpu(seed))[0])
            for one in (net, plain):
                for p in one.parameters():
                    p.mul_(1.1) if round_ == 0 else setattr(p, "data", p.data.clone())
    assert len(replay_of(net).calls.calls.kept) == 1

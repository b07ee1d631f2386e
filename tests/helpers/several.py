"""A program that test_processes runs in several processes: the runs that it compares with those of one process.

torchrun tests/helpers/several.py FOLDER
"""

import copy
import signal
import sys
from pathlib import Path

import torch
from tiny_run import CPU, TINY, run

from fastdiff import DDPM, cli, training
from fastdiff.training import Options, checkpoint, layout, loop, ranks

STEPS = 6
SAME = {"channels": 16, "lr": 2e-4}
# Another network, which is told its estimate in some of its steps.
TOLD = {"channels": 16, "lr": 2e-4, "network": "dit", "classes": True, "self_conditioning": True, "steps": 3}


def importance(out: Path) -> None:
    """Two steps whose levels are drawn by their losses, with all losses of the first step noted for the second."""
    torch.manual_seed(3)
    unet = training.build(Options(**{**TINY, **SAME})).model
    ddpm = DDPM(unet, timesteps=2, objective="v", schedule="cosine", importance=True)
    options = Options(**{**TINY, **SAME, "timesteps": 2, "batch_size": 64, "steps": 2})
    state = checkpoint.State(ddpm, copy.deepcopy(unet), {}, {"cpu": torch.get_rng_state()}, vars(options), 0)
    training.train(options, out, CPU, state)


def evaluate(model: Path, out: Path) -> int:
    """The figures of samples in more batches than processes, with one that is smaller."""
    args = ["eval", model, "--features", "pixels", "--n", 9, "--batch-size", 2, "--steps", 2, "--json", out]
    return cli.main([*map(str, args), "--device", "cpu"])


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    with ranks.joined(CPU) as each:
        run(folder / "replicated", steps=STEPS, accumulate=2, **SAME)
        run(folder / "split", steps=STEPS // 2, fsdp=True, **SAME)
        run(folder / "split", resume=True, steps=STEPS, fsdp=True, accumulate=2, **SAME)
        run(folder / "told", fsdp=True, **TOLD)
        importance(folder / "importance")
        assert evaluate(folder / "replicated", folder / "two.json") == 0
        model = checkpoint.load_model(folder / "split")
        if not each.leads:  # a run has written a later checkpoint meanwhile
            torch.nn.init.zeros_(model.model.conv_in.weight)
        each.share(model)
        layout.shard(model.model, CPU)
        drawn = model.sample(3, steps=2, sampler="ddim", seed=1)
        if each.leads:
            torch.save(drawn, folder / "drawn.pt")
        original = loop.update_ema
        loop.update_ema = lambda *args: (original(*args), each.leads or signal.raise_signal(signal.SIGTERM))
        caught: list[int] = []
        assert training.train(Options(**{**TINY, "steps": 9}), folder / "stopped", CPU, None, caught) == 1
        assert caught == [signal.SIGTERM]  # also where it was not sent


if __name__ == "__main__":
    main(Path(sys.argv[1]))

"""What the kit says of the goals, and at the end of its output."""

from benchmarks.gpu import report
from benchmarks.gpu.goals import goals, table


def rates(case: str, **per_s: float | None) -> dict:
    """Rows of a case, of which None has no figures."""
    rows = {}
    for method, rate in per_s.items():
        outcome = {"not_run": "no time"} if rate is None else {"figures": {"per_s": rate}}
        rows[f"{case} / {method.replace('_', ' ')}"] = {"run": "now", **outcome}
    return rows


def times(key: str, **figures: float) -> dict:
    return {key: {"run": "now", "figures": figures}}


SD = "sampling / SD 1.5 U-Net, batch 1"
CIFAR10 = "sampling / cifar10 U-Net, batch 16"
TRAINING = "training / cifar10 U-Net, batch 128"
ROWS = {
    **rates(CIFAR10, diffusers_eager=5.0, diffusers_compiled=8.0, fastdiff_eager=7.0, fastdiff_graph=12.0),
    **rates(
        SD, diffusers_eager=5.0, **{"diffusers max-autotune": None}, accelerate_graph=10.0, accelerate_compiled=None
    ),
    **rates(TRAINING, diffusers_eager=5.0, diffusers_compiled=10.0, fastdiff_graph=9.0),
    **times("operations / norm, nchw / bfloat16 256x128x32x32", fused=1.0, copy=0.9),
    **times("operations / norm, channels_last / bfloat16 256x128x32x32", fused=1.0, copy=0.8),
    **times("operations / norm, nchw / bfloat16 8x320x64x64", fused=1.0, copy=0.1),
    **times("operations / norm with gradients, nchw / bfloat16 256x128x32x32", fused=2.0, copy=1.7),
    **times("host / normal / float32 64x3x64x64", fused=5.0, reference=6.0),
}


def test_goals_are_ratios_of_the_rows():
    found = {(goal.what, goal.least): goal for goal in goals(ROWS)}
    cifar10 = found["sampling, cifar10 U-Net, batch 16, beside diffusers", 1.3]
    assert (cifar10.reached, cifar10.state) == (1.5, "yes")
    assert cifar10.beside == "fastdiff graph beside diffusers compiled"
    assert found["training, cifar10 U-Net, batch 128, beside diffusers eager", 1.5].reached == 1.8
    missed = found["training, cifar10 U-Net, batch 128, beside diffusers compiled", 1.1]
    assert (missed.reached, missed.state) == (0.9, "NO")
    norm = found["norm, a copy / fastdiff", 0.85]
    assert norm.state == "NO" and norm.beside == "worst of 2, 1 reach it: norm, channels_last / bfloat16 256x128x32x32"
    assert found["norm with gradients, a copy / fastdiff", 0.8].reached == 0.85
    assert found["host, eager / fastdiff", 1.0].reached == 1.2


def test_a_goal_whose_rows_have_no_figures_was_not_run():
    """What is there is said all the same."""
    goal = next(goal for goal in goals(ROWS) if goal.what.startswith("sampling, SD 1.5 U-Net, batch 1,"))
    assert (goal.reached, goal.state) == (None, "not run")
    assert goal.beside == (
        "accelerate graph beside diffusers eager: 2.00x; without figures: accelerate compiled, diffusers max-autotune"
    )
    assert {goal.state for goal in goals({})} == {"not run"}
    assert all(line.count("|") == 6 for line in table({}))


def test_the_output_ends_with_what_failed_and_the_goals():
    rows = ROWS | {f"smoke / case {i} / m": {"run": "now", "error": "a\nlong one " * 99} for i in range(90)}
    rows["smoke / old / m"] = {"run": "before", "error": "of other code"}
    text = "\n".join(report.summary({"rows": rows}, "now"))
    assert "14 measured, 90 FAILED, 2 not run" in text and "FAILED smoke / case 0 / m: a long one a long" in text
    assert "| training, cifar10 U-Net, batch 128, beside diffusers compiled | 1.1x | 0.90x | NO |" in text
    assert "of other code" not in text and len(text) < 12_000

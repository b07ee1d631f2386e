"""What the figures of a GPU should reach, one line a goal, and whether they do."""

from collections.abc import Callable
from typing import Any, NamedTuple

Rows = dict[str, dict[str, Any]]

# (batch, least): the best of fastdiff beside the best of diffusers, of the U-Net of ddpm-cifar10-32.
SAMPLING = [(1, 1.3), (16, 1.3), (256, 1.1)]
# (what, least): the time of a copy of the same bytes beside the norm's.
NORMS = [("norm", 0.85), ("norm with gradients", 0.8)]


class Goal(NamedTuple):
    """reached: the ratio that was measured; None if a row that it needs has no figures."""

    what: str
    least: float
    reached: float | None
    beside: str

    @property
    def state(self) -> str:
        if self.reached is None:
            return "not run"
        return "yes" if self.reached >= self.least else "NO"


def goals(rows: Rows) -> list[Goal]:
    """Those of the kit, by the rows of a results file."""
    found = []
    for batch, least in SAMPLING:
        found.append(_quicker(rows, f"sampling / cifar10 U-Net, batch {batch}", "fastdiff", "diffusers", least))
    for batch in (1, 4):
        case = f"sampling / SD 1.5 U-Net, batch {batch}"
        found.append(_quicker(rows, case, "accelerate", "diffusers max-autotune", 1.3))
    for batch in (16, 128):
        case = f"training / cifar10 U-Net, batch {batch}"
        found.append(_quicker(rows, case, "fastdiff", "diffusers eager", 1.5))
        found.append(_quicker(rows, case, "fastdiff", "diffusers compiled", 1.1))
    for what, least in NORMS:
        found.append(_worst(f"{what}, a copy / fastdiff", rows, "copy", least, _is_norm(what)))
    found.append(_worst("host, eager / fastdiff", rows, "reference", 1.0, lambda key: key.startswith("host / ")))
    return found


def table(rows: Rows) -> list[str]:
    """The lines of a table in Markdown."""
    lines = ["| goal | at least | measured | reached | |", "|---|---|---|---|---|"]
    for goal in goals(rows):
        measured = "" if goal.reached is None else f"{goal.reached:.2f}x"
        lines.append(f"| {goal.what} | {goal.least}x | {measured} | {goal.state} | {goal.beside} |")
    return lines


def _quicker(rows: Rows, case: str, ours: str, others: str, least: float) -> Goal:
    """The most a second of ours by the most of the others: methods of a case whose names begin so."""
    methods = {key.rpartition(" / ")[2]: row for key, row in rows.items() if key.rpartition(" / ")[0] == case}
    rates = {method: row["figures"]["per_s"] for method, row in methods.items() if "figures" in row}
    own = max((method for method in rates if method.startswith(ours)), key=lambda method: rates[method], default=None)
    ratios = {method: rates[own] / rates[method] for method in rates if own and not method.startswith(ours)}
    asked = [method for method in ratios if method.startswith(others)]
    nearest = min(asked or ratios, key=lambda method: ratios[method], default=None)
    notes = []
    if nearest is not None:
        notes.append(f"{own} beside {nearest}" + ("" if asked else f": {ratios[nearest]:.2f}x"))
    if lacking := sorted(method for method in methods.keys() - rates.keys() if method.startswith((ours, others))):
        notes.append(f"without figures: {', '.join(lacking)}")
    what = f"{case.replace(' / ', ', ')}, beside {others}"
    return Goal(what, least, ratios[nearest] if asked and nearest else None, "; ".join(notes))


def _worst(what: str, rows: Rows, over: str, least: float, chosen: Callable[[str], bool]) -> Goal:
    """The smallest ratio of a way's time to that of "fused", over the chosen rows."""
    measured = {key: row["figures"] for key, row in rows.items() if "figures" in row and chosen(key)}
    ratios = {key: figures[over] / figures["fused"] for key, figures in measured.items()}
    if not ratios:
        return Goal(what, least, None, "")
    worst = min(ratios, key=lambda key: ratios[key])
    good = sum(ratio >= least for ratio in ratios.values())
    return Goal(what, least, ratios[worst], f"worst of {len(ratios)}, {good} reach it: {worst.partition(' / ')[2]}")


def _is_norm(what: str) -> Callable[[str], bool]:
    """Whether a key is of that norm at a shape of the U-Net, whose batch is 256."""
    return lambda key: key.startswith(f"operations / {what}, ") and " 256x" in key

"""Importance sampling: which levels training sees (Nichol & Dhariwal 2021, arXiv:2102.09672, section 3.3)."""

from typing import Any

import torch
from torch import Tensor, nn

from .support import transforms
from .support.scalars import as_count


class LossSecondMoment(nn.Module):
    """Levels drawn in proportion to sqrt(E[L_t^2]), which makes the estimate of the bound least noisy.

    E is the mean over the last 10 losses of a level. Until each of the levels 1..T has 10 losses, all are drawn evenly;
    after that one draw in a thousand is.

    Reference: Nichol & Dhariwal 2021, arXiv:2102.09672, eq. 18.
    """

    HISTORY = 10
    UNIFORM = 0.001
    losses: Tensor  # (T, HISTORY) float32, a ring for each level
    seen: Tensor  # (T,) int64, losses that came in

    def __init__(self, timesteps: int) -> None:
        super().__init__()
        number = as_count("timesteps", timesteps)
        # State, but no buffers: an average of weights would average it, and .half() would round it.
        self.losses = torch.zeros(number, self.HISTORY, device="cpu")
        self.seen = torch.zeros(number, dtype=torch.int64, device="cpu")

    def to_device(self, device: torch.device) -> None:
        """Bring the history to a device. On the meta device, which has no values, it stays where it is."""
        if self.losses.device != device and device.type != "meta":
            with torch.inference_mode(False), torch.no_grad():
                self.losses, self.seen = self.losses.to(device), self.seen.to(device)

    def _apply(self, fn: Any, recurse: bool = True) -> "LossSecondMoment":
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.to_device(fn(torch.empty(0, device=self.losses.device)).device)
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}losses"], destination[f"{prefix}seen"] = self.losses, self.seen

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: Any, strict: bool,
        missing_keys: list[str], unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        for name, own in (("losses", self.losses), ("seen", self.seen)):
            key = prefix + name
            given = state_dict.get(key)
            if given is None:
                missing_keys += [key] if strict else []
            elif given.shape != own.shape:
                error_msgs.append(f"{key}: expected shape {tuple(own.shape)}, got {tuple(given.shape)}")
            elif given.device.type != "meta":
                own.copy_(given.detach())
        unexpected_keys += [
            key for key in state_dict
            if strict and key.startswith(prefix) and key[len(prefix) :] not in ("losses", "seen")
        ]  # fmt: skip

    def probabilities(self) -> Tensor:
        """p_t for t = 1..T, (T,)."""
        losses, seen = transforms.admitted(self.losses), transforms.admitted(self.seen)
        size = losses.square().mean(1).sqrt()
        even = torch.full_like(size, 1 / len(size))
        known = (seen >= self.HISTORY).all() & (size.sum() > 0)
        return torch.where(known, (1 - self.UNIFORM) * size / size.sum() + self.UNIFORM * even, even)

    def sample(self, batch: int) -> tuple[Tensor, Tensor]:
        """(t, weights), each (batch,): levels in 1..T from PyTorch's default generator, and 1 / (T p_t).

        With these weights E[weight L_t] is the mean of L over the levels. Nothing waits for the device.
        """
        p = self.probabilities()
        index = torch.multinomial(p, batch, replacement=True)
        return index + 1, 1 / (len(p) * p[index])

    def sample_at(self, quantiles: Tensor) -> tuple[Tensor, Tensor]:
        """As `sample`, at given quantiles (batch,) in [0, 1) of the distribution of the levels."""
        p = self.probabilities()
        ends = p.double().cumsum(0)
        index = torch.searchsorted(ends, quantiles.double() * ends[-1], right=True).clamp(max=len(p) - 1)
        return index + 1, 1 / (len(p) * p[index])

    @torch.no_grad()
    def update(self, t: Tensor, losses: Tensor) -> None:
        """Note the losses (B,) of the levels t (B,) in 1..T, without weights and in the order of the batch.

        Losses that are not finite are left out. Nothing waits for the device.
        """
        if losses.device.type == "meta" or transforms.fake_mode() is not None:  # they have no values
            return
        losses = losses.detach().to(self.losses.dtype)
        valid = losses.isfinite()
        same = (t[:, None] == t[None, :]) & valid[None, :]
        before = same.tril(-1).sum(1)
        fits = valid & (same.sum(1) - before <= self.HISTORY)  # if a ring is too small for them all, the last ones
        level = t - 1
        slot = torch.where(fits, (self.seen[level] + before) % self.HISTORY, self.HISTORY)
        padded = nn.functional.pad(self.losses, (0, 1))  # one more column takes the others
        padded[level, slot] = losses
        self.losses.copy_(padded[:, :-1])
        self.seen.index_add_(0, level, valid.long())

"""The reference U-Net: the DDPM architecture (Ho et al. 2020, arXiv:2006.11239, appendix B).

Constructor keywords, state_dict keys and arithmetic are those of diffusers' UNet2DModel, so its weights load.
"""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .ahead import aheads, owed, project
from .fused import Embedding, norm_silu, without_bias
from .interop import pretrained
from .nn import (
    Attention,
    DownBlock,
    Downsample,
    FourierProjection,
    MidBlock,
    ResnetBlock,
    TimeEmbedding,
    UpBlock,
    Upsample,
    sinusoidal_embedding,
)
from .ops.group_norm import is_fused
from .support.inputs import check_image, check_labels, describe, timesteps_of, with_estimate
from .support.scalars import plain_number
from .support.shapes import fits


class UNet(nn.Module):
    """U-Net of resnet and attention blocks, one level per entry of block_out_channels.

    Args:
        sample_size: image size, int or (H, W), multiples of 2^(levels-1); only read by `sample_shape`.
        in_channels, out_channels: channels of x and of the output.
        center_input_sample: map x to 2x - 1 first, for images in [0, 1].
        time_embedding_type: "positional" (sinusoids of t with freq_shift and flip_sin_to_cos) or "fourier"
            (random features of log t; t > 0 is the noise level sigma and the output is divided by it).
        time_embedding_dim: D, default 4 block_out_channels[0].
        down_block_types: "DownBlock2D" or "AttnDownBlock2D" per level, from the image down.
        up_block_types: "UpBlock2D" or "AttnUpBlock2D" per level, from the middle up.
        layers_per_block: resnet blocks per level on the way down; one more on the way up.
        add_attention, mid_block_scale_factor: of the middle block; its residual sums are divided by the factor.
        downsample_padding: 0 pads right and bottom only, 1 pads all round.
        downsample_type, upsample_type: "conv", or "resnet", which only changes levels with attention.
        dropout: probability in [0, 1), in the resnet blocks.
        attention_head_dim: channels per head; None is one head.
        attn_norm_num_groups: of the middle attention; None is norm_num_groups, or no norm with "scale_shift".
        resnet_time_scale_shift: how the embedding enters, added ("default") or "scale_shift".
        num_class_embeds: number of classes, makes the model class-conditional.
        self_condition: the network takes an estimate of x_0 too, x_self_cond, as in denoising-diffusion-pytorch; see
            fastdiff.recipes.self_conditioned. diffusers has no such networks.

    Raises ValueError naming the argument for anything else; of mid_block_type, act_fn, class_embed_type and
    num_train_timesteps only the default is supported. `config` holds the arguments, ready for JSON, and
    UNet(**config) builds the same model. `time_embedding(t)` gives the embeddings (N, D) of timesteps t (N,).
    """

    self_condition = False  # of networks that an earlier version pickled

    def __init__(
        self,
        sample_size: int | Sequence[int] | None = None,
        in_channels: int = 3,
        out_channels: int = 3,
        center_input_sample: bool = False,
        time_embedding_type: str = "positional",
        time_embedding_dim: int | None = None,
        freq_shift: float = 0,
        flip_sin_to_cos: bool = True,
        down_block_types: Sequence[str] = ("DownBlock2D", *["AttnDownBlock2D"] * 3),
        mid_block_type: str = "UNetMidBlock2D",
        up_block_types: Sequence[str] = (*["AttnUpBlock2D"] * 3, "UpBlock2D"),
        block_out_channels: Sequence[int] = (224, 448, 672, 896),
        layers_per_block: int = 2,
        mid_block_scale_factor: float = 1,
        downsample_padding: int = 1,
        downsample_type: str = "conv",
        upsample_type: str = "conv",
        dropout: float = 0.0,
        act_fn: str = "silu",
        attention_head_dim: int | None = 8,
        norm_num_groups: int = 32,
        attn_norm_num_groups: int | None = None,
        norm_eps: float = 1e-5,
        resnet_time_scale_shift: str = "default",
        add_attention: bool = True,
        class_embed_type: None = None,
        num_class_embeds: int | None = None,
        num_train_timesteps: None = None,
        self_condition: bool = False,
    ) -> None:
        config = {k: plain_number(v) for k, v in locals().items() if k not in ("self", "__class__")}
        _check_config(config)
        super().__init__()
        self.config: dict[str, Any] = {k: list(v) if isinstance(v, list | tuple) else v for k, v in config.items()}
        if not self_condition:
            del self.config["self_condition"]  # as diffusers has it
        self.self_condition = bool(self_condition)
        widths = list(block_out_channels)
        self.emb_dim = time_embedding_dim or 4 * widths[0]
        scale_shift = resnet_time_scale_shift == "scale_shift"
        resnet = partial(
            ResnetBlock,
            emb_dim=self.emb_dim,
            groups=norm_num_groups,
            eps=norm_eps,
            dropout=dropout,
            scale_shift=scale_shift,
        )
        attention = partial(Attention, head_dim=attention_head_dim, groups=norm_num_groups, eps=norm_eps)

        fourier = time_embedding_type == "fourier"
        self.time_proj = FourierProjection(widths[0]) if fourier else None
        proj = self.time_proj or partial(
            sinusoidal_embedding, dim=widths[0], freq_shift=freq_shift, flip_sin_to_cos=flip_sin_to_cos
        )
        self.time_embedding = TimeEmbedding(proj, (1 + fourier) * widths[0], self.emb_dim)
        self.class_embedding = nn.Embedding(num_class_embeds, self.emb_dim) if num_class_embeds else None

        self.conv_in = nn.Conv2d(in_channels * (1 + self.self_condition), widths[0], 3, padding=1)
        self.down_blocks, self.up_blocks = nn.ModuleList(), nn.ModuleList()
        skips = self._add_down_blocks(resnet, attention)
        scale = mid_block_scale_factor
        groups = attn_norm_num_groups or (None if scale_shift else norm_num_groups)
        self.mid_block = MidBlock(
            [resnet(widths[-1], widths[-1], scale=scale) for _ in range(2)],
            [attention(widths[-1], groups=groups, scale=scale)] if add_attention else [],
        )
        self._add_up_blocks(resnet, attention, skips)
        self.conv_norm_out = nn.GroupNorm(norm_num_groups, widths[0], norm_eps)
        self.conv_out = nn.Conv2d(widths[0], out_channels, 3, padding=1)
        for index, reader in enumerate(self.readers()):
            reader.index = index

    def _add_down_blocks(self, resnet: Callable[..., ResnetBlock], attention: Callable[..., Attention]) -> list[int]:
        """The levels from the image down. Returns: the channels of all that they keep for the way up."""
        config, widths = self.config, self.config["block_out_channels"]
        channels, skips = widths[0], [widths[0]]
        for i, (kind, width) in enumerate(zip(config["down_block_types"], widths, strict=True)):
            inputs = [channels] + [width] * (config["layers_per_block"] - 1)
            attended = inputs if kind == "AttnDownBlock2D" else []
            down = DownBlock([resnet(n, width) for n in inputs], [attention(width) for _ in attended])
            if i < len(widths) - 1 and attended and config["downsample_type"] == "resnet":
                down.downsamplers.append(resnet(width, width, resample=nn.AvgPool2d(2)))
            elif i < len(widths) - 1:
                down.downsamplers.append(Downsample(width, config["downsample_padding"]))
            self.down_blocks.append(down)
            channels = width
            skips += [width] * (len(inputs) + len(down.downsamplers))
        return skips

    def _add_up_blocks(
        self, resnet: Callable[..., ResnetBlock], attention: Callable[..., Attention], skips: list[int]
    ) -> None:
        """The levels from the middle up, which take the skips from the end."""
        config, widths = self.config, self.config["block_out_channels"]
        channels = widths[-1]
        for i, (kind, width) in enumerate(zip(config["up_block_types"], reversed(widths), strict=True)):
            inputs = [n + skips.pop() for n in [channels] + [width] * config["layers_per_block"]]
            attended = inputs if kind == "AttnUpBlock2D" else []
            up = UpBlock([resnet(n, width) for n in inputs], [attention(width) for _ in attended])
            if i < len(widths) - 1 and attended and config["upsample_type"] == "resnet":
                up.upsamplers.append(resnet(width, width, resample=nn.Upsample(scale_factor=2.0)))
            elif i < len(widths) - 1:
                up.upsamplers.append(Upsample(width))
            self.up_blocks.append(up)
            channels = width

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, *, torch_dtype: torch.dtype | None = None, variant: str | None = None
    ) -> "UNet":
        """The model of a UNet2DModel directory of diffusers, or of the unet/ of a pipeline's.

        Args:
            torch_dtype: of the weights; PyTorch's default type if None.
            variant: of the weights' files, such as "fp16". They may be sharded.

        Returns: the model in eval mode, on the CPU.
        Raises: FileNotFoundError if a file is missing. ValueError, naming the file, for a block or an option that UNet
            lacks, and for weights that do not fit the configuration.
        """
        pretrained.check_torch_dtype(torch_dtype)
        return pretrained.build(cls, *pretrained.read_unet(folder, variant), torch_dtype)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json and the weights as safetensors, which UNet2DModel.from_pretrained of diffusers reads."""
        pretrained.write_unet(folder, self.config, self.state_dict())

    def time_arguments(self, t: Tensor) -> dict[str, Tensor]:
        """What `forward` takes that follows from the timesteps t (N,) alone; see fastdiff.sampling."""
        emb = self.time_embedding(t)
        shifts = None if self.class_embedding is not None else project(self, F.silu(emb))
        if shifts is None:
            return {"emb": emb}
        debts = owed(self) if shifts.shape[0] else None
        return {"shifts": shifts if debts is None else torch.cat((shifts, debts.expand(shifts.shape[0], -1)), 1)}

    def levels(self) -> list[Any]:
        """The levels, in the order in which they run."""
        return [*self.down_blocks, self.mid_block, *self.up_blocks]

    def readers(self) -> list[Any]:
        """The modules that take something which is ready before the image, in the order in which they run."""
        return [reader for level in self.levels() for reader in level.readers()]

    @property
    def sample_shape(self) -> tuple[int, int, int] | None:
        """(in_channels, H, W) of one sample, or None if sample_size is None."""
        size = self.config["sample_size"]
        h, w = size if isinstance(size, list) else (size, size)
        return None if size is None else (self._in_channels, h, w)

    @property
    def _in_channels(self) -> int:
        """Those of x, by conv_in, which may be another layer now, also one that does not say."""
        taken = 1 + self.self_condition
        return int(getattr(self.conv_in, "in_channels", taken * self.config["in_channels"])) // taken

    def forward(
        self,
        x: Tensor,
        t: Tensor | float | None,
        class_labels: Tensor | None = None,
        emb: Tensor | None = None,
        shifts: Tensor | None = None,
        x_self_cond: Tensor | None = None,
    ) -> Tensor:
        """The model's prediction at x_t, shape (B, out_channels, H, W).

        Args:
            x: floating (B, in_channels, H, W), H and W multiples of 2^(levels-1).
            t: timesteps, tensor of shape (B,), (1,) or (), or a number; the 0-based index for "positional".
            class_labels: integer (B,), given if and only if num_class_embeds is.
            emb: time_embedding(t), (B, D) or (1, D). t is then ignored, except by "fourier", which still
                divides the output by it.
            shifts: what time_arguments(t) gives of that name, a row for each sample or one for all, in place of emb.
            x_self_cond: an estimate of x_0, shaped like x, if self_condition; None is zeros.

        Raises ValueError for any other shape or type.
        """
        self._check_inputs(x, class_labels, emb, shifts)
        sigma = None
        if self.time_proj is not None or (emb is None and shifts is None):
            t = timesteps_of(t, x)
            sigma = None if self.time_proj is None else t.reshape(-1, 1, 1, 1)
        of_blocks: Embedding
        if shifts is None:
            emb = self.time_embedding(t) if emb is None else emb
            if self.class_embedding is not None:
                emb = emb + self.class_embedding(class_labels)
            of_blocks = F.silu(emb)  # every resnet block starts with it
            # One product costs a copy of all weights, which pays where it saves launches.
            shifts = project(self, of_blocks) if is_fused(of_blocks) else None
        debt = None
        if shifts is not None:
            of_blocks = aheads(self, shifts)
            debt = of_blocks[-1].owed

        x = 2 * x - 1 if self.config["center_input_sample"] else x
        x = with_estimate(x, x_self_cond, self.self_condition)
        h = self.conv_in(x) if debt is None else without_bias(self.conv_in, x)
        skips = [h]
        for block in self.down_blocks:
            skips += block(h, of_blocks)
            h = skips[-1]
        h = self.mid_block(h, of_blocks)
        for block in self.up_blocks:
            count = len(block.resnets)  # type: ignore[arg-type]
            h = block(h, of_blocks, *skips[-count:])
            del skips[-count:]
        out: Tensor = self.conv_out(norm_silu(self.conv_norm_out, h, add=debt))
        return out if sigma is None else (out / sigma).to(out.dtype)

    def _check_inputs(self, x: Tensor, class_labels: Tensor | None, emb: Tensor | None, shifts: Tensor | None) -> None:
        check_image(x, self._in_channels, 2 ** (len(self.down_blocks) - 1))
        batch = x.shape[0]
        if emb is not None and (emb.shape[1:] != (self.emb_dim,) or not fits(emb.shape[0], batch)):
            raise ValueError(f"emb: expected shape ({batch} or 1, {self.emb_dim}), got {describe(emb)}")
        if shifts is not None and (emb is not None or self.class_embedding is not None):
            raise ValueError("shifts: expected None with emb, or with num_class_embeds; got a tensor")
        if shifts is not None and (shifts.ndim != 2 or not fits(shifts.shape[0], batch)):
            raise ValueError(f"shifts: expected shape ({batch} or 1, width), got {describe(shifts)}")
        if self.class_embedding is None:
            if class_labels is not None:
                raise ValueError("class_labels: expected None, as num_class_embeds is None, got labels")
        else:
            check_labels(class_labels, batch)


_CHOICES: dict[str, tuple[Any, ...]] = {
    "center_input_sample": (False, True),
    "time_embedding_type": ("positional", "fourier"),
    "flip_sin_to_cos": (False, True),
    "mid_block_type": ("UNetMidBlock2D",),
    "downsample_padding": (0, 1),
    "downsample_type": ("conv", "resnet"),
    "upsample_type": ("conv", "resnet"),
    "act_fn": ("silu",),
    "resnet_time_scale_shift": ("default", "scale_shift"),
    "add_attention": (False, True),
    "class_embed_type": (None,),
    "num_train_timesteps": (None,),
    "self_condition": (False, True),
}
_POSITIVE_INTS = ("in_channels", "out_channels", "layers_per_block", "norm_num_groups")
_OPTIONAL_INTS = ("time_embedding_dim", "attention_head_dim", "attn_norm_num_groups", "num_class_embeds")


def _positive_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _check_config(c: dict[str, Any]) -> None:
    """Raises the ValueError of the first argument that is not supported."""

    def check(ok: bool, name: str, expected: str) -> None:
        if not ok:
            raise ValueError(f"{name}: expected {expected}, got {c[name]!r}")

    def number(name: str, low: float, high: float) -> None:
        ok = isinstance(c[name], (int, float)) and low <= c[name] < high
        check(ok, name, f"a number in [{low:g}, {high:g})")

    def sequence(name: str, of: Callable[[Any], bool]) -> bool:
        return isinstance(c[name], (list, tuple)) and len(c[name]) > 0 and all(map(of, c[name]))

    for name, choices in _CHOICES.items():
        check(c[name] in choices, name, " or ".join(map(repr, choices)))
    for name in _POSITIVE_INTS:
        check(_positive_int(c[name]), name, "a positive int")
    for name in _OPTIONAL_INTS:
        check(c[name] is None or _positive_int(c[name]), name, "a positive int or None")
    tiny, inf = torch.finfo(torch.float32).tiny, float("inf")
    number("dropout", 0, 1)
    number("norm_eps", tiny, inf)
    number("mid_block_scale_factor", tiny, inf)

    groups, widths = c["norm_num_groups"], c["block_out_channels"]
    ok = sequence("block_out_channels", lambda w: _positive_int(w) and w % groups == 0)
    check(ok, "block_out_channels", f"positive multiples of norm_num_groups={groups}")
    if c["time_embedding_type"] == "positional":
        number("freq_shift", 0, widths[0] // 2)
    levels = len(widths)
    for way in ("Down", "Up"):
        name, kinds = f"{way.lower()}_block_types", (f"{way}Block2D", f"Attn{way}Block2D")
        ok = sequence(name, kinds.__contains__) and len(c[name]) == levels
        check(ok, name, f"{levels} of {kinds}, one for each of block_out_channels")
    ok = widths[-1] % (c["attn_norm_num_groups"] or 1) == 0
    check(ok, "attn_norm_num_groups", f"a divisor of block_out_channels[-1]={widths[-1]}")

    size, factor = c["sample_size"], 2 ** (levels - 1)
    sides = size if isinstance(size, (list, tuple)) else (size, size)
    ok = size is None or (len(sides) == 2 and all(_positive_int(n) and n % factor == 0 for n in sides))
    check(ok, "sample_size", f"None, a positive multiple of {factor} or a pair of them")

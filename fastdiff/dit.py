"""The reference transformer: DiT with adaLN-Zero (Peebles & Xie 2023, arXiv:2212.09748, section 3.2).

Constructor keywords, state_dict keys and arithmetic are those of diffusers' DiTTransformer2DModel, so its weights load.
Tokens are (B, N, D). Weights start as in the paper: every block is the identity, and the output is 0.
"""

from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import ops
from .fused import keys
from .interop import pretrained
from .nn import TimeEmbedding, attention, sinusoidal_embedding
from .ops.layer_norm import is_fused
from .support.cache import Tables
from .support.inputs import check_image, check_labels, describe, timesteps_of, with_estimate
from .support.scalars import integer, plain_number
from .support.shapes import fits

# Of the sinusoids of the timestep.
TIME_CHANNELS = 256
EPS = 1e-6  # of norm1 and norm_out, as published


class DiT(nn.Module):
    """Diffusion transformer on patches of an image: self-attention and an MLP, both modulated by time and class.

    Args:
        num_attention_heads, attention_head_dim: H and d; the width of the tokens is D = H d, a multiple of 4.
        in_channels, out_channels: channels of x and of the output; out_channels None is in_channels.
        num_layers: blocks.
        dropout: probability in [0, 1), after the attention and within the MLP.
        attention_bias: of the queries, keys and values.
        sample_size: side of the image, a multiple of patch_size; read by `sample_shape` and for the positions.
        patch_size: side of a patch.
        num_embeds_ada_norm: number of classes, also 0. There is one more label, the last, which stands for no class.
        norm_eps: of the norm before the MLP.
        self_condition: as of fastdiff.UNet.

    Raises ValueError naming the argument for anything else; of activation_fn, upcast_attention, norm_type and
    norm_elementwise_affine only the default is supported, and norm_num_groups is not read. `config` holds the
    arguments, ready for JSON, and DiT(**config) builds the same model.

    Labels are not dropped in here, unlike in DiTTransformer2DModel: see `fastdiff.recipes.drop_labels`.

    Reference: Peebles & Xie 2023, arXiv:2212.09748, figure 3; diffusers' DiTTransformer2DModel.

    >>> ddpm = DDPM(DiT(4, 32, num_layers=6, num_embeds_ada_norm=10))
    >>> ddpm(x0, class_labels=drop_labels(labels, none=10)).backward()
    """

    self_condition = False  # of networks that an earlier version pickled

    def __init__(
        self,
        num_attention_heads: int = 16,
        attention_head_dim: int = 72,
        in_channels: int = 4,
        out_channels: int | None = None,
        num_layers: int = 28,
        dropout: float = 0.0,
        norm_num_groups: int = 32,
        attention_bias: bool = True,
        sample_size: int = 32,
        patch_size: int = 2,
        activation_fn: str = "gelu-approximate",
        num_embeds_ada_norm: int = 1000,
        upcast_attention: bool = False,
        norm_type: str = "ada_norm_zero",
        norm_elementwise_affine: bool = False,
        norm_eps: float = 1e-5,
        self_condition: bool = False,
    ) -> None:
        config = {k: plain_number(v) for k, v in locals().items() if k not in ("self", "__class__")}
        _check_config(config)
        super().__init__()
        self.config = config
        if not self_condition:
            del config["self_condition"]  # as diffusers has it
        self.self_condition = bool(self_condition)
        self.out_channels = in_channels if out_channels is None else out_channels
        self._width = width = num_attention_heads * attention_head_dim
        self.pos_embed = Patches(in_channels * (1 + self.self_condition), width, patch_size)
        self.transformer_blocks = nn.ModuleList(
            Block(width, num_attention_heads, num_embeds_ada_norm, dropout, attention_bias, norm_eps)
            for _ in range(num_layers)
        )
        self.proj_out_1 = nn.Linear(width, 2 * width)
        self.proj_out_2 = nn.Linear(width, patch_size**2 * self.out_channels)
        self._tables = Tables()
        self._initialise()

    def _initialise(self) -> None:
        """As in the paper's program: Xavier's uniform weights, but 0 where a block and the output begin."""
        for name, part in self.named_modules():
            if isinstance(part, nn.Linear | nn.Conv2d):
                if part.bias is not None:
                    nn.init.zeros_(part.bias)
                if "timestep_embedder" in name:
                    nn.init.normal_(part.weight, std=0.02)
                elif name.endswith("norm1.linear") or name in ("proj_out_1", "proj_out_2"):
                    nn.init.zeros_(part.weight)
                else:
                    nn.init.xavier_uniform_(part.weight.flatten(1))
            elif isinstance(part, nn.Embedding):
                nn.init.normal_(part.weight, std=0.02)

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, *, torch_dtype: torch.dtype | None = None, variant: str | None = None
    ) -> "DiT":
        """The model of a DiTTransformer2DModel directory of diffusers, or of the transformer/ of a pipeline's.

        Args:
            torch_dtype, variant: as in UNet.from_pretrained.

        Returns: the model in eval mode, on the CPU.
        Raises: FileNotFoundError if a file is missing. ValueError, naming the file, for an option that DiT lacks, and
            for weights that do not fit the configuration.
        """
        pretrained.check_torch_dtype(torch_dtype)
        return pretrained.build(cls, *pretrained.read_dit(folder, variant), torch_dtype)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json and the weights as safetensors, which DiTTransformer2DModel.from_pretrained reads."""
        pretrained.write_dit(folder, self.config, self.state_dict())

    def time_arguments(self, t: Tensor) -> dict[str, Tensor]:
        """What `forward` takes that follows from the timesteps t (N,) alone; see fastdiff.sampling."""
        return {"emb": torch.stack([block.norm1.emb.timestep_embedder(t) for block in self._blocks], 1)}

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """(in_channels, H, W) of one sample."""
        size: int = self.config["sample_size"]
        return self.config["in_channels"], size, size

    @property
    def class_embedding(self) -> nn.Embedding:
        """The embedding of the first block. All blocks have as many labels."""
        table: nn.Embedding = self._blocks[0].norm1.emb.class_embedder.embedding_table
        return table

    @property
    def _blocks(self) -> list[Any]:
        return list(self.transformer_blocks)

    def forward(
        self,
        x: Tensor,
        t: Tensor | float | None,
        class_labels: Tensor | None = None,
        emb: Tensor | None = None,
        x_self_cond: Tensor | None = None,
    ) -> Tensor:
        """The model's prediction at x_t, shape (B, out_channels, H, W).

        Args:
            x: floating (B, in_channels, H, W), H and W multiples of patch_size.
            t: timesteps, tensor of shape (B,), (1,) or (), or a number.
            class_labels: integer (B,), from 0 to num_embeds_ada_norm, which stands for no class; None is that for all.
            emb: what time_arguments(t) gives of that name, (B or 1, layers, D). t is then ignored.
            x_self_cond: an estimate of x_0, shaped like x, if self_condition; None is zeros.

        Raises ValueError for any other shape or type.
        """
        self._check_inputs(x, class_labels, emb)
        if emb is None:
            t = timesteps_of(t, x)
        if class_labels is None:
            class_labels = torch.full(x.shape[:1], self.config["num_embeds_ada_norm"], device=x.device)
        patch, (h, w) = self.config["patch_size"], (side // self.config["patch_size"] for side in x.shape[2:])
        tokens = self.pos_embed(with_estimate(x, x_self_cond, self.self_condition))
        # The first operand says how a sum lies in memory: here with channels adjacent, unlike a convolution's output.
        tokens = (self._positions(h, w, x.device) + tokens).to(tokens.dtype)
        conditions: list[Tensor] = []
        for i, block in enumerate(self.transformer_blocks):
            tokens, condition = block(tokens, t, class_labels, None if emb is None else emb[:, i])
            conditions = conditions or [condition]  # the output is modulated by the first block's condition
        shift, scale = self.proj_out_1(F.silu(conditions[0])).chunk(2, dim=1)
        out: Tensor = self.proj_out_2(modulated_norm(tokens, shift, scale, EPS))
        out = out.reshape(-1, h, w, patch, patch, self.out_channels).permute(0, 5, 1, 3, 2, 4)
        return out.reshape(-1, self.out_channels, h * patch, w * patch)

    def _positions(self, h: int, w: int, device: torch.device) -> Tensor:
        """(N, D) of h x w patches, kept: as far apart as they are in an image of sample_size."""
        base = self.config["sample_size"] // self.config["patch_size"]
        build = partial(positions, h, w, self._width, base, device)
        table: Tensor = self._tables.get(f"{h}x{w} on {device}", build, ())
        return table

    def _check_inputs(self, x: Tensor, class_labels: Tensor | None, emb: Tensor | None) -> None:
        check_image(x, self.config["in_channels"], self.config["patch_size"])
        batch, shape = x.shape[0], (len(self.transformer_blocks), self._width)
        given = tuple(getattr(emb, "shape", ()))
        if emb is not None and (given[1:] != shape or not fits(given[0], batch)):
            raise ValueError(f"emb: expected shape ({batch} or 1, {shape[0]}, {shape[1]}), got {describe(emb)}")
        if class_labels is not None:
            check_labels(class_labels, batch)


class Patches(nn.Module):
    """(B, C, H, W) -> (B, N, D): a linear map of each patch, row by row."""

    def __init__(self, channels: int, width: int, patch: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, width, patch, stride=patch)

    def forward(self, x: Tensor) -> Tensor:
        tokens: Tensor = self.proj(x).flatten(2).transpose(1, 2)
        return tokens


class ClassEmbedding(nn.Module):
    """A vector for each class, and one for none."""

    def __init__(self, classes: int, width: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(classes + 1, width)

    def forward(self, labels: Tensor) -> Tensor:
        found: Tensor = self.embedding_table(labels)
        return found


class Conditioning(nn.Module):
    """Time and class, each embedded."""

    def __init__(self, classes: int, width: int) -> None:
        super().__init__()
        proj = partial(sinusoidal_embedding, dim=TIME_CHANNELS, freq_shift=1, flip_sin_to_cos=True)
        self.timestep_embedder = TimeEmbedding(proj, TIME_CHANNELS, width)
        self.class_embedder = ClassEmbedding(classes, width)

    def forward(self, t: Any, labels: Tensor, emb: Tensor | None) -> Tensor:
        """(B, D), the sum of the embeddings; emb, of the time, is made unless it is given."""
        classes: Tensor = self.class_embedder(labels)
        return (self.timestep_embedder(t) if emb is None else emb) + classes


class Modulation(nn.Module):
    """The six vectors that modulate a block, a linear map of the SiLU of the condition (adaLN-Zero)."""

    def __init__(self, classes: int, width: int) -> None:
        super().__init__()
        self.emb = Conditioning(classes, width)
        self.linear = nn.Linear(width, 6 * width)

    def forward(self, t: Any, labels: Tensor, emb: Tensor | None) -> tuple[Tensor, tuple[Tensor, ...]]:
        condition: Tensor = self.emb(t, labels, emb)
        return condition, self.linear(F.silu(condition)).chunk(6, dim=1)


class SelfAttention(nn.Module):
    """softmax(q k^T / sqrt(d)) v over the tokens, H heads, and a linear map of what they give."""

    def __init__(self, width: int, heads: int, dropout: float, bias: bool) -> None:
        super().__init__()
        self.heads = heads
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width, bias) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(width, width), nn.Dropout(dropout)])

    def forward(self, x: Tensor) -> Tensor:
        maps = self.to_q(x), keys(self.to_k, x), self.to_v(x)
        q, k, v = (made.unflatten(-1, (self.heads, -1)).transpose(1, 2) for made in maps)
        out: Tensor = attention(q, k, v).transpose(1, 2).flatten(2)
        for layer in self.to_out:
            out = layer(out)
        return out


class Gelu(nn.Module):
    """GELU by its tanh formula, of a linear map."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.proj(x), approximate="tanh")


class FeedForward(nn.Module):
    """An MLP of one hidden layer, four times as wide."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.net = nn.Sequential(Gelu(width, 4 * width), nn.Dropout(dropout), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(x)
        return out


class Block(nn.Module):
    """x = x + gate attention(norm(x) (1 + scale) + shift), then the same with the MLP; six vectors of the condition."""

    def __init__(self, width: int, heads: int, classes: int, dropout: float, bias: bool, eps: float) -> None:
        super().__init__()
        self.norm1 = Modulation(classes, width)
        self.attn1 = SelfAttention(width, heads, dropout, bias)
        self.ff = FeedForward(width, dropout)
        self.eps = eps

    def forward(self, x: Tensor, t: Any, labels: Tensor, emb: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(x', the condition) from tokens (B, N, D), timesteps (B or 1,), labels (B,), and emb as in Conditioning."""
        condition, (shift, scale, gate, shift_mlp, scale_mlp, gate_mlp) = self.norm1(t, labels, emb)
        y = self.attn1(modulated_norm(x, shift, scale, EPS))
        x, normed = add_modulated_norm(x, y, gate, shift_mlp, scale_mlp, self.eps)
        return torch.addcmul(x, gate_mlp[:, None], self.ff(normed)), condition


def modulated_norm(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """Each token (of B, N, D) with mean 0 and variance 1, times 1 + scale (B, D), plus shift (B, D)."""
    if is_fused(x, shift, scale):
        return ops.layer_norm(x, eps=eps, scale=scale, shift=shift)
    return F.layer_norm(x, x.shape[-1:], eps=eps) * (1 + scale[:, None]) + shift[:, None]


def add_modulated_norm(
    x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """x + gate y, gate (B, D), and its modulated norm."""
    if is_fused(x, y, gate, shift, scale):
        return ops.add_layer_norm(x, y, eps=eps, gate=gate, scale=scale, shift=shift)
    x = torch.addcmul(x, gate[:, None], y)
    return x, modulated_norm(x, shift, scale, eps)


def positions(h: int, w: int, width: int, base: int, device: torch.device) -> Tensor:
    """(h w, D) float32, row by row: [sin(x f), cos(x f), sin(y f), cos(y f)] of columns x and rows y in [0, base),

    with f_k = 10000^(-k / (D / 4)), k = 0 .. D / 4 - 1 (Dosovitskiy et al. 2021, arXiv:2010.11929, for base tokens).
    """
    y, x = (torch.arange(n, dtype=torch.float64, device=device) * (base / n) for n in (h, w))
    k = torch.arange(width // 4, dtype=torch.float64, device=device)
    waves = [at[:, None] * 10000 ** (-k / (width // 4)) for at in (x, y)]
    columns, rows = (torch.cat((wave.sin(), wave.cos()), 1) for wave in waves)
    return torch.cat((columns.repeat(h, 1), rows.repeat_interleave(w, 0)), 1).float()


def _check_config(c: dict[str, Any]) -> None:
    """Raises the ValueError of the first argument that is not supported."""

    def check(ok: bool, name: str, expected: str) -> None:
        if not ok:
            raise ValueError(f"{name}: expected {expected}, got {c[name]!r}")

    only = {
        "activation_fn": "gelu-approximate", "upcast_attention": False, "norm_type": "ada_norm_zero",
        "norm_elementwise_affine": False,
    }  # fmt: skip
    for name, value in only.items():
        check(c[name] == value, name, repr(value))
    for name in ("attention_bias", "self_condition"):
        check(c[name] in (False, True), name, "True or False")
    counts = ("num_attention_heads", "attention_head_dim", "in_channels", "num_layers", "sample_size", "patch_size")
    for name in (*counts, *(("out_channels",) if c["out_channels"] is not None else ())):
        check((integer(c[name]) or 0) > 0, name, "a positive int")
    classes = integer(c["num_embeds_ada_norm"])
    check(classes is not None and classes >= 0, "num_embeds_ada_norm", "an int of at least 0")
    width = c["num_attention_heads"] * c["attention_head_dim"]
    check(width % 4 == 0, "attention_head_dim", "a width num_attention_heads * attention_head_dim divisible by 4")
    check(c["sample_size"] % c["patch_size"] == 0, "sample_size", f"a multiple of patch_size={c['patch_size']}")
    for name, low, high in (("dropout", 0.0, 1.0), ("norm_eps", torch.finfo(torch.float32).tiny, float("inf"))):
        ok = isinstance(c[name], int | float) and not isinstance(c[name], bool) and low <= c[name] < high
        check(ok, name, f"a number in [{low:g}, {high:g})")

"""A small vision transformer and a small character transformer.

Every projection is a linear layer of its own (query, key, value, out, up, down), so heads and
feed-forward neurons can be addressed by name. Weights start as Glorot has them: on the digits
that was worth 3 points of accuracy over Kaiming, which makes attention too sharp.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secateurs.errors import require
from secateurs.zoo.networks import Shape, network, scaled


class Attention(nn.Module):
    """Multi-head self-attention (Vaswani et al., arXiv 1706.03762)."""

    def __init__(self, dim: int, num_heads: int, causal: bool) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.causal = num_heads, dim // num_heads, causal
        self.query = nn.Linear(dim, dim)
        self.key = nn.Linear(dim, dim)
        self.value = nn.Linear(dim, dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(N, T, dim) -> (N, T, dim)."""
        query, key, value = (
            projection(x).unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)
            for projection in (self.query, self.key, self.value)
        )
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=self.causal)
        result: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return result


class FeedForward(nn.Module):
    """down(gelu(up(x)))."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.up = nn.Linear(dim, hidden)
        self.gelu = nn.GELU()
        self.down = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(N, T, dim) -> (N, T, dim)."""
        result: Tensor = self.down(self.gelu(self.up(x)))
        return result


class GatedFeedForward(nn.Module):
    """down(silu(gate(x)) · up(x)) (Shazeer, arXiv 2002.05202)."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.gate = nn.Linear(dim, hidden)
        self.up = nn.Linear(dim, hidden)
        self.down = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(N, T, dim) -> (N, T, dim)."""
        result: Tensor = self.down(F.silu(self.gate(x)) * self.up(x))
        return result


class TransformerBlock(nn.Module):
    """Attention and feed-forward, each normalised before and added to its input."""

    def __init__(
        self, dim: int, num_heads: int, hidden: int, causal: bool = False, gated: bool = False
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attention = Attention(dim, num_heads, causal)
        self.norm2 = nn.LayerNorm(dim)
        self.feed_forward = (GatedFeedForward if gated else FeedForward)(dim, hidden)

    def forward(self, x: Tensor) -> Tensor:
        """(N, T, dim) -> (N, T, dim)."""
        x = x + self.attention(self.norm1(x))
        total: Tensor = x + self.feed_forward(self.norm2(x))
        return total


class VisionTransformer(nn.Module):
    """Patches, a learned position each, transformer blocks, the mean token, a linear layer."""

    def __init__(
        self,
        inputs: Shape,
        patch: int,
        dim: int,
        heads: int,
        depth: int,
        hidden: int,
        classes: int,
        gated: bool = False,
    ) -> None:
        super().__init__()
        self.grid = (inputs[1] // patch, inputs[2] // patch)
        self.patches = nn.Conv2d(inputs[0], dim, patch, stride=patch)
        self.positions = nn.Parameter(torch.randn(1, dim, *self.grid) * 0.02)
        self.blocks = nn.ModuleList(
            TransformerBlock(dim, heads, hidden, gated=gated) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(dim)
        self.classifier = nn.Linear(dim, classes)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, classes); at other sizes positions are interpolated."""
        x = self.patches(x)
        positions: Tensor = self.positions
        if x.shape[-2:] != self.grid:
            positions = F.interpolate(positions, x.shape[-2:], mode="bicubic", antialias=True)
        x = (x + positions).flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.classifier(self.norm(x).mean(1))
        return logits


@network("vit-tiny", inputs=(1, 8, 8), init="glorot-normal")
def vit(
    inputs: Shape,
    classes: int,
    width: float = 1.0,
    *,
    patch: int = 0,
    dim: int = 48,
    heads: int = 4,
    depth: int = 4,
    hidden: int = 192,
    gated: bool = False,
) -> nn.Module:
    """A small vision transformer (after arXiv 2010.11929, with the mean token as its output).

    Args:
        patch: side of a patch, in pixels; 0 for the largest power of two, 2 to 16, that is at
            most a seventh of the image's side.
        dim: width of the residual stream at width 1, a multiple of `heads`.
        heads: of the attention; their number does not change with the width, their size does.
        depth: blocks.
        hidden: neurons of a feed-forward layer at width 1.
        gated: whether these are gated, silu(gate(x)) · up(x).
    """
    dim = _stream(dim, heads, depth, hidden, width)
    patch = patch or _patch(min(inputs[1:]))
    divides = inputs[1] % patch == 0 and inputs[2] % patch == 0
    require(divides, "patch", patch, f"a divisor of the image's sides {inputs[1:]}")
    neurons = scaled(hidden, width)
    return VisionTransformer(inputs, patch, dim, heads, depth, neurons, classes, gated)


def _patch(side: int) -> int:
    patch = 2
    while patch < 16 and patch * 2 * 7 <= side:
        patch *= 2
    return patch


def _stream(dim: int, heads: int, depth: int, hidden: int, width: float) -> int:
    for name, value in (("dim", dim), ("heads", heads), ("depth", depth), ("hidden", hidden)):
        require(value >= 1, name, value, "at least 1")
    require(dim % heads == 0, "dim", dim, f"a multiple of heads={heads}")
    return heads * scaled(dim // heads, width)


class CharTransformer(nn.Module):
    """Tokens and positions embedded, causal transformer blocks, a linear layer."""

    def __init__(
        self, length: int, dim: int, heads: int, depth: int, hidden: int, vocabulary: int
    ) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, dim)
        self.positions = nn.Embedding(length, dim)
        for table in (self.tokens, self.positions):
            nn.init.normal_(table.weight, std=0.02)
        self.blocks = nn.ModuleList(
            TransformerBlock(dim, heads, hidden, causal=True) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(dim)
        self.classifier = nn.Linear(dim, vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        """(N, T) token numbers, T at most the length built for -> (N, T, vocabulary)."""
        x = self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.classifier(self.norm(x))
        return logits


@network("char-transformer", inputs=(128,), classes=256, kind="language", init="glorot-normal")
def char_transformer(
    inputs: Shape,
    classes: int,
    width: float = 1.0,
    *,
    dim: int = 64,
    heads: int = 4,
    depth: int = 4,
    hidden: int = 256,
) -> nn.Module:
    """A small causal transformer over characters or bytes.

    Args:
        dim, heads, depth, hidden: as in `vit`.
    """
    dim = _stream(dim, heads, depth, hidden, width)
    return CharTransformer(inputs[0], dim, heads, depth, scaled(hidden, width), classes)

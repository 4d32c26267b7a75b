"""Pictures as tiles of a canvas, and crops that stay inside one of them.

A canvas of side S has g tiles along a side; where g does not divide S, the first S mod g of them
have one pixel more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from secateurs.errors import described, library, require

Resize = Literal["bilinear", "area", "nearest"]


def check_grid(grid: int, side: int) -> None:
    """Refuse a grid whose tiles would have no pixel."""
    require(1 <= grid <= side, "grid", grid, f"1 to {side}, the side of a canvas")


def edges(side: int, grid: int) -> list[tuple[int, int]]:
    """Where tiles begin and end along a side; the first ones are a pixel larger if need be."""
    small, larger = divmod(side, grid)
    sizes = [small + (place < larger) for place in range(grid)]
    return list(pairwise(accumulate([0, *sizes])))


def pixels_of(sample: Any) -> Tensor:
    """A picture as (C, H, W): of tensors (H, W) or (C, H, W), arrays (H, W) or (H, W, C), PIL.

    Raises:
        InputError: it is no picture.
    """
    if not isinstance(sample, Tensor):
        array = np.array(sample)
        numeric = array.dtype.kind in "uif" and array.ndim in (2, 3)
        told = described(f"a {type(sample).__name__}")
        require(numeric, "samples", told, "pictures: tensors, arrays or PIL images")
        sample = torch.from_numpy(array)
        sample = sample.permute(2, 0, 1) if sample.ndim == 3 else sample
    told = described(f"a sample of shape {tuple(sample.shape)}")
    require(sample.ndim in (2, 3), "samples", told, "pictures, (H, W) or (C, H, W)")
    pixels = sample[None] if sample.ndim == 2 else sample
    return pixels if pixels.dtype == torch.uint8 else pixels.float()


def square(pixels: Tensor) -> Tensor:
    """The middle of a picture, as high as wide."""
    height, width = pixels.shape[-2:]
    size = min(height, width)
    top, left = (height - size) // 2, (width - size) // 2
    return pixels[..., top : top + size, left : left + size]


def resized(pixels: Tensor, size: tuple[int, int], how: Resize = "bilinear") -> Tensor:
    """A picture (C, H, W) at another size; bilinear is antialiased. Bytes stay bytes."""
    if pixels.shape[-2:] == size:
        return pixels
    made = F.interpolate(pixels[None].float(), size, mode=how,
                         **({"antialias": True} if how == "bilinear" else {}))[0]  # fmt: skip
    return made.round().clamp(0, 255).to(torch.uint8) if pixels.dtype == torch.uint8 else made


def composed(pictures: Sequence[Tensor], grid: int, side: int, how: Resize = "bilinear") -> Tensor:
    """g² pictures (C, H, W) on a canvas (C, side, side), row by row, each whole.

    Of pictures that are no squares, the middle.

    Raises:
        InputError: not g² pictures, or of different kinds.
    """
    check_grid(grid, side)
    require(len(pictures) == grid**2, "pictures", len(pictures), f"{grid**2}, one a tile")
    kinds = {(len(p), p.dtype) for p in pictures}
    told = described(f"pictures of {len(kinds)} kinds")
    require(len(kinds) == 1, "samples", told, "as many channels and one dtype in all")
    places = edges(side, grid)
    canvas = pictures[0].new_empty(len(pictures[0]), side, side)
    for number, picture in enumerate(pictures):
        (top, bottom), (left, right) = places[number // grid], places[number % grid]
        tile = resized(square(picture), (bottom - top, right - left), how)
        canvas[:, top:bottom, left:right] = tile
    return canvas


@dataclass(frozen=True)
class TileCrop:
    """Of a canvas one tile, at random, and a random resized crop inside it, maybe mirrored.

    It draws from torch's generator, as torchvision's transforms do. With a grid of 1 it is
    `torchvision.transforms.RandomResizedCrop` and a flip.

    Attributes:
        grid: tiles along a side of the canvas.
        size: side of what comes out; None for that of the canvas.
        scale: of the crop's area, a share of the tile's.
        ratio: of its width to its height.
        flip: probability that it is mirrored.
    """

    grid: int
    size: int | None = None
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5

    def __post_init__(self) -> None:
        require(self.grid >= 1, "grid", self.grid, "at least 1")
        require(self.size is None or self.size >= 1, "size", self.size, "at least 1, or none")
        low, high = self.scale
        require(0 < low <= high <= 1, "scale", self.scale, "two shares, the smaller first")
        require(0 < self.ratio[0] <= self.ratio[1], "ratio", self.ratio, "two, the smaller first")
        require(0 <= self.flip <= 1, "flip", self.flip, "a probability")

    def __call__(self, canvas: Tensor) -> Tensor:
        """(C, S, S) -> (C, size, size)."""
        transforms = library("torchvision.transforms", "vision")
        side = canvas.shape[-1]
        check_grid(self.grid, side)
        tile = canvas
        if self.grid > 1:
            number = int(torch.randint(self.grid**2, ()))
            places = edges(side, self.grid)
            (top, bottom), (left, right) = places[number // self.grid], places[number % self.grid]
            tile = canvas[:, top:bottom, left:right]
        draw = transforms.RandomResizedCrop.get_params
        top, left, height, width = draw(tile, list(self.scale), list(self.ratio))
        crop = tile[:, top : top + height, left : left + width]
        size = self.size or side
        made = resized(crop, (size, size))
        mirrored = self.flip > 0 and float(torch.rand(())) < self.flip
        return made.flip(-1) if mirrored else made

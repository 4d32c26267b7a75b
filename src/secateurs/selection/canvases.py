"""A small data set whose images are canvases: g × g whole pictures of one class, side by side.

A canvas is what is stored; a training draws one of its tiles at a time and crops inside that
(`secateurs.selection.tiles.TileCrop`). On disk it is a folder: the images, or one file of tensors,
and a manifest that names the class of every canvas and the samples it was made of.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from secateurs.errors import InputError, described, library, require
from secateurs.outcome import check_output_folder
from secateurs.selection.tiles import check_grid, pixels_of
from secateurs.state import read_tensors, write_json, write_tensors

MANIFEST, TENSORS = "manifest.json", "canvases.safetensors"
Format = Literal["png", "jpeg", "tensors"]


@dataclass(frozen=True)
class Canvases(Dataset[tuple[Tensor, int]]):
    """Images, each with a class; a torch data set of (image, class), images as float32.

    Bytes become numbers in [0, 1].

    Attributes:
        images: (n, C, S, S), bytes or float32.
        labels: (n,), int64.
        grid: g, tiles along a side.
        sources: of every canvas the ids of its pictures, row by row.
        transform: what is done to an image that is read, such as a
            `secateurs.selection.tiles.TileCrop`.
    """

    images: Tensor
    labels: Tensor
    grid: int
    sources: tuple[tuple[Any, ...], ...]
    transform: Callable[[Tensor], Tensor] | None = None

    def __post_init__(self) -> None:
        require(self.images.ndim == 4, "images", described(f"shape {tuple(self.images.shape)}"),
                "(canvases, channels, side, side)")  # fmt: skip
        check_grid(self.grid, self.side)
        count = len(self.images)
        told = described(f"{len(self.labels)} labels, {len(self.sources)} sources")
        fits = len(self.labels) == len(self.sources) == count
        require(fits, "canvases", told, f"one of each for {count} images")

    @property
    def side(self) -> int:
        """S, pixels."""
        return int(self.images.shape[-1])

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = self.images[index]
        image = image.float() / 255 if image.dtype == torch.uint8 else image
        image = self.transform(image) if self.transform is not None else image
        return image, int(self.labels[index])

    def with_transform(self, transform: Callable[[Tensor], Tensor] | None) -> Canvases:
        """The same images, read through another transform."""
        return replace(self, transform=transform)

    # ------------------------------------------------------------ on disk

    def write(self, folder: str | Path, format: Format = "png", quality: int = 95) -> Path:
        """Write a folder, which appears whole or not at all.

        Args:
            format: of the images: ``png`` and ``jpeg`` take bytes, or numbers in [0, 1], which
                are rounded to bytes, of 1 or 3 channels; ``tensors`` takes all, exactly.
            quality: of JPEG.

        Raises:
            InputError: the folder is not empty, or the images are none of these.
        """
        require(format in ("png", "jpeg", "tensors"), "format", format, "png, jpeg or tensors")
        require(1 <= quality <= 100, "quality", quality, "1 to 100")
        target = Path(folder)
        check_output_folder(target)
        partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            if format == "tensors":
                write_tensors(partial / TENSORS, {"images": self.images}, {})
                files = [None] * len(self)
            else:
                files = self._write_images(partial, format, quality)
            canvases = [
                {"file": file, "class": int(label), "sources": list(sources)}
                for file, label, sources in zip(files, self.labels, self.sources, strict=True)
            ]
            facts = {"grid": self.grid, "side": self.side, "format": format,
                     **({"quality": quality} if format == "jpeg" else {})}  # fmt: skip
            write_json(partial / MANIFEST, {**facts, "canvases": canvases})
            if target.exists():
                target.rmdir()
            os.replace(partial, target)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        return target

    def _write_images(self, folder: Path, format: Format, quality: int) -> list[Any]:
        image = library("PIL.Image", "vision")
        pixels = self.images
        if pixels.dtype != torch.uint8:
            inside = bool(((pixels >= 0) & (pixels <= 1)).all())
            told = described(f"numbers from {float(pixels.min()):.3g} to {float(pixels.max()):.3g}")
            require(inside, "images", told, f"numbers in [0, 1] for {format}, or format='tensors'")
            pixels = (pixels * 255).round().to(torch.uint8)
        channels = pixels.shape[1]
        require(channels in (1, 3), "images", described(f"{channels} channels"),
                f"1 or 3 for {format}, or format='tensors'")  # fmt: skip
        options = {"quality": quality} if format == "jpeg" else {}
        files = []
        for number, (canvas, label) in enumerate(zip(pixels, self.labels, strict=True)):
            file = f"{int(label)}/{number:06}.{format}"
            (folder / file).parent.mkdir(exist_ok=True)
            array = canvas[0].numpy() if channels == 1 else canvas.permute(1, 2, 0).numpy()
            image.fromarray(np.ascontiguousarray(array)).save(folder / file, format, **options)
            files.append(file)
        return files

    @staticmethod
    def read(folder: str | Path) -> Canvases:
        """What `write` wrote.

        Raises:
            InputError: no such folder, a manifest without a grid, an image that is missing.
        """
        where = Path(folder)
        path = where / MANIFEST
        require(path.is_file(), "folder", str(folder), f"a folder with {MANIFEST}")
        try:
            told = json.loads(path.read_text())
            rows, grid, side = told["canvases"], int(told["grid"]), int(told["side"])
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
            raise InputError("manifest", str(path), f"grid, side and canvases ({error})") from None
        if told.get("format") == "tensors":
            images = read_tensors(where / TENSORS)[0]["images"]
        else:
            images = torch.stack([_read_image(where / row["file"]) for row in rows])
        shape = described(f"images of shape {tuple(images.shape)}")
        require(images.shape[0] == len(rows) and images.shape[-1] == side, "manifest", shape,
                f"{len(rows)} images of side {side}, as it says")  # fmt: skip
        labels = torch.tensor([row["class"] for row in rows])
        return Canvases(images, labels, grid, tuple(tuple(row["sources"]) for row in rows))


def _read_image(path: Path) -> Tensor:
    image = library("PIL.Image", "vision")
    require(path.is_file(), "image", str(path), "a file that the manifest names")
    try:
        pixels = np.array(image.open(path))
    except OSError as error:
        raise InputError("image", str(path), f"a picture ({error})") from None
    return pixels_of(pixels)

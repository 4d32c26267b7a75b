"""Small pictures of samples, as data URIs: from the data set, from files, or from the embedding."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from secateurs.errors import InputError, described, library, require
from secateurs.selection.embeddings import Array, Embeddings

SIDE = 72
"""Pixels of the longer side; smaller pictures keep their size."""
LOOKED_AT = 10_000
"""Rows whose picture is looked for before there is anything to show."""


def check_pictures(source: Embeddings, images: str | None) -> None:
    """Refuse what `images` names, if there is no such thing.

    Raises:
        InputError: neither a column nor a shape that the embeddings have.
    """
    if images is None or shows_embeddings(source, images):
        return
    columns = ", ".join(source.columns) or "there are none"
    wanted = f"a column ({columns}), a shape of {source.width} numbers such as 8x8"
    raise InputError("images", images, f"{wanted}, or a data set such as digits")


def shows_embeddings(source: Embeddings, images: str) -> bool:
    """Whether `images` is a column of the embeddings, or a shape that they have."""
    shape = _shape(images)
    return images in source.columns or (shape is not None and int(np.prod(shape)) == source.width)


def check_paths(source: Embeddings, images: str | None) -> None:
    """Refuse a column of paths if there are no files: a look at `LOOKED_AT` rows, evenly spread.

    Raises:
        InputError: names the first that is not there.
    """
    if images is None or images not in source.columns:
        return
    chosen = np.unique(np.linspace(0, source.rows - 1, min(source.rows, LOOKED_AT)).astype(int))
    for number, first in enumerate(source.offsets[:-1]):
        own = chosen[(chosen >= first) & (chosen < source.offsets[number + 1])] - first
        for path in source.values(number, images)[own]:
            require(Path(str(path)).is_file(), "images", str(path), "an existing picture")


def _shape(images: str) -> tuple[int, ...] | None:
    found = re.fullmatch(r"(\d+)x(\d+)(?:x([13]))?", images)
    return None if found is None else tuple(int(g) for g in found.groups() if g is not None)


def picture_of(source: Embeddings, images: str | None) -> Callable[[int], str]:
    """A function from a row to its picture; empty where it has none.

    Args:
        images: a column with paths, or the shape of the embedding as a picture; by default the
            samples of the source, where it has any and they are pictures.
    """
    if images is None and source.samples is None:
        return lambda row: ""

    def picture(row: int) -> str:
        if images is None:
            return encoded(source.samples[row])
        number = int(np.searchsorted(source.offsets, row, side="right")) - 1
        place = row - int(source.offsets[number])
        if images in source.columns:
            return _read(str(source.values(number, images)[place]))
        shape, first = _shape(images), 0
        for block in source.shards[number].blocks(8192):
            if place < first + len(block):
                return encoded(np.asarray(block[place - first], np.float32).reshape(shape or -1))
            first += len(block)
        raise InputError("images", row, f"a row of {source.rows}")

    return picture


def _read(path: str) -> str:
    image = library("PIL.Image", "vision")
    require(Path(path).is_file(), "images", path, "an existing picture")
    try:
        return encoded(image.open(path))
    except OSError as error:
        raise InputError("images", path, f"a picture ({error})") from None


def encoded(sample: Any) -> str:
    """A sample as a PNG in a data URI; empty if it is no picture.

    Pictures are PIL images, arrays or tensors (H, W), (C, H, W) or (H, W, C) with 1 or 3
    channels, or the first part of a pair, or ``image`` or ``img`` of a mapping. Numbers that are
    no bytes are stretched from their least to their largest.
    """
    image = library("PIL.Image", "vision")
    if isinstance(sample, Mapping):
        sample = next((sample[k] for k in ("image", "img", "pixels") if k in sample), None)
    elif isinstance(sample, tuple | list) and sample:
        sample = sample[0]
    if isinstance(sample, image.Image):
        picture = sample.convert("RGB")
    else:
        values = sample.detach().cpu().numpy() if isinstance(sample, Tensor) else sample
        pixels = _pixels(values) if isinstance(values, np.ndarray) else None
        if pixels is None:
            return ""
        picture = image.fromarray(pixels)
    picture.thumbnail((SIDE, SIDE))
    stream = io.BytesIO()
    picture.save(stream, "PNG")
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()


def _pixels(values: Array) -> Array | None:
    """Bytes (H, W) or (H, W, 3), or None for what has no such shape."""
    if values.ndim == 3 and values.shape[0] in (1, 3) and values.shape[2] not in (1, 3):
        values = values.transpose(1, 2, 0)
    if values.ndim == 3 and values.shape[2] == 1:
        values = values[:, :, 0]
    if values.ndim != 2 and not (values.ndim == 3 and values.shape[2] == 3):
        return None
    if values.dtype != np.uint8:
        told = described(f"{values.dtype}")
        require(values.dtype.kind in "fiub", "images", told, "numbers")
        low, high = float(values.min()), float(values.max())
        values = ((values - low) / max(high - low, 1e-12) * 255).astype(np.uint8)
    return np.ascontiguousarray(values)

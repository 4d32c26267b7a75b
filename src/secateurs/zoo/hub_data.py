"""Data of the Hugging Face hub, its cache, or a folder on disk, by `datasets`.

``hf:NAME`` is a data set of the hub, a folder written by ``save_to_disk``, or a folder of data
files. What it becomes follows from its columns:

- a column of images, or of nested numbers, and one of labels: classification;
- a column of texts and one of labels: classification by a ``tokenizer`` that must be named;
- a column of texts alone: language, in bytes, or in the tokens of a ``tokenizer``.

Options: ``config`` (of the data set), ``train`` and ``test`` (splits), ``input`` and ``label``
(columns), ``size`` (side of images), ``limit`` (the first training samples), ``tokenizer`` (a name
or folder of transformers), ``block`` (tokens of a sample), ``as=language`` (ignore labels).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from secateurs.errors import InputError, described, require, unknown
from secateurs.zoo.datasets import Data, check_labels, stratified_split, tensor_data
from secateurs.zoo.images import Images, image_transform
from secateurs.zoo.specs import Options, Spec, check_hub_name
from secateurs.zoo.text import byte_tokens, token_data

TEST_SPLITS = ("test", "validation", "valid", "val", "dev")
LABEL_COLUMNS = ("label", "labels", "target", "fine_label", "coarse_label")
INPUT_COLUMNS = ("image", "img", "pixel_values", "text", "sentence", "content", "input")


def hub_data(spec: Spec, options: Options) -> Data:
    """Data of the hub, its cache or a folder; the module says what becomes of which columns.

    Raises:
        InputError: it cannot be had (the reason is told), a column or split is missing, a label
            is out of range, or an option does not apply.
    """
    require(bool(spec.name), "data", spec.text, "hf:NAME or hf:FOLDER")
    config = options.text("config")
    names = {part: options.text(part) for part in ("train", "test")}
    column, label = options.text("input"), options.text("label")
    size, limit = options.integer("size"), options.integer("limit")
    tokenizer, block = options.text("tokenizer"), options.integer("block", 128)
    purpose = options.text("as", "", ("", "classification", "language"))
    options.done()
    assert block is not None
    splits = _read(spec.name, config)
    column, label = _columns(splits, column, label, spec.text)
    train, test = _parts(splits, names, label, spec.text)
    if limit is not None:
        train = train.select(range(min(limit, len(train))))
    for part, rows in (("train", train), ("test", test)):
        empty = described("no samples")
        require(len(rows) > 0, f"data {spec.text} ({part})", empty, "at least one sample")
    texts = _is_text(train.features[column])
    if texts and (purpose == "language" or not label):
        return _language(spec.text, train, test, column, tokenizer, block)
    if not label or purpose == "language":
        have = described(f"columns {', '.join(train.column_names)}")
        raise InputError(f"data {spec.text}", have, "a column of texts, or one of labels")
    labels, classes = _labels(spec.text, train, test, label)
    if texts:
        return _text_classes(spec.text, train, test, column, labels, classes, tokenizer, block)
    if type(train.features[column]).__name__ == "Image":
        return _images(spec.text, train, test, column, labels, classes, size)
    numbers = _numbers(spec.text, train, column), _numbers(spec.text, test, column)
    pairs = list(zip(numbers, labels, strict=True))
    return tensor_data(spec.text, pairs[0], pairs[1], classes=classes)


def _read(name: str, config: str) -> dict[str, Any]:
    """The splits of a data set; one without splits has the name ``all``."""
    import datasets

    check_hub_name("data hf", name)
    folder = Path(name)
    saved = folder / "state.json", folder / "dataset_dict.json"
    try:
        if any(file.is_file() for file in saved):
            found = datasets.load_from_disk(str(folder))
        else:
            found = datasets.load_dataset(str(folder) if folder.exists() else name, config or None)
    except (OSError, ValueError, LookupError, datasets.exceptions.DatasetsError) as error:
        offline = os.environ.get("HF_HUB_OFFLINE") or os.environ.get("HF_DATASETS_OFFLINE")
        reason = str(error).strip().partition("\n")[0]
        hint = "; the hub is not asked, HF_HUB_OFFLINE is set" if offline else ""
        raise InputError(
            "data hf", name, f"a data set of the hub, its cache or a folder ({reason}{hint})"
        ) from None
    return dict(found) if isinstance(found, dict) else {"all": found}


def _parts(splits: dict[str, Any], names: dict[str, str], label: str, text: str) -> tuple[Any, Any]:
    """Training and held-out rows; where there is no held-out split, a fifth is held out."""
    for part, name in names.items():
        if name and name not in splits:
            raise unknown(f"data {text} option {part}", name, splits)
    first = "train" if "train" in splits else next(iter(splits))
    train = splits[names["train"] or first]
    others = [n for n in TEST_SPLITS if n in splits and splits[n] is not train]
    held_out = names["test"] or next(iter(others), "")
    if held_out:
        return train, splits[held_out]
    values = np.asarray(train[label][:]) if label else np.zeros(len(train))
    classes = torch.from_numpy(np.unique(values, return_inverse=True)[1])
    ours, theirs = stratified_split(classes, 0.2)
    return train.select(ours.tolist()), train.select(theirs.tolist())


def _columns(splits: dict[str, Any], column: str, label: str, text: str) -> tuple[str, str]:
    """Names of the columns of inputs and of labels; no label column is ''."""
    features = next(iter(splits.values())).features
    for option, name in (("input", column), ("label", label)):
        if name and name not in features:
            raise unknown(f"data {text} option {option}", name, features)
    if not label:
        marked = [n for n, f in features.items() if type(f).__name__ == "ClassLabel"]
        label = next((n for n in (*marked, *LABEL_COLUMNS) if n in features), "")
    if not column:
        rest = [n for n in features if n != label]
        images = [n for n in rest if type(features[n]).__name__ == "Image"]
        texts = [n for n in rest if _is_text(features[n])]
        likely = [n for n in INPUT_COLUMNS if n in rest]
        column = next(iter([*images, *likely, *(texts if len(texts) == 1 else ())]), "")
        if not column and len(rest) == 1:
            column = rest[0]
    if not column:
        raise InputError(f"data {text}", described(f"columns {', '.join(features)}"), "?input=NAME")
    return column, label


def _is_text(feature: Any) -> bool:
    return getattr(feature, "dtype", None) in ("string", "large_string")


def _labels(text: str, train: Any, test: Any, column: str) -> tuple[tuple[Tensor, Tensor], int]:
    """Labels of both parts, and the number of classes."""
    parts = []
    for rows in (train, test):
        values = np.asarray(rows[column][:])
        whole = values.dtype.kind in "iub"
        shown = described(f"column {column!r} of {values.dtype}")
        require(whole, f"data {text}", shown, "labels that are whole numbers")
        parts.append(torch.as_tensor(values).long())
    first, second = parts
    named = getattr(train.features[column], "num_classes", None)
    classes = int(named or max(int(first.max()), int(second.max())) + 1)
    for part, labels in (("train", first), ("test", second)):
        check_labels(f"data {text} ({part})", labels, classes)
    return (first, second), classes


def _numbers(text: str, rows: Any, column: str) -> Tensor:
    try:
        values = np.asarray(rows.with_format("numpy")[column][:])
        return torch.as_tensor(values.astype(np.float32))
    except (ValueError, TypeError):
        shown = described(f"column {column!r} of {rows.features[column]}")
        raise InputError(
            f"data {text}", shown, "images, texts, or numbers of one shape a sample"
        ) from None


class Rows(Dataset[Any]):
    """(decoded column, label) pairs of a table."""

    def __init__(
        self, rows: Any, column: str, labels: Tensor, decode: Callable[[Any], Any]
    ) -> None:
        self.rows, self.column = rows.select_columns([column]), column
        self.labels, self.decode = labels, decode

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        try:
            return self.decode(self.rows[index][self.column]), int(self.labels[index])
        except OSError as error:
            raise InputError(
                f"data, row {index}", described(f"damaged ({error})"), f"a whole {self.column}"
            ) from None


def as_stored(value: Any) -> Any:
    """A value as the table has it."""
    return value


class Mode:
    """Brings images to one mode of PIL: ``RGB`` or ``L``."""

    def __init__(self, mode: str) -> None:
        self.mode = mode

    def __call__(self, image: Any) -> Any:
        return image if image.mode == self.mode else image.convert(self.mode)


def _images(
    text: str,
    train: Any,
    test: Any,
    column: str,
    labels: tuple[Tensor, Tensor],
    classes: int,
    size: int | None,
) -> Data:
    first, _ = Rows(train, column, labels[0], as_stored)[0]
    channels = 1 if first.mode in ("1", "L", "I", "I;16", "F") else 3
    side = (size, size) if size is not None else (first.height, first.width)
    shape, decode = (channels, *side), Mode("L" if channels == 1 else "RGB")
    transform = image_transform(size, channels)
    parts = [
        Images(Rows(rows, column, y, decode), range(len(y)), transform, shape)
        for rows, y in zip((train, test), labels, strict=True)
    ]
    return Data(parts[0], parts[1], shape, classes, "classification", text)


def load_tokenizer(name: str) -> Any:
    """A tokenizer of transformers by name or folder.

    Raises:
        InputError: it cannot be had.
    """
    import transformers

    try:
        return transformers.AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise InputError(
            "tokenizer", name, f"a name or folder of transformers ({reason})"
        ) from None


def _language(text: str, train: Any, test: Any, column: str, tokenizer: str, block: int) -> Data:
    if not tokenizer:
        parts = ["\n".join(rows[column][:]).encode() for rows in (train, test)]
        streams = [byte_tokens(part) for part in parts]
        return token_data(text, streams[0], streams[1], block=block, vocabulary=256)
    coder = load_tokenizer(tokenizer)
    end = [] if coder.eos_token_id is None else [coder.eos_token_id]
    streams = []
    for rows in (train, test):
        ids = coder(list(rows[column]), add_special_tokens=False)["input_ids"]
        flat = [np.asarray([*one, *end], np.int32) for one in ids]
        streams.append(torch.from_numpy(np.concatenate(flat)))
    return token_data(text, streams[0], streams[1], block=block, vocabulary=len(coder))


class TextCollate:
    """(text, label) samples -> a dictionary of token tensors with ``labels``."""

    def __init__(self, coder: Any, block: int) -> None:
        self.coder, self.block = coder, block

    def __call__(self, samples: Sequence[tuple[str, int]]) -> dict[str, Tensor]:
        texts, labels = zip(*samples, strict=True)
        coded = self.coder(
            list(texts),
            truncation=True,
            max_length=self.block,
            padding="longest",
            return_tensors="pt",
        )
        return {**coded, "labels": torch.tensor(labels)}


def _text_classes(
    text: str,
    train: Any,
    test: Any,
    column: str,
    labels: tuple[Tensor, Tensor],
    classes: int,
    tokenizer: str,
    block: int,
) -> Data:
    if not tokenizer:
        raise InputError(
            f"data {text}", described("texts with labels"), "?tokenizer=NAME, or ?as=language"
        )
    coder = load_tokenizer(tokenizer)
    parts = [Rows(rows, column, y, str) for rows, y in zip((train, test), labels, strict=True)]
    collate = TextCollate(coder, block)
    return Data(parts[0], parts[1], None, classes, "classification", text, collate)

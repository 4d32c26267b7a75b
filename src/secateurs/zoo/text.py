"""Text for next-token prediction: bytes or characters in blocks of equal length."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from secateurs.errors import InputError, described, require
from secateurs.zoo.datasets import Data, as_fetched
from secateurs.zoo.specs import Options, Spec

HELD_OUT = 0.1
"""Share of a text, at its end, that is held out where nothing else is said."""


class TokenBlocks(Dataset[Any]):
    """A token stream cut into blocks; the target of a token is the one after it.

    A loader over it needs ``collate_fn=as_fetched``.

    Args:
        tokens: (n,) integers of any width.
        block: tokens of a sample; the last n - 1 modulo `block` are left out.
    """

    def __init__(self, tokens: Tensor, block: int) -> None:
        self.tokens, self.block = tokens, block
        self._offsets = torch.arange(block + 1)

    def __len__(self) -> int:
        return max(0, len(self.tokens) - 1) // self.block

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        inputs, targets = self.__getitems__([range(len(self))[index]])
        return inputs[0], targets[0]

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """The batch of these blocks: tokens and targets, (N, block) each, int64."""
        places = torch.as_tensor(indices)[:, None] * self.block + self._offsets
        window = self.tokens[places].long()
        return window[:, :-1], window[:, 1:]


def token_data(
    name: str, train: Tensor, test: Tensor | None, *, block: int, vocabulary: int
) -> Data:
    """Language data from token streams.

    Args:
        train: (n,) tokens; where `test` is None its last tenth is held out.
        block: tokens of a sample.

    Raises:
        InputError: a part is shorter than one block and a token.
    """
    if test is None:
        cut = len(train) - max(round(HELD_OUT * len(train)), block + 1)
        train, test = train[: max(cut, 0)], train[max(cut, 0) :]
    parts = TokenBlocks(train, block), TokenBlocks(test, block)
    for part, blocks in zip(("train", "test"), parts, strict=True):
        tokens = described(f"{len(blocks.tokens)} tokens")
        require(len(blocks) > 0, f"data {name} ({part})", tokens, f"more than block={block}")
    return Data(*parts, (block,), vocabulary, "language", name, as_fetched)


def text(spec: Spec, options: Options) -> Data:
    """A text file, or all ``.txt`` files of a folder in the order of their names.

    The last tenth is held out. Options: ``block``, tokens of a sample (128); ``level``, ``byte``
    (a vocabulary of 256) or ``char`` (the characters that occur, sorted); ``tokenizer``, a name
    or folder of transformers, whose tokens it then is.

    Raises:
        InputError: no such file, not UTF-8 (for all but ``byte``), too short, or no tokenizer.
    """
    block = options.integer("block", 128)
    level = options.text("level", "byte", ("byte", "char"))
    tokenizer = options.text("tokenizer")
    options.done()
    assert block is not None
    require(bool(spec.name), "data", spec.text, "text:PATH")
    raw = read_texts(Path(spec.name))
    if tokenizer:
        return _coded(spec, raw, tokenizer, block)
    if level == "byte":
        return token_data(spec.text, byte_tokens(raw), None, block=block, vocabulary=256)
    points = np.frombuffer(_decoded(spec, raw).encode("utf-32-le"), "<u4")
    characters, tokens = np.unique(points, return_inverse=True)
    return token_data(
        spec.text,
        torch.from_numpy(tokens.astype(np.int32)),
        None,
        block=block,
        vocabulary=len(characters),
    )


def _coded(spec: Spec, raw: bytes, tokenizer: str, block: int) -> Data:
    from secateurs.zoo.hub_data import load_tokenizer

    coder = load_tokenizer(tokenizer)
    ids = coder(_decoded(spec, raw), add_special_tokens=False)["input_ids"]
    tokens = torch.tensor(ids, dtype=torch.int32)
    return token_data(spec.text, tokens, None, block=block, vocabulary=len(coder))


def _decoded(spec: Spec, raw: bytes) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"data {spec.name}", described(str(error)), "UTF-8") from None


def byte_tokens(raw: bytes) -> Tensor:
    """The bytes of a text, uint8."""
    return torch.from_numpy(np.frombuffer(raw, np.uint8).copy())


def read_texts(path: Path) -> bytes:
    """A file, or the ``.txt`` files of a folder, one after the other.

    Raises:
        InputError: there is none, or nothing in it.
    """
    files = sorted(path.glob("*.txt")) if path.is_dir() else [path]
    found = bool(files) and all(file.is_file() for file in files)
    require(found, "data text", str(path), "an existing file, or a folder with .txt files")
    raw = b"".join(file.read_bytes() for file in files)
    require(bool(raw), "data text", str(path), "a text that is not empty")
    return raw

"""The sentences of Python's own manual, each with the topic that it belongs to.

Topics of the manual stand in each other: ``compound`` repeats ``function``, ``class`` and ``with``,
``specialnames`` repeats ``customization``. So a fifth of the sentences are there twice, as they are
in any collection of texts, and a sentence belongs to the shortest topic that has it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from secateurs.errors import described, require
from secateurs.zoo.datasets import Data, stratified_split
from secateurs.zoo.pretrained import minilm_folder
from secateurs.zoo.specs import Spec

WORDS = 6, 60
"""Words of a sentence, at least and at most: headings and grammar rules fall out."""
HELD_OUT = 0.2
"""Share of the distinct sentences of every topic that is held out."""

_END = re.compile(r'(?:(?<=[.!?])|(?<=[.!?]["”)]))(?<!e\.g\.)(?<!i\.e\.)\s+(?=["“(]|[A-Z])')
_SENTENCE = re.compile(r'(?:["“(]\S|[A-Z]).*[.!?:]["”)]?')
_NOT_PROSE = re.compile(r"::=|\+--|==")


def sentences_of(text: str) -> list[str]:
    """The sentences of a page of the manual, in order, without marks of emphasis.

    Tables, grammar and code are no sentences: these begin with a capital letter, end with a
    stop or a colon, and have 6 to 60 words.
    """
    least, most = WORDS
    found = []
    for paragraph in re.split(r"\n\s*\n", text):
        joined = re.sub(r"(?<=\w-)\n *(?=\w)", "", paragraph)
        words = re.sub(r"[*`]", "", " ".join(joined.split()))
        for sentence in _END.split(words):
            told = _SENTENCE.fullmatch(sentence) and not _NOT_PROSE.search(sentence)
            if told and least <= len(sentence.split()) <= most:
                found.append(sentence)
    return found


def owners(pages: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """The topic of every distinct sentence: of those that have it the one with the fewest
    sentences, which is the most particular; of equal ones the first by name."""
    owner: dict[str, str] = {}
    for topic in sorted(pages, key=lambda name: (len(pages[name]), name)):
        for sentence in pages[topic]:
            owner.setdefault(sentence, topic)
    return owner


class Sentences(Dataset[Any]):
    """(sentence, number of its topic), with ids, texts and names of topics as `columns`.

    Args:
        columns: ``id``, ``text`` and ``label`` of every sample.
        topics: names by number.
        tokens: of a sentence at most, for the encoder.
    """

    def __init__(
        self, columns: Mapping[str, Sequence[str]], topics: Sequence[str], tokens: int
    ) -> None:
        from tokenizers import Tokenizer

        self.columns, self.topics = columns, list(topics)
        numbers = {name: number for number, name in enumerate(topics)}
        self.numbers = [numbers[name] for name in columns["label"]]
        self.tokenizer = Tokenizer.from_file(str(minilm_folder() / "tokenizer.json"))
        self.tokenizer.enable_truncation(tokens)
        self.tokenizer.enable_padding()  # to the longest of a batch

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> tuple[str, int]:
        return self.columns["text"][index], self.numbers[index]

    def collate(self, samples: Sequence[tuple[str, int]]) -> dict[str, Tensor]:
        """Tokens of a batch, and its topics as ``labels``."""
        coded = self.tokenizer.encode_batch([text for text, _ in samples])
        return {
            "input_ids": torch.tensor([one.ids for one in coded]),
            "attention_mask": torch.tensor([one.attention_mask for one in coded]),
            "labels": torch.tensor([number for _, number in samples]),
        }


def sentence_data(spec: Spec, tokens: int, least: int) -> Data:
    """Sentences of the topics that have at least `least` different ones.

    A fifth of every topic's different sentences is held out, each once. The rest is the
    training part with every repetition, whose id tells topic and place: ``compound/012``. No
    sentence is in both.

    Raises:
        InputError: fewer than two topics are left.
    """
    pages = manual_pages()
    owner = owners(pages)
    distinct = sorted(owner)
    sizes: dict[str, int] = {}
    for sentence in distinct:
        sizes[owner[sentence]] = sizes.get(owner[sentence], 0) + 1
    topics = sorted(name for name, size in sizes.items() if size >= least)
    told = described(f"{len(topics)} topics with least={least} sentences")
    require(len(topics) > 1, f"data {spec.text}", told, "at least two topics")
    own = [sentence for sentence in distinct if sizes[owner[sentence]] >= least]
    numbers = torch.tensor([topics.index(owner[sentence]) for sentence in own])
    _, test_rows = stratified_split(numbers, HELD_OUT)
    held_out = {own[row] for row in test_rows.tolist()}
    parts: dict[bool, dict[str, list[str]]] = {
        side: {"id": [], "text": [], "label": []} for side in (False, True)
    }
    told_already: set[str] = set()
    for topic, sentences in pages.items():
        for place, sentence in enumerate(sentences):
            side = sentence in held_out
            if owner[sentence] not in topics or (side and sentence in told_already):
                continue
            told_already.add(sentence)
            parts[side]["id"].append(f"{topic}/{place:03}")
            parts[side]["text"].append(sentence)
            parts[side]["label"].append(owner[sentence])
    train, test = (Sentences(parts[side], topics, tokens) for side in (False, True))
    return Data(train, test, None, len(topics), "classification", spec.text, train.collate)


def manual_pages() -> dict[str, list[str]]:
    """The sentences of every topic, in alphabetical order."""
    from pydoc_data.topics import topics

    return {name: sentences_of(text) for name, text in sorted(topics.items())}

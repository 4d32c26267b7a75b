"""The topics of Python's own manual, ``pydoc_data.topics`` in the standard library.

As retrieval: find the topic that a first sentence opens. A query is the first sentence of a
topic, its document what follows; mean reciprocal rank over all topics decides. As language: the
bytes of the topics, one topic in ten held out. As sentences: `secateurs.zoo.sentences`.
"""

from __future__ import annotations

import re
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from secateurs.errors import require
from secateurs.task import Metric, Task
from secateurs.zoo.datasets import Data
from secateurs.zoo.pretrained import minilm_folder
from secateurs.zoo.specs import Options, Spec
from secateurs.zoo.text import byte_tokens, token_data

TEMPERATURE = 0.05
"""Of the contrastive loss: cosines are divided by it."""


def topic_pairs() -> list[tuple[str, str]]:
    """(first sentence, the rest) of every topic that has both, in alphabetical order."""
    from pydoc_data.topics import topics

    pairs = []
    for _, text in sorted(topics.items()):
        body = re.sub(r"\*{3,}|={3,}|-{3,}|[*`]", " ", text.partition("\n")[2])
        words = " ".join(body.split())
        first, _, rest = words.partition(". ")
        if len(first.split()) >= 5 and len(rest.split()) >= 30:
            pairs.append((first, rest))
    return pairs


class Pairs(Dataset[Any]):
    """Pairs of texts as tokens."""

    def __init__(self, pairs: list[tuple[str, str]], tokens: int) -> None:
        from tokenizers import Tokenizer

        self.pairs = pairs
        self.tokenizer = Tokenizer.from_file(str(minilm_folder() / "tokenizer.json"))
        self.tokenizer.enable_truncation(tokens)
        self.tokenizer.enable_padding(length=tokens)

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[str, str]:
        return self.pairs[index]

    def collate(self, pairs: list[tuple[str, str]]) -> tuple[dict[str, Tensor], Tensor]:
        """Queries first, their documents behind them; the target is each query's document."""
        texts = [q for q, _ in pairs] + [d for _, d in pairs]
        encoded = self.tokenizer.encode_batch(texts)
        inputs = {
            "input_ids": torch.tensor([e.ids for e in encoded]),
            "attention_mask": torch.tensor([e.attention_mask for e in encoded]),
        }
        return inputs, torch.arange(len(pairs))


def similarities(embeddings: Tensor) -> Tensor:
    """Cosines of queries (first half) with documents (second half), (n, n)."""
    queries, documents = embeddings.chunk(2)
    return queries @ documents.t()


def reciprocal_rank(embeddings: Tensor, target: Tensor) -> Tensor:
    """1 / rank of every query's own document; ties, and what is not a number, count against it."""
    cosines = similarities(embeddings)
    own = cosines.gather(1, target[:, None])
    return 1 / (~(cosines < own)).sum(1).float()


def recalled(embeddings: Tensor, target: Tensor) -> Tensor:
    """Whether a query's own document is the nearest."""
    return (similarities(embeddings).argmax(1) == target).float()


def contrastive(embeddings: Tensor, target: Tensor) -> Tensor:
    """Cross entropy of the right document among those of the batch."""
    return F.cross_entropy(similarities(embeddings) / TEMPERATURE, target)


def topics(spec: Spec, options: Options) -> Data:
    """The retrieval task, ``as=language`` the texts in bytes, ``as=sentences`` labelled sentences.

    Options: ``as``, ``retrieval``, ``language`` or ``sentences``; ``tokens`` of a text (64, of a
    sentence 128); ``block``, bytes of a sample (128); ``least``, sentences of a topic (20). For
    retrieval every third topic is for training, in batches of 16; the others are searched all at
    once.
    """
    purpose = options.text("as", "retrieval", ("retrieval", "language", "sentences"))
    tokens = options.integer("tokens", 128 if purpose == "sentences" else 64)
    block, least = options.integer("block", 128), options.integer("least", 20, least=2)
    options.done()
    assert tokens is not None
    assert block is not None
    assert least is not None
    require(not spec.name, "data", spec.text, "topics, without a path")
    if purpose == "language":
        train, test = topic_bytes()
        return token_data(spec.text, train, test, block=block, vocabulary=256)
    if purpose == "sentences":
        from secateurs.zoo.sentences import sentence_data

        return sentence_data(spec, tokens, least)
    return _retrieval(spec, tokens)


def topic_bytes() -> tuple[Tensor, Tensor]:
    """All topics in alphabetical order as bytes, and apart from them every tenth of them."""
    from pydoc_data.topics import topics

    texts = [text.encode() for _, text in sorted(topics.items())]
    held_out = texts[5::10]
    train = [text for i, text in enumerate(texts) if i % 10 != 5]
    return byte_tokens(b"\n".join(train)), byte_tokens(b"\n".join(held_out))


def _retrieval(spec: Spec, tokens: int) -> Data:
    pairs = topic_pairs()
    train = Pairs(pairs[::3], tokens)
    test = Pairs([p for i, p in enumerate(pairs) if i % 3], tokens)
    loaders = (
        DataLoader(train, 16, shuffle=True, collate_fn=train.collate),
        DataLoader(test, len(test), collate_fn=test.collate),
    )
    example, _ = test.collate(test.pairs[:1])
    task = Task(
        model=torch.nn.Identity(),
        train=loaders[0],
        evaluate=loaders[1],
        loss=contrastive,
        metrics={"mrr": Metric(reciprocal_rank), "recall@1": Metric(recalled)},
        example_inputs=example,
        primary="mrr",
    )
    return Data(train, test, (tokens,), None, "language", spec.text, train.collate, task)

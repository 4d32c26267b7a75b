"""The page of a selection: what it says, which pictures it shows, what it refuses."""

import base64
import io

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch.utils.data import TensorDataset

import secateurs as sc
from secateurs.errors import InputError
from secateurs.report import figures
from secateurs.report.pictures import encoded, picture_of
from secateurs.report.selection import write_selection
from secateurs.report.texts import LONGEST, text_of
from secateurs.selection.sources import from_arrays

from .test_html import HOSTILE, read

pytest.importorskip("plotly")
image = pytest.importorskip("PIL.Image")


@pytest.fixture
def selection():
    images, labels = load_digits(return_X_y=True)
    images, labels = np.concatenate([images, images[:9]]), np.concatenate([labels, labels[:9]])
    return sc.select(images, "density", 0.25, labels=labels, clusters=10, epsilon=1e-5)


def pictures(page):
    return [attrs["src"] for tag, attrs in page.tags if tag == "img"]


def opened(uri):
    assert uri.startswith("data:image/png;base64,")
    return image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))


def test_the_page_says_what_stays(tmp_path, selection):
    page = read(write_selection(tmp_path / "a.html", selection, title="digits", images="8x8",
                                environment={"torch": "2.9"}))  # fmt: skip
    kept = {row["class"]: row["kept"] / row["rows"] for row in selection.by_class()}
    least, most = min(kept, key=kept.get), max(kept, key=kept.get)
    for words in (
        "452 of 1 806 samples stay, 25.0 %.",
        f"Class {least} keeps the least",
        f"class {most} the most",
        "Duplicates 9 0.50 % of all",
        "Budget keep=0.25 asked 25.0 % reached 25.0 % ✓ kept",
        "Balance of classes",
        "Nearest and farthest samples",
        "pairs 1 to 3",
        "Effective pruning of web-scale datasets",
        "torch 2.9",
    ):
        assert words in page.text, words
    assert len(page.figures) == 2
    shown = pictures(page)
    assert len(shown) == 6 * 8 + 9 * 2
    nearest = selection.examples()[0]["nearest"][0]
    pixels = np.asarray(opened(shown[0]))
    digit = load_digits().images[nearest["row"]]
    assert np.abs(pixels / 255 - digit / digit.max()).max() < 0.01


def test_without_pictures_there_are_ids_and_names_stay_names(tmp_path):
    rows = np.random.default_rng(0).normal(size=(60, 4))
    ids = np.array([HOSTILE + str(n) for n in range(60)])
    made = sc.select(rows, "density", 0.5, ids=ids, clusters=3, epsilon=None)
    page = read(write_selection(tmp_path / "a.html", made, title=HOSTILE))
    assert pictures(page) == []
    assert "<script>alert(1)" not in page.all
    assert "What stays of each class" not in page.text


def test_texts_stand_where_pictures_do(tmp_path):
    rows = np.random.default_rng(0).normal(size=(60, 4))
    rows[1] = rows[0]
    texts = np.array([f"sentence {n} {HOSTILE} " + "word " * (100 * (n == 2)) for n in range(60)])
    columns = {"text": texts, "other": np.array([f"other {n}" for n in range(60)])}
    made = sc.select(rows, "density", 0.5, scores=columns, clusters=2, epsilon=1e-6)
    page = read(write_selection(tmp_path / "a.html", made))
    assert pictures(page) == []
    assert "<script>alert(1)" not in page.all
    largest = made.examples()[0]
    pairs = zip(largest["nearest"], largest["farthest"], strict=True)
    captions = [f"{e['row']} · {e['distance']:.3f}" for pair in pairs for e in pair]
    places = [page.text.index(caption) for caption in captions[:8]]
    assert places == sorted(places), "the nearest on the left, the farthest on the right"
    nearest = largest["nearest"][0]["row"]
    assert f"sentence {nearest} " in page.text[: places[0]]
    ((goes, like, _),) = made.pairs
    assert f"{goes} · cosine 1.0000" in page.text
    assert f"{like} · like this one" in page.text
    words = text_of(made.source, None)
    assert len(words(2)) <= LONGEST
    assert words(2).endswith("…")
    assert str(texts[2]).startswith(words(2)[:-1])
    assert words(59) == str(texts[59])
    assert "other 5" not in page.text
    page = read(write_selection(tmp_path / "a.html", made, text="other"))
    assert f"other {nearest} " in page.text
    with pytest.raises(InputError, match="text: got 'texts'.*did you mean 'text'"):
        write_selection(tmp_path / "a.html", made, text="texts")


def test_texts_are_found_in_their_shard():
    ids = np.array([f"row {n}" for n in range(7)])
    source = from_arrays(np.eye(7), columns={"text": ids}, rows=3)
    words = text_of(source, None)
    assert [words(n) for n in (6, 0, 3, 5)] == ["row 6", "row 0", "row 3", "row 5"]
    assert text_of(from_arrays(np.eye(2)), None)(1) == ""


def test_pictures_are_found_in_the_data_set_in_files_and_in_the_embedding(tmp_path):
    colours = torch.zeros(4, 3, 9, 9)
    colours[:, 0] = torch.arange(1, 5).view(4, 1, 1) / 4
    data = TensorDataset(colours, torch.tensor([0, 0, 1, 1]))
    made = sc.select(data, "density", 0.5, encoder=lambda b: b.flatten(1) + 0.1, clusters=1)
    found = opened(picture_of(made.source, None)(2))
    assert (found.size, found.mode) == ((9, 9), "RGB")
    for number in range(2):
        image.new("RGB", (300, 150), (number * 200, 0, 0)).save(tmp_path / f"{number}.png")
    paths = np.array([str(tmp_path / f"{number}.png") for number in range(2)])
    source = sc.select(np.eye(2), "density", 1.0, scores={"path": paths}, clusters=1).source
    found = opened(picture_of(source, "path")(1))
    assert found.size == (72, 36)
    assert found.getpixel((0, 0)) == (200, 0, 0)
    assert opened(picture_of(source, "1x2")(1)).getpixel((1, 0)) == 255


def test_what_is_no_picture_has_none():
    assert encoded("a text") == ""
    assert encoded(torch.zeros(5)) == ""
    assert encoded({"text": "x"}) == ""
    assert encoded({"image": image.new("L", (3, 3))}).startswith("data:")
    assert encoded((np.zeros((3, 3), np.uint8), 4)).startswith("data:")


def test_pictures_that_are_not_there_are_refused(tmp_path, selection):
    with pytest.raises(InputError, match="images: got 'path'; accepted: a column"):
        write_selection(tmp_path / "a.html", selection, images="path")
    with pytest.raises(InputError, match="images: got '7x7'"):
        write_selection(tmp_path / "a.html", selection, images="7x7")
    assert not (tmp_path / "a.html").exists()


def test_groups_have_names_until_there_are_many():
    groups = [{"name": str(n), "rows": 10, "kept": n} for n in range(10)]
    few = figures.kept_of_groups(groups, "class")
    assert list(few.data[1].y) == list(range(10))
    assert few.layout.xaxis.ticktext[3] == "3"
    many = figures.kept_of_groups([{**groups[3], "name": HOSTILE}] * 99, "class")
    assert many.layout.xaxis.ticktext is None
    assert "3 of 10 rows stay, 30.0 %" in many.data[0].hovertext[0]
    with pytest.raises(InputError, match="groups"):
        figures.kept_of_groups([], "class")

"""Tiles, crops that stay inside them, and canvases on disk and back."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader
from torchvision.transforms import Compose, RandomHorizontalFlip, RandomResizedCrop

from secateurs.errors import InputError
from secateurs.selection.canvases import MANIFEST, Canvases
from secateurs.selection.tiles import TileCrop, composed, edges, pixels_of


@given(st.integers(1, 64), st.integers(1, 64))
def test_tiles_cover_a_side_and_the_first_are_the_larger(side, grid):
    if grid > side:
        return
    found = edges(side, grid)
    assert [a for a, _ in found] == [0, *(b for _, b in found[:-1])]
    assert found[-1][1] == side
    sizes = [b - a for a, b in found]
    assert sizes == sorted(sizes, reverse=True)
    assert max(sizes) - min(sizes) <= 1
    assert sum(s == max(sizes) for s in sizes) in (side % grid or grid,)


def four(side=16):
    pictures = [torch.full((1, 8, 8), n / 4) for n in range(4)]
    return composed(pictures, 2, side)


def test_crops_never_see_two_tiles_and_all_tiles_are_drawn():
    crop, counts = TileCrop(2, size=8), torch.zeros(4)
    torch.manual_seed(0)
    for canvas in (four(), four(17)):
        for _ in range(500):
            made = crop(canvas)
            assert made.shape == (1, 8, 8)
            value = made.mean()
            assert torch.allclose(made, value.expand_as(made), atol=1e-6)
            counts[round(float(value) * 4)] += 1
    assert float(((counts - 250) ** 2 / 250).sum()) < 16.3, "chi-square, 3 degrees, one in 1000"


def test_a_grid_of_one_is_torchvisions_crop():
    image = torch.rand(3, 24, 24)
    theirs = Compose([RandomResizedCrop(16, scale=(0.2, 1.0)), RandomHorizontalFlip(0.5)])
    ours = TileCrop(1, size=16, scale=(0.2, 1.0))
    for seed in range(50):
        torch.manual_seed(seed)
        expected = theirs(image)
        torch.manual_seed(seed)
        assert torch.allclose(ours(image), expected, atol=1e-6)


def test_a_crop_of_the_whole_tile_is_the_tile():
    canvas = torch.arange(64.0).reshape(1, 8, 8)
    crop = TileCrop(2, size=4, scale=(1.0, 1.0), ratio=(1.0, 1.0), flip=0.0)
    torch.manual_seed(0)
    seen = {tuple(crop(canvas).flatten().tolist()) for _ in range(100)}
    tiles = {tuple(canvas[0, a : a + 4, b : b + 4].flatten().tolist())
             for a in (0, 4) for b in (0, 4)}  # fmt: skip
    assert seen == tiles


def test_pictures_are_cut_to_their_middle_and_antialiased():
    wide = torch.zeros(1, 4, 8)
    wide[:, :, 2:6] = 1.0
    assert torch.equal(composed([wide] * 4, 2, 8), torch.ones(1, 8, 8))
    stripes = torch.tensor([0, 255], dtype=torch.uint8).repeat(8).expand(1, 16, 16)
    made = composed([stripes] * 4, 2, 8)
    assert made.dtype == torch.uint8
    assert int(made[..., 1:3].float().mean()) in range(110, 145), "stripes blur into grey"
    nearest = composed([stripes] * 4, 2, 8, "nearest")
    assert set(nearest.unique().tolist()) <= {0, 255}


def test_pictures_of_every_kind():
    from PIL import Image

    bytes_ = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    for picture in (bytes_, Image.fromarray(bytes_), torch.from_numpy(bytes_).permute(2, 0, 1)):
        assert torch.equal(pixels_of(picture), torch.from_numpy(bytes_).permute(2, 0, 1))
    assert pixels_of(torch.zeros(4, 5)).shape == (1, 4, 5)
    for wrong in (torch.zeros(4), np.zeros(3), "a word", object()):
        with pytest.raises(InputError, match="samples"):
            pixels_of(wrong)


@pytest.fixture
def canvases():
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (6, 3, 8, 8), generator=generator).to(torch.uint8)
    sources = tuple(tuple(range(4 * n, 4 * n + 4)) for n in range(6))
    return Canvases(images, torch.tensor([0, 0, 1, 1, 2, 2]), 2, sources)


def test_bytes_go_to_disk_and_come_back(canvases, tmp_path):
    canvases.write(tmp_path / "png")
    canvases.write(tmp_path / "tensors", "tensors")
    for name in ("png", "tensors"):
        read = Canvases.read(tmp_path / name)
        assert torch.equal(read.images, canvases.images)
        assert torch.equal(read.labels, canvases.labels)
        assert (read.grid, read.sources) == (2, canvases.sources)
    assert len(list((tmp_path / "png").glob("*/*.png"))) == 6
    canvases.write(tmp_path / "jpeg", "jpeg", quality=90)
    told = json.loads((tmp_path / "jpeg" / MANIFEST).read_text())
    assert (told["quality"], told["grid"], told["side"]) == (90, 2, 8)
    assert Canvases.read(tmp_path / "jpeg").images.shape == canvases.images.shape


def test_numbers_are_kept_exactly_as_tensors_and_to_a_byte_as_pictures(tmp_path):
    images = torch.rand(2, 1, 4, 4)
    made = Canvases(images, torch.tensor([0, 1]), 1, (("a",), ("b",)))
    made.write(tmp_path / "tensors", "tensors")
    assert torch.equal(Canvases.read(tmp_path / "tensors").images, images)
    made.write(tmp_path / "png")
    read = Canvases.read(tmp_path / "png")
    assert read.sources == (("a",), ("b",))
    assert torch.allclose(read[1][0], images[1], atol=0.5 / 255 + 1e-6)


def test_it_is_a_data_set_for_torch(canvases):
    loader = DataLoader(canvases.with_transform(TileCrop(2, size=5)), 4, num_workers=0)
    batches = list(loader)
    assert [len(x) for x, _ in batches] == [4, 2]
    assert batches[0][0].shape == (4, 3, 5, 5)
    assert float(batches[0][0].max()) <= 1
    assert torch.cat([y for _, y in batches]).tolist() == canvases.labels.tolist()


def test_bad_input_is_refused(canvases, tmp_path):
    for fields, told in (
        ({"size": 0}, "size"),
        ({"scale": (0.0, 1.0)}, "scale"),
        ({"scale": (1.0, 0.5)}, "scale"),
        ({"ratio": (2.0, 1.0)}, "ratio"),
        ({"flip": 1.5}, "flip"),
    ):
        with pytest.raises(InputError, match=told):
            TileCrop(2, **fields)
    with pytest.raises(InputError, match="grid: got 9"):
        TileCrop(9)(torch.zeros(1, 8, 8))
    with pytest.raises(InputError, match="pictures: got 3"):
        composed([torch.zeros(1, 4, 4)] * 3, 2, 8)
    with pytest.raises(InputError, match="samples: got pictures of 2 kinds"):
        composed([torch.zeros(1, 4, 4)] * 3 + [torch.zeros(3, 4, 4)], 2, 8)
    with pytest.raises(InputError, match="folder"):
        Canvases.read(tmp_path)
    canvases.write(tmp_path / "out")
    with pytest.raises(InputError, match="output folder"):
        canvases.write(tmp_path / "out")
    with pytest.raises(InputError, match="format"):
        canvases.write(tmp_path / "new", "gif")
    negative = Canvases(-torch.ones(1, 1, 4, 4), torch.tensor([0]), 1, ((0,),))
    with pytest.raises(InputError, match="images: got numbers from -1 to -1"):
        negative.write(tmp_path / "new")
    manifest = tmp_path / "out" / MANIFEST
    told = json.loads(manifest.read_text())
    (tmp_path / "out" / told["canvases"][3]["file"]).unlink()
    with pytest.raises(InputError, match=r"image: got .*000003.png"):
        Canvases.read(tmp_path / "out")
    del told["grid"]
    manifest.write_text(json.dumps(told))
    with pytest.raises(InputError, match="manifest: got .*grid"):
        Canvases.read(tmp_path / "out")

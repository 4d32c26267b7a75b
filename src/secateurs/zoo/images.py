"""Images: the digits of scikit-learn, Fashion-MNIST, folders of image files."""

from __future__ import annotations

import gzip
import os
import zlib
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from secateurs.errors import InputError, described, require
from secateurs.zoo.attributes import CLOTHING, EVEN_ODD, choice_of
from secateurs.zoo.datasets import Data, check_labels, stratified_split, tensor_data
from secateurs.zoo.specs import Options, Spec

IMAGENET_MEAN, IMAGENET_DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of the red, green and blue values in [0, 1]: what pretrained networks expect."""


def digits(spec: Spec, options: Options) -> Data:
    """1,797 handwritten digits of 8x8 pixels (UCI, shipped with scikit-learn), standardised.

    Options: ``test``, the share of every class that is held out (0.25, always the same
    samples); ``limit``, the first samples of the training part; those of
    `secateurs.zoo.attributes`, the coarse category being even or odd.
    """
    share, limit = options.fraction("test", 0.25), options.integer("limit")
    chosen = choice_of(options, 10)
    options.done()
    require(not spec.name, "data", spec.text, "digits, without a path")
    table = torch.from_numpy(np.loadtxt(_digits_file(), delimiter=",", dtype=np.float32))
    images, classes = table[:, :-1].reshape(-1, 1, 8, 8), table[:, -1].long()
    train, test = stratified_split(classes, share)
    train = train[:limit]
    parts = (images[train], classes[train]), (images[test], classes[test])
    return chosen(tensor_data(spec.text, *parts, classes=10, standardise=True), EVEN_ODD)


def _digits_file() -> Path:
    """The table in scikit-learn's folder; importing the package would take three seconds."""
    package = find_spec("sklearn")
    assert package is not None
    assert package.origin is not None
    return Path(package.origin).parent / "datasets" / "data" / "digits.csv.gz"


def fashion_mnist(spec: Spec, options: Options) -> Data:
    """60,000 and 10,000 pieces of clothing (Xiao et al., arXiv 1708.07747), standardised.

    Options: ``limit``, the first training images; ``size``, a divisor of 28 to which images are
    average-pooled; those of `secateurs.zoo.attributes`, the coarse categories being tops,
    trousers, shoes and bags.

    Raises:
        InputError: the files are not there, damaged, or do not belong together.
    """
    limit, size = options.integer("limit"), options.integer("size", 28)
    chosen = choice_of(options, 10)
    options.done()
    assert size is not None
    require(28 % size == 0, "option size of fashion-mnist", size, "a divisor of 28")
    folder = _fashion_folder(spec.name)
    train = _idx_pair(folder, "train", limit)
    test = _idx_pair(folder, "t10k")
    train, test = ((_pooled(images, size), labels) for images, labels in (train, test))
    return chosen(tensor_data(spec.text, train, test, classes=10, standardise=True), CLOTHING)


def _fashion_folder(given: str) -> Path:
    if given:
        root = Path(given)
        require(root.is_dir(), "data fashion-mnist", given, "an existing folder")
        places = [root]
    else:
        places = []
        if named := os.environ.get("SECATEURS_DATA"):
            places = [Path(named) / "fashion-mnist", Path(named)]
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        places += [Path("/usr/share/datasets/fashion-mnist"), cache / "secateurs/fashion-mnist"]
    for place in places:
        for folder in (place, place / "FashionMNIST" / "raw"):
            if _idx_file(folder, "train-images-idx3-ubyte") is not None:
                return folder
    raise InputError(
        "data fashion-mnist",
        described("no train-images-idx3-ubyte[.gz] in " + ", ".join(map(str, places))),
        "the files, from 'apt install dataset-fashion-mnist', as fashion-mnist:FOLDER, or in the "
        "folder that SECATEURS_DATA names",
    )


def _idx_file(folder: Path, name: str) -> Path | None:
    for candidate in (folder / f"{name}.gz", folder / name):
        if candidate.is_file():
            return candidate
    return None


def _idx_pair(folder: Path, part: str, limit: int | None = None) -> tuple[Tensor, Tensor]:
    """Images (N, H, W) and labels (N,) of a part."""
    found = []
    for name, rank in ((f"{part}-images-idx3-ubyte", 3), (f"{part}-labels-idx1-ubyte", 1)):
        path = _idx_file(folder, name)
        if path is None:
            raise InputError("file", str(folder / name), "an existing file, or the same with .gz")
        found.append((path, read_idx(path, rank)))
    (image_path, images), (label_path, labels) = found
    if len(images) != len(labels):
        counts = described(f"{len(labels)} labels for {len(images)} images of {image_path.name}")
        raise InputError(f"file {label_path}", counts, "a label for every image")
    require(len(images) > 0, f"file {image_path}", described("no images"), "at least one image")
    check_labels(f"file {label_path}", labels.long(), 10)
    square = images.shape[1:] == (28, 28)
    shown = described(f"images of {images.shape[1]}x{images.shape[2]}")
    require(square, f"file {image_path}", shown, "images of 28x28 pixels")
    return images[:limit], labels[:limit].long()


def read_idx(path: Path, rank: int) -> Tensor:
    """An IDX file of bytes, gzipped or not.

    The format: two zero bytes, the type (8: unsigned bytes), the number of dimensions, each
    dimension as a big-endian 32-bit integer, then the values.

    Args:
        rank: dimensions that the file must have.

    Raises:
        InputError: the file is damaged, truncated, too long, or of another type or rank.
    """
    accepted = f"a whole IDX file of unsigned bytes with {rank} dimension(s)"
    try:
        raw = path.read_bytes()
        if path.suffix == ".gz":
            raw = gzip.decompress(raw)
    except (EOFError, OSError, zlib.error) as error:
        reason = described(f"damaged ({error})")
        raise InputError(f"file {path}", reason, accepted) from None
    start = 4 + 4 * rank
    if len(raw) < start or raw[:4] != bytes([0, 0, 8, rank]):
        raise InputError(f"file {path}", described(f"header {raw[:4].hex()}"), accepted)
    shape = np.frombuffer(raw, ">u4", rank, 4).tolist()
    length = start + int(np.prod(shape, dtype=np.int64))
    if len(raw) != length:
        sizes = described(f"{len(raw)} bytes where its header says {length}")
        raise InputError(f"file {path}", sizes, accepted)
    values = np.frombuffer(raw, np.uint8, offset=start).reshape(shape)
    return torch.from_numpy(values.copy())


def _pooled(images: Tensor, size: int) -> Tensor:
    """(N, 28, 28) bytes -> (N, 1, size, size) in [0, 1]."""
    scaled = images[:, None].float() / 255
    return F.avg_pool2d(scaled, images.shape[-1] // size) if size != images.shape[-1] else scaled


def image_folder(spec: Spec, options: Options) -> Data:
    """A folder of images a class, read on access: shorter side to `size`, centre cropped.

    Values are normalised by ImageNet's mean and deviation. With the folders ``train`` and
    ``test``, ``val`` or ``valid`` inside, those are the parts; otherwise a fifth of each class
    is held out, always the same files. Option ``limit``: training images, drawn once.

    Raises:
        InputError: no such folder, no images, or parts with different classes; on access, a
            file that cannot be read.
    """
    from torchvision.datasets import ImageFolder

    size, limit = options.integer("size", 224), options.integer("limit")
    options.done()
    assert size is not None
    root = Path(spec.name)
    require(bool(spec.name) and root.is_dir(), "data imagefolder", spec.name, "an existing folder")

    def read(folder: Path) -> Any:
        try:
            return ImageFolder(str(folder), loader=read_image)
        except FileNotFoundError as error:
            raise InputError("data imagefolder", str(folder), str(error)) from None

    parts = [root / name for name in ("test", "val", "valid") if (root / name).is_dir()]
    if (root / "train").is_dir():
        require(bool(parts), "data imagefolder", str(root), "a folder 'test' or 'val' by 'train'")
        train, test = read(root / "train"), read(parts[0])
        same = train.classes == test.classes
        shown = described(f"{train.classes} in train, {test.classes} in {parts[0].name}")
        require(same, f"data {root}", shown, "the same classes in both")
        chosen = torch.arange(len(train)), torch.arange(len(test))
    else:
        train = test = read(root)
        chosen = stratified_split(torch.tensor(train.targets), 0.2)
    ours, held_out = chosen
    require(len(held_out) > 0, f"data {root}", described("one image a class"), "at least two")
    if limit is not None:
        drawn = torch.randperm(len(ours), generator=torch.Generator().manual_seed(0))
        ours = ours[drawn[:limit].sort().values]
    transform, shape = image_transform(size), (3, size, size)
    return Data(
        Images(train, ours.tolist(), transform, shape),
        Images(test, held_out.tolist(), transform, shape),
        shape,
        len(train.classes),
        "classification",
        spec.text,
    )


def read_image(path: str) -> Any:
    """An image file as a PIL image in RGB.

    Raises:
        InputError: the file is no image, or a damaged one.
    """
    from PIL import Image

    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError) as error:
        raise InputError(f"file {path}", described(f"damaged ({error})"), "an image") from None


def image_transform(size: int | None, channels: int = 3) -> Callable[[Any], Tensor]:
    """PIL image -> (C, size, size), normalised as pretrained networks expect.

    Args:
        size: the shorter side is brought to it and the centre cut out; None keeps the image.
        channels: 3, or 1 for grey images, whose mean and deviation are the averages.
    """
    from torchvision.transforms import v2

    mean, deviation = list(IMAGENET_MEAN), list(IMAGENET_DEVIATION)
    if channels == 1:
        mean, deviation = [sum(mean) / 3], [sum(deviation) / 3]
    resize = [] if size is None else [v2.Resize(size), v2.CenterCrop(size)]
    transform: Callable[[Any], Tensor] = v2.Compose(
        [
            *resize,
            v2.PILToTensor(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(mean, deviation),
        ]
    )
    return transform


class Images(Dataset[Any]):
    """Some of the (PIL image, label) pairs of a data set, as tensors of one `shape`."""

    def __init__(
        self,
        pairs: Any,
        indices: Sequence[int],
        transform: Callable[[Any], Tensor],
        shape: tuple[int, ...],
    ) -> None:
        self.pairs, self.indices, self.transform, self.shape = pairs, indices, transform, shape

    @property
    def columns(self) -> dict[str, list[str]]:
        """Of images out of files: the path, under the folder the ``id``, and the class's name."""
        files = getattr(self.pairs, "samples", None)
        if files is None:
            return {}
        found = [files[index] for index in self.indices]
        return {
            "id": [os.path.relpath(path, self.pairs.root) for path, _ in found],
            "label": [self.pairs.classes[label] for _, label in found],
            "path": [str(path) for path, _ in found],
        }

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, label = self.pairs[self.indices[index]]
        pixels = self.transform(image)
        if pixels.shape != self.shape:
            shown = described(f"an image of shape {tuple(pixels.shape)}")
            raise InputError("data", shown, f"{self.shape} as the others, or ?size=N")
        return pixels, label

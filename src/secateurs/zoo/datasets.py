"""Data sets by name, and the form all of them take: `Data`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset, default_collate

from secateurs.errors import InputError, described, require, unknown
from secateurs.task import Task, head, split_batch
from secateurs.zoo.specs import Options, Spec, imported_function, parse_spec

Kind = Literal["classification", "language"]
Collate = Callable[[Any], Any]


@dataclass(frozen=True)
class Data:
    """Training and held-out samples, and what a model must know about them.

    Attributes:
        train, test: map-style data sets; `test` is for scoring only.
        inputs: shape of a sample: (C, H, W) of an image, (T,) of tokens; None where it varies.
        classes: number of classes, or the size of the vocabulary; None where it is not known.
        kind: ``classification`` or ``language``.
        name: the spec that makes it again.
        collate: samples -> batch; None for torch's own.
        task: a whole task whose loaders, loss and metrics are to be used as they are.
        heads: of data with several labels a sample, (N, tasks): the number of classes by task,
            whose sum is `classes`.
    """

    train: Dataset[Any]
    test: Dataset[Any]
    inputs: tuple[int, ...] | None
    classes: int | None
    kind: Kind
    name: str
    collate: Collate | None = None
    task: Task | None = None
    heads: Mapping[str, int] | None = None

    def loaders(
        self, batch_size: int = 64, *, seed: int = 0, workers: int = 0
    ) -> tuple[DataLoader[Any], DataLoader[Any]]:
        """A shuffling loader over `train` and an ordered one over `test`; no sample is dropped.

        Args:
            seed: of the order.
            workers: processes that load.
        """
        require(batch_size >= 1, "batch_size", batch_size, "at least 1")
        order = torch.Generator().manual_seed(seed)
        shared: dict[str, Any] = {"collate_fn": self.collate, "num_workers": workers}
        train = DataLoader(self.train, batch_size, shuffle=True, generator=order, **shared)
        return train, DataLoader(self.test, batch_size, **shared)

    def example(self) -> Any:
        """The inputs of one held-out sample, as a batch of 1."""
        if self.task is not None:
            return self.task.example_inputs
        fetch = getattr(self.test, "__getitems__", None)
        samples = fetch([0]) if fetch is not None else [self.test[0]]
        inputs, _ = split_batch((self.collate or default_collate)(samples))
        return head(inputs, 1)


def columns_of(samples: Any) -> dict[str, Sequence[Any]]:
    """What a data set tells of its samples beside inputs and targets, in its ``columns``.

    ``id``, ``label`` (the name of the class) and ``text`` are such columns, with a value a sample.

    Raises:
        InputError: a column has another length than the data set.
    """
    found = dict(getattr(samples, "columns", None) or {})
    for name, values in found.items():
        told = described(f"{len(values)} values for {len(samples)} samples")
        require(len(values) == len(samples), f"column {name} of the data", told, "one a sample")
    return found


def as_fetched(batch: Any) -> Any:
    """Collate for data sets that fetch whole batches: the batch is there already."""
    return batch


class TensorData(Dataset[Any]):
    """Samples held in memory; a batch is one `index_select`.

    A loader over it needs ``collate_fn=as_fetched``.

    Args:
        inputs: (N, ...).
        targets: (N,), int64; (N, tasks) where there are several.
    """

    def __init__(self, inputs: Tensor, targets: Tensor) -> None:
        self.inputs, self.targets = inputs, targets

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.inputs[index], self.targets[index]

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """The batch of these samples: (inputs, targets)."""
        chosen = torch.as_tensor(indices)
        return self.inputs.index_select(0, chosen), self.targets.index_select(0, chosen)


def tensor_data(
    name: str,
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    *,
    classes: int | None = None,
    standardise: bool = False,
) -> Data:
    """Classification data held in memory, checked.

    Args:
        train, test: (N, ...) inputs, and (N,) labels from 0.
        classes: one more than the largest label of either part when None.
        standardise: bring the training inputs to mean 0 and standard deviation 1 and treat the
            test inputs alike.

    Raises:
        InputError: a part is empty, its lengths differ, an input is NaN or Inf, labels are not
            whole numbers in [0, classes), or all inputs are the same number.
    """
    if classes is None:
        tops = [int(labels.max()) for _, labels in (train, test) if labels.numel()]
        classes = max(tops, default=0) + 1
    for part, (inputs, labels) in (("train", train), ("test", test)):
        where = f"data {name} ({part})"
        require(len(inputs) > 0, where, described("no samples"), "at least one sample")
        sizes = described(f"{len(inputs)} inputs, {len(labels)} labels")
        require(len(inputs) == len(labels), where, sizes, "a label for every input")
        check_labels(where, labels, classes)
        if inputs.is_floating_point() and not torch.isfinite(inputs).all():
            kind = "NaN" if torch.isnan(inputs).any() else "Inf"
            raise InputError(where, described(f"{kind} in the inputs"), "finite inputs")
    inputs, held_out = train[0], test[0]
    require(
        inputs.shape[1:] == held_out.shape[1:],
        f"data {name}",
        described(f"train {tuple(inputs.shape[1:])}, test {tuple(held_out.shape[1:])}"),
        "samples of one shape",
    )
    if standardise:
        mean, deviation = inputs.double().mean().item(), inputs.double().std().item()
        require(deviation > 0, f"data {name}", described("constant inputs"), "inputs that vary")
        inputs, held_out = ((x.float() - mean) / deviation for x in (inputs, held_out))
    return Data(
        TensorData(inputs, train[1].long()),
        TensorData(held_out, test[1].long()),
        tuple(inputs.shape[1:]),
        classes,
        "classification",
        name,
        as_fetched,
    )


def check_labels(where: str, labels: Tensor, classes: int) -> None:
    """Raise `InputError` unless all labels are whole numbers in [0, classes)."""
    plain = labels.ndim == 1 and not labels.is_floating_point() and not labels.is_complex()
    shown = described(f"labels of shape {tuple(labels.shape)}, {labels.dtype}")
    require(plain, where, shown, "one integer a sample")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= classes:
        wrong = low if low < 0 else high
        raise InputError(where, described(f"label {wrong}"), f"labels from 0 to {classes - 1}")


def stratified_split(labels: Tensor, share: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Indices of a training and a held-out part, each class split alike.

    Args:
        labels: (N,) classes.
        share: of each class that is held out, rounded, at least one sample of two.
        seed: of the draw; the same seed gives the same parts.

    Returns:
        Training and held-out indices, each in ascending order.
    """
    generator = torch.Generator().manual_seed(seed)
    held_out = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique():
        members = (labels == label).nonzero().flatten()
        count = round(share * len(members))
        if len(members) > 1:
            count = min(max(count, 1), len(members) - 1)
        held_out[members[torch.randperm(len(members), generator=generator)[:count]]] = True
    return (~held_out).nonzero().flatten(), held_out.nonzero().flatten()


def load_data(spec: str) -> Data:
    """A data set by name.

    ==================== =====================================================================
    ``digits``           1,797 digits of scikit-learn, (1, 8, 8); ``test=0.25``, ``limit``
    ``fashion-mnist``    70,000 pieces of clothing, (1, 28, 28), found by itself or in
                         ``fashion-mnist:FOLDER``; ``limit``, ``size``
    ``imagefolder:PATH`` a folder of images a class, under ``train`` and ``test`` or ``val``, or
                         split 80/20; ``size=224``, ``limit``
    ``hf:NAME``          of the Hugging Face hub, its cache, or a local folder; see
                         `secateurs.zoo.hub_data`
    ``photographs``      crops of photographs that scikit-image ships, without labels: agreement
                         with a dense classifier (`secateurs.zoo.photographs`)
    ``topics``           Python's manual: retrieval, its bytes with ``as=language``
                         (`secateurs.zoo.retrieval`), or sentences with their topics with
                         ``as=sentences`` (`secateurs.zoo.sentences`)
    ``text:PATH``        a text file or folder of ``.txt`` files; ``block=128``, ``level=byte``
                         or ``char``, or ``tokenizer``
    ``python:MODULE:F``  what a function returns: a Task, `Data`, or (train, test) data sets
    ==================== =====================================================================

    Options follow a question mark: ``fashion-mnist?limit=6000&size=14`` takes the first 6000
    training images, average-pooled to 14x14. Digits and clothing also take
    (`secateurs.zoo.attributes`): ``classes=5,7,9``, only these, renamed from 0; ``per_class=10``,
    the first training samples of each; ``with=coarse`` or ``rotation``, a second task beside the
    class.

    Raises:
        InputError: unknown name or option, missing or damaged files, data that is empty, has
            NaN, or labels out of range.
    """
    parsed = parse_spec(spec, "data")
    if parsed.weights is not None:
        raise InputError("data", spec, "a name without @FILE; weights belong to the model")
    if parsed.kind not in _KINDS:
        raise unknown("data", parsed.kind, _KINDS)
    options = Options(parsed, "data")
    return _KINDS[parsed.kind](parsed, options)


def names_data(text: str) -> bool:
    """Whether a text begins as the name of a data set does; nothing is looked up."""
    return text.partition("?")[0].partition(":")[0] in _KINDS


def _digits(spec: Spec, options: Options) -> Data:
    from secateurs.zoo.images import digits

    return digits(spec, options)


def _fashion_mnist(spec: Spec, options: Options) -> Data:
    from secateurs.zoo.images import fashion_mnist

    return fashion_mnist(spec, options)


def _image_folder(spec: Spec, options: Options) -> Data:
    from secateurs.zoo.images import image_folder

    return image_folder(spec, options)


def _hub(spec: Spec, options: Options) -> Data:
    from secateurs.zoo.hub_data import hub_data

    return hub_data(spec, options)


def _text(spec: Spec, options: Options) -> Data:
    from secateurs.zoo.text import text

    return text(spec, options)


def _python(spec: Spec, options: Options) -> Data:
    options.done()
    return data_from(imported_function(spec, "data")(), spec.text)


def _photographs(spec: Spec, options: Options) -> Data:
    from secateurs.zoo.photographs import photographs

    return photographs(spec, options)


def _topics(spec: Spec, options: Options) -> Data:
    from secateurs.zoo.retrieval import topics

    return topics(spec, options)


_KINDS: Mapping[str, Callable[[Spec, Options], Data]] = {
    "digits": _digits,
    "fashion-mnist": _fashion_mnist,
    "imagefolder": _image_folder,
    "hf": _hub,
    "text": _text,
    "photographs": _photographs,
    "topics": _topics,
    "python": _python,
}


def data_from(value: Any, name: str) -> Data:
    """`Data` from what a user's function returns.

    Args:
        value: a `Task`, `Data`, or a pair (train, test) of map-style data sets. Tensor data
            sets are checked and take the fast path; others say their number of classes by an
            attribute ``classes`` (as torchvision's do).

    Raises:
        InputError: anything else.
    """
    match value:
        case Data():
            return value
        case Task():
            held_out: Dataset[Any] = value.evaluate.dataset
            train = value.train.dataset if value.train is not None else held_out
            inputs = value.example_inputs
            shape = tuple(inputs.shape[1:]) if isinstance(inputs, Tensor) else None
            kind: Kind = "language" if value.primary == "perplexity" else "classification"
            return Data(train, held_out, shape, None, kind, name, None, value)
        case (TensorDataset(tensors=(x, y)), TensorDataset(tensors=(test_x, test_y))):
            return tensor_data(name, (x, y), (test_x, test_y))
        case (Dataset() as train, Dataset() as held_out):
            return _from_pair(train, held_out, name)
    raise InputError(
        f"data {name}",
        described(f"a {type(value).__name__}"),
        "a function that returns a Task, secateurs.zoo.datasets.Data or (train, test) data sets",
    )


def _from_pair(train: Any, test: Any, name: str) -> Data:
    for part, samples in (("train", train), ("test", test)):
        sized = hasattr(samples, "__len__") and len(samples) > 0
        require(sized, f"data {name} ({part})", described("no samples"), "at least one sample")
    names = getattr(train, "classes", None)
    if names is None:
        raise InputError(
            f"data {name}",
            described(f"a {type(train).__name__} without `classes`"),
            "TensorDataset, data sets with an attribute `classes`, or secateurs.zoo.datasets.Data",
        )
    sample, _ = split_batch(train[0])
    shape = tuple(sample.shape) if isinstance(sample, Tensor) else None
    classes = names if isinstance(names, int) else len(names)
    return Data(train, test, shape, classes, "classification", name)

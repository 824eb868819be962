"""Images with labels in four disjoint parts: train, reward, selection and a sealed test.

A search sees `train` (fine-tuning, criteria), `reward` (the agent's signal) and `selection` (choosing among
finished candidates). `test` is read once, for the figure in the report, and keeps a record of each reading.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .checks import check_seed, check_types
from .errors import UserError, closest
from .sources import DATA, Request
from .splits import (
    Batch,
    DatasetSplit,
    SealedSplit,
    SealedSplitError,
    Split,
    TensorSplit,
    augment_crop_flip,
    stratified_order,
)

__all__ = [
    "Batch",
    "DataSplits",
    "DatasetSplit",
    "SealedSplit",
    "SealedSplitError",
    "Split",
    "SplitSettings",
    "TensorSplit",
    "augment_crop_flip",
    "data_names",
    "load_data",
    "stratified_order",
]


@dataclass(frozen=True)
class DataSplits:
    """The four parts of a data set, no image in two of them, and what a network must know of it.

    Args:
        name: The name the data was loaded by.
        train: For fine-tuning and for criteria.
        reward: For the agent's signal during a search.
        selection: For choosing among the candidates a search has found.
        test: For the reported figure.
        classes: Number of classes.
        image_shape: Channels, height and width.
        mean: Of each channel, in the scale [0, 1]; was subtracted.
        std: Of each channel, in the scale [0, 1]; has divided.
        class_names: One name for each class number.
    """

    name: str
    train: Split
    reward: Split
    selection: Split
    test: SealedSplit
    classes: int
    image_shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    class_names: tuple[str, ...]


@dataclass(frozen=True)
class SplitSettings:
    """How the reward, selection and test splits are taken out of the data.

    Args:
        reward: Images, or their share of the training part if below 1.
        selection: Images, or their share of the training part if below 1.
        test: Share of all images in (0, 1), where the source has no test split of its own.
        seed: Seed of the draw; the same settings give the same splits.
        heldout: A text file with one `class/file.jpg` of the train folder per line, the images the given
            network was not trained on. Reward and selection are drawn from these only, and train is the
            rest of the folder. For image folders.

    Raises:
        UserError: A size is not positive, or a number of images is not whole.
    """

    reward: int | float = 0.1
    selection: int | float = 0.1
    test: float = 0.2
    seed: int = 0
    heldout: str | None = None

    def __post_init__(self) -> None:
        check_types(self)
        check_seed(self.seed)
        for field in ("reward", "selection"):
            size = getattr(self, field)
            if not size > 0 or (size >= 1 and size != int(size)):
                raise UserError(
                    f"{field} must be a share in (0, 1) or a whole number of images, but got {field}={size}"
                )
        if not 0 < self.test < 1:
            raise UserError(f"test must be a share in (0, 1), but got test={self.test}")


def data_names() -> list[str]:
    """Return every name `load_data` knows."""
    return list(DATA)


def load_data(
    name: str,
    *,
    root: str | None = None,
    settings: SplitSettings = SplitSettings(),
    image_size: int | None = None,
    in_memory: bool | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    workers: int = 0,
) -> DataSplits:
    """Read a data set from the disk and cut it into four disjoint parts; nothing is downloaded.

    Args:
        name: One of `data_names()`.
        root: The folder the data is in, as the record's description says; not needed for `digits`.
        settings: Sizes and seed of the parts. Reward and selection hold the classes in proportion.
        image_size: Height and width to bring the images to, in pixels; None leaves them (digits: 28). Files
            of an image folder are resized by their shorter side and cropped, others are stretched.
        in_memory: Hold an image folder in memory; None does so up to 2 GiB of uint8 pixels.
        mean: Of each channel in [0, 1]. None takes the usual one of a known data set, otherwise that of
            the train part (for a streamed folder, of at most 10,000 of its images).
        std: As `mean`, the standard deviation.
        workers: Processes that decode a streamed image folder.

    Returns:
        The parts. Their images are normalised.

    Raises:
        UserError: The name is unknown, the data is not where it must be, or there are too few images.
    """
    if name not in DATA:
        raise UserError(f"data must be a known name, but got {name!r}{closest(name, DATA)}")
    if image_size is not None and image_size < 1:
        raise UserError(f"image_size must be 1 pixel or more, but got {image_size=}")
    place = None if root is None else Path(root).expanduser()
    source = DATA[name].read(Request(name, place, image_size, in_memory, workers))
    generator = torch.Generator().manual_seed(settings.seed)
    train_pool, test_pool = source.train, source.test
    available = torch.arange(len(train_pool.labels))
    if test_pool is None:
        n_test = max(1, round(settings.test * len(available)))
        order = stratified_order(train_pool.labels, generator)
        test_pool, test_index, available = train_pool, order[:n_test], order[n_test:].sort().values
    else:
        test_index = torch.arange(len(test_pool.labels))
    parts = _cut(name, train_pool.labels, available, source.files, settings, generator)
    shape = train_pool.shape()
    if mean is None or std is None:
        usual = (source.mean, source.std) if source.mean and source.std else None
        found = usual or train_pool.statistics(parts["train"])
        mean, std = mean or found[0], std or found[1]
    if len(mean) != shape[0] or len(std) != shape[0] or min(std) <= 0:
        raise UserError(
            f"mean and std must have a number for each of {shape[0]} channels, std above 0, but got {mean=} {std=}"
        )
    splits = {part: train_pool.split(index, part, mean, std) for part, index in parts.items()}
    test = SealedSplit(test_pool.split(test_index.sort().values, "test", mean, std))
    names = source.class_names
    return DataSplits(
        name, **splits, test=test, classes=len(names), image_shape=shape, mean=tuple(mean), std=tuple(std),
        class_names=names,
    )  # fmt: skip


def _cut(
    name: str,
    labels: Tensor,
    available: Tensor,
    files: Sequence[str],
    settings: SplitSettings,
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """Choose the images of train, reward and selection.

    Args:
        name: The name of the data.
        labels: int64 (N,), of the whole pool.
        available: int64 (M,), the indices that are not in the test part.
        files: class/file.jpg of each image of the pool; empty where the data is not an image folder.
        settings: Sizes of the parts.
        generator: Draws them.

    Returns:
        int64 indices, in rising order, of each part.
    """
    sizes = [size if size >= 1 else max(1, round(size * len(available)))
             for size in (settings.reward, settings.selection)]  # fmt: skip
    n_reward, n_selection = (int(size) for size in sizes)
    candidates, whence = available, "of the training part"
    if settings.heldout is not None:
        known = _heldout(settings.heldout, files, name)
        candidates = available[torch.isin(available, known)]
        whence = f"listed in {settings.heldout!r}"
    rest = len(available) - n_reward - n_selection
    if n_reward + n_selection > len(candidates) or rest < 1:
        raise UserError(
            f"reward and selection must leave images to train on and fit into the {len(candidates)} images "
            f"{whence} of {name!r}, but got {n_reward} + {n_selection}; "
            "ask for fewer (--task.splits.reward, --task.splits.selection)"
        )
    order = candidates[stratified_order(labels[candidates], generator)]
    reward, selection = order[:n_reward], order[n_reward : n_reward + n_selection]
    train = available[~torch.isin(available, torch.cat([reward, selection]))]
    return {"train": train, "reward": reward.sort().values, "selection": selection.sort().values}


def _heldout(path: str, files: Sequence[str], name: str) -> Tensor:
    """Return the indices of the images that the file lists."""
    if not files:
        raise UserError(f"heldout names files of an image folder, but the data is {name!r}; drop it")
    if not Path(path).is_file():
        raise UserError(f"heldout must be a text file, but there is none at {path!r}; check the path")
    try:
        listed = Path(path).read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as problem:
        raise UserError(f"heldout must be a text file, but {path!r} is not: {problem}") from problem
    places = {file: place for place, file in enumerate(files)}
    wanted = [line.strip() for line in listed if line.strip()]
    unknown = [file for file in wanted if file not in places]
    if unknown or not wanted:
        came = f"{len(unknown)} others, first {unknown[0]!r}" if unknown else "nothing"
        raise UserError(
            f"{path!r} must list images of the train folder as class/file.jpg, such as {files[0]!r}, but lists {came}"
        )
    return torch.tensor([places[file] for file in wanted])

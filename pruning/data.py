"""Images with labels in four disjoint parts: train, reward, selection and a sealed test.

A search sees `train` (fine-tuning, criteria), `reward` (the agent's signal) and `selection` (choosing among
finished candidates). `test` is read once, for the figure in the report, and keeps a record of each reading.
"""

import math
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset, Subset

from .errors import UserError, closest
from .torchvision_compat import torchvision

IN_MEMORY_BYTES = 2 * 2**30  # an image folder whose uint8 images take more than this is streamed
STATISTICS_IMAGES = 10_000  # a streamed folder's mean and deviation are computed on at most this many
_CHUNK = 4096  # images converted to float at once where a whole split would need four times its memory


class Batch(NamedTuple):
    """Some images and their classes.

    Args:
        images: float32 (N, C, H, W), normalised.
        labels: int64 (N,), class numbers from 0.
    """

    images: Tensor
    labels: Tensor


class SealedSplitError(RuntimeError):
    """The test split was read without being opened."""


class Split(ABC):
    """Images with labels that can be read in batches.

    Args:
        name: What the split is for, such as `reward`; used in messages.
    """

    def __init__(self, name: str) -> None:
        """Keep the name."""
        self.name = name

    @abstractmethod
    def __len__(self) -> int:
        """Count the images."""

    @abstractmethod
    def batches(
        self, batch_size: int, *, generator: torch.Generator | None = None, drop_last: bool = False
    ) -> Iterator[Batch]:
        """Read every image once.

        Args:
            batch_size: Images in a batch, 1 or more.
            generator: Draws the order; None reads in the stored order.
            drop_last: Leave out a last batch that is not full.

        Returns:
            The batches, on the device of the split.
        """

    @abstractmethod
    def subset(self, n: int, generator: torch.Generator) -> "Split":
        """Draw `n` different images, from each class in proportion where the labels are known.

        Raises:
            UserError: `n` is not in [1, number of images].
        """

    @abstractmethod
    def to(self, device: torch.device | str) -> "Split":
        """Return the split with its batches on `device`; this one stays where it is."""

    def example(self) -> Tensor:
        """Return the first image, normalised, (1, C, H, W)."""
        return next(iter(self.batches(1))).images

    def prepared(self) -> "Split":
        """Return the split with all work done that would be repeated at each reading."""
        return self


class TensorSplit(Split):
    """A split held in memory.

    Args:
        images: (N, C, H, W); uint8, normalised batch by batch as (images / 255 - mean) / std, or float32,
            taken as is.
        labels: Whole numbers (N,), class numbers from 0.
        name: What the split is for.
        mean: One number per channel, in [0, 1], for uint8 images only; none is subtracted where None.
        std: One positive number per channel, for uint8 images only; none divides where None.

    Raises:
        UserError: There is no image, a shape or type is another, or a float image is not finite.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        *,
        name: str,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        """Check the tensors and keep them."""
        super().__init__(name)
        if images.ndim != 4 or len(images) == 0:
            raise UserError(
                f"split {name!r} must have images (N, C, H, W) with N of 1 or more, but got {tuple(images.shape)}"
            )
        if images.dtype not in (torch.uint8, torch.float32):
            raise UserError(f"split {name!r} must have uint8 or float32 images, but got {images.dtype}")
        if labels.shape != images.shape[:1] or labels.is_floating_point() or labels.dtype == torch.bool:
            came = f"{labels.dtype} {tuple(labels.shape)}"
            raise UserError(f"split {name!r} must have a whole-number label per image, but got {came}")
        if int(labels.min()) < 0:
            raise UserError(f"split {name!r} must have labels from 0, but the lowest is {int(labels.min())}")
        if images.is_floating_point():
            if mean is not None or std is not None:
                raise UserError(f"split {name!r} takes float images as they are, but got a mean or std; drop it")
            if not torch.isfinite(images).all():
                raise UserError(f"split {name!r} must have finite images, but got NaN or infinity")
        self.images = images
        self.labels = labels.to(torch.int64)
        self.mean = None if mean is None else tuple(mean)
        self.std = None if std is None else tuple(std)

    def __len__(self) -> int:
        """Count the images."""
        return len(self.labels)

    def batches(
        self, batch_size: int, *, generator: torch.Generator | None = None, drop_last: bool = False
    ) -> Iterator[Batch]:
        """Read every image once, see `Split.batches`."""
        _check_batch_size(batch_size)
        order = None if generator is None else _permutation(len(self), generator).to(self.labels.device)
        stop = len(self) - len(self) % batch_size if drop_last else len(self)
        for start in range(0, stop, batch_size):
            index = slice(start, start + batch_size) if order is None else order[start : start + batch_size]
            yield Batch(self._normalised(self.images[index]), self.labels[index])

    def subset(self, n: int, generator: torch.Generator) -> "TensorSplit":
        """Draw `n` different images, from each class in proportion."""
        _check_subset(self, n)
        index = stratified_order(self.labels.cpu(), generator)[:n].to(self.labels.device)
        return self._like(self.images[index], self.labels[index])

    def to(self, device: torch.device | str) -> "TensorSplit":
        """Return the split on `device`."""
        return self._like(self.images.to(device), self.labels.to(device))

    def prepared(self) -> "TensorSplit":
        """Return the split with its images normalised once, as float32."""
        if self.images.is_floating_point():
            return self
        parts = [self._normalised(part) for part in self.images.split(_CHUNK)]
        return TensorSplit(torch.cat(parts), self.labels, name=self.name)

    def _like(self, images: Tensor, labels: Tensor) -> "TensorSplit":
        """Make a split of other images that are normalised alike."""
        return TensorSplit(images, labels, name=self.name, mean=self.mean, std=self.std)

    def _normalised(self, images: Tensor) -> Tensor:
        """Turn stored images into what the network takes, float32 of the same shape."""
        if images.is_floating_point():
            return images
        return _normalise(images.float() / 255, self.mean, self.std)


class DatasetSplit(Split):
    """A split that is read from a torch data set image by image, for data larger than the memory.

    Args:
        dataset: Yields (normalised float32 image (C, H, W), class number). Where it has `targets`, subsets
            are drawn from each class in proportion.
        name: What the split is for.
        workers: Processes that read ahead; 0 reads in this process.

    Raises:
        UserError: The data set is empty.
    """

    def __init__(self, dataset: Dataset[Any], *, name: str, workers: int = 0) -> None:
        """Keep the data set."""
        super().__init__(name)
        self.dataset = dataset
        self.workers = workers
        self.device = torch.device("cpu")
        if len(self) == 0:
            raise UserError(f"split {name!r} must have 1 image or more, but got an empty data set")

    def __len__(self) -> int:
        """Count the images."""
        return len(self.dataset)  # type: ignore[arg-type]

    def batches(
        self, batch_size: int, *, generator: torch.Generator | None = None, drop_last: bool = False
    ) -> Iterator[Batch]:
        """Read every image once, see `Split.batches`."""
        _check_batch_size(batch_size)
        order = range(len(self)) if generator is None else _permutation(len(self), generator).tolist()
        loader = DataLoader(
            self.dataset,
            batch_size,
            sampler=order,
            drop_last=drop_last,
            num_workers=self.workers,
            generator=torch.Generator(),  # of its own, or each reading would advance the global one
            pin_memory=self.device.type == "cuda",
        )
        for images, labels in loader:
            yield Batch(images.to(self.device), labels.to(self.device, torch.int64))

    def subset(self, n: int, generator: torch.Generator) -> "DatasetSplit":
        """Draw `n` different images, from each class in proportion where the labels are known."""
        _check_subset(self, n)
        labels = _targets(self.dataset)
        order = _permutation(len(self), generator) if labels is None else stratified_order(labels, generator)
        return self._like(Subset(self.dataset, order[:n].tolist()), self.device)

    def example(self) -> Tensor:
        """Return the first image, normalised, (1, C, H, W), without starting the workers."""
        return self.dataset[0][0].unsqueeze(0).to(self.device)

    def to(self, device: torch.device | str) -> "DatasetSplit":
        """Return the split with its batches on `device`."""
        return self._like(self.dataset, torch.device(device))

    def _like(self, dataset: Dataset[Any], device: torch.device) -> "DatasetSplit":
        """Make a split of another data set that is read alike."""
        split = DatasetSplit(dataset, name=self.name, workers=self.workers)
        split.device = device
        return split


class SealedSplit(Split):
    """A split that must be opened, with a reason, before it can be read.

    Copies and pickles stay sealed. Counting the images is allowed.

    Args:
        split: The split to keep.
    """

    def __init__(self, split: Split) -> None:
        """Seal the split."""
        super().__init__(split.name)
        self._split = split
        self._readings: list[str] = []

    @property
    def readings(self) -> tuple[str, ...]:
        """The reason of each opening so far."""
        return tuple(self._readings)

    def open(self, reason: str) -> Split:
        """Return the split itself and record why.

        Raises:
            UserError: The reason is empty.
        """
        if not reason.strip():
            raise UserError(f"opening split {self.name!r} must have a reason, but got {reason!r}; say what for")
        self._readings.append(reason)
        return self._split

    def __len__(self) -> int:
        """Count the images."""
        return len(self._split)

    def batches(
        self, batch_size: int, *, generator: torch.Generator | None = None, drop_last: bool = False
    ) -> Iterator[Batch]:
        """Refuse."""
        raise self._refusal("batches")

    def subset(self, n: int, generator: torch.Generator) -> Split:
        """Refuse."""
        raise self._refusal("subset")

    def to(self, device: torch.device | str) -> Split:
        """Refuse."""
        raise self._refusal("to")

    def example(self) -> Tensor:
        """Refuse."""
        raise self._refusal("example")

    def prepared(self) -> Split:
        """Refuse."""
        raise self._refusal("prepared")

    def _refusal(self, method: str) -> SealedSplitError:
        """Say how the split is read."""
        return SealedSplitError(
            f"split {self.name!r} is sealed until a search is over, but {method}() was called; "
            "read it once at the end, through open(reason)"
        )


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
        """Check the sizes."""
        for field in ("reward", "selection"):
            size = getattr(self, field)
            if not size > 0 or (size >= 1 and size != int(size)):
                raise UserError(
                    f"{field} must be a share in (0, 1) or a whole number of images, but got {field}={size}"
                )
        if not 0 < self.test < 1:
            raise UserError(f"test must be a share in (0, 1), but got test={self.test}")


def stratified_order(labels: Tensor, generator: torch.Generator) -> Tensor:
    """Draw a random order of which every beginning holds the classes in proportion.

    The r-th image of a class of n, in random order, gets the rank (r + u) / n with one random u per class;
    the images are sorted by it. Each beginning so holds a class's due share to within one image.

    Args:
        labels: int64 (N,), class numbers from 0, on the CPU.
        generator: Draws the order.

    Returns:
        A permutation of the indices, int64 (N,).
    """
    shuffled = _permutation(len(labels), generator)
    by_class = shuffled[torch.sort(labels[shuffled], stable=True).indices]
    counts = torch.bincount(labels)
    first = torch.cumsum(counts, 0) - counts  # where each class begins in by_class
    own = labels[by_class]
    start = torch.rand(len(counts), generator=generator, dtype=torch.float64, device=generator.device).cpu()
    rank = (torch.arange(len(labels)) - first[own] + start[own]) / counts[own]
    return by_class[torch.argsort(rank)]


def augment_crop_flip(images: Tensor, *, padding: int, flip: bool, generator: torch.Generator) -> Tensor:
    """Shift each image at random, filling with zeros, and mirror half of them.

    Args:
        images: (N, C, H, W). Zero is the mean colour where they are normalised.
        padding: Largest shift in each direction, in pixels, 0 or more; usual are 4 for 32x32 images.
        flip: Mirror each image left to right with probability 1/2.
        generator: Draws the shifts and the mirroring.

    Returns:
        New images of the same shape, type and device.

    Raises:
        UserError: `padding` is negative.
    """
    if padding < 0:
        raise UserError(f"padding must be 0 or more pixels, but got {padding=}")
    n, _, height, width = images.shape
    device = generator.device
    shifts = torch.randint(0, 2 * padding + 1, (2, n), generator=generator, device=device).to(images.device)
    rows = shifts[0, :, None] + torch.arange(height, device=images.device)  # (N, H)
    columns = shifts[1, :, None] + torch.arange(width, device=images.device)  # (N, W)
    if flip:
        mirrored = torch.randint(0, 2, (n, 1), generator=generator, device=device).to(images.device) == 1
        columns = torch.where(mirrored, columns.flip(1), columns)
    padded = functional.pad(images, (padding,) * 4).permute(0, 2, 3, 1)  # (N, H + 2p, W + 2p, C)
    which = torch.arange(n, device=images.device)[:, None, None]
    shifted = padded[which, rows[:, :, None], columns[:, None, :]]  # (N, H, W, C)
    return shifted.permute(0, 3, 1, 2).contiguous()


class _Pool(ABC):
    """Labelled images of a source, from which splits are taken by index."""

    labels: Tensor  # int64 (N,)

    @abstractmethod
    def split(self, index: Tensor, name: str, mean: Sequence[float], std: Sequence[float]) -> Split:
        """Take the images of `index`, normalised by the mean and deviation of each channel."""

    @abstractmethod
    def chunks(self, index: Tensor) -> Iterator[Tensor]:
        """Yield the images of `index` in [0, 1], float32 (some, C, H, W)."""

    def shape(self) -> tuple[int, int, int]:
        """Return channels, height and width."""
        _, channels, height, width = next(self.chunks(torch.tensor([0]))).shape
        return channels, height, width

    def statistics(self, index: Tensor) -> tuple[list[float], list[float]]:
        """Return each channel's mean and standard deviation over all pixels of the images of `index`."""
        pixels, total, squares = 0, torch.zeros(1), torch.zeros(1)
        for images in self.chunks(index):
            pixels += images.numel() // images.shape[1]
            total = total + images.sum((0, 2, 3), dtype=torch.float64)
            squares = squares + images.square().sum((0, 2, 3), dtype=torch.float64)
        mean = total / pixels
        std = (squares / pixels - mean.square()).clamp_min(1e-12).sqrt()
        return mean.tolist(), std.tolist()


class _MemoryPool(_Pool):
    """Images in memory: uint8, or float32 in [0, 1]; resized to squares of `image_size` pixels if given."""

    def __init__(self, images: Tensor, labels: Tensor, image_size: int | None = None) -> None:
        self.labels = labels
        self.images = images
        if image_size is not None and images.shape[2:] != (image_size, image_size):
            self.images = torch.cat([_enlarged(part, image_size) for part in images.split(_CHUNK)])

    def split(self, index: Tensor, name: str, mean: Sequence[float], std: Sequence[float]) -> Split:
        """Take the images of `index`."""
        images, labels = self.images[index], self.labels[index]
        if images.is_floating_point():
            return TensorSplit(_normalise(images, mean, std), labels, name=name)
        return TensorSplit(images, labels, name=name, mean=mean, std=std)

    def chunks(self, index: Tensor) -> Iterator[Tensor]:
        """Yield the images of `index` in [0, 1]."""
        for part in index.split(_CHUNK):
            images = self.images[part]
            yield images if images.is_floating_point() else images.float() / 255


class _FolderPool(_Pool):
    """Image files that are read when they are needed."""

    def __init__(self, folder: Any, image_size: int, workers: int) -> None:
        self.folder = folder
        self.labels = torch.tensor(folder.targets)
        self.image_size = image_size
        self.workers = workers

    def split(self, index: Tensor, name: str, mean: Sequence[float], std: Sequence[float]) -> Split:
        """Take the files of `index`."""
        files = [self.folder.samples[place] for place in index.tolist()]
        return DatasetSplit(_Files(files, self.image_size, mean, std), name=name, workers=self.workers)

    def chunks(self, index: Tensor) -> Iterator[Tensor]:
        """Yield the images of at most STATISTICS_IMAGES of the files in [0, 1]."""
        every = math.ceil(len(index) / STATISTICS_IMAGES)
        files = [self.folder.samples[place] for place in index[::every].tolist()]
        zero, one = [0.0] * 3, [1.0] * 3
        for images, _ in DataLoader(_Files(files, self.image_size, zero, one), 64, num_workers=self.workers):
            yield images


class _Files(Dataset[tuple[Tensor, int]]):
    """Image files of known class, decoded, cropped to a square and normalised one by one."""

    def __init__(
        self, files: list[tuple[str, int]], image_size: int, mean: Sequence[float], std: Sequence[float]
    ) -> None:
        self.files = files
        self.targets = [label for _, label in files]
        self.image_size = image_size
        self.mean = mean
        self.std = std

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, place: int) -> tuple[Tensor, int]:
        path, label = self.files[place]
        image = torch.from_numpy(_decode(path, self.image_size)).permute(2, 0, 1)  # (H, W, C) -> (C, H, W)
        return _normalise(image[None].float() / 255, self.mean, self.std)[0], label


@dataclass(frozen=True)
class _Request:
    """What `load_data` was asked for, as a source sees it."""

    name: str
    root: Path | None
    image_size: int | None
    in_memory: bool | None
    workers: int


@dataclass(frozen=True)
class _Source:
    """What a source has: its pool, a test pool if it has its own, and the usual mean and deviation."""

    train: _Pool
    test: _Pool | None
    class_names: tuple[str, ...]
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    files: tuple[str, ...] = ()  # class/file.jpg of each image of the pool


def _read_digits(request: _Request) -> _Source:
    """Read scikit-learn's digits, which come with it."""
    digits = load_digits()
    images = torch.from_numpy(digits.images).float().unsqueeze(1) / 16  # (N, 8, 8) of 0..16 -> (N, 1, 8, 8)
    size = 28 if request.image_size is None else request.image_size
    pool = _MemoryPool(images, torch.from_numpy(digits.target).long(), size)
    return _Source(pool, None, tuple(str(digit) for digit in range(10)))


@dataclass(frozen=True)
class _Torchvision:
    """A reader of one of torchvision's data sets, with the usual mean and deviation of its channels."""

    kind: str
    folder: str
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, request: _Request) -> _Source:
        """Read both parts from the root folder, which must hold the unpacked files."""
        root = _root(request, self.folder)
        kind = getattr(torchvision.datasets, self.kind)
        try:
            parts = [kind(str(root), train=train, download=False) for train in (True, False)]
        except (RuntimeError, OSError) as problem:
            raise UserError(
                f"data {request.name!r} must be unpacked in {str(root / self.folder)!r}, but nothing complete "
                "is there; nothing is downloaded, so put it there or set --data_root to the folder above"
            ) from problem
        pools = [_MemoryPool(_as_images(part.data), torch.as_tensor(part.targets), request.image_size)
                 for part in parts]  # fmt: skip
        return _Source(pools[0], pools[1], tuple(parts[0].classes), self.mean, self.std)


def _as_images(data: Tensor | np.ndarray) -> Tensor:
    """Bring (N, H, W) or (N, H, W, C) to (N, C, H, W)."""
    images = torch.as_tensor(data)
    return images.unsqueeze(1) if images.ndim == 3 else images.permute(0, 3, 1, 2).contiguous()


def _read_folder(request: _Request) -> _Source:
    """Read a folder of class folders, or one of those in train/ and in test/ or val/."""
    root = _root(request, "train/CLASS/*.jpg")
    train_root = root / "train" if (root / "train").is_dir() else root
    test_root = next((root / part for part in ("test", "val") if (root / part).is_dir()), None)
    train = _list_folder(train_root)
    test = _list_folder(test_root) if test_root is not None and train_root != root else None
    if test is not None and test.classes != train.classes:
        other = sorted(set(test.classes) ^ set(train.classes))
        raise UserError(f"{train_root} and {test_root} must have the same classes, but differ in {other[:5]}")
    train_pool = _folder_pool(train, request)
    test_pool = None if test is None else _folder_pool(test, request)
    start = f"{train_root}{os.sep}"
    files = tuple(path.removeprefix(start).replace(os.sep, "/") for path, _ in train.samples)
    return _Source(train_pool, test_pool, tuple(train.classes), files=files)


def _list_folder(root: Path) -> Any:
    """List the class folders in `root` and their images."""
    try:
        return torchvision.datasets.ImageFolder(str(root))
    except FileNotFoundError as problem:
        raise UserError(
            f"an image folder must have a folder of images for each class, but {str(root)!r} has not "
            f"({problem}); --data_root sets it"
        ) from problem


def _folder_pool(folder: Any, request: _Request) -> _Pool:
    """Read the images now if they fit into memory, or leave them on the disk."""
    paths = [path for path, _ in folder.samples]
    with Image.open(paths[0]) as first:
        width, height = first.size if request.image_size is None else (request.image_size,) * 2
    small = len(paths) * 3 * width * height <= IN_MEMORY_BYTES
    if not (small if request.in_memory is None else request.in_memory):
        if request.image_size is None:
            raise UserError("an image folder that is streamed must have one size, but got no image_size; set it")
        return _FolderPool(folder, request.image_size, request.workers)
    images = np.empty((len(paths), height, width, 3), np.uint8)

    def fill(place: int) -> None:
        image = _decode(paths[place], request.image_size)
        if image.shape != images.shape[1:]:
            raise UserError(
                f"images must have one size, but {paths[place]!r} is {image.shape[1]}x{image.shape[0]} and the "
                f"first is {width}x{height}; set image_size"
            )
        images[place] = image

    # Decoding leaves Python's lock, opening a file does not: below this size threads only wait for it.
    threads = 1 if width * height < 96 * 96 else min(8, os.cpu_count() or 1)
    if threads == 1:
        for place in range(len(paths)):
            fill(place)
    else:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(fill, range(len(paths))))
    return _MemoryPool(_as_images(images), torch.tensor(folder.targets))


def _decode(path: str, image_size: int | None) -> np.ndarray:
    """Read an image file as RGB; with a size, resize its shorter side to it and crop the middle square.

    Returns:
        uint8 (H, W, 3).
    """
    try:
        with Image.open(path) as file:
            image = file.convert("RGB")
    except OSError as problem:
        raise UserError(f"images must be readable, but {path!r} is not ({problem})") from problem
    if image_size is not None and image.size != (image_size, image_size):
        image = torchvision.transforms.v2.functional.resize(image, [image_size])
        image = torchvision.transforms.v2.functional.center_crop(image, [image_size])
    return np.array(image)


@dataclass(frozen=True)
class DataRecord:
    """A kind of data by its name.

    Args:
        name: The name users type.
        read: Reads it.
        description: One sentence for the list shown to users.
    """

    name: str
    read: Callable[[_Request], _Source]
    description: str


DATA: dict[str, DataRecord] = {
    record.name: record
    for record in (
        DataRecord(
            "digits",
            _read_digits,
            "1,797 handwritten digits that come with scikit-learn, 8x8 pixels, enlarged to 28x28.",
        ),
        DataRecord(
            "mnist",
            _Torchvision("MNIST", "MNIST/raw", (0.1307,), (0.3081,)),
            "70,000 handwritten digits, 1x28x28, read from ROOT/MNIST/raw.",
        ),
        DataRecord(
            "fashion_mnist",
            _Torchvision("FashionMNIST", "FashionMNIST/raw", (0.2860,), (0.3530,)),
            "70,000 pieces of clothing in 10 classes, 1x28x28, read from ROOT/FashionMNIST/raw.",
        ),
        DataRecord(
            "cifar10",
            _Torchvision("CIFAR10", "cifar-10-batches-py", (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
            "60,000 photographs in 10 classes, 3x32x32, read from ROOT/cifar-10-batches-py.",
        ),
        DataRecord(
            "cifar100",
            _Torchvision("CIFAR100", "cifar-100-python", (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
            "60,000 photographs in 100 classes, 3x32x32, read from ROOT/cifar-100-python.",
        ),
        DataRecord(
            "image_folder",
            _read_folder,
            "Your own images: ROOT/CLASS/*.jpg, or the same in ROOT/train and in ROOT/test or ROOT/val.",
        ),
    )
}


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
    source = DATA[name].read(_Request(name, place, image_size, in_memory, workers))
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
            f"{whence} of {name!r}, but got {n_reward} + {n_selection}; ask for fewer"
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
    listed = Path(path).read_text(encoding="utf-8").split("\n")
    places = {file: place for place, file in enumerate(files)}
    wanted = [line.strip() for line in listed if line.strip()]
    unknown = [file for file in wanted if file not in places]
    if unknown or not wanted:
        came = f"{len(unknown)} others, first {unknown[0]!r}" if unknown else "nothing"
        raise UserError(
            f"{path!r} must list images of the train folder as class/file.jpg, such as {files[0]!r}, but lists {came}"
        )
    return torch.tensor([places[file] for file in wanted])


def _root(request: _Request, expected: str) -> Path:
    """Return the root folder, or say what must be in it."""
    if request.root is None or not request.root.is_dir():
        came = "no root was given" if request.root is None else f"there is no folder {str(request.root)!r}"
        raise UserError(f"data {request.name!r} is read from ROOT/{expected}, but {came}; --data_root sets ROOT")
    return request.root


def _normalise(images: Tensor, mean: Sequence[float] | None, std: Sequence[float] | None) -> Tensor:
    """Subtract and divide channel by channel, (N, C, H, W)."""
    if mean is not None:
        images = images - torch.tensor(mean, dtype=images.dtype, device=images.device)[:, None, None]
    if std is not None:
        images = images / torch.tensor(std, dtype=images.dtype, device=images.device)[:, None, None]
    return images


def _enlarged(images: Tensor, size: int) -> Tensor:
    """Stretch images (N, C, H, W) to squares, bilinearly, and keep their type."""
    scaled = functional.interpolate(images.float(), (size, size), mode="bilinear", align_corners=False, antialias=True)
    return scaled.round().to(torch.uint8) if images.dtype == torch.uint8 else scaled


def _permutation(n: int, generator: torch.Generator) -> Tensor:
    """Draw an order of n indices, on the CPU."""
    return torch.randperm(n, generator=generator, device=generator.device).cpu()


def _targets(dataset: Any) -> Tensor | None:
    """Find the class numbers of a data set without reading its images; None where it does not tell."""
    if isinstance(dataset, Subset):
        inner = _targets(dataset.dataset)
        return None if inner is None else inner[torch.as_tensor(dataset.indices)]
    targets = getattr(dataset, "targets", None)
    return None if targets is None else torch.as_tensor(targets)


def _check_batch_size(batch_size: int) -> None:
    """Refuse an empty batch."""
    if batch_size < 1:
        raise UserError(f"batch_size must be 1 or more, but got {batch_size=}")


def _check_subset(split: Split, n: int) -> None:
    """Refuse a subset the split cannot give."""
    if not 1 <= n <= len(split):
        raise UserError(f"a subset of split {split.name!r} must be 1 to {len(split)} images, but got {n=}")

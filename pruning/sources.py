"""The data sets that can be loaded by name, and how each is read from the disk; nothing is downloaded."""

import math
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset

from .errors import UserError
from .splits import CHUNK, DatasetSplit, Split, TensorSplit, normalise, unit_range
from .torchvision_compat import torchvision

IN_MEMORY_BYTES = 2 * 2**30  # an image folder whose uint8 images take more than this is streamed
STATISTICS_IMAGES = 10_000  # a streamed folder's mean and deviation are computed on at most this many


class Pool(ABC):
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


class _MemoryPool(Pool):
    """Images in memory: uint8, or float32 in [0, 1]; resized to squares of `image_size` pixels if given."""

    def __init__(self, images: Tensor, labels: Tensor, image_size: int | None = None) -> None:
        self.labels = labels
        self.images = images
        if image_size is not None and images.shape[2:] != (image_size, image_size):
            self.images = torch.cat([_enlarged(part, image_size) for part in images.split(CHUNK)])

    def split(self, index: Tensor, name: str, mean: Sequence[float], std: Sequence[float]) -> Split:
        images, labels = self.images[index], self.labels[index]
        if images.is_floating_point():
            return TensorSplit(normalise(images, mean, std), labels, name=name)
        return TensorSplit(images, labels, name=name, mean=mean, std=std)

    def chunks(self, index: Tensor) -> Iterator[Tensor]:
        for part in index.split(CHUNK):
            yield unit_range(self.images[part])


class _FolderPool(Pool):
    """Image files that are read when they are needed."""

    def __init__(self, folder: Any, image_size: int, workers: int) -> None:
        self.folder = folder
        self.labels = torch.tensor(folder.targets)
        self.image_size = image_size
        self.workers = workers

    def split(self, index: Tensor, name: str, mean: Sequence[float], std: Sequence[float]) -> Split:
        files = [self.folder.samples[place] for place in index.tolist()]
        return DatasetSplit(_Files(files, self.image_size, mean, std), name=name, workers=self.workers)

    def chunks(self, index: Tensor) -> Iterator[Tensor]:
        """Yield the images of at most STATISTICS_IMAGES of the files in [0, 1]."""
        every = math.ceil(len(index) / STATISTICS_IMAGES)
        files = [self.folder.samples[place] for place in index[::every].tolist()]
        for images, _ in DataLoader(_Files(files, self.image_size, None, None), 64, num_workers=self.workers):
            yield images


class _Files(Dataset[tuple[Tensor, int]]):
    """Image files of known class, decoded, cropped to a square and normalised one by one."""

    def __init__(
        self, files: list[tuple[str, int]], image_size: int, mean: Sequence[float] | None, std: Sequence[float] | None
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
        return normalise(image, self.mean, self.std), label


@dataclass(frozen=True)
class Request:
    """What `load_data` was asked for, as a source sees it."""

    name: str
    root: Path | None
    image_size: int | None
    in_memory: bool | None
    workers: int


@dataclass(frozen=True)
class Source:
    """What a source has: its pool, a test pool if it has its own, and the usual mean and deviation."""

    train: Pool
    test: Pool | None
    class_names: tuple[str, ...]
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    files: tuple[str, ...] = ()  # class/file.jpg of each image of the pool


def _read_digits(request: Request) -> Source:
    """Read scikit-learn's digits, which come with it."""
    digits = load_digits()
    images = torch.from_numpy(digits.images).float().unsqueeze(1) / 16  # (N, 8, 8) of 0..16 -> (N, 1, 8, 8)
    size = 28 if request.image_size is None else request.image_size
    pool = _MemoryPool(images, torch.from_numpy(digits.target).long(), size)
    return Source(pool, None, tuple(str(digit) for digit in range(10)))


@dataclass(frozen=True)
class _Torchvision:
    """A reader of one of torchvision's data sets, with the usual mean and deviation of its channels."""

    kind: str
    folder: str
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, request: Request) -> Source:
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
        return Source(pools[0], pools[1], tuple(parts[0].classes), self.mean, self.std)


def _as_images(data: Tensor | np.ndarray) -> Tensor:
    """Bring (N, H, W) or (N, H, W, C) to (N, C, H, W)."""
    images = torch.as_tensor(data)
    return images.unsqueeze(1) if images.ndim == 3 else images.permute(0, 3, 1, 2).contiguous()


def _read_folder(request: Request) -> Source:
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
    return Source(train_pool, test_pool, tuple(train.classes), files=files)


def _list_folder(root: Path) -> Any:
    """List the class folders in `root` and their images."""
    try:
        return torchvision.datasets.ImageFolder(str(root))
    except FileNotFoundError as problem:
        raise UserError(
            f"an image folder must have a folder of images for each class, but {str(root)!r} has not "
            f"({problem}); --data_root sets it"
        ) from problem


def _folder_pool(folder: Any, request: Request) -> Pool:
    """Read the images now if they fit into memory, or leave them on the disk."""
    paths = [path for path, _ in folder.samples]
    if len(folder.classes) < 2:
        raise UserError(
            f"an image folder must have at least 2 classes, but has {len(folder.classes)}: {folder.classes}"
        )
    height, width = _decode(paths[0], request.image_size).shape[:2]
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


def _root(request: Request, expected: str) -> Path:
    """Return the root folder, or say what must be in it."""
    if request.root is None or not request.root.is_dir():
        came = "no root was given" if request.root is None else f"there is no folder {str(request.root)!r}"
        raise UserError(f"data {request.name!r} is read from ROOT/{expected}, but {came}; --data_root sets ROOT")
    return request.root


def _enlarged(images: Tensor, size: int) -> Tensor:
    """Stretch images (N, C, H, W) to squares, bilinearly, and keep their type."""
    scaled = functional.interpolate(images.float(), (size, size), mode="bilinear", align_corners=False, antialias=True)
    return scaled.round().to(torch.uint8) if images.dtype == torch.uint8 else scaled


@dataclass(frozen=True)
class DataRecord:
    """A kind of data by its name.

    Args:
        name: The name users type.
        read: Reads it.
        description: One sentence for the list shown to users.
    """

    name: str
    read: Callable[[Request], Source]
    description: str


DATA: dict[str, DataRecord] = {
    record.name: record
    for record in (
        DataRecord("digits", _read_digits, "1,797 handwritten digits that come with scikit-learn, 8x8 pixels, "
                   "enlarged to 28x28."),
        DataRecord("mnist", _Torchvision("MNIST", "MNIST/raw", (0.1307,), (0.3081,)),
                   "70,000 handwritten digits, 1x28x28, read from ROOT/MNIST/raw."),
        DataRecord("fashion_mnist", _Torchvision("FashionMNIST", "FashionMNIST/raw", (0.2860,), (0.3530,)),
                   "70,000 pieces of clothing in 10 classes, 1x28x28, read from ROOT/FashionMNIST/raw."),
        DataRecord("cifar10", _Torchvision("CIFAR10", "cifar-10-batches-py", (0.4914, 0.4822, 0.4465),
                                           (0.2470, 0.2435, 0.2616)),
                   "60,000 photographs in 10 classes, 3x32x32, read from ROOT/cifar-10-batches-py."),
        DataRecord("cifar100", _Torchvision("CIFAR100", "cifar-100-python", (0.5071, 0.4865, 0.4409),
                                            (0.2673, 0.2564, 0.2762)),
                   "60,000 photographs in 100 classes, 3x32x32, read from ROOT/cifar-100-python."),
        DataRecord("image_folder", _read_folder, "Your own images: ROOT/CLASS/*.jpg, or the same in ROOT/train "
                   "and in ROOT/test or ROOT/val."),
    )
}  # fmt: skip

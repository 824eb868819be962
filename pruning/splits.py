"""Images with labels that are read in batches: from memory, from a torch data set, or sealed until opened."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset, Subset

from .errors import UserError

CHUNK = 4096  # images converted to float at once where a whole split would need four times its memory


class Batch(NamedTuple):
    """Some images and their classes.

    Args:
        images: Normalised float32 (N, C, H, W); from the user's own data also float64 or (N, ...).
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
        """Return the first image, normalised, (1, ...)."""
        return next(iter(self.batches(1))).images

    def prepared(self) -> "Split":
        """Return the split with all work done that would be repeated at each reading."""
        return self


class TensorSplit(Split):
    """A split held in memory.

    Args:
        images: uint8 (N, C, H, W), normalised batch by batch as (images / 255 - mean) / std; or float32 or
            float64 (N, ...), such as images, signals (N, C, L) or feature vectors (N, F), taken as they are.
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
        super().__init__(name)
        came = f"{images.dtype} {tuple(images.shape)}"
        if images.ndim < 2 or len(images) == 0:
            raise UserError(f"split {name!r} must have images (N, ...) with N of 1 or more, but got {came}")
        if images.dtype not in (torch.uint8, torch.float32, torch.float64):
            raise UserError(f"split {name!r} must have uint8, float32 or float64 images, but got {came}")
        if images.dtype == torch.uint8 and images.ndim != 4:
            raise UserError(
                f"split {name!r} must have uint8 images (N, C, H, W), but got {came}; "
                "convert other data to float and scale it yourself"
            )
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
        """Return the split with its images normalised once; float images are so already."""
        if self.images.is_floating_point():
            return self
        parts = [self._normalised(part) for part in self.images.split(CHUNK)]
        return TensorSplit(torch.cat(parts), self.labels, name=self.name)

    def _like(self, images: Tensor, labels: Tensor) -> "TensorSplit":
        """Make a split of other images that are normalised alike."""
        return TensorSplit(images, labels, name=self.name, mean=self.mean, std=self.std)

    def _normalised(self, images: Tensor) -> Tensor:
        """Turn stored images into what the network takes, of the same shape; float images have no mean or std."""
        return normalise(images, self.mean, self.std)


PREPARED_BYTES = 2 * 2**30
"""Largest part of a streamed data set that is kept in memory for repeated reading (scoring, calibration)."""


class DatasetSplit(Split):
    """A split that is read from a torch data set image by image, for data larger than the memory.

    Args:
        dataset: Yields (normalised float image, class number), all images of one shape. Where it has
            `targets`, subsets are drawn from each class in proportion.
        name: What the split is for.
        workers: Processes that read ahead; 0 reads in this process.

    Raises:
        UserError: The data set is empty.
    """

    def __init__(self, dataset: Dataset[Any], *, name: str, workers: int = 0) -> None:
        super().__init__(name)
        self.dataset = dataset
        self.workers = workers
        self.device = torch.device("cpu")
        if len(self) == 0:
            raise UserError(f"split {name!r} must have 1 image or more, but got an empty data set")

    def __len__(self) -> int:
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
        """Return the first image, normalised, (1, ...), without starting the workers."""
        return self.dataset[0][0].unsqueeze(0).to(self.device)

    def to(self, device: torch.device | str) -> "DatasetSplit":
        """Return the split with its batches on `device`."""
        return self._like(self.dataset, torch.device(device))

    def prepared(self) -> Split:
        """Return the split read into memory once, if that takes at most `PREPARED_BYTES`; else itself."""
        image = self.example()
        if len(self) * image.numel() * image.element_size() > PREPARED_BYTES:
            return self
        batches = list(self.batches(256))
        images = torch.cat([batch.images for batch in batches])
        return TensorSplit(images, torch.cat([batch.labels for batch in batches]), name=self.name)

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
        UserError: `padding` is negative, or the images are not (N, C, H, W).
    """
    if images.ndim != 4:
        raise UserError(
            f"random crops and flips need images (N, C, H, W), but got {tuple(images.shape)}; "
            "set the padding to 0 and the flip off"
        )
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


def normalise(images: Tensor, mean: Sequence[float] | None, std: Sequence[float] | None) -> Tensor:
    """Scale uint8 images to [0, 1], then subtract and divide channel by channel; (N, C, H, W) or (C, H, W)."""
    images = unit_range(images)
    if mean is not None:
        images = images - torch.tensor(mean, dtype=images.dtype, device=images.device)[:, None, None]
    if std is not None:
        images = images / torch.tensor(std, dtype=images.dtype, device=images.device)[:, None, None]
    return images


def unit_range(images: Tensor) -> Tensor:
    """Scale uint8 images from 0..255 to [0, 1], as float32; float images are taken to be there already."""
    return images if images.is_floating_point() else images.float() / 255


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

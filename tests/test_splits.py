"""Splits: each image once with its label, subsets in proportion, sealed; augmentation against slices cut by hand."""

import copy
import pickle

import pytest
import torch
from prunegym.pruning.errors import UserError
from prunegym.pruning.splits import (
    DatasetSplit,
    SealedSplit,
    SealedSplitError,
    Split,
    TensorSplit,
    augment_crop_flip,
    stratified_order,
)
from torch import Tensor
from torch.utils.data import TensorDataset


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def numbered(n: int = 12, classes: int = 3) -> TensorSplit:
    """Make a split whose image i has the value i everywhere."""
    images = torch.arange(n, dtype=torch.uint8)[:, None, None, None].expand(n, 1, 2, 2).contiguous()
    return TensorSplit(images, torch.arange(n) % classes, name="train")


def images_of(split: Split) -> Tensor:
    return torch.cat([batch.images for batch in split.batches(64)])


def rows(split: Split) -> set[bytes]:
    return {image.numpy().tobytes() for image in images_of(split)}


def identity(images: Tensor) -> Tensor:
    return (images.flatten(1)[:, 0] * 255).round().long()


class TestTensorSplit:
    def test_batches_in_order(self) -> None:
        sizes = [len(batch.labels) for batch in numbered().batches(5)]
        assert sizes == [5, 5, 2]
        assert [len(batch.labels) for batch in numbered().batches(5, drop_last=True)] == [5, 5]
        assert identity(images_of(numbered())).tolist() == list(range(12))

    def test_shuffled_batches_hold_each_image_once_with_its_label(self) -> None:
        batches = list(numbered().batches(5, generator=seeded()))
        order = torch.cat([identity(batch.images) for batch in batches])
        labels = torch.cat([batch.labels for batch in batches])
        assert order.tolist() != list(range(12))
        assert sorted(order.tolist()) == list(range(12))
        assert torch.equal(labels, order % 3)
        again = torch.cat([identity(batch.images) for batch in numbered().batches(5, generator=seeded())])
        assert torch.equal(order, again)

    def test_normalisation_by_hand(self) -> None:
        images = torch.tensor([0, 255, 51, 102], dtype=torch.uint8).reshape(1, 2, 1, 2)
        split = TensorSplit(images, torch.tensor([0]), name="x", mean=(0.5, 0.2), std=(0.25, 0.1))
        expected = torch.tensor([-2.0, 2.0, 0.0, 2.0]).reshape(1, 2, 1, 2)
        assert torch.allclose(split.example(), expected, atol=1e-6)
        prepared = split.prepared()
        assert prepared.images.dtype == torch.float32
        assert torch.equal(images_of(prepared), images_of(split))
        assert prepared.prepared() is prepared

    def test_float_images_are_taken_as_they_are(self) -> None:
        images = torch.randn(3, 1, 4, 4, generator=seeded())
        split = TensorSplit(images, torch.zeros(3, dtype=torch.int32), name="x")
        assert torch.equal(images_of(split), images)
        assert next(split.batches(2)).labels.dtype == torch.int64

    @pytest.mark.parametrize("shape", [(7, 5), (7, 3, 9), (7, 1, 4, 4), (7, 2, 3, 4, 5)])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_float_data_of_any_rank_and_precision(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        images = torch.randn(shape, generator=seeded(), dtype=dtype)
        split = TensorSplit(images, torch.arange(7) % 2, name="x")
        assert images_of(split).dtype == images_of(split.prepared()).dtype == dtype
        assert torch.equal(images_of(split), images)
        assert split.example().shape == (1, *shape[1:])
        part = split.subset(4, seeded())
        assert torch.bincount(part.labels).tolist() == [2, 2]
        streamed = DatasetSplit(TensorDataset(images, split.labels), name="x")
        assert torch.equal(images_of(streamed), images)
        assert streamed.example().dtype == dtype

    def test_subset_keeps_the_proportions(self) -> None:
        split = numbered(100, classes=5)
        part = split.subset(20, seeded())
        assert torch.bincount(part.labels).tolist() == [4] * 5
        assert len(set(identity(images_of(part)).tolist())) == 20
        assert torch.equal(identity(images_of(part)) % 5, part.labels)

    def test_pickle_and_move(self) -> None:
        split = pickle.loads(pickle.dumps(numbered()))
        assert rows(split) == rows(split.to("cpu")) == rows(numbered())

    @pytest.mark.parametrize(
        ("images", "labels", "wording"),
        [
            (torch.zeros(0, 1, 2, 2), torch.zeros(0).long(), "N of 1 or more"),
            (torch.zeros(2), torch.zeros(2).long(), r"\(N, \.\.\.\) .* but got torch.float32 \(2,\)"),
            (torch.tensor(1.0), torch.zeros(2).long(), r"but got torch.float32 \(\)"),
            (torch.zeros(2, 3).byte(), torch.zeros(2).long(), r"uint8 images \(N, C, H, W\).*\(2, 3\); convert"),
            (torch.zeros(2, 1, 2, 2).half(), torch.zeros(2).long(), "float32 or float64 .* got torch.float16"),
            (torch.zeros(2, 1, 2, 2).long(), torch.zeros(2).long(), "but got torch.int64"),
            (torch.zeros(2, 1, 2, 2), torch.zeros(2), r"whole-number label per image, but got torch.float32"),
            (torch.zeros(2, 1, 2, 2), torch.zeros(3).long(), r"but got torch.int64 \(3,\)"),
            (torch.zeros(2, 1, 2, 2), torch.tensor([0, -1]), "the lowest is -1"),
            (torch.full((2, 1, 2, 2), float("nan")), torch.zeros(2).long(), "got NaN or infinity"),
        ],
    )
    def test_wrong_tensors(self, images: Tensor, labels: Tensor, wording: str) -> None:
        with pytest.raises(UserError, match=wording):
            TensorSplit(images, labels, name="train")

    def test_wrong_requests(self) -> None:
        with pytest.raises(UserError, match="drop it"):
            TensorSplit(torch.zeros(1, 1, 2, 2), torch.zeros(1).long(), name="x", mean=(0.5,), std=(1.0,))
        with pytest.raises(UserError, match="1 to 12 images, but got n=13"):
            numbered().subset(13, seeded())
        with pytest.raises(UserError, match="batch_size must be 1 or more"):
            next(numbered().batches(0))


class TestDatasetSplit:
    def split(self, workers: int = 0) -> DatasetSplit:
        tensors = numbered(20)
        dataset = TensorDataset(images_of(tensors), tensors.labels)
        return DatasetSplit(dataset, name="train", workers=workers)

    def test_reads_what_a_tensor_split_reads(self) -> None:
        for ours, theirs in zip(self.split().batches(8), numbered(20).batches(8), strict=True):
            assert torch.equal(ours.images, theirs.images)
            assert torch.equal(ours.labels, theirs.labels)
        ours_first = next(self.split().batches(8, generator=seeded(3)))
        theirs_first = next(numbered(20).batches(8, generator=seeded(3)))
        assert torch.equal(ours_first.images, theirs_first.images)

    def test_leaves_the_global_random_state(self) -> None:
        before = torch.get_rng_state()
        list(self.split().batches(8, generator=seeded()))
        assert torch.equal(torch.get_rng_state(), before)

    def test_subset_example_and_empty(self) -> None:
        part = self.split().subset(7, seeded())
        assert len(rows(part)) == len(part) == 7
        assert part.example().shape == (1, 1, 2, 2)
        assert len(part.prepared()) == len(part)
        with pytest.raises(UserError, match="empty data set"):
            DatasetSplit(TensorDataset(torch.zeros(0, 1)), name="train")


class TestSealedSplit:
    READS = (
        lambda split: split.batches(2),
        lambda split: split.subset(2, seeded()),
        lambda split: split.example(),
        lambda split: split.to("cpu"),
        lambda split: split.prepared(),
    )

    @pytest.mark.parametrize("read", READS)
    @pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda split: pickle.loads(pickle.dumps(split))])
    def test_no_reading_before_it_is_opened(self, read, copied) -> None:  # type: ignore[no-untyped-def]
        sealed = copied(SealedSplit(numbered()))
        with pytest.raises(SealedSplitError, match=r"sealed until a search is over, but \w+\(\) was called"):
            read(sealed)
        assert len(sealed) == 12
        assert sealed.readings == ()

    def test_opening_is_recorded(self) -> None:
        inner = numbered()
        sealed = SealedSplit(inner)
        assert sealed.open("final figure") is inner
        sealed.open("second look")
        assert sealed.readings == ("final figure", "second look")
        assert copy.deepcopy(sealed).readings == sealed.readings
        with pytest.raises(SealedSplitError):
            sealed.example()
        with pytest.raises(UserError, match="must have a reason"):
            sealed.open(" ")


def test_every_beginning_of_a_stratified_order_is_in_proportion() -> None:
    labels = torch.tensor([0] * 60 + [1] * 30 + [3] * 10)
    order = stratified_order(labels, seeded())
    assert sorted(order.tolist()) == list(range(100))
    for n in range(1, 101):
        found = torch.bincount(labels[order[:n]], minlength=4)
        due = n * torch.tensor([0.6, 0.3, 0.0, 0.1])
        assert (found - due).abs().max() < 2
    assert not torch.equal(order, stratified_order(labels, seeded(1)))


@pytest.mark.parametrize("padding", [0, 1, 3])
@pytest.mark.parametrize("flip", [False, True])
def test_augmentation_gives_slices_of_the_padded_image(padding: int, flip: bool) -> None:
    images = torch.rand(64, 2, 5, 6, generator=seeded()) + 1  # no pixel is zero or like another
    result = augment_crop_flip(images, padding=padding, flip=flip, generator=seeded(1))
    found = set()
    for image, changed in zip(images, result, strict=True):
        padded = torch.zeros(2, 5 + 2 * padding, 6 + 2 * padding)
        padded[:, padding : padding + 5, padding : padding + 6] = image
        matches = []
        for top in range(2 * padding + 1):
            for left in range(2 * padding + 1):
                window = padded[:, top : top + 5, left : left + 6]
                matches += [(top, left, False)] if torch.equal(window, changed) else []
                matches += [(top, left, True)] if torch.equal(window.flip(2), changed) else []
        assert len(matches) == 1
        found.update(matches)
    shifts = {(top, left) for top, left, _ in found}
    assert len(shifts) >= min(20, (2 * padding + 1) ** 2)
    assert {mirrored for _, _, mirrored in found} == ({False, True} if flip else {False})
    again = augment_crop_flip(images, padding=padding, flip=flip, generator=seeded(1))
    assert torch.equal(result, again)


def test_augmentation_keeps_double_precision() -> None:
    images = torch.rand(3, 1, 4, 4, generator=seeded(), dtype=torch.float64)
    assert augment_crop_flip(images, padding=1, flip=True, generator=seeded()).dtype == torch.float64


def test_augmentation_refuses_wrong_requests() -> None:
    with pytest.raises(UserError, match=r"need images \(N, C, H, W\), but got \(3, 2, 8\)"):
        augment_crop_flip(torch.zeros(3, 2, 8), padding=1, flip=False, generator=seeded())
    with pytest.raises(UserError, match="padding must be 0 or more"):
        augment_crop_flip(torch.zeros(1, 1, 2, 2), padding=-1, flip=False, generator=seeded())


def test_a_streamed_split_is_prepared_in_memory_once() -> None:
    reads = []

    class Counting(torch.utils.data.Dataset):  # type: ignore[type-arg]
        def __len__(self) -> int:
            return 6

        def __getitem__(self, place: int) -> tuple[torch.Tensor, int]:
            reads.append(place)
            return torch.full((1, 2, 2), float(place)), place % 3

    split = DatasetSplit(Counting(), name="reward")
    ready = split.prepared()
    before = len(reads)
    for _ in range(3):
        images = torch.cat([batch.images for batch in ready.batches(4)])
        assert images[:, 0, 0, 0].tolist() == [0, 1, 2, 3, 4, 5]
    assert len(reads) == before
    assert torch.cat([batch.labels for batch in ready.batches(4)]).tolist() == [0, 1, 2, 0, 1, 2]

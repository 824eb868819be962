"""Splits: disjoint, in proportion, sealed; augmentation against slices cut by hand."""

import copy
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from prunegym.pruning.data import (
    DATA,
    DatasetSplit,
    DataSplits,
    SealedSplit,
    SealedSplitError,
    Split,
    SplitSettings,
    TensorSplit,
    augment_crop_flip,
    data_names,
    load_data,
    stratified_order,
)
from prunegym.pruning.errors import UserError
from torch import Tensor
from torch.utils.data import TensorDataset

SHARED = Path(__file__).resolve().parents[2] / "shared"


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
            (torch.zeros(2, 2, 2), torch.zeros(2).long(), r"but got \(2, 2, 2\)"),
            (torch.zeros(2, 1, 2, 2).double(), torch.zeros(2).long(), "but got torch.float64"),
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
        assert part.prepared() is part
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


def test_augmentation_refuses_negative_padding() -> None:
    with pytest.raises(UserError, match="padding must be 0 or more"):
        augment_crop_flip(torch.zeros(1, 1, 2, 2), padding=-1, flip=False, generator=seeded())


def check_parts(splits: DataSplits, total: int) -> None:
    """Check that no image is in two parts and none is lost."""
    parts = [splits.train, splits.reward, splits.selection, splits.test.open("test of the split")]
    sets = [rows(part) for part in parts]
    assert sum(len(part) for part in parts) == total
    assert len(set.union(*sets)) == total
    assert splits.train.example().shape == (1, *splits.image_shape)


def test_digits() -> None:
    splits = load_data("digits", settings=SplitSettings(reward=100, selection=0.2, test=0.25))
    check_parts(splits, 1797)
    assert (len(splits.reward), len(splits.selection), len(splits.test)) == (100, 270, 449)
    assert (splits.classes, splits.image_shape, splits.class_names[3]) == (10, (1, 28, 28), "3")
    train = images_of(splits.train)
    assert abs(float(train.mean())) < 1e-4
    assert abs(float(train.std(correction=0)) - 1) < 1e-4
    counts = torch.bincount(next(splits.reward.batches(100)).labels)
    assert counts.min() >= 9
    assert counts.max() <= 11


def test_seed_decides_the_draw() -> None:
    first, same = (load_data("digits", settings=SplitSettings(seed=1), image_size=8) for _ in range(2))
    other = load_data("digits", settings=SplitSettings(seed=2), image_size=8)
    assert rows(first.reward) == rows(same.reward)
    assert rows(first.test.open("check")) != rows(other.test.open("check"))
    assert first.image_shape == (1, 8, 8)


def test_digits_pixels_are_the_original_ones() -> None:
    splits = load_data("digits", image_size=8, mean=(0.0,), std=(1.0,))
    values = images_of(splits.train)
    assert values.min() == 0
    assert values.max() == 1
    assert torch.equal(values * 16, (values * 16).round())


def write_mnist(root: Path, n_train: int, n_test: int) -> None:
    """Write two small files in the layout of the original MNIST."""
    folder = root / "MNIST" / "raw"
    folder.mkdir(parents=True)
    for stem, n in (("train", n_train), ("t10k", n_test)):
        pixels = np.random.default_rng(n).integers(0, 256, (n, 28, 28), np.uint8)
        labels = (np.arange(n) % 10).astype(np.uint8)
        (folder / f"{stem}-images-idx3-ubyte").write_bytes(struct.pack(">4i", 2051, n, 28, 28) + pixels.tobytes())
        (folder / f"{stem}-labels-idx1-ubyte").write_bytes(struct.pack(">2i", 2049, n) + labels.tobytes())


def test_mnist_layout(tmp_path: Path) -> None:
    write_mnist(tmp_path, 100, 30)
    splits = load_data("mnist", root=str(tmp_path), settings=SplitSettings(reward=20, selection=30))
    check_parts(splits, 130)
    assert [len(part) for part in (splits.train, splits.reward, splits.selection, splits.test)] == [50, 20, 30, 30]
    assert torch.bincount(next(splits.reward.batches(20)).labels).tolist() == [2] * 10
    assert (splits.mean, splits.std) == ((0.1307,), (0.3081,))
    wide = load_data("mnist", root=str(tmp_path), settings=SplitSettings(0.2, 0.2), image_size=32)
    assert wide.train.example().shape == (1, 1, 32, 32)


@pytest.mark.parametrize(
    ("name", "folder"),
    [
        ("mnist", "MNIST/raw"),
        ("fashion_mnist", "FashionMNIST/raw"),
        ("cifar10", "cifar-10-batches-py"),
        ("cifar100", "cifar-100-python"),
    ],
)
def test_missing_data_names_the_folder(name: str, folder: str, tmp_path: Path) -> None:
    for root in (None, str(tmp_path), str(tmp_path / "nowhere")):
        with pytest.raises(UserError, match=rf"{folder}.*--data_root"):
            load_data(name, root=root)


def paint(path: Path, colour: tuple[int, int, int], size: tuple[int, int] = (6, 6)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Paint 40 + 8 images of two classes, each with a colour of its own."""
    for part, n in (("train", 20), ("test", 4)):
        for label, kind in enumerate(("cat", "dog")):
            for place in range(n):
                paint(tmp_path / part / kind / f"{place:02}.png", (place, 100 * label, 200 * (part == "test")))
    return tmp_path


@pytest.mark.parametrize("in_memory", [None, False])
def test_image_folder(folder: Path, in_memory: bool | None) -> None:
    settings = SplitSettings(reward=6, selection=0.25)
    splits = load_data(
        "image_folder", root=str(folder), settings=settings, image_size=6, in_memory=in_memory,
        mean=(0, 0, 0), std=(1, 1, 1),
    )  # fmt: skip
    assert isinstance(splits.train, TensorSplit if in_memory is None else DatasetSplit)
    check_parts(splits, 48)
    assert (splits.class_names, splits.image_shape) == (("cat", "dog"), (3, 6, 6))
    assert [len(part) for part in (splits.train, splits.reward, splits.selection, splits.test)] == [24, 6, 10, 8]
    for part in (splits.train, splits.reward, splits.selection, splits.test.open("check")):
        batch = next(part.batches(48))
        colours = (batch.images[:, :, 0, 0] * 255).round().long()
        assert torch.equal(colours[:, 1], 100 * batch.labels)
        assert torch.bincount(batch.labels).tolist() == [len(part) // 2] * 2
        assert (colours[:, 2] == (200 if part.name == "test" else 0)).all()
    assert splits.reward.subset(4, seeded()).example().shape == (1, 3, 6, 6)
    assert rows(pickle.loads(pickle.dumps(splits)).train) == rows(splits.train)


def test_streamed_statistics_equal_those_in_memory(folder: Path) -> None:
    settings = SplitSettings(reward=4, selection=4)
    memory, stream = (
        load_data("image_folder", root=str(folder), settings=settings, image_size=6, in_memory=flag)
        for flag in (True, False)
    )
    assert memory.mean == pytest.approx(stream.mean)
    assert memory.std == pytest.approx(stream.std)
    colours = torch.stack([image[:, 0, 0] for image in images_of(memory.train)])
    assert colours[:, :2].mean(0).tolist() == pytest.approx([0, 0], abs=1e-4)
    assert colours[:, :2].std(0, correction=0).tolist() == pytest.approx([1, 1], abs=1e-3)


def test_plain_folder_is_split_in_proportion(folder: Path) -> None:
    settings = SplitSettings(reward=4, selection=4, test=0.25)
    splits = load_data("image_folder", root=str(folder / "train"), settings=settings)
    check_parts(splits, 40)
    assert torch.bincount(next(splits.test.open("check").batches(40)).labels).tolist() == [5, 5]


def test_heldout_images_alone_reach_reward_and_selection(folder: Path) -> None:
    listed = {f"{kind}/{place:02}.png" for kind in ("cat", "dog") for place in range(4, 10)}
    (folder / "heldout.txt").write_text("\n".join(sorted(listed)) + "\n")
    settings = SplitSettings(reward=4, selection=6, heldout=str(folder / "heldout.txt"))
    splits = load_data("image_folder", root=str(folder), settings=settings, mean=(0, 0, 0), std=(1, 1, 1))
    check_parts(splits, 48)
    for part in (splits.reward, splits.selection):
        assert set((images_of(part)[:, 0, 0, 0] * 255).round().long().tolist()) <= set(range(4, 10))
    assert len(splits.train) == 30
    with pytest.raises(UserError, match=r"into the 12 images listed in .*, but got 4 \+ 9"):
        load_data("image_folder", root=str(folder), settings=SplitSettings(4, 9, heldout=settings.heldout))
    (folder / "heldout.txt").write_text("cow/1.png\n")
    with pytest.raises(UserError, match=r"such as 'cat/00\.png', but lists 1 others, first 'cow/1\.png'"):
        load_data("image_folder", root=str(folder), settings=settings)
    with pytest.raises(UserError, match="heldout names files of an image folder"):
        load_data("digits", settings=settings)


def test_resize_takes_the_middle_square(tmp_path: Path) -> None:
    for kind in ("a", "b"):
        for place in range(3):
            pixels = np.full((10, 30, 3), 255, np.uint8)
            pixels[:, 10:20] = 10 * place  # the middle third
            (tmp_path / kind).mkdir(exist_ok=True)
            Image.fromarray(pixels).save(tmp_path / kind / f"{place}.png")
    settings = SplitSettings(reward=1, selection=1, test=0.2)
    splits = load_data("image_folder", root=str(tmp_path), settings=settings, image_size=10, mean=[0] * 3, std=[1] * 3)
    assert splits.image_shape == (3, 10, 10)
    assert images_of(splits.train).max() <= 20 / 255


def test_folder_errors(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    empty = tmp_path_factory.mktemp("empty")
    with pytest.raises(UserError, match="a folder of images for each class"):
        load_data("image_folder", root=str(empty))
    with pytest.raises(UserError, match="got no image_size"):
        load_data("image_folder", root=str(folder), in_memory=False)
    paint(folder / "train" / "cat" / "wide.png", (0, 0, 0), (9, 6))
    with pytest.raises(UserError, match=r"wide\.png' is 9x6 and the first is 6x6; set image_size"):
        load_data("image_folder", root=str(folder))
    (folder / "train" / "cat" / "wide.png").write_bytes(b"broken")
    with pytest.raises(UserError, match="images must be readable"):
        load_data("image_folder", root=str(folder))
    paint(folder / "test" / "cow" / "0.png", (0, 0, 0))
    with pytest.raises(UserError, match=r"must have the same classes, but differ in \['cow'\]"):
        load_data("image_folder", root=str(folder))


@pytest.mark.parametrize(
    ("keywords", "wording"),
    [
        ({"reward": 0}, "got reward=0"),
        ({"selection": 1.5}, "got selection=1.5"),
        ({"reward": -3}, "got reward=-3"),
        ({"test": 1.0}, r"share in \(0, 1\), but got test=1.0"),
    ],
)
def test_wrong_settings(keywords: dict, wording: str) -> None:
    with pytest.raises(UserError, match=wording):
        SplitSettings(**keywords)


def test_wrong_requests() -> None:
    with pytest.raises(UserError, match="did you mean 'fashion_mnist'"):
        load_data("fashionmnist")
    with pytest.raises(UserError, match=r"into the 1438 images of the training part of 'digits', but got 1000 \+ 500"):
        load_data("digits", settings=SplitSettings(1000, 500))
    with pytest.raises(UserError, match="each of 1 channels"):
        load_data("digits", mean=(0.5, 0.5, 0.5), std=(1, 1, 1))
    with pytest.raises(UserError, match="image_size must be 1 pixel or more"):
        load_data("digits", image_size=0)


def test_names_are_described() -> None:
    assert data_names() == ["digits", "mnist", "fashion_mnist", "cifar10", "cifar100", "image_folder"]
    assert all(record.name == name and record.description.endswith(".") for name, record in DATA.items())


def test_real_mnist() -> None:
    root = SHARED / "data"
    if not (root / "MNIST" / "raw").is_dir():
        pytest.skip("the original MNIST lies in ../shared/data, which is not here")
    splits = load_data("mnist", root=str(root), settings=SplitSettings(2000, 2000))
    assert [len(part) for part in (splits.train, splits.reward, splits.selection, splits.test)] == [
        56_000,
        2000,
        2000,
        10_000,
    ]
    images = images_of(splits.train.subset(10_000, seeded()))
    assert abs(float(images.mean())) < 0.02  # the constants are those of this data
    assert abs(float(images.std()) - 1) < 0.02

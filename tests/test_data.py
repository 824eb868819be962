"""Data by name: four disjoint parts in proportion, read from small files written here."""

import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from prunegym.pruning.data import (
    DatasetSplit,
    DataSplits,
    Split,
    SplitSettings,
    TensorSplit,
    data_names,
    load_data,
)
from prunegym.pruning.errors import UserError
from prunegym.pruning.sources import DATA
from torch import Tensor

SHARED = Path(__file__).resolve().parents[2] / "shared"


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images_of(split: Split) -> Tensor:
    return torch.cat([batch.images for batch in split.batches(64)])


def rows(split: Split) -> set[bytes]:
    return {image.numpy().tobytes() for image in images_of(split)}


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

"""What a saved network's `manifest.json` says: how to build the original, what was cut, and a digest of every file."""

import hashlib
import importlib.metadata
import json
import os
import platform
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from .errors import UserError

FORMAT = 2
WEIGHTS = "pruned.safetensors"
PLAN = "plan.json"
MANIFEST = "manifest.json"
DTYPES = {
    "float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64,
}  # fmt: skip

OTHER_FORMAT = "it was saved by another version of prunegym; rebuild it with `prunegym apply` or save it anew"
COPY_AGAIN = "the file was altered, cut off or comes from elsewhere; copy the folder again or save the network anew"


@dataclass(frozen=True)
class NetworkSource:
    """How the original network is built.

    Attributes:
        name: Built-in or torchvision name, `module:function` or `path/to/file.py:function`.
        arguments: Its keyword arguments.
        classes: Number of outputs, or None where the name decides.
        image_shape: Channels, height and width of an image, or None where unknown.
        started_in: For a function of the user's own, the folder in which its name was typed, relative to the saved
            folder, so that both may move together; None elsewhere.
    """

    name: str
    arguments: dict[str, Any]
    classes: int | None
    image_shape: tuple[int, ...] | None
    started_in: str | None = None


@dataclass(frozen=True)
class DataSource:
    """Which data the network was made for.

    Attributes:
        name: Of the data set.
        mean: Per channel in the scale [0, 1], to subtract from an image; None where unknown.
        std: Per channel in the scale [0, 1], to divide by; None where unknown.
    """

    name: str
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None


@dataclass(frozen=True)
class Manifest:
    """What is known of a saved network besides its tensors.

    Attributes:
        network: How the original is built; None where it was passed in as an object.
        data: What an input must look like; None where unknown.
        example_shape: (1, C, H, W) shape of one input.
        dtype: Of the first floating-point parameter and of inputs, e.g. "float32".
        widths: Channels that are left, by group.
        counts: Layer -> attribute -> value, such as `conv1.out_channels`; of `normalized_shape` the last entry.
        versions: Of Python and of the packages that saved it.
        sha256: Hexadecimal digests of the weights and of the plan, by file name.
    """

    network: NetworkSource | None
    data: DataSource | None
    example_shape: tuple[int, ...]
    dtype: str
    widths: dict[str, int]
    counts: dict[str, dict[str, int]]
    versions: dict[str, str]
    sha256: dict[str, str]

    def to_bytes(self) -> bytes:
        """Return the file's content, with a digest of itself.

        Raises:
            UserError: The network's arguments cannot be written as JSON.
        """
        try:
            content = json.loads(json.dumps({"format": FORMAT, **asdict(self)}))
        except (TypeError, ValueError) as error:
            raise UserError(
                f"a network's arguments must be plain numbers, texts and lists to be saved, but: {error}; "
                "leave `source` empty and pass the original to load_pruned"
            ) from error
        content["sha256"][MANIFEST] = _own_digest(content)
        return (json.dumps(content, indent=1) + "\n").encode()

    @classmethod
    def from_bytes(cls, data: bytes, path: Path) -> "Manifest":
        """Read what `to_bytes` returned, and check every entry.

        Args:
            data: The file's content.
            path: Where it was found, for the error.

        Raises:
            UserError: Not JSON, of another format, an entry missing or of the wrong type, or altered.
        """
        content = parse_json(data, path)
        entry = _Entry(content, path)
        found = entry.get("format", _is_count, "a whole number")
        if found != FORMAT:
            raise UserError(f"{path} must have format {FORMAT}, but has {found}; {OTHER_FORMAT}")
        network = entry.inner("network")
        dataset = entry.inner("data")
        manifest = cls(
            network=None if network is None else NetworkSource(
                name=network.get("name", _is_text, "a text"),
                arguments=network.get("arguments", _is_mapping, "a mapping"),
                classes=network.get("classes", _optional(_is_count), "a positive whole number or null"),
                image_shape=_tuple(network.get("image_shape", _optional(_is_shape), "three positive numbers or null")),
                started_in=network.get("started_in", _optional(_is_text), "a folder or null", needed=False),
            ),
            data=None if dataset is None else DataSource(
                name=dataset.get("name", _is_text, "a text"),
                mean=_tuple(dataset.get("mean", _optional(_are_numbers), "a list of numbers or null")),
                std=_tuple(dataset.get("std", _optional(_are_numbers), "a list of numbers or null")),
            ),
            example_shape=tuple(entry.get("example_shape", _is_shape, "a list of positive whole numbers")),
            dtype=entry.get("dtype", lambda value: _is_text(value) and value in DTYPES, f"one of {', '.join(DTYPES)}"),
            widths=entry.get("widths", _mapping_of(_is_count), "a mapping from groups to positive whole numbers"),
            counts=entry.get("counts", _mapping_of(_mapping_of(_is_count)), "layer -> attribute -> positive number"),
            versions=entry.get("versions", _mapping_of(_is_text), "a mapping from packages to versions"),
            sha256=dict(entry.get("sha256", _mapping_of(_is_text), "a mapping from files to digests")),
        )  # fmt: skip
        for name in (WEIGHTS, PLAN, MANIFEST):
            if name not in manifest.sha256:
                raise UserError(f"{path} must hold the SHA-256 of {name}, but does not; {COPY_AGAIN}")
        del content["sha256"][MANIFEST]
        if manifest.sha256.pop(MANIFEST) != _own_digest(content):
            raise UserError(f"{path} must be as it was saved, but its SHA-256 differs; {COPY_AGAIN}")
        return manifest


def parse_json(data: bytes, path: Path) -> Any:
    """Return what a JSON file holds.

    Raises:
        UserError: It is no JSON; the file is named.
    """
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} must be JSON, but is not ({error}); {COPY_AGAIN}") from error


def current_versions() -> dict[str, str]:
    """Return the versions of Python and of what a network is built from."""
    packages = ("prunegym", "torch", "torchvision")
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in packages}}


def source_of(source: Mapping[str, Any], folder: Path) -> tuple[NetworkSource | None, DataSource | None]:
    """Pick what a manifest in `folder` keeps of a task's `source`; (None, None) where the network was an object."""
    if "network" not in source:
        return None, None
    shape, mean, std = (source.get(key) for key in ("image_shape", "mean", "std"))
    network = NetworkSource(
        name=source["network"],
        arguments=dict(source.get("network_arguments") or {}),
        classes=source.get("classes"),
        image_shape=None if shape is None else tuple(int(size) for size in shape),
        started_in=relative_folder(source.get("started_in", "."), folder) if ":" in source["network"] else None,
    )
    if "data" not in source:
        return network, None
    statistics = (None if values is None else tuple(float(value) for value in values) for values in (mean, std))
    return network, DataSource(source["data"], *statistics)


def relative_folder(target: str | Path, folder: Path) -> str:
    """Return `target` as seen from `folder`, with forward slashes; absolute where no relative path leads there."""
    try:
        return Path(os.path.relpath(Path(target).resolve(), folder.resolve())).as_posix()
    except ValueError:  # another drive
        return str(Path(target).resolve())


@dataclass(frozen=True)
class _Entry:
    """A mapping inside the file, whose entries are checked as they are read."""

    content: Any
    path: Path
    within: str = ""

    def get(self, key: str, fits: Callable[[Any], bool], what: str, needed: bool = True) -> Any:
        if not needed and isinstance(self.content, dict) and key not in self.content:
            return None
        if not isinstance(self.content, dict) or key not in self.content:
            raise UserError(f"{self.path} must hold {self.within + key!r}, but does not; {COPY_AGAIN}")
        value = self.content[key]
        if not fits(value):
            raise UserError(
                f"{self.within + key!r} in {self.path} must be {what}, but is {repr(value)[:60]}; {COPY_AGAIN}"
            )
        return value

    def inner(self, key: str) -> "_Entry | None":
        value = self.get(key, _optional(_is_mapping), "a mapping or null")
        return None if value is None else _Entry(value, self.path, f"{self.within}{key}.")


def _own_digest(content: Mapping[str, Any]) -> str:
    """Digest over the entries, so that only their meaning counts, not the layout of the text."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _tuple(values: Any) -> Any:
    return None if values is None else tuple(values)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_shape(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(map(_is_count, value))


def _are_numbers(value: Any) -> bool:
    return isinstance(value, list) and all(type(one) in (int, float) for one in value)


def _is_mapping(value: Any) -> bool:
    return isinstance(value, dict)


def _optional(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or fits(value)


def _mapping_of(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, dict) and all(map(fits, value.values()))

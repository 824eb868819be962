"""From names to a checked task: load the data, build the network, load or train its weights.

Weights trained here are kept in the user's cache folder, keyed by everything that decides them, so that the
same task is not trained twice; a damaged cache file is trained again.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from .architecture import Architecture, is_architecture
from .artifact import weight_bytes, write_atomically
from .checks import check_seed, check_types
from .data import DataSplits, SplitSettings, TensorSplit, load_data
from .errors import UserError
from .networks import build_network
from .retraining import RetrainSettings, retrain
from .task import PruningTask
from .user_code import locate, locate_function
from .weights import load_weights

RECIPE = 1
"""Raised when training changes, so that older cached weights are not taken."""


@dataclass(frozen=True)
class TaskSettings:
    """Which network, on which data.

    Attributes:
        network: Built-in or torchvision name, the user's own as `module:function` or `file.py:function`, or the
            `architecture.yaml` of a pruned one, to be trained from scratch.
        network_arguments: Keyword arguments of the network; they come before those of an architecture file.
        weights: File with trained weights (.safetensors or a plain state dict); None = train here.
        data: Name of the data set, see `data.data_names()`.
        data_root: Folder that holds it.
        image_size: Side to which images are brought, in pixels; None = the data set's own.
        mean: Per channel, subtracted from images in [0, 1]; None = the data set's own.
        std: Per channel, divides; None = the data set's own.
        in_memory: Whether an image folder is decoded into memory; None = if it takes at most 2 GiB.
        workers: Processes that read a streamed image folder.
        splits: Sizes and seed of the reward, selection and test splits.
        training: How the network is trained when no weights are given.
        metric: "accuracy" or "top5_accuracy".
    """

    network: str = "lenet5_caffe"
    network_arguments: dict[str, Any] = field(default_factory=dict)
    weights: str | None = None
    data: str = "digits"
    data_root: str | None = None
    image_size: int | None = None
    mean: list[float] | None = None
    std: list[float] | None = None
    in_memory: bool | None = None
    workers: int = 0
    splits: SplitSettings = field(default_factory=SplitSettings)
    training: RetrainSettings = field(default_factory=RetrainSettings)
    metric: str = "accuracy"

    def __post_init__(self) -> None:
        """Refuse values of other types."""
        check_types(self)

    def located(self, folder: Path | None) -> "TaskSettings":
        """Return the settings with relative paths that only exist below `folder` put there."""
        if folder is None:
            return self
        heldout = self.splits.heldout
        return dataclasses.replace(
            self,
            network=locate(self.network, folder)
            if is_architecture(self.network)
            else locate_function(self.network, folder),
            weights=None if self.weights is None else locate(self.weights, folder),
            data_root=None if self.data_root is None else locate(self.data_root, folder),
            splits=self.splits if heldout is None else dataclasses.replace(
                self.splits, heldout=locate(heldout, folder)
            ),
        )  # fmt: skip

    def unfolded(self) -> "TaskSettings":
        """Return the settings with an architecture file replaced by the network it names, narrowed.

        Raises:
            UserError: The file is missing, is no architecture, or names no network.
        """
        if not is_architecture(self.network):
            return self
        network, arguments = Architecture.load(self.network).build_arguments(self.network)
        return dataclasses.replace(self, network=network, network_arguments={**arguments, **self.network_arguments})


def cache_folder() -> Path:
    """Return the user's cache folder, `$XDG_CACHE_HOME/prunegym` or `~/.cache/prunegym`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "prunegym"


def prepare_task(
    settings: TaskSettings,
    *,
    seed: int = 0,
    device: str = "cpu",
    progress: Callable[[int], None] | None = None,
    check: Callable[[nn.Module, Tensor], None] | None = None,
    folder: Path | None = None,
) -> PruningTask:
    """Load data and network, train it if no weights are given, and check the whole.

    Args:
        settings: What to load.
        seed: Of the initial weights and the training, in [0, 2**63).
        device: Where training and the task run, e.g. "cpu" or "cuda".
        progress: Called with the number of training updates done.
        check: Called with the network before it is trained, and one input (1, C, H, W); may refuse the request.
        folder: Where relative paths of the settings are looked for that the working directory does not have.

    Raises:
        UserError: Anything the user asked for does not exist or does not fit.
    """
    check_seed(seed)
    typed, settings = settings, settings.located(folder)
    label = typed.network
    if is_architecture(settings.network):
        settings = settings.unfolded()
        label = f"{settings.network}, narrowed,"
        # what is saved of the task holds the widths, so that it can be built without the file
        typed = dataclasses.replace(typed, network=settings.network, network_arguments=settings.network_arguments)
    data = load_data(
        settings.data,
        root=settings.data_root,
        settings=settings.splits,
        image_size=settings.image_size,
        mean=settings.mean,
        std=settings.std,
        in_memory=settings.in_memory,
        workers=settings.workers,
    )
    network = build_network(
        settings.network,
        classes=data.classes,
        in_channels=data.image_shape[0],
        image_size=data.image_shape[-1],
        arguments=settings.network_arguments,
        seed=seed,
    ).to(device)
    if check is not None:
        check(network, data.train.example().to(device))
    if settings.weights is not None:
        load_weights(network, settings.weights)
    source = {
        **dataclasses.asdict(typed), "started_in": str(folder or Path.cwd()), "seed": seed,
        "classes": data.classes, "image_shape": data.image_shape,
        "mean": list(data.mean), "std": list(data.std),
    }  # fmt: skip
    task = PruningTask.from_data(  # also checks network and data before any training
        network, data, metric=settings.metric, name=f"{label} on {typed.data}", source=source
    )
    if settings.weights is None:
        _trained(network, data, settings, seed, device, progress)
    network.eval()
    return task.to(device) if device != "cpu" else task


def _trained(
    network: nn.Module,
    data: DataSplits,
    settings: TaskSettings,
    seed: int,
    device: str,
    progress: Callable[[int], None] | None,
) -> None:
    """Train `network` in place, or take the weights that the same training gave before."""
    training = settings.training.resolved(len(data.train))
    if not training.updates:
        raise UserError(
            "an untrained network cannot be pruned: give its weights (--task.weights) "
            "or train it here (--task.training.updates or --task.training.epochs)"
        )
    settings = dataclasses.replace(settings, training=training)
    own_code = ":" in settings.network
    kept = None if own_code else cache_folder() / f"{_key(settings, data, seed, device)}.safetensors"
    if kept is not None and kept.is_file():
        try:
            network.load_state_dict(load_file(kept, device=device))
            return
        except (OSError, RuntimeError, SafetensorError):
            kept.unlink(missing_ok=True)  # damaged: train again
    selection = data.selection.to(device) if training.check_every else None
    retrain(network, data.train.to(device), training, seed=seed, selection=selection, progress=progress)
    if kept is not None:
        _keep(network, kept)


def _keep(network: nn.Module, path: Path) -> None:
    """Write atomically; a cache that cannot be written is no error."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, weight_bytes(network))
    except OSError:
        return


def _key(settings: TaskSettings, data: DataSplits, seed: int, device: str) -> str:
    """Digest of everything that decides the trained weights."""
    parts = dataclasses.asdict(settings)
    for irrelevant in ("metric", "weights", "data_root", "in_memory", "workers"):
        parts.pop(irrelevant)
    content = str(settings.data_root)
    if isinstance(data.train, TensorSplit):
        some = data.train.images[:: max(1, len(data.train) // 512)].contiguous()
        content = hashlib.sha256(some.numpy().tobytes() + data.train.labels.numpy().tobytes()).hexdigest()
    parts.update(
        recipe=RECIPE, seed=seed, device=device, torch=torch.__version__, threads=torch.get_num_threads(),
        content=content, examples=len(data.train),
    )  # fmt: skip
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:32]

"""A pruning task: a trained network and the data it is judged on, checked once, here.

Four splits with different duties: *train* (retraining, calibration), *reward* (what a search is paid on),
*selection* (choosing among finished candidates), *test* (sealed; read once, for the final report).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .copying import copy_network
from .data import DatasetSplit, DataSplits, SealedSplit, Split, TensorSplit
from .errors import UserError, closest
from .evaluation import METRICS
from .tracing import evaluation_mode

SplitLike = Split | tuple[Tensor, Tensor] | torch.utils.data.Dataset[Any]


@dataclass(eq=False)
class PruningTask:
    """What is to be pruned and how it is judged.

    Args:
        network: A trained classifier, (N, …) -> (N, classes). It is never changed.
        train: Data for retraining and calibration: a `Split`, a pair (images (N, C, H, W) float32 or uint8,
            labels (N,) int64), or any dataset of (image, label).
        reward: Data a search is scored on. Held out from training.
        selection: Data for choosing among finished candidates. Held out from both.
        test: Data for the final report; sealed here, whatever is given.
        example_input: (1, …) one input; taken from `train` by default.
        metric: "accuracy" or "top5_accuracy".
        name: For reports.
        source: How to build and load the network again (network name, arguments, data …), for the run folder.

    Raises:
        UserError: NaN weights, a non-(N, classes) output, labels beyond the outputs, an empty split.
    """

    network: nn.Module
    train: Any
    reward: Any
    selection: Any
    test: Any
    example_input: Tensor | None = None
    metric: str = "accuracy"
    name: str = "task"
    source: Mapping[str, Any] = field(default_factory=dict)
    classes: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        """Turn what was given into splits and check everything once."""
        if not isinstance(self.network, nn.Module):
            raise UserError(f"network must be a torch.nn.Module, but got {type(self.network).__name__}")
        if self.metric not in METRICS:
            raise UserError(f"metric must be a known name, but got {self.metric!r}{closest(self.metric, METRICS)}")
        self.train = as_split(self.train, "train")
        self.reward = as_split(self.reward, "reward")
        self.selection = as_split(self.selection, "selection")
        self.test = self.test if isinstance(self.test, SealedSplit) else SealedSplit(as_split(self.test, "test"))
        for name, value in (*self.network.named_parameters(), *self.network.named_buffers()):
            if value.is_floating_point() and not bool(torch.isfinite(value).all()):
                raise UserError(f"a trained network has finite weights, but {name!r} holds NaN or infinity")
        if self.example_input is None:
            self.example_input = self.train.example()
        if next(self.network.parameters(), None) is None:
            raise UserError("a network must have parameters to be pruned, but this one has none")
        device = next(self.network.parameters()).device
        with evaluation_mode(self.network), torch.no_grad():
            try:
                output = self.network(self.example_input.to(device))
            except Exception as error:
                raise UserError(
                    f"the network must accept inputs of shape {tuple(self.example_input.shape)}, "
                    f"but its forward pass failed: {type(error).__name__}: {error}"
                ) from error
        if not isinstance(output, Tensor) or output.dim() != 2:
            shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise UserError(f"the network's output must be (N, classes), but it is {shape}")
        if not bool(torch.isfinite(output).all()):
            raise UserError("the network's output must be finite, but it holds NaN or infinity")
        self.classes = output.shape[1]
        for split in (self.train, self.reward, self.selection):
            labels = getattr(split, "labels", None)
            if isinstance(labels, Tensor) and int(labels.max()) >= self.classes:
                raise UserError(
                    f"labels must be below the network's {self.classes} outputs, "
                    f"but split {split.name!r} has label {int(labels.max())}"
                )

    @classmethod
    def from_data(cls, network: nn.Module, data: DataSplits, **keywords: Any) -> "PruningTask":
        """Make a task from a network and the splits that `load_data` returned."""
        keywords.setdefault("name", data.name)
        return cls(network, data.train, data.reward, data.selection, data.test, **keywords)

    @property
    def example(self) -> Tensor:
        """One input (1, …), on the network's device."""
        assert self.example_input is not None  # set in __post_init__
        return self.example_input.to(next(self.network.parameters()).device)

    def to(self, device: str | torch.device) -> "PruningTask":
        """Return the task with a copy of its network, and its data, on `device`."""
        return PruningTask(
            network=copy_network(self.network).to(device),
            train=self.train.to(device),
            reward=self.reward.to(device),
            selection=self.selection.to(device),
            test=self.test,
            example_input=self.example_input,
            metric=self.metric,
            name=self.name,
            source=self.source,
        )


def as_split(data: Any, name: str) -> Split:
    """Turn a `Split`, a pair of tensors or a dataset of (image, label) into a `Split`.

    Raises:
        UserError: None of these, or empty.
    """
    if isinstance(data, Split):
        split = data
    elif isinstance(data, torch.utils.data.TensorDataset) and len(data.tensors) == 2:
        split = TensorSplit(*data.tensors, name=name)
    elif isinstance(data, (tuple, list)) and len(data) == 2 and all(isinstance(part, Tensor) for part in data):
        split = TensorSplit(data[0], data[1], name=name)
    elif isinstance(data, torch.utils.data.Dataset):
        split = DatasetSplit(data, name=name)
    else:
        raise UserError(
            f"split {name!r} must be a Split, a pair (images, labels) or a dataset, but got {type(data).__name__}"
        )
    if len(split) == 0:
        raise UserError(f"split {name!r} must not be empty")
    return split

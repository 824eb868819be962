"""What the agent sees of one channel group: float32, finite, in documented ranges, of a size that does not depend
on the network. Two choices: "full" (`GroupObservation`) and the state of AMC (`AmcObservation`).
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ..pruning.cost import CostModel
from ..pruning.errors import UserError, closest
from ..pruning.groups import ChannelGroup
from ..pruning.subject import Subject
from .layer_sizes import layer_sizes

FloatArray = NDArray[np.float64]
OBSERVATIONS = ("full", "amc")
"""What `TrimSettings.observation` may be."""


@dataclass(frozen=True)
class Feature:
    """One entry of the observation: its name, range and meaning."""

    name: str
    low: float
    high: float
    meaning: str


FEATURES: tuple[Feature, ...] = (
    Feature("position", 0, 1, "place of the group in the walk, 0 = first, 1 = last"),
    Feature("round", 0, 1, "rounds finished / rounds"),
    Feature("log_width", 0, 1, "log2 of the channels present / 12"),
    Feature("params_share", 0, 1, "share of the present parameters that vanishes with the group"),
    Feature("macs_share", 0, 1, "share of the present MACs that vanishes with the group"),
    Feature("kernel", 0, 1, "largest kernel extent of the producers / 11"),
    Feature("stride", 0, 1, "largest stride of the producers / 4"),
    Feature("producers", 0, 1, "log2(1 + layers that produce the channels) / 6"),
    Feature("consumers", 0, 1, "log2(1 + layers that read them) / 6"),
    Feature("has_relu", 0, 1, "1 where a ReLU follows; else the six APoZ entries are 0"),
    Feature("apoz_mean", 0, 1, "mean APoZ over channels"),
    Feature("apoz_std", 0, 1, "standard deviation of APoZ, times 2"),
    Feature("apoz_p10", 0, 1, "10th percentile"),
    Feature("apoz_p50", 0, 1, "median"),
    Feature("apoz_p90", 0, 1, "90th percentile"),
    Feature("apoz_above", 0, 1, "share of channels above mean + one standard deviation"),
    Feature("taylor_share", 0, 1, "share of the network's summed Taylor 2017 importance"),
    Feature("taylor_weakest_25", 0, 1, "share of the group's importance held by its weakest quarter"),
    Feature("taylor_weakest_50", 0, 1, "... by its weaker half"),
    Feature("taylor_weakest_75", 0, 1, "... by all but its strongest quarter"),
    Feature("residual_75", 0, 1, "least-squares residual at the consumers when 75 % stay, 1 = everything lost"),
    Feature("residual_50", 0, 1, "... when 50 % stay"),
    Feature("residual_25", 0, 1, "... when 25 % stay"),
    Feature("width_ratio", 0, 1, "channels present / channels of the pristine network"),
    Feature("target", 0, 1, "budget: share of the pristine cost to keep (0 = no budget)"),
    Feature("spent", 0, 1, "cost of the widths decided so far / pristine cost"),
    Feature("reachable", 0, 1, "least cost that can still be reached / pristine cost"),
    Feature("previous_action", -1, 1, "action of the step before, 0 at the start"),
    Feature("accuracy_drop", -1, 1, "pristine accuracy minus the last scored one, 0 before the first score"),
)

AMC_FEATURES: tuple[Feature, ...] = (
    Feature("index", 0, 1, "t, place of the group in the walk, 0 = first, 1 = last"),
    Feature("channels_out", 0, 1, "n, outputs of the first producer / the most in the walk"),
    Feature("channels_in", 0, 1, "c, its inputs / the most in the walk"),
    Feature("height", 0, 1, "h, of the maps it reads, 1 for a linear layer / the largest in the walk"),
    Feature("width", 0, 1, "w, likewise"),
    Feature("stride", 0, 1, "its largest stride / the largest in the walk"),
    Feature("kernel", 0, 1, "k, its largest kernel extent / the largest in the walk"),
    Feature("macs", 0, 1, "present MACs of all producers / MACs of the pristine network"),
    Feature("reduced", 0, 1, "MACs that the widths decided so far take away / MACs of the pristine network"),
    Feature("rest", 0, 1, "present MACs of the later groups' producers / MACs of the pristine network"),
    Feature("previous_action", 0, 1, "action of the step before, from -1 … 1 to 0 … 1; 0.5 at the start"),
)


@dataclass(frozen=True)
class Progress:
    """Where an episode stands, as far as the agent may see it.

    Attributes:
        position: Group that the next action trims, from 0.
        round: Rounds finished.
        rounds: Rounds of an episode.
        target: Budget of the round, 0 = none.
        spent: Cost of the widths decided so far / pristine cost, in the budget's unit.
        reachable: Least cost that can still be reached / pristine cost, in the budget's unit.
        macs: MACs of the widths decided so far / pristine MACs.
        previous_action: Action of the step before, in [-1, 1]; 0 at the start.
        accuracy_drop: Pristine accuracy minus the last scored one.
    """

    position: int
    round: int
    rounds: int
    target: float
    spent: float
    reachable: float
    macs: float
    previous_action: float
    accuracy_drop: float


class Observation(ABC):
    """Owns a space and the values that lie in it.

    Args:
        model: Cost model of the pristine network.
        features: What the entries are, in order.
    """

    def __init__(self, model: CostModel, features: Sequence[Feature]) -> None:
        self.model = model
        self._low = np.array([feature.low for feature in features], dtype=np.float32)
        self._high = np.array([feature.high for feature in features], dtype=np.float32)
        self._described: tuple[Subject, FloatArray] | None = None

    def space(self) -> gym.spaces.Box:
        """Return the observation space, Box of shape (features,)."""
        return gym.spaces.Box(self._low, self._high, dtype=np.float32)

    @abstractmethod
    def observe(self, subject: Subject, progress: Progress) -> NDArray[np.float32]:
        """Return (features,) what is known of the group at `progress.position`."""

    def describe(self, subject: Subject) -> FloatArray:
        """Return (groups, entries) what does not change while the same network is walked; worked out once."""
        if self._described is None or self._described[0] is not subject:
            self._described = (subject, np.array(self._rows(subject), dtype=np.float64))
        return self._described[1]

    @abstractmethod
    def _rows(self, subject: Subject) -> list[list[float]]:
        """Return the rows of `describe`."""

    def _bounded(self, values: Any) -> NDArray[np.float32]:
        """Return (features,) finite values within the space."""
        return np.clip(np.nan_to_num(values), self._low, self._high).astype(np.float32)


class GroupObservation(Observation):
    """`FEATURES`: geometry, activations, Taylor importance, least-squares residuals, and the episode's progress.

    `describe` gives (groups, 22), `log_width` to `width_ratio`.

    Args:
        model: Cost model of the pristine network.
    """

    def __init__(self, model: CostModel) -> None:
        super().__init__(model, FEATURES)

    def observe(self, subject: Subject, progress: Progress) -> NDArray[np.float32]:
        """Return (features,) what is known of the group at `progress.position`."""
        row = self.describe(subject)[progress.position]
        last = max(1, len(subject.groups) - 1)
        values = np.concatenate(
            (
                [progress.position / last, progress.round / progress.rounds],
                row,
                [progress.target, progress.spent, progress.reachable],
                [progress.previous_action, progress.accuracy_drop],
            )
        )
        return self._bounded(values)

    def _rows(self, subject: Subject) -> list[list[float]]:
        taylor = [_sum(subject.statistics.groups[group.name].taylor_2017) for group in subject.groups]
        whole = max(sum(taylor), 1e-30)
        present = np.array([group.width for group in subject.groups], dtype=np.int64)
        params, macs = (self.model.group_share(unit, present) for unit in ("params", "macs"))
        return [
            [
                np.log2(group.width) / 12,
                params[place],
                macs[place],
                group.kernel / 11,
                group.stride / 4,
                np.log2(1 + len(group.producers)) / 6,
                np.log2(1 + len(group.consumers)) / 6,
                *_apoz(subject, group),
                taylor[place] / whole,
                *_taylor_shares(subject.statistics.groups[group.name].taylor_2017),
                *subject.residuals[group.name].tolist(),
                group.width / self.model.widths[place],
            ]
            for place, group in enumerate(subject.groups)
        ]


class AmcObservation(Observation):
    """`AMC_FEATURES`: the state of a layer in AMC (He et al. 2018, section 3.1), for a group of layers.

    Geometry is that of the group's first producer, MACs are summed over its producers. Nothing is measured on images.
    `describe` gives (groups, 8), `channels_out` to `macs`, and `rest`.

    Args:
        model: Cost model of the pristine network.
        example: (1, …) one input, run once per network to see the sizes of the maps.
    """

    def __init__(self, model: CostModel, example: Tensor) -> None:
        super().__init__(model, AMC_FEATURES)
        self.example = example

    def observe(self, subject: Subject, progress: Progress) -> NDArray[np.float32]:
        """Return (features,) what is known of the group at `progress.position`."""
        *geometry_and_macs, rest = self.describe(subject)[progress.position]
        return self._bounded(
            [
                progress.position / max(1, len(subject.groups) - 1),
                *geometry_and_macs,
                1.0 - progress.macs,
                rest,
                (progress.previous_action + 1.0) / 2.0,
            ]
        )

    def _rows(self, subject: Subject) -> list[list[float]]:
        layers = layer_sizes(
            subject.network, {name for group in subject.groups for name in group.producers}, self.example
        )
        geometry = np.array([layers[group.producers[0]].geometry for group in subject.groups], dtype=np.float64)
        geometry /= geometry.max(0)  # (groups, 6), each column up to 1
        whole = self.model.full.macs
        rows = []
        for place, group in enumerate(subject.groups):
            later = {name for other in subject.groups[place + 1 :] for name in other.producers}
            macs, rest = (sum(layers[name].macs for name in names) / whole for names in (group.producers, later))
            rows.append([*geometry[place], macs, rest])
        return rows


def make_observation(name: str, model: CostModel, example: Tensor) -> Observation:
    """Return the observation called `name`: "full" or "amc".

    Args:
        name: As in `TrimSettings.observation`.
        model: Cost model of the pristine network.
        example: (1, …) one input of the network.
    """
    check_observation(name)
    return AmcObservation(model, example) if name == "amc" else GroupObservation(model)


def check_observation(name: str) -> None:
    """Refuse an unknown name."""
    if name not in OBSERVATIONS:
        raise UserError(f"observation must be a known name, but got {name!r}{closest(name, OBSERVATIONS)}")


def _sum(values: FloatArray | None) -> float:
    return 0.0 if values is None else float(values.sum())


def _apoz(subject: Subject, group: ChannelGroup) -> list[float]:
    apoz = subject.statistics.groups[group.name].apoz
    if apoz is None:
        return [0.0] * 7
    mean, std = float(apoz.mean()), float(apoz.std())
    return [1.0, mean, 2 * std, *np.percentile(apoz, (10, 50, 90)).tolist(), float((apoz > mean + std).mean())]


def _taylor_shares(taylor: FloatArray | None) -> list[float]:
    if taylor is None:
        return [0.0] * 3
    cumulative = np.cumsum(np.sort(taylor)) / max(float(taylor.sum()), 1e-30)
    return [_at(np.concatenate(([0.0], cumulative)), share) for share in (0.25, 0.5, 0.75)]


def _at(curve: FloatArray, share: float) -> float:
    """Read a curve over 0 … width channels at a share of the width, linearly between whole channels."""
    return float(np.interp(share * (len(curve) - 1), np.arange(len(curve)), curve))

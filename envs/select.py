"""`prunegym/SelectFilters-v0`: look at the weights of one channel group's filters and say which stay."""

import math
from dataclasses import dataclass, field
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from ..pruning.checks import check_keys, check_kind, check_types
from ..pruning.errors import UserError, closest
from ..pruning.groups import ChannelGroup, TensorSlice
from ..pruning.layers import output_dim
from ..pruning.plan import PruningPlan
from ..pruning.repair_settings import RepairSettings
from ..pruning.retraining import RetrainSettings
from ..pruning.schedule import round_seed, round_training
from ..pruning.statistics import weight_norms
from ..pruning.subject import Subject
from ..pruning.task import PruningTask
from ..pruning.trimmed import Trimmed
from ..pruning.trimmer import Trimmer
from ..pruning.widths import GroupSettings
from .arguments import make_trimmer
from .reward import Measured, Outcome, Reward, RewardSettings

LARGEST = 10.0
"""Weights are shown in multiples of their layer's root mean square, up to this many."""

Observation = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class SelectSettings:
    """Settings of `SelectFiltersEnv`.

    Attributes:
        group: Name of the group to decide; "" = the first.
        accepted_drop: b of the reward, in (0, 1]: the accepted drop below the original's accuracy; 0.02 is two points.
        fine_tune: Training updates after the cut, before the network is scored.
        retraining: How these are trained; their number is `fine_tune`, and nothing is scored on the selection split.
        repair: Compensation, calibration and scoring; the published method repairs nothing ("delete"). Which filters
            leave is the action's choice, not the criterion's.
        groups: Which groups may be cut, and to which widths.
        max_filters: Filters that observation and action have room for; 0 = as many as the widest group has.
        entries: Weights of one filter that the observation has room for; 0 = as many as the largest filter has.
    """

    group: str = ""
    accepted_drop: float = 0.02
    fine_tune: int = 10
    retraining: RetrainSettings = field(default_factory=RetrainSettings)
    repair: RepairSettings = field(default_factory=lambda: RepairSettings(compensation="delete"))
    groups: GroupSettings = field(default_factory=GroupSettings)
    max_filters: int = 0
    entries: int = 0

    def __post_init__(self) -> None:
        """Refuse values of other types or outside their ranges."""
        check_types(self)
        RewardSettings("accuracy_floor", self.accepted_drop)  # which knows the range of b
        for name in ("fine_tune", "max_filters", "entries"):
            if getattr(self, name) < 0:
                raise UserError(f"{name} must be at least 0, but got {getattr(self, name)}")


class SelectFiltersEnv(gym.Env[Observation, NDArray[np.int8]]):
    """Keep or drop every filter of one channel group, in a single step.

    ## Description
    The question of try-and-learn (Huang, Zhou, You, Neumann 2018, arXiv 1801.07365): given the raw weights of a
    layer's filters, which can go? The network is cut for real, repaired, its batch norm recalibrated, fine-tuned a
    little and scored on the reward images. Every episode starts from the same weights, which are never changed: the
    pristine network, or what earlier cuts left of it (`subject`). The same action is always paid the same.

    ## Observation
    `Dict`, padded with zeros to a size that does not depend on the group:

    | key | space | meaning |
    |---|---|---|
    | filters | `Box(-10, 10, (max_filters, entries))`, float32 | a row a filter: the weights that make the channel |
    | mask | `MultiBinary(max_filters)` | 1 = the row is a filter, 0 = padding |

    Stable-Baselines3's `check_env` warns that `filters` has two dimensions, which its own policies would flatten; that
    is on purpose, so that a policy can treat all filters alike.

    Weights are divided by the root mean square of their layer's and clipped to ±10; the bias is left out. Where several
    layers produce the channels together (a residual sum), their weights stand side by side.

    ## Action
    `MultiBinary(max_filters)`: 1 = keep. What is said of padding is ignored. A group keeps at least one filter, and
    only widths that `SelectSettings.groups` allow: where the action keeps fewer than the next allowed width, the
    dropped filters with the largest sum of absolute weights stay as well, just as many as are missing.

    ## Reward
    ψ · φ with ψ = (b − (p* − p̂)) / b and φ = ln(N / C): p* is the accuracy of the pristine network, p̂ that of the cut
    and fine-tuned one, both on the reward images; C of the group's N filters stay. Keeping all pays 0. ψ exceeds 1
    where the accuracy rises; it is not clipped, nor is it below.

    ## Start, end
    `reset(options={"group": name})` decides another group in this episode; other keys are refused. Each episode is one
    step and terminates.

    ## Info
    `reset`: `group`. The step: `group`, `requested` (filters that the action keeps), `executed` (filters that stay),
    both numbered as in the observation; `accuracy`, `loss`, `params`, `macs`, `kept` (C / N), `plan` (channels of the
    pristine network that stay, by group) and `reward_terms`. No wall-clock times.

    ## Arguments
    `task`: a `PruningTask`, by default embedded digits with a small LeNet; `settings`: `SelectSettings`; `trimmer`:
    share the measurements of another environment in the same process, of the same task; `subject`: what is cut, from
    `Trimmer.examine_trimmed` of that trimmer, the pristine network by default.

    ## Version history
    v0: first version.
    """

    metadata = {"render_modes": []}  # noqa: RUF012  (the type gymnasium declares)

    def __init__(
        self,
        task: PruningTask | None = None,
        settings: SelectSettings | None = None,
        trimmer: Trimmer | None = None,
        subject: Subject | None = None,
    ) -> None:
        where = type(self).__name__
        self.settings = SelectSettings() if settings is None else check_kind(settings, SelectSettings, where)
        self.trimmer = make_trimmer(task, trimmer, self.settings.repair, self.settings.groups, where)
        if subject is None:
            self.subject = self.trimmer.pristine
        else:
            check_kind(subject, Subject, where, "Trimmer.examine_trimmed makes one")
            check_subject(subject, trimmer)
            self.subject = subject
        self._rows = {group.name: filter_rows(self.subject.network, group) for group in self.subject.groups}
        rows = self._rows.values()
        self._size = (
            self.settings.max_filters or max(len(each) for each in rows),
            self.settings.entries or max(each.shape[1] for each in rows),
        )
        self._group = self._find(self.settings.group or self.subject.groups[0].name)
        self._reward = Reward(RewardSettings("accuracy_floor", self.settings.accepted_drop))
        self._open = False
        self.observation_space: gym.spaces.Dict = gym.spaces.Dict(  # type: ignore[assignment]
            {
                "filters": gym.spaces.Box(-LARGEST, LARGEST, self._size, np.float32),
                "mask": gym.spaces.MultiBinary(self._size[0]),
            }
        )
        self.action_space: gym.spaces.MultiBinary = gym.spaces.MultiBinary(self._size[0])

    # ---- the two verbs --------------------------------------------------------------------------------------------
    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Show the filters of a group; `options={"group": name}` chooses it for one episode."""
        super().reset(seed=seed)
        chosen = check_keys(options, {"group": f'"{self.subject.groups[0].name}"'}, "options").get("group")
        self._group = self._find(self.settings.group or self.subject.groups[0].name if chosen is None else chosen)
        self._open = True
        return self._observe(), {"group": self._group.name}

    def step(self, action: NDArray[np.int8]) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """Cut to what the action keeps, repair, fine-tune, score; the episode ends."""
        if not self._open:
            raise gym.error.ResetNeeded("call reset() before step(); an episode is one step")
        requested = np.flatnonzero(self._checked(action)[: self._group.width])
        self._open = False
        executed = self._allowed(requested)
        trimmed = self._trim(executed)
        kept = len(executed) / self._group.width
        terms = self._reward.terms(
            Outcome(
                plan=Measured(trimmed.score, trimmed.cost),
                baseline=self.trimmer.baseline.accuracy,
                kept=kept,
            )
        )
        info = {
            "group": self._group.name,
            "requested": requested.tolist(),
            "executed": executed.tolist(),
            "accuracy": trimmed.score.accuracy,
            "loss": trimmed.score.loss,
            "params": trimmed.cost.params,
            "macs": trimmed.cost.macs,
            "kept": kept,
            "plan": trimmed.plan.to_dict(),
            "reward_terms": terms,
        }
        return self._observe(), self._reward.total(terms), True, False, info

    # ---- an episode's nouns ---------------------------------------------------------------------------------------
    def _find(self, name: Any) -> ChannelGroup:
        known = {group.name: group for group in self.subject.groups}
        if not isinstance(name, str) or name not in known:
            raise UserError(f"group must be a group that may be cut, but got {name!r}{closest(str(name), known)}")
        for setting, room, needed in zip(("max_filters", "entries"), self._size, self._rows[name].shape, strict=True):
            if needed > room:
                raise UserError(
                    f"{setting} must be at least {needed} for group {name!r}, but got {room}; 0 = enough for all groups"
                )
        return known[name]

    def _observe(self) -> Observation:
        rows = self._rows[self._group.name]
        filters, mask = np.zeros(self._size, np.float32), np.zeros(self._size[0], np.int8)
        filters[: rows.shape[0], : rows.shape[1]] = rows
        mask[: len(rows)] = 1
        return {"filters": filters, "mask": mask}

    def _checked(self, action: Any) -> NDArray[np.bool_]:
        value = np.asarray(action)
        if value.shape != self._size[:1] or not np.isin(value, (0, 1)).all():
            raise UserError(f"an action must be {self._size[0]} numbers, each 0 or 1, but got {action!r:.80}")
        return value.astype(bool)

    def _allowed(self, requested: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return what stays, ascending: the filters asked for, and as many of the others as an allowed width needs."""
        place = [group.name for group in self.subject.groups].index(self._group.name)
        present = np.array([group.width for group in self.subject.groups], dtype=np.int64)
        counts = present.copy()
        counts[place] = len(requested)
        wanted = int(self.trimmer.cost_model.allowed.not_below(counts, present)[place])
        strength = weight_norms(self.subject.network, [self._group])[self._group.name][0]  # Σ |w|; needs no data
        strength[requested] = math.inf
        return np.sort(np.argsort(-strength, kind="stable")[:wanted])

    def _trim(self, executed: NDArray[np.int64]) -> Trimmed:
        plan = PruningPlan({self._group.name: executed.tolist()})
        retraining = round_training(self.settings.retraining, self.settings.fine_tune, last=False)
        seed = round_seed(self.settings.repair.seed, 0)
        return self.trimmer.trim(plan, self.subject, retraining=retraining, seed=seed)


def check_subject(subject: Subject, trimmer: Trimmer | None) -> None:
    """Refuse a subject that does not come from the pristine network of `trimmer`.

    Args:
        subject: What is to be cut.
        trimmer: The one that is shared; None = none is.

    Raises:
        UserError: No trimmer, or one that numbers other channels.
    """
    rule = "a subject must come with the trimmer that made it, in SelectFiltersEnv(trimmer=…, subject=…)"
    if trimmer is None:
        raise UserError(f"{rule}, but got no trimmer; give it")
    whole = {group.name: group.width for group in trimmer.groups}
    widths = {group.name: group.width for group in subject.groups}
    fits = list(widths) == list(whole) and subject.plan.counts == widths
    if not fits or any(max(subject.plan[name]) >= width for name, width in whole.items()):
        raise UserError(f"{rule}, but its channels are not of that trimmer's network; give its own")


def filter_rows(network: nn.Module, group: ChannelGroup) -> NDArray[np.float32]:
    """Return (width, entries) the weights that produce each channel, layer beside layer, without bias.

    Each layer's weights are divided by their root mean square and clipped to ±`LARGEST`. A channel that a layer does
    not produce has zeros there.

    Args:
        network: The network that the group numbers.
        group: Of this network.
    """
    tensors = dict(network.named_parameters(remove_duplicate=False))
    consumed = {f"{consumer.module}.weight" for consumer in group.consumers}
    parts = []
    for piece in sorted(group.slices, key=lambda piece: piece.tensor):
        layer, _, kind = piece.tensor.rpartition(".")
        outward = output_dim(network.get_submodule(layer))
        if layer in group.producers and kind == "weight" and not (piece.tensor in consumed and piece.dim != outward):
            parts.append(_rows(tensors[piece.tensor].detach(), piece, group.width))
    if not parts:  # weights that are computed, of which no tensor tells the channels
        return np.zeros((group.width, 1), np.float32)
    return np.concatenate(parts, axis=1)


def _rows(weight: torch.Tensor, piece: TensorSlice, width: int) -> NDArray[np.float32]:
    """Return (width, entries) one tensor's weights by channel; a channel of several outputs has them side by side."""
    values = weight.movedim(piece.dim, 0).flatten(1).double().cpu().numpy()[piece.index]  # (n, weights of an output)
    order = np.argsort(piece.channel, kind="stable")
    channel, values = piece.channel[order], values[order]
    rank = np.arange(len(channel)) - np.searchsorted(channel, channel)  # of an output within its channel
    rows = np.zeros((width, int(rank.max()) + 1, values.shape[1]))
    rows[channel, rank] = values
    scale = math.sqrt(float(np.square(values).mean()))
    return np.clip(rows.reshape(width, -1) / (scale or 1.0), -LARGEST, LARGEST).astype(np.float32)

"""A pruning schedule: the plan of each round and the retraining between them. Readable, editable, replayable.

`build` is how every final network comes about, whoever made the schedule: from the pristine weights, never from
an episode's leftovers.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from .checks import SEEDS, check_seed
from .cost import Cost
from .errors import UserError, closest
from .evaluation import Score
from .plan import PruningPlan
from .repair_settings import RepairSettings
from .retraining import RetrainResult, RetrainSettings
from .trimmed import Trimmed
from .trimmer import Trimmer

FORMAT = 1


@dataclass(frozen=True)
class Round:
    """One round: cut to `plan`, repair, then train for `retrain_updates`.

    Attributes:
        plan: What stays of the *original* network after this round.
        retrain_updates: Optimizer steps after the cut.
    """

    plan: PruningPlan
    retrain_updates: int = 0


@dataclass(frozen=True)
class Schedule:
    """Rounds, and how each is repaired and trained.

    Attributes:
        rounds: First to last; each keeps a subset of the one before.
        repair: How cuts are repaired.
        retraining: How the network is trained after a cut; `updates` is taken from each round, `epochs` must be 0.
            With `carry_state` the optimizer's momentum goes through the cuts from round to round. `check_every` and
            `patience` hold for the last round only: no other network is finished.
        seed: Root of the training's random numbers, in [0, 2**63).
        made_by: Who made it, e.g. "agent" or "network_trimming".

    Raises:
        UserError: `retraining` counts epochs, or the seed is no whole number in its range.
    """

    rounds: tuple[Round, ...]
    repair: RepairSettings = field(default_factory=RepairSettings)
    retraining: RetrainSettings = field(default_factory=RetrainSettings)
    seed: int = 0
    made_by: str = ""

    def __post_init__(self) -> None:
        """Refuse epochs, as rounds count updates, and a seed that no generator takes."""
        check_seed(self.seed, "the seed of a schedule")
        if self.retraining.epochs:
            raise UserError(
                "the rounds of a schedule count updates, so its retraining must have epochs 0, but got "
                f"{self.retraining.epochs:g}; call retraining.resolved(examples) and give its updates to the rounds"
            )

    @property
    def plan(self) -> PruningPlan:
        """What stays of the original network in the end."""
        return self.rounds[-1].plan

    @property
    def retrain_updates(self) -> int:
        """Optimizer steps over all rounds."""
        return sum(entry.retrain_updates for entry in self.rounds)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return {
            "format": FORMAT,
            "made_by": self.made_by,
            "seed": self.seed,
            "repair": dataclasses.asdict(self.repair),
            "retraining": dataclasses.asdict(self.retraining),
            "rounds": [
                {"widths_read_only": r.plan.counts, "retrain_updates": r.retrain_updates, "keep": r.plan.to_dict()}
                for r in self.rounds
            ],
        }

    @classmethod
    def from_dict(cls, data: Any) -> "Schedule":
        """Read what `to_dict` wrote; `widths_read_only` is for people and need not be given; `keep` decides.

        Raises:
            UserError: Not a schedule, an unknown key, or no round.
        """
        if not isinstance(data, Mapping) or not isinstance(data.get("rounds"), list) or not data["rounds"]:
            raise UserError("a schedule must hold a list 'rounds' with at least one round")
        if data.get("format", FORMAT) != FORMAT:
            raise UserError(f"a schedule must have format {FORMAT}, but got {data['format']!r}")
        _known_keys(data, ("format", "made_by", "seed", "repair", "retraining", "rounds"), "a schedule")
        rounds = []
        for place, entry in enumerate(data["rounds"]):
            if not isinstance(entry, Mapping) or "keep" not in entry:
                raise UserError(f"round {place} of a schedule must hold 'keep', but got {entry!r:.80}")
            _known_keys(entry, ("keep", "widths_read_only", "retrain_updates"), f"round {place} of a schedule")
            plan = PruningPlan.from_dict(entry["keep"])
            updates = _whole(entry.get("retrain_updates", 0), f"retrain_updates of round {place}")
            rounds.append(Round(plan, updates))
        return cls(
            tuple(rounds),
            repair=_settings(RepairSettings, data.get("repair", {}), "repair"),
            retraining=_settings(RetrainSettings, data.get("retraining", {}), "retraining"),
            seed=data.get("seed", 0),
            made_by=str(data.get("made_by", "")),
        )

    def save(self, path: str | Path) -> None:
        """Write the schedule as JSON."""
        Path(path).write_text(_compact(json.dumps(self.to_dict(), indent=1)) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> "Schedule":
        """Read a schedule.

        Raises:
            UserError: The file is missing, is no JSON or no schedule; the file is named.
        """
        try:
            return cls.from_dict(json.loads(Path(path).read_text()))
        except OSError as error:
            raise UserError(f"a schedule file must be readable, but {path} is not: {error.strerror}") from error
        except UserError as error:
            raise UserError(f"{path}: {error}") from error
        except (ValueError, RecursionError) as error:
            raise UserError(f"a schedule must be JSON, but {path} is not: {error}") from error


@dataclass(frozen=True)
class BuiltRound:
    """What one round of a build did.

    Attributes:
        widths: Channels present after it, by group.
        after_trim: Score on the reward images after cut and repair.
        after_retraining: Score after the round's training (the same where there was none).
        cost: Cost after the cut.
        retrain_updates: Optimizer steps asked for.
        training: What the training did, without the optimizer's state; None where there was none.
    """

    widths: dict[str, int]
    after_trim: Score
    after_retraining: Score
    cost: Cost
    retrain_updates: int
    training: RetrainResult | None = None

    @classmethod
    def of(cls, trimmed: Trimmed, after_trim: Score, asked: int) -> "BuiltRound":
        """Record a round that ended as `trimmed`, scored `after_trim` before the `asked` steps of training."""
        training = None if trimmed.retraining is None else dataclasses.replace(trimmed.retraining, state=None)
        return cls(trimmed.plan.counts, after_trim, trimmed.score, trimmed.cost, asked, training)

    @property
    def updates_taken(self) -> int:
        """Optimizer steps that were taken: fewer than asked for where patience ended, more after a divergence."""
        return self.training.updates if self.training else 0

    @property
    def stopped_early(self) -> bool:
        """Whether patience ended the training."""
        return self.training is not None and self.training.stopped_early


@dataclass(frozen=True, eq=False)
class Built:
    """A finished network and how it came about."""

    network: nn.Module
    schedule: Schedule
    rounds: tuple[BuiltRound, ...]

    @property
    def cost(self) -> Cost:
        """Cost of the finished network."""
        return self.rounds[-1].cost

    @property
    def updates_taken(self) -> int:
        """Optimizer steps that were taken over all rounds."""
        return sum(entry.updates_taken for entry in self.rounds)


def build(
    trimmer: Trimmer, schedule: Schedule, *, verify: bool = True, progress: Callable[[int], None] | None = None
) -> Built:
    """Replay a schedule on the pristine weights.

    Args:
        trimmer: Knows the task; its settings must be the schedule's.
        schedule: What to replay.
        verify: Whether each cut is checked against the masked network.
        progress: Called with the number of optimizer steps done so far, over all rounds.
    """
    if schedule.repair != trimmer.settings:
        trimmer = trimmer.with_settings(schedule.repair)
    subject, records, spent = trimmer.pristine, [], 0
    for place, entry in enumerate(schedule.rounds):
        relative = entry.plan.completed(trimmer.groups).relative_to(subject.plan)
        trimmed = trimmer.trim(relative, subject, verify=verify)
        after_trim = trimmed.score
        if entry.retrain_updates:
            settings = round_training(
                schedule.retraining, entry.retrain_updates, last=place + 1 == len(schedule.rounds)
            )
            tell = (lambda done, before=spent: progress(before + done)) if progress else None
            trimmed = trimmer.retrain(trimmed, settings, seed=round_seed(schedule.seed, place), progress=tell)
            spent += entry.retrain_updates
        records.append(BuiltRound.of(trimmed, after_trim, entry.retrain_updates))
        if place + 1 < len(schedule.rounds):
            subject = trimmer.examine_trimmed(trimmed)
    return Built(trimmed.network, schedule, tuple(records))


def round_seed(seed: int, place: int) -> int:
    """Return the seed of the training after round `place`, in [0, 2**63)."""
    return (seed * 1009 + place) % SEEDS


def round_training(retraining: RetrainSettings, updates: int, *, last: bool) -> RetrainSettings:
    """Return how one round is trained: `updates` steps, scored on the selection split only after the last cut.

    A search is paid for, and a heuristic measures, what earlier rounds leave; neither may depend on that split.
    """
    settings = dataclasses.replace(retraining, updates=updates, epochs=0.0)
    return settings if last else settings.without_checks()


def _settings(kind: Any, data: Any, where: str) -> Any:
    if not isinstance(data, Mapping):
        raise UserError(f"{where!r} of a schedule must hold settings, but got {data!r:.80}")
    _known_keys(data, tuple(item.name for item in dataclasses.fields(kind)), f"{where!r} of a schedule")
    standard = kind()
    for key, value in data.items():
        wanted = type(getattr(standard, key))
        fits = isinstance(value, (int, float)) if wanted is float else isinstance(value, wanted)
        if not fits or (isinstance(value, bool) and wanted is not bool):
            raise UserError(f"{key!r} in {where!r} of a schedule must be of type {wanted.__name__}, but got {value!r}")
    return kind(**data)


def _whole(value: Any, what: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise UserError(f"{what} must be a whole number from 0, but got {value!r}")
    return value


def _known_keys(data: Mapping[str, Any], known: tuple[str, ...], where: str) -> None:
    for key in data:
        if key not in known:
            raise UserError(f"{where} may not hold {key!r}{closest(str(key), known)}")


def _compact(text: str) -> str:
    """Put lists of numbers on one line, so that a person can read and edit them."""
    lines: list[str] = []
    inside = False
    for line in text.split("\n"):
        if inside:
            lines[-1] += line.strip() + (" " if line.rstrip().endswith(",") else "")
            inside = line.strip() not in ("]", "],")
        else:
            lines.append(line)
            inside = line.endswith("[") and "rounds" not in line
    return "\n".join(lines)

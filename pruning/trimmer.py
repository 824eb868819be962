"""The waist of the hourglass: every plan, whoever made it, is cut, repaired and scored here.

    subject --plan--> cut -> compensated -> batch norm recalibrated -> (retrained) -> scored, costed

The environment, the heuristics, the controls and the final build all call `Trimmer.trim`, or `Trimmer.evaluate` where
only the score is wanted, so that they are compared on the same ground.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property, partial

import numpy as np
import torch
from torch import Tensor, nn

from .checks import SEEDS
from .compensation import compensate, get_compensation
from .cost import Cost, CostModel, count_cost
from .criteria import get_criterion
from .data import Split, TensorSplit
from .errors import UserError
from .evaluation import Score, evaluate, log_probabilities
from .fingerprint import FORMAT, digest, groups_digest, network_digest, split_digest, versions
from .folding import Pair, foldable, folded
from .grouping import find_groups
from .groups import ChannelGroup, shrink_groups
from .lineage import CHECKED, TRAINED, cut_digest, longer, training_digest, trains
from .optimizer_state import OptimizerState, slice_state
from .plan import PruningPlan
from .precision import takes_channels_last
from .recalibration import recalibrate
from .repair_settings import RepairSettings
from .retraining import RetrainResult, RetrainSettings, retrain
from .statistics import Statistics, measure
from .subject import Subject
from .surgery import apply_plan
from .task import PruningTask
from .trimmed import Evaluated, ScoreStore, Trimmed
from .widths import GroupSettings


class Trimmer:
    """Cuts, repairs and scores plans for one task.

    Data for calibration, recalibration and scoring are drawn and normalised once. The pristine network is
    measured when it is first needed.

    Args:
        task: What is pruned.
        settings: How cuts are chosen, repaired and scored.
        group_settings: Which groups may be cut, and to which widths. Plans may only name these groups; the widths are
            kept by whoever makes a plan, not demanded of a plan that is given.
        lean: Whether only those statistics are measured that the criterion and the compensation read. An agent that
            observes the network wants them all.
        scores: Where `evaluate` finds scores and leaves them; None = everything is scored.
    """

    def __init__(
        self,
        task: PruningTask,
        settings: RepairSettings | None = None,
        group_settings: GroupSettings | None = None,
        *,
        lean: bool = False,
        scores: ScoreStore | None = None,
    ) -> None:
        self.lean = lean
        self.scores = scores
        self.task = task
        self.settings = settings or RepairSettings()
        self.group_settings = group_settings or GroupSettings()

    def with_settings(self, settings: RepairSettings, *, lean: bool | None = None) -> "Trimmer":
        """Return a trimmer of the same task and store with other settings; the groups are not searched for again."""
        lean = self.lean if lean is None else lean
        other = Trimmer(self.task, settings, self.group_settings, lean=lean, scores=self.scores)
        other.groups, other.cost_model, other._foretold = self.groups, self.cost_model, self._foretold
        return other

    @cached_property
    def groups(self) -> tuple[ChannelGroup, ...]:
        """Channel groups of the pristine network that may be cut."""
        chosen = self.group_settings
        return find_groups(self.task.network, self.task.example, include=chosen.include, ignore=chosen.ignore)

    @cached_property
    def cost_model(self) -> CostModel:
        """Predicts the cost of any plan for the pristine network."""
        return CostModel(self.task.network, self.groups, self.task.example, self.group_settings)

    @cached_property
    def calibration(self) -> Split:
        """Training images for statistics and Gram matrices, normalised once."""
        return self._draw(self.task.train, self.settings.calibration_images, 1)

    @cached_property
    def recalibration(self) -> Split:
        """Training images for batch norm, normalised and laid out once."""
        return self._laid_out(self._draw(self.task.train, self.settings.recalibration_images, 2))

    @cached_property
    def reward(self) -> Split:
        """Images of the reward split, normalised and laid out once."""
        return self._laid_out(self._draw(self.task.reward, self.settings.reward_images or len(self.task.reward), 3))

    @cached_property
    def pristine(self) -> Subject:
        """The original network, measured."""
        subject = self.examine(self.task.network, self.groups, PruningPlan.full(self.groups))
        return replace(subject, lineage=())

    @cached_property
    def baseline(self) -> Score:
        """Score of the original network on the reward images."""
        score = self.score(self.task.network)
        if not math.isfinite(score.loss):
            raise UserError("the original network's loss on the reward images is not finite; do the images hold NaN?")
        return score

    def examine(self, network: nn.Module, groups: Sequence[ChannelGroup], plan: PruningPlan) -> Subject:
        """Make a network ready to be cut; it is measured when its statistics are first needed.

        Args:
            network: The pristine one or what a trim left; it must not change afterwards.
            groups: Its groups.
            plan: How it came from the pristine network.
        """
        measured = partial(self._measure, network, tuple(groups))  # which can be pickled, unlike a function made here
        return Subject(network, tuple(groups), measured, plan, self.settings.criterion, self.settings.seed)

    def examine_trimmed(self, trimmed: Trimmed) -> Subject:
        """Make what an earlier trim left ready for another round; no graph is traced again."""
        subject = self.examine(trimmed.network, shrink_groups(self.groups, trimmed.plan), trimmed.plan)
        return replace(subject, state=trimmed.state, lineage=trimmed.lineage)

    def plan(self, counts: Sequence[int] | np.ndarray, subject: Subject | None = None) -> PruningPlan:
        """Return the plan that keeps the `counts` (groups,) most important channels, in `subject`'s numbering."""
        subject = subject or self.pristine
        names = [group.name for group in subject.groups]
        chosen = {name: int(count) for name, count in zip(names, counts, strict=True)}
        return PruningPlan.from_counts(subject.groups, chosen, subject.orders)

    def evaluate(
        self,
        plan: PruningPlan,
        subject: Subject | None = None,
        *,
        retraining: RetrainSettings | None = None,
        seed: int = 0,
    ) -> Evaluated:
        """Return what `trim` would score, without the network; what the store knows is not worked out again.

        Args:
            plan: What stays of `subject`, in its numbering.
            subject: What is cut; the pristine network by default. A network that was neither cut nor trained by a
                trimmer of this task is scored without the store.
            retraining: Training after the repair; none by default.
            seed: Of that training.
        """
        subject = subject or self.pristine
        store = self.scores
        if store is None or subject.lineage is None:
            trimmed = self.trim(plan, subject, retraining=retraining, seed=seed)
            return Evaluated(trimmed.score, trimmed.cost, trimmed.plan)
        plan = plan.completed(subject.groups)
        key = self._key(plan, subject.lineage, retraining if trains(retraining) else None, seed)
        score = store.get(key)
        if score is None:
            trimmed = self.trim(plan, subject, retraining=retraining, seed=seed)
            store.put(key, trimmed.score)
            return Evaluated(trimmed.score, trimmed.cost, trimmed.plan)
        whole = subject.plan.then(plan)
        return Evaluated(score, self.cost_of(whole), whole, cached=True)

    def trim(
        self,
        plan: PruningPlan,
        subject: Subject | None = None,
        *,
        retraining: RetrainSettings | None = None,
        seed: int = 0,
        verify: bool = False,
        progress: Callable[[int], None] | None = None,
    ) -> Trimmed:
        """Cut, repair, recalibrate, perhaps retrain, and score.

        Args:
            plan: What stays of `subject`, in its numbering.
            subject: What is cut; the pristine network by default.
            retraining: Training after the repair; none by default.
            seed: Of that training.
            verify: Whether the cut is checked against the masked original before it is repaired.
            progress: Called with the number of retraining updates done.
        """
        subject = subject or self.pristine
        inputs = None
        if verify:
            few = self.calibration.subset(min(8, len(self.calibration)), torch.Generator().manual_seed(0))
            inputs = next(iter(few.batches(8))).images
        network = apply_plan(subject.network, subject.groups, plan, verify=inputs)
        method = self.settings.compensation
        statistics = subject.statistics if get_compensation(method).needs_data else None
        compensate(network, subject.network, subject.groups, plan, statistics, method)
        self.recalibrate(network)
        state = subject.state
        if state is not None:
            state = slice_state(state, subject.groups, plan, subject.network)
        done = None
        plan = plan.completed(subject.groups)
        lineage = longer(subject.lineage, cut_digest(plan, self.settings))
        if retraining is not None and trains(retraining):
            done = self._retrain(network, retraining, seed, state, progress)
            state = done.state
            lineage = longer(lineage, training_digest(retraining, seed))
        network.eval()
        whole = subject.plan.then(plan)
        return Trimmed(
            network=network,
            plan=whole,
            score=self.score(network),
            cost=self.cost_of(whole, network),
            retraining=done,
            state=state,
            lineage=lineage,
        )

    def retrain(
        self,
        trimmed: Trimmed,
        settings: RetrainSettings,
        *,
        seed: int,
        progress: Callable[[int], None] | None = None,
    ) -> Trimmed:
        """Train what a trim left, in place and from the optimizer state it holds, and score it again."""
        done = self._retrain(trimmed.network, settings, seed, trimmed.state, progress)
        state = done.state if done.updates else trimmed.state
        lineage = longer(trimmed.lineage, training_digest(settings, seed)) if trains(settings) else trimmed.lineage
        return replace(trimmed, score=self.score(trimmed.network), retraining=done, state=state, lineage=lineage)

    def cost_of(self, plan: PruningPlan, network: nn.Module | None = None) -> Cost:
        """Return what a plan leaves of the pristine network costs, as `cost.count_cost` counts it.

        Args:
            plan: In the pristine numbering.
            network: What it leaves, if at hand; else it is cut where it has to be run to be counted.
        """
        if self._foretold:
            return self.cost_model.cost(plan.counts)
        if network is None:
            network = apply_plan(self.task.network, self.groups, plan)
        return count_cost(network, self.task.example)

    def _retrain(
        self,
        network: nn.Module,
        settings: RetrainSettings,
        seed: int,
        state: OptimizerState | None,
        progress: Callable[[int], None] | None,
    ) -> RetrainResult:
        return retrain(
            network,
            self.task.train,
            settings,
            seed=seed,
            teacher=self.task.network if settings.distillation else None,
            selection=self.task.selection,
            metric=self.task.metric,
            state=state,
            progress=progress,
        )

    def recalibrate(self, network: nn.Module) -> None:
        """Re-estimate the batch norms of `network` in place, if it has any and the settings ask for it."""
        if self.settings.recalibration_images:
            images = (images for images, _ in self._batches(self.recalibration))
            recalibrate(network, images, precision=self.settings.precision)

    def score(self, network: nn.Module) -> Score:
        """Score a network on the reward images."""
        return evaluate(
            self._read_only(network),
            self._batches(self.reward),
            self.task.metric,
            precision=self.settings.precision,
            original=self._original,
        )

    def score_selection(self, network: nn.Module) -> Score:
        """Score a network on the selection split, in the network's own precision."""
        return evaluate(network, self._batches(self.task.selection), self.task.metric)

    @cached_property
    def fingerprint(self) -> str:
        """Digest of all that decides a score beside the plan and the training: network, images, repair, versions."""
        repair = get_compensation(self.settings.compensation)
        return digest(
            FORMAT,
            versions(),
            network_digest(self.task.network, self.task.example),
            groups_digest(self.groups),
            str(self.task.example.device.type),
            self.task.metric,
            [self.settings.compensation, self.settings.batch_size, self.settings.precision, self._channels_last],
            self._foldable,
            split_digest(self.calibration) if repair.needs_data else None,
            split_digest(self.recalibration) if self.settings.recalibration_images else None,
            split_digest(self.reward),
        )

    def _key(self, plan: PruningPlan, lineage: tuple[str, ...], retraining: RetrainSettings | None, seed: int) -> str:
        """Return what the score of a plan (complete, in its subject's numbering) is kept under."""
        steps = [*lineage, cut_digest(plan)]
        if retraining is not None:
            steps.append(training_digest(retraining, seed))
        if any(step.startswith(TRAINED) for step in steps):
            steps.append(self._train_digest)
        if any(step.startswith(CHECKED) for step in steps):
            steps.append(self._selection_digest)
        return digest(self.fingerprint, steps)

    @cached_property
    def _train_digest(self) -> str:
        return split_digest(self.task.train)

    @cached_property
    def _selection_digest(self) -> str:
        return split_digest(self.task.selection)

    @cached_property
    def _channels_last(self) -> bool:
        """Whether images lie channels last, in which most convolutions are faster."""
        return takes_channels_last(self.task.network, self.task.example)

    @cached_property
    def _original(self) -> tuple[Tensor, ...]:
        """The original's log-probabilities (N, classes) for each batch of reward images."""
        network, batches = self._read_only(self.task.network), self._batches(self.reward)
        return log_probabilities(network, batches, precision=self.settings.precision)

    def _read_only(self, network: nn.Module) -> nn.Module:
        """Return what is run for a score: in bfloat16, where rounding is accepted, a copy without its batch norms."""
        return folded(network, self._foldable) if self._foldable else network

    @cached_property
    def _foldable(self) -> tuple[Pair, ...]:
        """What `_read_only` folds."""
        if self.settings.precision != "bfloat16":
            return ()
        return foldable(self.task.network, self.task.example)

    @cached_property
    def _foretold(self) -> bool:
        """Whether the cost model foretells what is counted, tried where it has most to foretell: the narrowest plan.

        It does not where a cut changes how often a weight is used, or products of activations with each other.
        """
        model = self.cost_model
        counts = model.allowed.smallest(model.widths)
        plan = PruningPlan.from_counts(self.groups, dict(zip(model.names, counts.tolist(), strict=True)))
        return count_cost(apply_plan(self.task.network, self.groups, plan), self.task.example) == model.cost(counts)

    def _measure(self, network: nn.Module, groups: tuple[ChannelGroup, ...]) -> Statistics:
        gradients = grams = True
        if self.lean:
            criterion = get_criterion(self.settings.criterion)
            gradients = criterion.needs_gradients
            grams = criterion.needs_moments or get_compensation(self.settings.compensation).needs_data
        return measure(network, groups, self._batches(self.calibration), gradients=gradients, grams=grams)

    def _batches(self, split: Split) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(split.batches(self.settings.batch_size))

    def _draw(self, split: Split, count: int, salt: int) -> Split:
        generator = torch.Generator().manual_seed((self.settings.seed * 1000 + salt) % SEEDS)
        chosen = split.subset(count, generator) if count < len(split) else split
        return chosen.prepared()

    def _laid_out(self, split: Split) -> Split:
        """Return the split with its images channels last where the network takes them and they are in memory."""
        if not self._channels_last or not isinstance(split, TensorSplit):
            return split
        return TensorSplit(split.images.contiguous(memory_format=torch.channels_last), split.labels, name=split.name)

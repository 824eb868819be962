"""Two checks of Network Trimming (Hu et al. 2016): do inherited weights matter, does the choice depend on data?"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from ..data import Split
from ..narrowing import forget
from ..plan import PruningPlan
from ..retraining import RetrainSettings
from ..statistics import measure
from ..surgery import apply_plan
from ..trimmed import Trimmed
from ..trimmer import Trimmer


def train_from_scratch(trimmer: Trimmer, plan: PruningPlan, retraining: RetrainSettings, *, seed: int) -> Trimmed:
    """Train the architecture that a plan leaves from random weights: the ablation without inherited weights.

    Args:
        trimmer: The task.
        plan: What stays of the original network.
        retraining: How it is trained.
        seed: Of the initial weights and of the training.

    Returns:
        The trained network with its score on the reward images.

    Raises:
        UserError: A layer with parameters of its own has no `reset_parameters`, so that its weights would stay.
    """
    network = apply_plan(trimmer.task.network, trimmer.groups, plan)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        forget(network)
    made = Trimmed(
        network, plan.completed(trimmer.groups), trimmer.score(network), trimmer.cost_model.cost(plan.counts)
    )
    return trimmer.retrain(made, replace(retraining, distillation=0.0), seed=seed)


@dataclass(frozen=True)
class Overlap:
    """Channels that Network Trimming's threshold takes from one layer, by the data that APoZ is measured on.

    Attributes:
        train: Taken with APoZ of training images.
        heldout: Taken with APoZ of held-out images.
        both: Taken with either.
    """

    train: int
    heldout: int
    both: int

    @property
    def share(self) -> float:
        """Channels taken with either over channels taken with one or the other, in [0, 1]; 1 where none is taken."""
        union = self.train + self.heldout - self.both
        return self.both / union if union else 1.0


def selection_overlap(trimmer: Trimmer, sigmas: float = 1.0) -> Mapping[str, Overlap]:
    """Compare the channels whose APoZ lies above the threshold on training and on held-out images.

    Args:
        trimmer: As many reward images as there are calibration images are the held-out ones, or all there are.
        sigmas: The threshold, in standard deviations above the layer's mean.

    Returns:
        group -> overlap, for every group with a ReLU behind it.
    """
    heldout = trimmer.reward
    if len(heldout) > len(trimmer.calibration):
        heldout = heldout.subset(len(trimmer.calibration), torch.Generator().manual_seed(trimmer.settings.seed))
    taken = [_taken(trimmer, split, sigmas) for split in (trimmer.calibration, heldout)]
    return {
        name: Overlap(len(first), len(taken[1][name]), len(first & taken[1][name])) for name, first in taken[0].items()
    }


def _taken(trimmer: Trimmer, split: Split, sigmas: float) -> dict[str, set[int]]:
    batches = split.batches(trimmer.settings.batch_size)
    found = measure(trimmer.task.network, trimmer.groups, batches, gradients=False, grams=False)
    result = {}
    for group in trimmer.groups:
        apoz = found.groups[group.name].apoz
        if apoz is not None:
            result[group.name] = set((apoz > apoz.mean() + sigmas * apoz.std()).nonzero()[0].tolist())
    return result

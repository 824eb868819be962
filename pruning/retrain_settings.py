"""How a network is trained, and what training did."""

import math
from dataclasses import dataclass, field, replace
from typing import Literal

from .checks import check_types
from .errors import UserError, closest
from .optimizer_state import OptimizerState

CHOICES = {
    "optimizer": ("sgd", "adamw"),
    "schedule": ("cosine", "one_cycle", "constant"),
    "precision": ("float32", "bfloat16"),
}


@dataclass(frozen=True)
class RetrainSettings:
    """How to train.

    Attributes:
        updates: Optimizer steps; 0 leaves the network as it is.
        epochs: Passes over the training data, in place of `updates`; 0 = `updates` counts. See `resolved`.
        batch_size: Examples a step.
        optimizer: "sgd" (Nesterov momentum) or "adamw".
        learning_rate: Highest learning rate.
        schedule: "cosine" to zero, "one_cycle" (linear rise over the first 30 %, then cosine) or "constant".
        momentum: Of SGD, in [0, 1).
        weight_decay: L2 penalty (SGD) or decoupled decay (AdamW).
        distillation: Share of the loss, in [0, 1], that is the distance to the original's softened outputs.
        temperature: Of the distillation.
        label_smoothing: In [0, 1).
        crop_padding: Pixels of zero padding for random crops; 0 = none.
        flip: Whether images are mirrored at random.
        clip_norm: Largest gradient norm; 0 = no clipping.
        precision: "float32", or "bfloat16" for autocast.
        channels_last: Whether 4-D weights and images lie channels last while training (faster convolutions on GPUs).
        check_every: Updates between two scores on the selection split, all of which is read each time; the last
            step is always scored as well, and the best-scoring weights are kept. 0 = no scores, the last weights
            are kept. Of a pruning schedule only the training after the last cut is scored.
        patience: Scores in a row without improvement after which training stops; 0 = it runs to the end.
        carry_state: Whether training goes on from the optimizer state given, such as the momentum an earlier round
            left, sliced with the cut, and hands its own on. Costs as much memory as the parameters (SGD) or twice
            as much (AdamW).
    """

    updates: int = 0
    epochs: float = 0.0
    batch_size: int = 128
    optimizer: Literal["sgd", "adamw"] = "sgd"
    learning_rate: float = 0.02
    schedule: Literal["cosine", "one_cycle", "constant"] = "cosine"
    momentum: float = 0.9
    weight_decay: float = 5e-4
    distillation: float = 0.0
    temperature: float = 4.0
    label_smoothing: float = 0.0
    crop_padding: int = 0
    flip: bool = False
    clip_norm: float = 5.0
    precision: Literal["float32", "bfloat16"] = "float32"
    channels_last: bool = False
    check_every: int = 0
    patience: int = 0
    carry_state: bool = True

    def __post_init__(self) -> None:
        """Refuse values outside their ranges."""
        check_types(self)
        for name, known in CHOICES.items():
            value = getattr(self, name)
            if value not in known:
                raise UserError(f"{name} must be a known name, but got {value!r}{closest(str(value), known)}")
        if self.weight_decay < 0 or self.clip_norm < 0 or self.crop_padding < 0:
            raise UserError(
                "weight_decay, clip_norm and crop_padding must be at least 0, but got "
                f"{self.weight_decay}, {self.clip_norm} and {self.crop_padding}"
            )
        if self.updates < 0 or self.batch_size < 2:
            raise UserError(
                f"retraining needs updates >= 0 and batch_size >= 2, but got {self.updates} and {self.batch_size}"
            )
        if self.epochs < 0:
            raise UserError(f"epochs must be a number from 0, but got {self.epochs}; it counts passes over the data")
        if self.updates and self.epochs:
            raise UserError(
                "the length of a training must be given in updates or in epochs, "
                f"but got updates={self.updates} and epochs={self.epochs:g}; set one of them to 0"
            )
        if self.check_every < 0 or self.patience < 0:
            raise UserError(
                f"check_every and patience must be at least 0, but got {self.check_every} and {self.patience}"
            )
        if self.patience and not self.check_every:
            raise UserError(
                f"patience counts scores on the selection split, but got patience={self.patience} and check_every=0; "
                "set check_every to the number of updates between two scores"
            )
        if not self.learning_rate > 0:
            raise UserError(f"learning_rate must be positive, but got {self.learning_rate}")
        if not 0 <= self.distillation <= 1:
            raise UserError(f"distillation must be in [0, 1], but got {self.distillation}; it is a share of the loss")
        if not (0 <= self.momentum < 1 and 0 <= self.label_smoothing < 1 and self.temperature > 0):
            raise UserError(
                "momentum and label_smoothing must be in [0, 1) and temperature positive, but got "
                f"{self.momentum}, {self.label_smoothing} and {self.temperature}"
            )

    def without_checks(self) -> "RetrainSettings":
        """Return the settings without scores on the selection split and the early stop that needs them."""
        return replace(self, check_every=0, patience=0)

    def resolved(self, examples: int) -> "RetrainSettings":
        """Return the settings with epochs turned into updates, to the nearest whole number, at least one.

        Args:
            examples: Size of the training split. An epoch leaves out a last batch that is not full, unless it is
                the only one.

        Raises:
            UserError: There are epochs, but no examples.
        """
        if not self.epochs:
            return self
        if examples < 1:
            raise UserError(f"epochs need at least one training example, but got {examples}; give updates instead")
        steps = max(1, examples // self.batch_size)
        return replace(self, updates=max(1, math.floor(self.epochs * steps + 0.5)), epochs=0.0)


@dataclass(frozen=True)
class RetrainResult:
    """What training did.

    Attributes:
        updates: Optimizer steps taken (the steps of a diverged attempt are counted too).
        loss: Mean training loss over the last tenth of the steps, nan if there were none.
        learning_rate: The highest rate that was finally used.
        best_update: Step, counted from 1 in the attempt that succeeded, whose weights were kept: the best-scoring
            one, or the last where nothing was scored.
        best_accuracy: Of these weights on the selection split, in [0, 1]; nan where nothing was scored.
        stopped_early: Whether patience ended the training.
        state: What the optimizer remembered at `best_update`; None without updates or with `carry_state` off.
    """

    updates: int
    loss: float
    learning_rate: float
    best_update: int = 0
    best_accuracy: float = math.nan
    stopped_early: bool = False
    state: OptimizerState | None = field(default=None, compare=False, repr=False)

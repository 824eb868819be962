"""Fine-tune a network, with optional distillation from the original."""

import copy
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .data import Batch, Split, augment_crop_flip
from .errors import UserError, closest
from .tracing import evaluation_mode

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
    """

    updates: int = 0
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

    def __post_init__(self) -> None:
        """Refuse values outside their ranges."""
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
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise UserError(f"learning_rate must be positive, but got {self.learning_rate}")
        if not 0 <= self.distillation <= 1:
            raise UserError(f"distillation must be in [0, 1], but got {self.distillation}; it is a share of the loss")
        if not (0 <= self.momentum < 1 and 0 <= self.label_smoothing < 1 and self.temperature > 0):
            raise UserError("momentum and label_smoothing must be in [0, 1) and temperature positive")


@dataclass(frozen=True)
class RetrainResult:
    """What training did.

    Attributes:
        updates: Optimizer steps taken (the steps of a diverged attempt are counted too).
        loss: Mean training loss over the last tenth of the steps, nan if there were none.
        learning_rate: The highest rate that was finally used.
    """

    updates: int
    loss: float
    learning_rate: float


def retrain(
    network: nn.Module,
    split: Split,
    settings: RetrainSettings,
    *,
    seed: int,
    teacher: nn.Module | None = None,
    progress: Callable[[int], None] | None = None,
) -> RetrainResult:
    """Train `network` in place and leave it in evaluation mode.

    A loss that is not finite restarts from the weights given, at a quarter of the rate, with a warning.

    Args:
        network: Trained in place.
        split: Training data, reshuffled every epoch.
        settings: How to train.
        seed: Decides shuffling, augmentation and dropout; the global random state comes back.
        teacher: The original; needed when `settings.distillation` is positive. Run in evaluation mode; its
            own modes come back.
        progress: Called with the number of steps done, after each.

    Raises:
        UserError: Distillation without a teacher, or training diverges four times.
    """
    if not settings.updates:
        return RetrainResult(0, float("nan"), settings.learning_rate)
    if settings.distillation and teacher is None:
        raise UserError("distillation needs a teacher (the original network), but none was given")
    start = copy.deepcopy(network.state_dict())
    spent = 0
    for attempt in range(4):
        rate = settings.learning_rate / 4**attempt
        with torch.random.fork_rng(), nullcontext() if teacher is None else evaluation_mode(teacher):
            torch.manual_seed(seed)
            losses = _attempt(network, split, replace(settings, learning_rate=rate), seed, teacher, progress)
        spent += len(losses)
        if losses and math.isfinite(losses[-1]):
            tail = losses[-max(1, len(losses) // 10) :]
            return RetrainResult(spent, sum(tail) / len(tail), rate)
        warnings.warn(
            f"training diverged after {len(losses)} updates at learning rate {rate:g}; it starts again at {rate / 4:g}",
            stacklevel=2,
        )
        network.load_state_dict(start)
    raise UserError(f"training diverged four times, the last at learning rate {rate:g}; is the data finite?")


def _attempt(
    network: nn.Module,
    split: Split,
    settings: RetrainSettings,
    seed: int,
    teacher: nn.Module | None,
    progress: Callable[[int], None] | None,
) -> list[float]:
    """Train until done or until a loss is not finite (which is then the last in the list)."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = _optimizer(network, settings)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_factor(settings, step))
    network.train()
    losses: list[float] = []
    for step, (images, labels) in enumerate(_endless(split, settings, generator)):
        if step == settings.updates:
            break
        images = augment(images, settings, generator)
        device = images.device.type
        with torch.autocast(device, dtype=torch.bfloat16, enabled=settings.precision == "bfloat16"):
            loss = _loss(network, images, labels, settings, teacher)
        losses.append(float(loss.detach()))
        if not math.isfinite(losses[-1]):
            break
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if settings.clip_norm:
            nn.utils.clip_grad_norm_(network.parameters(), settings.clip_norm)
        optimizer.step()
        scheduler.step()
        if progress:
            progress(step + 1)
    network.eval()
    return losses


def _loss(
    network: nn.Module, images: Tensor, labels: Tensor, settings: RetrainSettings, teacher: nn.Module | None
) -> Tensor:
    logits = network(images)
    loss = F.cross_entropy(logits, labels, label_smoothing=settings.label_smoothing)
    if not settings.distillation or teacher is None:
        return loss
    with torch.no_grad():
        target = F.softmax(teacher(images) / settings.temperature, dim=1)
    # Hinton, Vinyals & Dean 2015: the soft term's gradient scales with 1/T², hence the factor T²
    soft = F.cross_entropy(logits / settings.temperature, target) * settings.temperature**2
    return (1 - settings.distillation) * loss + settings.distillation * soft


def _optimizer(network: nn.Module, settings: RetrainSettings) -> torch.optim.Optimizer:
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    if not parameters:  # a network frozen for inference: retraining was asked for, so it trains whole
        parameters = list(network.requires_grad_(True).parameters())
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay)
    return torch.optim.SGD(
        parameters,
        lr=settings.learning_rate,
        momentum=settings.momentum,
        nesterov=settings.momentum > 0,
        weight_decay=settings.weight_decay,
    )


def rate_factor(settings: RetrainSettings, step: int) -> float:
    """Return the learning rate of a step relative to the highest, in [0, 1]."""
    if settings.schedule == "constant":
        return 1.0
    rise = round(0.3 * settings.updates) if settings.schedule == "one_cycle" else 0
    if step < rise:
        return (step + 1) / (rise + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, settings.updates - rise)))


def augment(images: Tensor, settings: RetrainSettings, generator: torch.Generator) -> Tensor:
    """Apply the random crops and flips that `settings` ask for; (N, C, H, W) -> same shape."""
    if not settings.crop_padding and not settings.flip:
        return images
    return augment_crop_flip(images, padding=settings.crop_padding, flip=settings.flip, generator=generator)


def _endless(split: Split, settings: RetrainSettings, generator: torch.Generator) -> Iterator[Batch]:
    """Yield shuffled batches, epoch after epoch; a last batch of one example is left out (batch norm)."""
    drop_last = len(split) > settings.batch_size
    while True:
        yield from split.batches(settings.batch_size, generator=generator, drop_last=drop_last)

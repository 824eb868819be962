"""Fine-tune a network, with optional distillation from the original and early stopping on a split apart."""

import copy
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .checks import check_seed
from .data import Batch, Split, augment_crop_flip
from .errors import UserError
from .evaluation import Score, evaluate
from .optimizer_state import OptimizerState, capture, restore
from .retrain_settings import RetrainResult, RetrainSettings
from .tracing import evaluation_mode

__all__ = ["RetrainResult", "RetrainSettings", "augment", "rate_factor", "retrain"]


@dataclass(frozen=True, eq=False)
class _Job:
    """What all attempts of one training share; the values are those of `retrain`'s arguments."""

    network: nn.Module
    split: Split
    seed: int
    teacher: nn.Module | None
    selection: Split | None
    metric: str
    state: OptimizerState | None
    progress: Callable[[int], None] | None


@dataclass(frozen=True, eq=False)
class _Best:
    """The best-scoring step so far, with copies of the weights and of the optimizer's state."""

    update: int
    score: Score
    weights: dict[str, Tensor]
    state: OptimizerState | None


@dataclass(frozen=True, eq=False)
class _Attempt:
    """How an attempt ended; the network holds the weights of `best`, or the last ones without it."""

    losses: list[float]
    diverged: bool
    stopped_early: bool = False
    best: _Best | None = None
    state: OptimizerState | None = None


def retrain(
    network: nn.Module,
    split: Split,
    settings: RetrainSettings,
    *,
    seed: int,
    teacher: nn.Module | None = None,
    selection: Split | None = None,
    metric: str = "accuracy",
    state: OptimizerState | None = None,
    progress: Callable[[int], None] | None = None,
) -> RetrainResult:
    """Train `network` in place and leave it in evaluation mode, without gradients.

    Parameters with `requires_grad` off stay as they are, unless all have it off: such a network, frozen for inference,
    is trained whole. The flags are as before afterwards.

    A loss, a score or a weight that is not finite restarts from the weights and the optimizer state given, at a
    quarter of the rate, with a warning. With `settings.check_every` the network is scored now and then and ends with
    the weights of the highest accuracy, of these the lowest loss. The weights given are no candidate: fresh from a
    cut, they are what training was asked to leave behind.

    Args:
        network: Trained in place.
        split: Training data, reshuffled every epoch.
        settings: How to train.
        seed: Decides shuffling, augmentation and dropout; the global random state comes back. Scoring uses no
            random numbers of the training.
        teacher: The original; needed when `settings.distillation` is positive. Run in evaluation mode; its
            own modes come back.
        selection: What the network is scored on; needed when `settings.check_every` is positive.
        metric: Of these scores, a name from `evaluation.METRICS`.
        state: Where the optimizer goes on; by default it begins at rest. A state of another kind of optimizer is
            left out, as is any with `settings.carry_state` off.
        progress: Called with the number of steps done, after each.

    Raises:
        UserError: Distillation without a teacher, scores without a selection split, a state that does not fit the
            network, a seed outside [0, 2**63), or training diverges four times.
    """
    check_seed(seed)
    settings = settings.resolved(len(split))
    if not settings.updates:
        return RetrainResult(0, math.nan, settings.learning_rate)
    if settings.distillation and teacher is None:
        raise UserError("distillation needs a teacher (the original network), but none was given")
    if settings.check_every and selection is None:
        raise UserError(
            f"check_every={settings.check_every} needs a selection split to score on, but none was given; "
            "pass selection=..., or set check_every to 0"
        )
    job = _Job(network, split, seed, teacher, selection, metric, state if settings.carry_state else None, progress)
    start = copy.deepcopy(network.state_dict())
    spent = 0
    with _flags_kept(network), _channels_last(network) if settings.channels_last else nullcontext():
        for attempt in range(4):
            rate = settings.learning_rate / 4**attempt
            with torch.random.fork_rng(), nullcontext() if teacher is None else evaluation_mode(teacher):
                torch.manual_seed(seed)
                done = _attempt(job, replace(settings, learning_rate=rate))
            spent += len(done.losses)
            if not done.diverged:
                return _result(done, spent, rate)
            warnings.warn(
                f"training diverged after {len(done.losses)} updates at learning rate {rate:g}; "
                f"it starts again at {rate / 4:g}",
                stacklevel=2,
            )
            network.load_state_dict(start)
    raise UserError(f"training diverged four times, the last at learning rate {rate:g}; is the data finite?")


def _result(done: _Attempt, spent: int, rate: float) -> RetrainResult:
    tail = done.losses[-max(1, len(done.losses) // 10) :]
    return RetrainResult(
        updates=spent,
        loss=sum(tail) / len(tail),
        learning_rate=rate,
        best_update=done.best.update if done.best else len(done.losses),
        best_accuracy=done.best.score.accuracy if done.best else math.nan,
        stopped_early=done.stopped_early,
        state=done.state,
    )


def _attempt(job: _Job, settings: RetrainSettings) -> _Attempt:
    """Train until done, until patience ends or until something is not finite."""
    network = job.network
    generator = torch.Generator().manual_seed(job.seed)
    optimizer = _optimizer(network, settings)
    if job.state is not None:
        restore(optimizer, network, job.state)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_factor(settings, step))
    network.train()
    losses: list[float] = []
    best: _Best | None = None
    waited, diverged, stopped = 0, False, False
    for update, batch in zip(range(1, settings.updates + 1), _endless(job.split, settings, generator), strict=False):
        losses.append(_update(job, settings, batch, optimizer, generator))
        diverged = not math.isfinite(losses[-1])
        if diverged:
            break
        scheduler.step()
        if job.progress:
            job.progress(update)
        if not _is_check(settings, update):
            continue
        score = _check(job, settings)
        diverged = not math.isfinite(score.loss)
        if diverged:
            break
        if best is None or (score.accuracy, -score.loss) > (best.score.accuracy, -best.score.loss):
            best, waited = (
                _Best(update, score, copy.deepcopy(network.state_dict()), _state(job, settings, optimizer)),
                0,
            )
        else:
            waited += 1
            stopped = waited == settings.patience and update < settings.updates
        if stopped:
            break
    optimizer.zero_grad(set_to_none=True)
    network.eval()
    # the last step has no later loss that would show what it did
    if diverged or not all(bool(torch.isfinite(parameter).all()) for parameter in network.parameters()):
        return _Attempt(losses, diverged=True)
    if best is None:
        return _Attempt(losses, diverged=False, state=_state(job, settings, optimizer))
    network.load_state_dict(best.weights)
    return _Attempt(losses, diverged=False, stopped_early=stopped, best=best, state=best.state)


def _update(
    job: _Job, settings: RetrainSettings, batch: Batch, optimizer: torch.optim.Optimizer, generator: torch.Generator
) -> float:
    """Take one step and return its loss; no step where the loss is not finite."""
    images = augment(batch.images, settings, generator)
    if settings.channels_last and images.dim() == 4:
        images = images.contiguous(memory_format=torch.channels_last)
    with torch.autocast(images.device.type, dtype=torch.bfloat16, enabled=settings.precision == "bfloat16"):
        loss = _loss(job.network, images, batch.labels, settings, job.teacher)
    value = float(loss.detach())
    if math.isfinite(value):
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if settings.clip_norm:
            nn.utils.clip_grad_norm_(job.network.parameters(), settings.clip_norm)
        optimizer.step()
    return value


def _is_check(settings: RetrainSettings, update: int) -> bool:
    return settings.check_every > 0 and (update % settings.check_every == 0 or update == settings.updates)


def _check(job: _Job, settings: RetrainSettings) -> Score:
    """Score the network as it will be used, in full precision; the training's random numbers are not touched."""
    assert job.selection is not None  # checked by `retrain`
    with torch.random.fork_rng():
        return evaluate(job.network, job.selection.batches(settings.batch_size), job.metric)


def _state(job: _Job, settings: RetrainSettings, optimizer: torch.optim.Optimizer) -> OptimizerState | None:
    return capture(optimizer, job.network) if settings.carry_state else None


@contextmanager
def _flags_kept(network: nn.Module) -> Iterator[None]:
    """Give every parameter its `requires_grad` back on leaving."""
    flags = [(parameter, parameter.requires_grad) for parameter in network.parameters()]
    try:
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


@contextmanager
def _channels_last(network: nn.Module) -> Iterator[None]:
    """Lay 4-D parameters and buffers out channels last; on leaving they are contiguous as before."""
    tensors = (*network.parameters(), *network.buffers())
    laid_out = [tensor for tensor in tensors if tensor.dim() == 4 and tensor.is_contiguous()]
    for tensor in laid_out:
        tensor.data = tensor.data.contiguous(memory_format=torch.channels_last)
    try:
        yield
    finally:
        for tensor in laid_out:
            # a clone, for strides of their own: `contiguous` would leave those of a 1x1 kernel as they are
            tensor.data = tensor.data.clone(memory_format=torch.contiguous_format)


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

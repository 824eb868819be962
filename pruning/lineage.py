"""Digests of the cuts and trainings that make a network: what its score depends on beside the images."""

from dataclasses import asdict

from .fingerprint import digest
from .plan import PruningPlan
from .retrain_settings import RetrainSettings

TRAINED = "trained:"
"""How the digest of a training begins."""

CHECKED = f"{TRAINED}checked:"
"""How that of a training begins that was scored on the selection split."""


def trains(retraining: RetrainSettings | None) -> bool:
    """Return whether a network is trained at all by these settings."""
    return retraining is not None and bool(retraining.updates or retraining.epochs)


def cut_digest(plan: PruningPlan) -> str:
    """Return the digest of a cut: a complete plan in the numbering of what it cut."""
    return "cut:" + plan.fingerprint


def training_digest(retraining: RetrainSettings, seed: int) -> str:
    """Return the digest of a training with a seed."""
    return (CHECKED if retraining.check_every else TRAINED) + digest(asdict(retraining), seed)


def longer(lineage: tuple[str, ...] | None, step: str) -> tuple[str, ...] | None:
    """Return a lineage with one step more; unknown stays unknown."""
    return None if lineage is None else (*lineage, step)

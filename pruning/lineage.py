"""Digests of the cuts and trainings that make a network: what its score depends on beside the images."""

from dataclasses import asdict

from .fingerprint import digest
from .plan import PruningPlan
from .repair_settings import RepairSettings
from .retrain_settings import RetrainSettings

TRAINED = "trained:"
"""How the digest of a training begins."""

CHECKED = f"{TRAINED}checked:"
"""How that of a training begins that was scored on the selection split."""


REPAIRED_BY = ("compensation", "calibration_images", "recalibration_images", "batch_size", "precision", "seed")
"""Those of `RepairSettings` that decide what a cut leaves; the others decide what is cut, and its score."""


def trains(retraining: RetrainSettings | None) -> bool:
    """Return whether a network is trained at all by these settings."""
    return retraining is not None and bool(retraining.updates or retraining.epochs)


def cut_digest(plan: PruningPlan, repair: RepairSettings | None = None) -> str:
    """Return the digest of a cut.

    Args:
        plan: Complete, in the numbering of what it cut.
        repair: How it was repaired; None where that is told elsewhere.
    """
    made = "cut:" + plan.fingerprint
    if repair is None:
        return made
    return f"{made}:{digest({name: getattr(repair, name) for name in REPAIRED_BY})}"


def training_digest(retraining: RetrainSettings, seed: int) -> str:
    """Return the digest of a training with a seed."""
    return (CHECKED if retraining.check_every else TRAINED) + digest(asdict(retraining), seed)


def longer(lineage: tuple[str, ...] | None, step: str) -> tuple[str, ...] | None:
    """Return a lineage with one step more; unknown stays unknown."""
    return None if lineage is None else (*lineage, step)

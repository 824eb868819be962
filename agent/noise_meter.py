"""Can the reward tell plans apart? Measured before an agent is trained on it.

Every plan of a search is scored on the same reward images. Their common difficulty falls out of the difference of two
plans; what is left is luck with single images, and a policy can only learn differences that are larger than that.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice

import numpy as np
import torch
from numpy.typing import NDArray

from ..envs.action import RoundTarget, make_action_rule
from ..envs.reward import Reward
from ..pruning.checks import check_kind, check_seed
from ..pruning.data import Split
from ..pruning.errors import UserError
from ..pruning.plan import PruningPlan
from ..pruning.trimmer import Trimmer
from .finalists import right_examples
from .noise_report import NoiseReport, NotMeasurable, variance_components
from .progress import Progress
from .randomness import derive_seed, random_state_kept
from .settings import SearchSettings

DOUBTFUL, HOPELESS = 1.0, 0.5
"""Signal to noise: below the first a search warns, below the second it refuses."""

FEW_IMAGES = 500
"""Reward images that a first look takes; what more of them would tell follows from it."""

STEP = 4
"""Plans that are added at once where those so far leave a doubt."""

FREE_BUDGET = 0.5
"""Share of the cost at which plans are measured where a search has no budget."""


def measure_noise(
    trimmer: Trimmer,
    *,
    budget: float,
    unit: str,
    plans: int = 8,
    most: int = 24,
    spread: float = 0.5,
    score_scale: float = 3.0,
    seed: int = 0,
    remarks: Sequence[str] = (),
) -> NoiseReport:
    """Score a few plans image by image: the uniform one, and random ones such as an agent's first episodes try.

    The first `plans` are scored on at most 500 reward images, and further ones up to `most` until the 80 % range lies
    above a signal to noise of 1. Where they leave it below 1, all of them are scored on all reward images. No global
    random state is touched.

    Args:
        trimmer: Cuts, repairs and holds the reward images; nothing is trained.
        budget: Share of the cost to keep, in (0, 1].
        unit: "macs" or "params".
        plans: Fewest plans that are scored, from 2.
        most: Most plans that are scored, at least `plans`.
        spread: Standard deviation of the actions that make the random plans, positive; clipped to [-1, 1].
        score_scale: Log-odds of staying at action 1, as in `TrimSettings`.
        seed: Of the random plans and of the 500 images, in [0, 2**63).
        remarks: Taken over into the report.

    Raises:
        NotMeasurable: All plans at the budget are the same, or there is but one reward image.
        UserError: A number outside its range, or an unreachable budget.
    """
    check_kind(trimmer, Trimmer, "measure_noise")
    check_seed(seed)
    if plans < 2 or most < plans or not spread > 0:
        raise UserError(
            f"noise needs plans >= 2, most >= plans and spread > 0, but got plans={plans}, most={most} and "
            f"spread={spread}; 8, 24 and 0.5 are usual"
        )
    with random_state_kept():
        drawn = _draw_plans(trimmer, budget, unit, spread, score_scale, np.random.default_rng(seed))
        chosen = list(islice(drawn, plans))
        if len(chosen) < 2:
            raise NotMeasurable(
                f"noise needs at least two plans, but every plan at {budget:.3g} of the {unit} is the same; "
                "choose another budget"
            )
        whole = trimmer.reward
        few = whole
        if len(whole) > FEW_IMAGES:
            few = whole.subset(FEW_IMAGES, torch.Generator().manual_seed(seed)).prepared()
        right, more = _right(trimmer, chosen, few), math.sqrt(len(whole) / len(few))
        while more * variance_components(right).low < DOUBTFUL and len(chosen) < most:
            others = list(islice(drawn, min(STEP, most - len(chosen))))
            if not others:
                break
            chosen += others
            right = np.concatenate([right, _right(trimmer, others, few)])
        if few is not whole and more * variance_components(right).signal_to_noise < DOUBTFUL:
            right = _right(trimmer, chosen, whole)
    return NoiseReport(
        components=variance_components(right),
        plans=tuple(chosen),
        scored=right.shape[1],
        images=len(whole),
        available=len(trimmer.task.reward),
        budget=budget,
        unit=unit,
        accuracies=tuple(right.mean(1).tolist()),
        remarks=tuple(remarks),
    )


def _right(trimmer: Trimmer, plans: Sequence[PruningPlan], images: Split) -> NDArray[np.bool_]:
    """Return (plans, images) whether each image is right under each plan."""
    cutter = trimmer.with_settings(replace(trimmer.settings, reward_images=1))  # a trim scores too: here for nothing
    size, metric = trimmer.settings.batch_size, trimmer.task.metric
    rows = [right_examples(cutter.trim(plan, trimmer.pristine).network, images, size, metric) for plan in plans]
    return np.stack(rows)


def _draw_plans(
    trimmer: Trimmer, budget: float, unit: str, spread: float, score_scale: float, rng: np.random.Generator
) -> Iterator[PruningPlan]:
    """Yield distinct plans that meet the budget, the uniform one first, until 50 draws in a row bring nothing new."""
    rule = make_action_rule("score", trimmer.cost_model, score_scale=score_scale, largest_trim=0.5)
    rule.check(budget, unit)
    subject, target = trimmer.pristine, RoundTarget(budget, unit, True)
    seen: set[tuple[int, ...]] = set()
    actions, repeats = np.zeros(len(subject.groups)), 0
    while repeats < 50:
        counts = rule.resolve(actions, subject, target)
        actions = np.clip(rng.normal(0.0, spread, len(subject.groups)), -1.0, 1.0)
        if tuple(counts.tolist()) in seen:
            repeats += 1
            continue
        seen.add(tuple(counts.tolist()))
        repeats = 0
        yield trimmer.plan(counts, subject)


ACCURACY = ("gain_over_uniform", "accuracy", "negative_error", "psi_phi", "error_log_macs")
"""Terms of the reward that know no more of the reward images than how many are right."""


def noise_for(trimmer: Trimmer, settings: SearchSettings) -> NoiseReport:
    """Measure the noise for a search: one cut at its final budget, with the spread of its agent's first actions.

    Raises:
        UserError: As `measure_noise`.
    """
    trim, remarks = settings.trim, []
    budget = trim.budget
    if budget is None:
        budget = max(FREE_BUDGET, trimmer.cost_model.smallest_budget(trim.budget_unit))
        remarks.append(f"the search has no budget: measured at {budget:.3g} of the {trim.budget_unit}")
    if trim.rounds > 1:
        remarks.append(f"the search cuts in {trim.rounds} rounds: measured after one cut to the same budget")
    if trim.retrain_updates:
        remarks.append("the search retrains inside its episodes: measured without, where plans lie further apart")
    others = [name for name in Reward(trim.reward).weights if name not in ACCURACY]
    if others:
        remarks.append(f"the reward pays for {', '.join(others)}: only the accuracy is measured")
    if trim.action != "score":
        remarks.append(f"the search's actions are {trim.action!r}: plans are drawn by 'score'")
    return measure_noise(
        trimmer,
        budget=budget,
        unit=trim.budget_unit,
        spread=math.exp(settings.learner.noise_start),
        score_scale=trim.score_scale,
        seed=derive_seed(settings.seed, "noise"),
        remarks=remarks,
    )


def check_noise(trimmer: Trimmer, settings: SearchSettings, progress: Progress) -> NoiseReport | None:
    """Say before a search whether its reward can tell plans apart; warn where it hardly can.

    The plans that are scored here are no evaluations of the agent. Nothing is refused where the rewards of the search
    are others than what was measured (`NoiseReport.remarks`).

    Returns:
        What was measured; None with `noise_check` "off", or where there are not two plans and two images.

    Raises:
        UserError: With `noise_check` "refuse", a signal to noise below 0.5.
    """
    if settings.noise_check == "off":
        return None
    try:
        report = noise_for(trimmer, settings)
    except NotMeasurable as error:
        progress.say(f"reward noise: not measured ({error})")
        return None
    progress.say(report.finding())
    for remark in report.remarks:
        progress.say(f"  {remark}")
    if report.signal_to_noise >= DOUBTFUL:
        return report
    if report.signal_to_noise < HOPELESS and settings.noise_check == "refuse" and not report.remarks:
        raise UserError(
            f"a reward must tell plans apart, but {report.images:,} reward images measure the difference of two plans "
            f"to {100 * report.noise(report.images):.2f} points where it is about {100 * report.difference:.2f} "
            f"(signal to noise {report.signal_to_noise:.2f}, {len(report.plans)} plans); {report.advice()}; or search "
            "nevertheless with --search.noise_check warn"
        )
    progress.say(
        f"WARNING: the reward hardly tells plans apart: much of what the agent will learn is luck with these "
        f"{report.images:,} images; {report.advice()}"
    )
    return report

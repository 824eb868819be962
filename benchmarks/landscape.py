"""A small landscape that is known completely: every plan of a small network at one budget, scored once and kept.

    python benchmarks/landscape.py          # scores all plans anew and writes landscape.json beside this file

Digits of 8x8 pixels, a residual network of eight layers, six groups, a quarter of its MACs. Whoever searches plays on
the table as on the network: `TableTrimmer` answers in place of `Trimmer`, with the same environment around it. What a
search misses of the best plan is then known exactly, and a search takes seconds. `regret.py` measures searches so.
"""

import argparse
import itertools
import json
import math
import shlex
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from prunegym.envs import RewardSettings, TrimEnv, TrimSettings
from prunegym.pruning import (
    CostModel,
    Evaluated,
    GroupSettings,
    PruningPlan,
    PruningTask,
    RepairSettings,
    RetrainSettings,
    Score,
    SplitSettings,
    Subject,
    TaskSettings,
    Trimmer,
    UserError,
    prepare_task,
)
from prunegym.pruning.artifact import weights_digest
from prunegym.pruning.budget import solve_each
from prunegym.pruning.widths import CountArray

TABLE = Path(__file__).with_suffix(".json")
SEED = 0
STEP = 2
"""All widths are multiples of it."""
BUDGET, UNIT = 0.25, "macs"
LOSS_DIGITS = 4
REWARD = RewardSettings(weights={"gain_over_uniform": 1.0, "loss_gain": 1.0})
TRIM = TrimSettings(
    budget=BUDGET,
    budget_unit=UNIT,
    groups=GroupSettings(channel_multiple=STEP),
    repair=RepairSettings(calibration_images=256, recalibration_images=256, seed=SEED),
    reward=REWARD,
)
TASK = TaskSettings(
    network="cifar_resnet20",
    network_arguments={"blocks": 1, "widths": [8, 12, 16]},
    data="digits",
    image_size=8,
    splits=SplitSettings(reward=400, selection=100),
    training=RetrainSettings(updates=200, batch_size=64, learning_rate=0.05, schedule="one_cycle"),
)
DRAWS = 4000
"""Actions tried for each plan when the best one that a search can reach is looked for."""


# ---- the table -------------------------------------------------------------------------------------------------------
@dataclass(frozen=True, eq=False)
class Landscape:
    """All plans that just meet the budget, and what they are worth.

    Attributes:
        scores: Widths by group, in order -> accuracy and loss on the reward images.
        uniform: Widths of the uniform plan.
        best: Widths of the plan of highest value among those that actions can reach.
        best_actions: (groups,) in [-1, 1] that reach it.
    """

    scores: Mapping[tuple[int, ...], Score]
    uniform: tuple[int, ...]
    best: tuple[int, ...]
    best_actions: tuple[float, ...]

    @classmethod
    def load(cls, path: Path = TABLE) -> "Landscape":
        """Read the table."""
        kept = json.loads(path.read_text())
        images = kept["images"]
        scores = {widths_of(key): Score(right / images, loss, images) for key, (right, loss) in kept["plans"].items()}
        best = kept["best"]
        return cls(scores, widths_of(kept["uniform"]), widths_of(best["plan"]), tuple(best["actions"]))

    def value(self, widths: tuple[int, ...]) -> float:
        """Return accuracy (a share) less loss (nats): the reward is this, less the uniform plan's."""
        return value_of(self.scores[widths])

    def ranked(self) -> list[tuple[int, ...]]:
        """Return the widths of all plans, those of highest value first; not all can be reached."""
        return sorted(self.scores, key=self.value, reverse=True)

    @cached_property
    def span(self) -> float:
        """What there is to gain: the best reachable plan's value less the uniform one's."""
        return self.value(self.best) - self.value(self.uniform)

    def regret(self, reward: float) -> float:
        """Return the share of the span that a search has missed, in [0, 1] unless it beat the best known plan.

        The uniform plan is known to all, as rewards are relative to it: who finds nothing better has missed all.

        Args:
            reward: The best it found, as `TrimEnv` pays it.
        """
        return 1.0 - max(reward, 0.0) / self.span


def value_of(score: Score) -> float:
    """Return accuracy less loss."""
    return score.accuracy - score.loss


def widths_of(key: str) -> tuple[int, ...]:
    """Return the widths that a key of the table stands for: one digit a group, in steps."""
    return tuple(STEP * int(digit) for digit in key)


def key_of(widths: tuple[int, ...]) -> str:
    """Return the key of widths; the inverse of `widths_of`."""
    return "".join(str(width // STEP) for width in widths)


# ---- what may be reached ---------------------------------------------------------------------------------------------
def plans_at_the_budget(model: CostModel, budget: float, unit: str) -> CountArray:
    """Return (plans, groups) all allowed widths that meet the budget while some group's next width would exceed it.

    More never come out of `solve_counts`, whatever the scores; not all of these do.
    """
    limit = math.floor(budget * model.full.of(unit) * (1 + 1e-12))
    grid = np.array(list(itertools.product(*(range(STEP, width + 1, STEP) for width in model.widths))))
    tight = np.zeros(len(grid), dtype=bool)
    for group, width in enumerate(model.widths):
        wider = grid.copy()
        wider[:, group] += STEP
        tight |= (wider[:, group] <= width) & (model.costs(wider, unit) > limit)
    return grid[tight & (model.costs(grid, unit) <= limit)]


def actions_to(widths: tuple[int, ...], model: CostModel, seed: int) -> NDArray[np.float64] | None:
    """Return (groups,) actions in [-1, 1] that lead to these widths, looked for around their log-odds, or None."""
    share = (np.array(widths) - 0.25 * STEP) / model.widths  # within what is rounded to these widths
    middle = np.log(share / (1 - share)) / TRIM.score_scale
    middle -= (middle.max() + middle.min()) / 2  # adding a number to all changes nothing
    random = np.random.default_rng(seed)
    spread = random.choice((0.02, 0.1, 0.2), (DRAWS, 1))
    actions = np.clip(middle + spread * random.standard_normal((DRAWS, len(widths))), -1.0, 1.0).round(3)
    solved = solve_each(model, TRIM.score_scale * actions, np.full(DRAWS, BUDGET), UNIT)
    hits = (solved == np.array(widths)).all(1)
    return actions[hits][0] if hits.any() else None


# ---- playing on it ---------------------------------------------------------------------------------------------------
class TableTrimmer(Trimmer):
    """Looks a plan of the pristine network up instead of cutting and scoring it.

    Args:
        task: From `landscape_task`.
        landscape: Its table.
    """

    def __init__(self, task: PruningTask, landscape: Landscape) -> None:
        super().__init__(task, TRIM.repair, TRIM.groups)
        self.landscape = landscape

    def evaluate(
        self,
        plan: PruningPlan,
        subject: Subject | None = None,
        *,
        retraining: RetrainSettings | None = None,
        seed: int = 0,
    ) -> Evaluated:
        """Return the score that the table holds.

        Raises:
            UserError: What is cut is not the pristine network, or it is to be trained, or the plan is not in the table.
        """
        if (subject is not None and subject is not self.pristine) or (retraining and retraining.updates):
            raise UserError("the table must be asked for plans of the pristine network without training; use Trimmer")
        plan = plan.completed(self.groups)
        widths = tuple(plan.counts.values())
        if widths not in self.landscape.scores:
            raise UserError(
                f"the table must hold the plan, but got widths {widths}; it holds those that just keep "
                f"{BUDGET:.0%} of the {UNIT}"
            )
        return Evaluated(self.landscape.scores[widths], self.cost_model.cost(plan.counts), plan)


def landscape_task() -> PruningTask:
    """Return the network, trained in about a second, and its data; nothing is downloaded.

    A processor that rounds otherwise gives other weights, and so slightly other scores than the table's; the search
    plays on the table's all the same. `weights_digest` tells.
    """
    return prepare_task(TASK, seed=SEED)


def table_environment(trimmer: TableTrimmer) -> TrimEnv:
    """Return the environment in which the table is played."""
    return TrimEnv(trimmer.task, TRIM, trimmer=trimmer)


# ---- making it -------------------------------------------------------------------------------------------------------
def fresh_score(trimmer: Trimmer, widths: tuple[int, ...]) -> Score:
    """Cut, repair and score a plan for real."""
    return trimmer.evaluate(trimmer.plan(widths)).score


def scored(trimmer: Trimmer, plans: CountArray) -> Iterator[tuple[tuple[int, ...], Score]]:
    """Yield widths and score of each plan, and say how far it is."""
    began = time.monotonic()
    for place, row in enumerate(plans):
        widths = tuple(row.tolist())
        yield widths, fresh_score(trimmer, widths)
        if not (place + 1) % 500:
            print(f"{place + 1:,} of {len(plans):,} plans, {time.monotonic() - began:.0f} s", file=sys.stderr)


def main() -> int:
    """Train the network, score every plan and write the table."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    torch.set_num_threads(1)
    began = time.monotonic()
    task = landscape_task()
    trimmer = Trimmer(task, TRIM.repair, TRIM.groups)
    model = trimmer.cost_model
    scores = dict(scored(trimmer, plans_at_the_budget(model, BUDGET, UNIT)))
    uniform = tuple(solve_each(model, np.zeros((1, len(model.widths))), [BUDGET], UNIT)[0].tolist())
    beyond, best, actions = 0, uniform, np.zeros(len(uniform))
    for widths in sorted(scores, key=lambda widths: -value_of(scores[widths])):
        found = actions_to(widths, model, SEED)
        if found is not None:
            best, actions = widths, found
            break
        beyond += 1
    lines = [f'"{key_of(widths)}":[{round(s.accuracy * s.examples)},{s.loss:.{LOSS_DIGITS}f}]' for widths, s in
             scores.items()]  # fmt: skip
    head = {
        "what": "plan (one digit a group: channels / 2) -> right answers, loss (nats, 4 decimals)",
        "network": "ResNet-8, widths 8-12-16",
        "weights_sha256": weights_digest(task.network),
        "data": "scikit-learn digits, 8x8",
        "budget": BUDGET,
        "unit": UNIT,
        "images": len(trimmer.reward),
        "groups": dict(zip(model.names, model.widths.tolist(), strict=True)),
        "original": [round(trimmer.baseline.accuracy * len(trimmer.reward)), round(trimmer.baseline.loss, LOSS_DIGITS)],
        "uniform": key_of(uniform),
        "best": {"plan": key_of(best), "actions": actions.tolist(), "better_but_unreachable": beyond},
        "seed": SEED,
        "versions": {name: version(name) for name in ("prunegym", "torch", "numpy", "scikit-learn")},
        "seconds": round(time.monotonic() - began),
        "command": shlex.join(["python", "benchmarks/landscape.py", *sys.argv[1:]]),
    }
    text = json.dumps(head, indent=1).rstrip("\n}") + ',\n "plans": {\n'
    per_line = (",".join(lines[start : start + 5]) for start in range(0, len(lines), 5))
    TABLE.write_text(text + ",\n".join(per_line) + "\n}}\n")
    print({key: value for key, value in head.items() if key != "what"})
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""AMC's agent against random search at equal evaluations, and the uniform plan, on one environment.

    python benchmarks/amc.py configs/amc_resnet20.yaml --table docs/results/amc.md --seeds 0 1 --data_root DATA \
        --task.weights WEIGHTS --task.splits.heldout UNSEEN --max_evaluations 150 --search.learner.warmup_episodes 20

- DDPG as the configuration says; its last evaluation is the policy without noise.
- Random: uniform actions through the same environment, as many evaluations.
- Uniform: the same share of every group, within the budget.

DDPG and random choose alike: the best plans on the reward images are scored on the selection split, and the best there
is retrained, as the uniform plan is. The test split is read once, when all networks of all seeds are finished.
"""

import argparse
import shlex
import statistics
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from prunegym.agent.configuration import read_config
from prunegym.agent.finalists import Finalist, read_test_split
from prunegym.agent.history import Evaluation, History, SearchCallback
from prunegym.agent.learner import make_learner, noise_setter
from prunegym.agent.loading import load_task
from prunegym.agent.progress import Progress
from prunegym.agent.search import derive_seed
from prunegym.agent.settings import SearchSettings
from prunegym.agent.workers import make_environments
from prunegym.envs import TrimEnv
from prunegym.pruning import PruningPlan, Schedule, Trimmer, build
from prunegym.pruning.heuristics import uniform
from prunegym.pruning.schedule import Round
from stable_baselines3.common.base_class import BaseAlgorithm


@dataclass(frozen=True, eq=False)
class Found:
    """A plan, how it was found, and the network that was built from it.

    Attributes:
        method: "DDPG", "random" or "uniform".
        seed: Of the search.
        inside: Accuracy on the reward images after the cut and the refit, without training.
        selection_before: On the selection split, likewise.
        network: Retrained.
        history: All evaluations of the search; empty for the uniform plan.
    """

    method: str
    seed: int
    inside: float
    selection_before: float
    network: Finalist
    history: History


def main() -> int:
    """Run the seeds and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--table", required=True, help="Markdown file to write")
    options, rest = parser.parse_known_args()
    config = read_config([options.config, *rest])
    started = time.monotonic()
    trimmer = Trimmer(load_task(config, Progress()), config.search.trim.repair, config.search.trim.groups)
    found: list[Found] = []
    for seed in options.seeds:
        settings = replace(config.search, seed=seed)
        for method, run in (("DDPG", ddpg), ("random", random_search)):
            found.append(finish(trimmer, settings, method, run(trimmer, settings)))
            say(found[-1], started)
    found.append(finish_uniform(trimmer, config.search))
    say(found[-1], started)
    whole = trimmer.task.network
    original = Finalist(
        "original", "original", whole, trimmer.cost_model.full, None, (), trimmer.score_selection(whole)
    )
    read_test_split(trimmer, [original, *(entry.network for entry in found)])
    command = shlex.join(["python", "benchmarks/amc.py", *sys.argv[1:]])
    minutes = time.process_time() / 60
    Path(options.table).write_text(page(trimmer, config.search, original, found, command, minutes))
    return 0


def say(entry: Found, started: float) -> None:
    """Print one line of progress."""
    minutes = (time.monotonic() - started) / 60
    print(
        f"{minutes:.1f} min: {entry.method} {entry.seed}: inside {entry.inside:.4f}, selection "
        f"{entry.selection_before:.4f} -> {entry.network.selection.accuracy:.4f}",
        flush=True,
    )


# ---- three ways to a plan --------------------------------------------------------------------------------------------
def ddpg(trimmer: Trimmer, settings: SearchSettings) -> History:
    """Let the agent of the configuration learn; the last evaluation is its policy without noise."""
    history, allowed = History(), settings.max_evaluations - 1
    groups, seed = len(trimmer.groups), derive_seed(settings.seed, "learner")
    workers = make_environments(trimmer.task, settings.trim, trimmer, workers=1, seed=seed)
    learner = make_learner(settings.learner, workers, steps_per_episode=groups, seed=seed, log_folder=None)
    noise = noise_setter(learner, settings.learner)
    callback = SearchCallback(history, max_evaluations=allowed, set_noise=noise)
    learner.learn(allowed * groups, callback=callback)
    callback.record_alone(*play(TrimEnv(trimmer.task, settings.trim, trimmer=trimmer), learner))
    return history


def random_search(trimmer: Trimmer, settings: SearchSettings) -> History:
    """Draw every action uniformly from [-1, 1]."""
    env, history = TrimEnv(trimmer.task, settings.trim, trimmer=trimmer), History()
    rng = np.random.default_rng(derive_seed(settings.seed, "random"))
    for place in range(settings.max_evaluations):
        (info,), reward = play(env, rng)
        history.add(
            Evaluation(
                evaluation=place + 1,
                episode=place + 1,
                round=1,
                accuracy=info["accuracy"],
                loss=info["loss"],
                kept=info["kept"],
                params=info["params"],
                macs=info["macs"],
                reward=reward,
                widths={name: len(keep) for name, keep in info["plan"].items()},
                plans=tuple(info["plans"]),
            )
        )
    return history


def play(env: TrimEnv, policy: BaseAlgorithm | np.random.Generator) -> tuple[list[dict], float]:
    """Play one episode without noise, or at random; returns the infos of its scored step and its reward."""
    observation, _ = env.reset()
    ended, reward, info = False, 0.0, {}
    while not ended:
        if isinstance(policy, np.random.Generator):
            action = policy.uniform(-1.0, 1.0, 1).astype(np.float32)
        else:
            action, _ = policy.predict(observation, deterministic=True)
        observation, reward, ended, _, info = env.step(action)
    return [info], reward


# ---- from a plan to a network ----------------------------------------------------------------------------------------
def finish(trimmer: Trimmer, settings: SearchSettings, method: str, history: History) -> Found:
    """Score the best plans on the selection split, and retrain the best there."""
    candidates = []
    for row in history.ranked()[: settings.candidates]:
        plan = PruningPlan.from_dict(row.plans[-1])
        trimmed = trimmer.trim(plan)
        candidates.append((trimmer.score_selection(trimmed.network).accuracy, row.accuracy, plan))
    selection, inside, plan = max(candidates, key=lambda entry: entry[:2])
    retraining = settings.trim.retraining.resolved(len(trimmer.task.train))
    schedule = Schedule(
        rounds=(Round(plan, retraining.updates),),
        repair=trimmer.settings,
        retraining=replace(retraining, updates=0),
        seed=settings.trim.repair.seed,
        made_by=method,
    )
    return Found(
        method, settings.seed, inside, selection, finalist(trimmer, schedule, f"{method} {settings.seed}"), history
    )


def finish_uniform(trimmer: Trimmer, settings: SearchSettings) -> Found:
    """Retrain the uniform plan."""
    trim = settings.trim
    assert trim.budget is not None
    schedule = uniform(
        trimmer, budget=trim.budget, unit=trim.budget_unit, retraining=trim.retraining, seed=trim.repair.seed
    )
    trimmed = trimmer.trim(schedule.plan)
    selection = trimmer.score_selection(trimmed.network).accuracy
    network = finalist(trimmer, schedule, "uniform")
    return Found("uniform", settings.seed, trimmed.score.accuracy, selection, network, History())


def finalist(trimmer: Trimmer, schedule: Schedule, name: str) -> Finalist:
    """Build, retrain and score on the selection split."""
    built = build(trimmer, schedule, verify=False)
    selection = trimmer.score_selection(built.network)
    return Finalist(name, name, built.network, built.cost, schedule, built.rounds, selection)


# ---- page ------------------------------------------------------------------------------------------------------------
def page(
    trimmer: Trimmer, settings: SearchSettings, original: Finalist, found: list[Found], command: str, minutes: float
) -> str:
    """Return the page."""
    trim, learner, task = settings.trim, settings.learner, trimmer.task
    retraining = trim.retraining.resolved(len(task.train))
    epochs = retraining.updates * retraining.batch_size / len(task.train)
    lines = [
        "# AMC's agent, random search and the uniform plan",
        "",
        f"{task.name} at {trim.budget:.0%} of the {trim.budget_unit}; state, action, reward and agent of AMC "
        f"(He et al. 2018): observation `{trim.observation}`, action `{trim.action}`, reward accuracy - 1 on "
        f"{len(trimmer.reward):,} images after criterion `{trim.repair.criterion}` and compensation "
        f"`{trim.repair.compensation}`, no training inside the search. {settings.max_evaluations} evaluations for "
        f"{learner.algorithm} ({learner.warmup_episodes} of them random warm-up, the last the policy without noise) "
        f"and as many for random actions in the same environment. The {settings.candidates} best plans of each are "
        f"scored on the selection split ({len(task.selection):,} images); the best there is retrained "
        f"{retraining.updates:,} updates of {retraining.batch_size} ({epochs:.1f} epochs), as is the uniform plan. "
        f"The test split ({len(task.test):,} images) was read once, at the end, for all networks. "
        f"Accuracies in percent; {minutes:.0f} minutes of one core.",
        "",
        "| plan | seed | MACs kept | inside the search (reward) | selection, before training | selection, retrained "
        "| test, retrained |",
        "|---|--:|--:|--:|--:|--:|--:|",
        f"| original | – | 100.0 | {_percent(trimmer.baseline.accuracy)} | {_percent(original.selection.accuracy)} "
        f"| – | {_percent(original.test)} |",
    ]
    for entry in found:
        share = entry.network.cost.macs / original.cost.macs
        seed = "–" if entry.method == "uniform" else str(entry.seed)
        lines.append(
            f"| {entry.method} | {seed} | {100 * share:.1f} | {_percent(entry.inside)} | "
            f"{_percent(entry.selection_before)} | {_percent(entry.network.selection.accuracy)} | "
            f"{_percent(entry.network.test)} |"
        )
    lines += [
        "",
        *_searches(settings, found),
        *_published(task.name, original, found, settings),
        f"Command: `{command}`",
        "",
    ]
    return "\n".join(lines)


def _searches(settings: SearchSettings, found: list[Found]) -> list[str]:
    """Return how the accuracies developed in each search, and what may be said of the difference."""
    warmup = settings.learner.warmup_episodes or settings.learner.episodes_per_update
    lines = [
        "## Inside the searches",
        "",
        f"Accuracy on the reward images, %: the first {warmup} evaluations (DDPG's warm-up), the last {warmup}, "
        "the policy without noise, and the best.",
        "",
        "| search | seed | mean of the first | mean of the last | without noise | best | distinct plans |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for entry in found:
        values = [100 * row.accuracy for row in entry.history.rows]
        if not values:
            continue
        alone = f"{values[-1]:.2f}" if entry.method == "DDPG" else "–"
        lines.append(
            f"| {entry.method} | {entry.seed} | {statistics.mean(values[:warmup]):.2f} | "
            f"{statistics.mean(values[-warmup:]):.2f} | {alone} | {max(values):.2f} | {len(entry.history.ranked())} |"
        )
    pairs = [
        (agent, other)
        for agent in found
        for other in found
        if (agent.method, other.method) == ("DDPG", "random") and agent.seed == other.seed
    ]
    gaps = {
        "inside the search": [100 * (agent.inside - other.inside) for agent, other in pairs],
        "on the test split": [
            100 * ((agent.network.test or 0.0) - (other.network.test or 0.0)) for agent, other in pairs
        ],
    }
    said = "; ".join(f"{where} {', '.join(f'{gap:+.2f}' for gap in values)}" for where, values in gaps.items())
    return [*lines, "", f"DDPG minus random, points, seed by seed: {said}. {len(pairs)} seeds carry no interval.", ""]


def _published(network: str, original: Finalist, found: list[Found], settings: SearchSettings) -> list[str]:
    """Return the published figures beside ours, and why they differ."""
    mean = {
        method: statistics.mean(100 * (entry.network.test or 0.0) for entry in found if entry.method == method)
        for method in ("DDPG", "random", "uniform")
    }
    base = 100 * (original.test or 0.0)
    return [
        "## Beside the published figures",
        "",
        "| source | network | base | random | DDPG | uniform | DDPG minus base |",
        "|---|---|--:|--:|--:|--:|--:|",
        f"| here, test, mean over seeds | {network} | {base:.2f} | {mean['random']:.2f} | {mean['DDPG']:.2f} | "
        f"{mean['uniform']:.2f} | {mean['DDPG'] - base:+.2f} |",
        "| reproduction with feature-map least squares | ResNet-20 / CIFAR-10, half the MACs | 91.78 | 90.98 | 91.26 | "
        "– | -0.52 |",
        "| AMC | ResNet-56 / CIFAR-10, half the MACs | 92.80 | – | 91.90 | – | -0.90 |",
        "| AMC | MobileNetV1 / ImageNet, 285 M MACs | 70.9 | – | 70.5 | – | -0.4 |",
        "",
        "What differs, a sentence each:",
        "",
        f"- Base: the original here has {base:.2f} %, the reproduction's 91.78 %, so that only differences to the base "
        "compare.",
        "- Fine-tuning: the reproduction trains 60 epochs after the search; here it is the number above, the same "
        "for every plan.",
        f"- Length: AMC plays 800 episodes, 100 of them warm-up; here {settings.max_evaluations}, "
        f"{settings.learner.warmup_episodes or 0} of them warm-up.",
        f"- Reward images: AMC splits off 5,000; here {settings.trim.repair.reward_images or 'all'}, and the fewer, "
        "the luckier is the best of a search.",
        "- Previous action: in the state it is the one that was asked for; AMC shows it after the clip.",
        "- Choice: the five best plans are scored again on the selection split; AMC takes the best of the search.",
        "- Units: a residual sum ties layers together, so an action decides a whole group; AMC decides layer by layer.",
        "- Magnitude: channels are ranked by the weights that produce them; AMC's code ranks by the weights that read "
        "them.",
        "- Refit: least squares on moments of what every reader of the cut channels reads, with batch norm "
        "recalibrated; AMC fits sampled points of the layer's output.",
        "- Action: at least a fifth of each group stays, as in AMC; the clip against the budget is AMC's, in whole "
        "channels, which AMC rounds to multiples of 8.",
        "- Noise: a normal of half the action's range, clipped to the range; AMC truncates it.",
        "- Reward: paid at the last step and handed to all steps of the episode as their return, with discount 1; "
        "AMC's code copies it to every step, bootstraps, and subtracts a moving average.",
        "- Learning rate: one for actor and critic, falling to a tenth; AMC has 0.0001 and 0.001, constant.",
        "",
    ]


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.2f}"


if __name__ == "__main__":
    sys.exit(main())

"""Searches on a landscape that is known completely: the table is right, the agent finds its best plan, chance does not.

The table is `benchmarks/landscape.json`: every plan of a small ResNet at a quarter of its MACs, scored once.
"""

import itertools
import json
import statistics
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from prunegym.agent.settings import ImaginationSettings, LearnerSettings
from prunegym.envs import TrimEnv
from prunegym.pruning import PruningPlan, RetrainSettings, Score, Trimmer, UserError, solve_counts
from prunegym.pruning.artifact import weights_digest
from scipy.stats import spearmanr
from toys import benchmark

benchmark("lines")
LAND = benchmark("landscape")
REGRET = benchmark("regret")
EVALUATIONS = 100


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def landscape() -> Any:
    return LAND.Landscape.load()


@pytest.fixture(scope="module")
def trimmer(landscape: Any) -> Any:
    return LAND.TableTrimmer(LAND.landscape_task(), landscape)


def macs(widths: tuple[int, ...]) -> int:
    """Return the MACs of the network by hand: 8x8 maps, then 4x4, then 2x2; 1x1 shortcuts where the size changes."""
    stem, inner1, inner2, stage2, inner3, stage3 = widths
    first = 64 * 9 * (1 * stem + stem * inner1 + inner1 * stem)
    second = 16 * (9 * stem * inner2 + 9 * inner2 * stage2 + stem * stage2)
    third = 4 * (9 * stage2 * inner3 + 9 * inner3 * stage3 + stage2 * stage3)
    return first + second + third + 10 * stage3


def play(environment: TrimEnv, actions: Any) -> tuple[float, dict[str, Any]]:
    environment.reset()
    for action in actions:
        _, reward, _, _, info = environment.step(np.array([action], np.float32))
    return reward, info


# ---- the table -------------------------------------------------------------------------------------------------------
def test_the_table_holds_just_the_plans_that_meet_the_budget(landscape: Any, trimmer: Any) -> None:
    whole = (8, 8, 12, 12, 16, 16)
    assert tuple(group.width for group in trimmer.groups) == whole
    limit = 0.25 * macs(whole)
    expected = set()
    for plan in itertools.product(*(range(2, width + 1, 2) for width in whole)):
        wider = [
            (*plan[:place], plan[place] + 2, *plan[place + 1 :]) for place in range(6) if plan[place] < whole[place]
        ]
        if macs(plan) <= limit < max(map(macs, wider), default=0):
            expected.add(plan)
    assert set(landscape.scores) == expected
    assert 1000 < len(expected) < 10_000


def test_scores_are_those_of_the_network(landscape: Any, trimmer: Any) -> None:
    """On a processor that rounds otherwise the network has other weights: then the order of the plans must agree."""
    fresh = Trimmer(trimmer.task, LAND.TRIM.repair, LAND.TRIM.groups)
    plans = sorted(landscape.scores)
    chosen = [plans[place] for place in np.random.default_rng(7).choice(len(plans), 18, replace=False)]
    kept = [landscape.scores[plan] for plan in [landscape.uniform, landscape.best, *chosen]]
    scores = [LAND.fresh_score(fresh, plan) for plan in [landscape.uniform, landscape.best, *chosen]]
    close = [
        abs(one.accuracy - other.accuracy) <= 0.01 and abs(one.loss - other.loss) <= 0.02
        for one, other in zip(kept, scores, strict=True)
    ]
    same = weights_digest(trimmer.task.network) == json.loads(LAND.TABLE.read_text())["weights_sha256"]
    assert sum(close) >= 18 if same else spearmanr([s.loss for s in kept], [s.loss for s in scores]).statistic > 0.6


def test_the_best_plan_is_reached_and_none_that_is_reached_is_better(landscape: Any, trimmer: Any) -> None:
    model, scale = trimmer.cost_model, LAND.TRIM.score_scale
    assert max(map(abs, landscape.best_actions)) <= 1
    reward, info = play(LAND.table_environment(trimmer), landscape.best_actions)
    assert tuple(len(keep) for keep in info["plan"].values()) == landscape.best
    assert reward == pytest.approx(landscape.span)
    assert tuple(solve_counts(model, np.zeros(6), 0.25, "macs")) == landscape.uniform
    draws = np.random.default_rng(0).uniform(-1, 1, (4000, 6))
    reached = LAND.solve_each(model, scale * draws, np.full(4000, 0.25), "macs")
    values = [landscape.value(tuple(row)) for row in reached.tolist()]  # a plan beyond the table would be no key
    assert landscape.value(landscape.uniform) < max(values) <= landscape.value(landscape.best)


def test_an_episode_on_the_table_is_one_on_the_network(landscape: Any, trimmer: Any) -> None:
    actions = [0.4, -0.6, -0.2, 0.1, -0.3, 0.5]
    reward, told = play(LAND.table_environment(trimmer), actions)
    again, real = play(TrimEnv(trimmer.task, LAND.TRIM), actions)
    assert reward == pytest.approx(again, abs=0.05)
    assert {name: told[name] for name in ("plan", "macs", "params", "kept")} == {
        name: real[name] for name in ("plan", "macs", "params", "kept")
    }


def test_the_table_refuses_what_it_does_not_hold(trimmer: Any) -> None:
    with pytest.raises(UserError, match=r"must hold the plan, but got widths \(8, 8, 12, 12, 16, 16\); it holds"):
        trimmer.evaluate(PruningPlan.full(trimmer.groups))
    plan = trimmer.plan(trimmer.landscape.uniform)
    with pytest.raises(UserError, match="plans of the pristine network without training"):
        trimmer.evaluate(plan, retraining=RetrainSettings(updates=1))
    other = trimmer.examine(trimmer.task.network, trimmer.groups, PruningPlan.full(trimmer.groups))
    with pytest.raises(UserError, match="plans of the pristine network without training"):
        trimmer.evaluate(plan, other)


def test_regret_by_hand() -> None:
    """Values 0.5 - 1.0 and 0.8 - 0.5: a span of 0.8."""
    scores = {(2,): Score(0.5, 1.0, 10), (4,): Score(0.8, 0.5, 10), (6,): Score(0.9, 0.4, 10)}
    land = LAND.Landscape(scores, uniform=(2,), best=(4,), best_actions=(1.0,))
    assert land.span == pytest.approx(0.8)
    assert land.regret(0.8) == pytest.approx(0.0)
    assert land.regret(0.2) == pytest.approx(0.75)
    assert land.regret(-3.0) == 1.0


def test_the_page_shows_the_means_of_what_was_kept(landscape: Any, tmp_path: Path) -> None:
    """Regrets 0.0 and 0.04: mean 2 %, standard error 2 %; both within 5 %, one of them within 2 %."""
    labels = [*REGRET.AGENTS, *REGRET.CONTROL_NAMES]
    lines = [
        REGRET.Line(label, evaluations, seed, 0.04 * seed if label == labels[0] else 1.0, 3.0 + seed)
        for label in labels for evaluations in REGRET.EVALUATIONS for seed in (0, 1)
    ]  # fmt: skip
    path = tmp_path / "lines.jsonl"
    path.write_text("".join(json.dumps(asdict(line)) + "\n" for line in lines))
    assert REGRET.read_lines(path) == lines
    assert REGRET.read_lines(tmp_path / "none.jsonl") == []
    page = REGRET.page(landscape, lines, "as typed")
    rows = [text.split("|")[2].strip() for text in page.splitlines() if text.startswith(f"| {labels[0]} |")]
    assert rows == ["2.0 ± 2.0", "100%", "50%", f"{0.02 * landscape.span:.3f}"]
    assert "Seeds 0 to 1." in page
    assert f"{labels[0]} 3.5," in page


# ---- who finds it ----------------------------------------------------------------------------------------------------
def test_the_agent_finds_the_best_plan_and_chance_does_not(landscape: Any, trimmer: Any) -> None:
    """One of 7,180 plans; a hundred evaluations suffice the agent for a regret of 2 % on average.

    Which seeds miss may depend on the processor, hence the room: four of five found it where it was tried, the fifth
    the second best.
    """
    uniform = landscape.value(landscape.uniform)
    assert sum(landscape.regret(landscape.value(plan) - uniform) <= REGRET.EXACT for plan in landscape.scores) == 1

    def regrets(histories: list[Any]) -> list[float]:
        assert all(history.spent <= EVALUATIONS for history in histories)
        return [landscape.regret(REGRET.best_after(history, EVALUATIONS)) for history in histories]

    searches = [REGRET.agent_search(LearnerSettings(), trimmer, EVALUATIONS, seed) for seed in range(5)]
    agent = regrets(searches)
    chance = regrets([REGRET.control_search("random", trimmer, EVALUATIONS, seed) for seed in range(10)])
    assert sum(regret <= REGRET.EXACT for regret in agent) >= 3
    assert statistics.mean(agent) <= 0.02
    assert statistics.mean(chance) >= 0.10
    # the policy itself has learned: its plan without noise, scored last, is no longer the uniform one
    own = [landscape.regret(history.rows[-1].reward) for history in searches]
    assert statistics.median(own) <= REGRET.CLOSE
    never = LearnerSettings(imagination=ImaginationSettings(practise=False))
    assert landscape.regret(REGRET.agent_search(never, trimmer, 10, 0).rows[-1].reward) == pytest.approx(1.0)

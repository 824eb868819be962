"""The reward-noise meter: right in simulation and by brute force, and a search refuses what it cannot learn from."""

import itertools
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from prunegym.agent import LearnerSettings, SearchSettings, search
from prunegym.agent.cli import main
from prunegym.agent.noise_meter import check_noise, measure_noise, noise_for
from prunegym.agent.noise_report import Components, NoiseReport, NotMeasurable, variance_components
from prunegym.agent.progress import Progress
from prunegym.envs import RewardSettings, TrimSettings
from prunegym.envs.default_task import DEFAULT_TASK, default_task
from prunegym.pruning import PruningTask, Trimmer, UserError, prepare_task
from prunegym.pruning.heuristics import uniform
from prunegym.pruning.repair_settings import RepairSettings
from prunegym.pruning.retraining import RetrainSettings
from torch import nn
from toys import Wired


@pytest.fixture(scope="module")
def trimmer() -> Trimmer:
    return Trimmer(default_task())


@pytest.fixture(scope="module")
def report(trimmer: Trimmer) -> NoiseReport:
    return measure_noise(trimmer, budget=0.3, unit="macs", seed=3)


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the list of what progress is told to say."""
    lines: list[str] = []
    monkeypatch.setattr(Progress, "say", lambda _, text: lines.append(text))
    return lines


def simulate(rng: np.random.Generator, plans: int, images: int, signal: float) -> np.ndarray:
    """Draw right answers of plans whose true accuracies have standard deviation `signal`; luck² is LUCK - signal²."""
    ease = rng.uniform(0.3, 0.9, images)
    chance = ease[None, :] + signal * rng.uniform(-(3**0.5), 3**0.5, plans)[:, None]
    return rng.random((plans, images)) < chance


LUCK = 0.6 * 0.4 - 0.6**2 / 12
"""Mean of p (1 - p) for p uniform in [0.3, 0.9]: mean (1 - mean) - variance; plans that differ add theirs."""


# ---- the estimates ---------------------------------------------------------------------------------------------------
def test_a_table_worked_out_by_hand() -> None:
    found = variance_components(np.array([[1.0, 1.0, 1.0, 0.0], [1.0, 0.0, 0.0, 0.0]]))
    # means 3/4 and 1/4; between plans 4 · (1/4)² · 2 / 1 = 1/2; rest ± 1/4 in each of 8 cells, over 1 · 3
    assert found.luck**2 == pytest.approx(8 / 16 / 3)
    assert found.signal**2 == pytest.approx((1 / 2 - 1 / 6) / 4)
    assert found.signal_to_noise**2 == pytest.approx(3 - 1)


def test_noise_is_that_of_paired_differences() -> None:
    right = simulate(np.random.default_rng(0), 6, 80, 0.05)
    paired = [np.var(one - other, ddof=1) for one, other in itertools.combinations(right.astype(float), 2)]
    assert 2 * variance_components(right).luck ** 2 == pytest.approx(float(np.mean(paired)))


def test_known_signal_and_luck_are_found() -> None:
    rng = np.random.default_rng(1)
    found = [variance_components(simulate(rng, 12, 400, 0.05)) for _ in range(300)]
    assert np.mean([one.signal**2 for one in found]) == pytest.approx(0.05**2, rel=0.08)
    assert np.mean([one.luck**2 for one in found]) == pytest.approx(LUCK - 0.05**2, rel=0.01)


@pytest.mark.parametrize("signal", [0.02, 0.05])
def test_the_range_holds_the_truth_four_times_in_five(signal: float) -> None:
    rng = np.random.default_rng(2)
    truth = signal * (300 / (LUCK - signal**2)) ** 0.5
    found = [variance_components(simulate(rng, 8, 300, signal)) for _ in range(400)]
    assert 0.72 < np.mean([one.low <= truth <= one.high for one in found]) < 0.92


def test_plans_that_are_alike_have_no_signal() -> None:
    rng = np.random.default_rng(3)
    found = [variance_components(simulate(rng, 24, 300, 0.0)) for _ in range(200)]
    assert np.mean([one.signal_to_noise < 0.5 for one in found]) > 0.7
    assert np.mean([one.signal_to_noise > 1.0 for one in found]) < 0.03
    same = variance_components(np.tile(rng.random(50) < 0.7, (5, 1)))
    assert (same.signal, same.luck, same.signal_to_noise) == (0.0, 0.0, 0.0)


def test_a_single_plan_or_image_is_refused() -> None:
    with pytest.raises(NotMeasurable, match=r"at least two plans and two images, but got a table of shape \(1, 9\)"):
        variance_components(np.ones((1, 9)))


# ---- on a network ----------------------------------------------------------------------------------------------------
def test_disjoint_subsets_scatter_as_said(trimmer: Trimmer, report: NoiseReport) -> None:
    images, labels = next(iter(trimmer.reward.batches(len(trimmer.reward))))
    with torch.no_grad():
        answers = [trimmer.trim(plan).network(images).argmax(1) for plan in report.plans]
    right = np.stack([(answer == labels).numpy() for answer in answers])
    rng, scattered = np.random.default_rng(0), []
    for _ in range(200):
        accuracy = right[:, rng.permutation(300)].reshape(-1, 10, 30).mean(2)  # (plans, 10 disjoint subsets)
        scattered += [np.var(one - other, ddof=1) for one, other in itertools.combinations(accuracy, 2)]
    assert report.noise(30) == pytest.approx(float(np.mean(scattered)) ** 0.5, rel=0.05)


def test_plans_are_distinct_within_the_budget_and_the_first_is_uniform(trimmer: Trimmer, report: NoiseReport) -> None:
    start = uniform(trimmer, budget=0.3, unit="macs", retraining=RetrainSettings())
    assert report.plans[0].counts == start.plan.counts
    assert len({tuple(plan.counts.values()) for plan in report.plans}) == len(report.plans) == len(report.accuracies)
    for plan, accuracy in zip(report.plans, report.accuracies, strict=True):
        trimmed = trimmer.trim(plan)
        assert trimmed.cost.macs <= 0.3 * trimmer.cost_model.full.macs
        assert trimmed.score.accuracy == pytest.approx(accuracy)


def test_the_same_seed_gives_the_same_and_no_global_state_moves(trimmer: Trimmer, report: NoiseReport) -> None:
    torch.manual_seed(11)
    np.random.seed(11)  # noqa: NPY002
    random.seed(11)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()  # noqa: NPY002
    again = measure_noise(trimmer, budget=0.3, unit="macs", seed=3)
    assert again == report
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1]  # noqa: NPY002
    assert random.getstate() == before[2]
    assert measure_noise(trimmer, budget=0.3, unit="macs", seed=4).plans != report.plans


def test_a_first_look_at_few_images_tells_of_more(trimmer: Trimmer, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = measure_noise(trimmer, budget=0.1, unit="macs", seed=0)
    monkeypatch.setattr("prunegym.agent.noise_meter.FEW_IMAGES", 150)
    few = measure_noise(trimmer, budget=0.1, unit="macs", seed=0)
    assert (few.scored, few.images, whole.scored) == (150, 300, 300)
    assert few.noise(300) == pytest.approx(whole.noise(300), rel=0.3)
    assert few.signal_to_noise == pytest.approx(few.difference / few.noise(300))


def test_doubt_takes_more_plans(trimmer: Trimmer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prunegym.agent.noise_meter.FEW_IMAGES", 20)
    doubtful = measure_noise(trimmer, budget=0.8, unit="macs", plans=4, most=9, spread=0.1, seed=0)
    assert len(doubtful.plans) > 4
    assert len({tuple(plan.counts.values()) for plan in doubtful.plans}) == len(doubtful.accuracies)


def test_a_bad_verdict_is_made_on_all_images(hopeless: Trimmer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prunegym.agent.noise_meter.FEW_IMAGES", 20)
    report = measure_noise(hopeless, budget=0.3, unit="macs", plans=4, most=6, spread=0.05)
    assert (report.scored, len(report.plans), report.signal_to_noise < 1) == (300, 6, True)
    for plan, accuracy in zip(report.plans, report.accuracies, strict=True):
        assert hopeless.trim(plan).score.accuracy == pytest.approx(accuracy)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"plans": 1}, "plans >= 2, most >= plans and spread > 0, but got plans=1"),
        ({"most": 3}, "but got plans=8, most=3"),
        ({"spread": 0.0}, "spread=0.0"),
        ({"budget": 1e-9}, "budget"),
        ({"seed": -1}, "seed must be"),
    ],
)
def test_impossible_numbers_are_refused(trimmer: Trimmer, wrong: dict[str, float], words: str) -> None:
    with pytest.raises(UserError, match=words):
        measure_noise(trimmer, **{"budget": 0.3, "unit": "macs", **wrong})


# ---- what a report says ----------------------------------------------------------------------------------------------
def made(signal: float, luck: float = 0.4, images: int = 400, available: int = 400) -> NoiseReport:
    components = Components(signal, luck, signal * images**0.5 / luck, 0.0, 9.0)
    return NoiseReport(components, (), images, images, available, 0.5, "macs", ())


def test_how_many_images_are_enough() -> None:
    report = made(0.02)  # 2 · luck / signal = 40, squared
    assert report.enough == 1600
    assert report.signal_to_noise_at(1600) == pytest.approx(2.0)
    assert report.noise(400) == pytest.approx(2**0.5 * 0.02)
    assert report.signal_to_noise == pytest.approx(1.0)
    assert report.sizes() == [50, 100, 200, 400, 1600]
    assert made(0.02, available=1000).sizes() == [50, 100, 200, 400, 800, 1000, 1600]
    assert report.table().row_count == 5
    with pytest.raises(UserError, match="images must be at least 1, but got 0"):
        report.noise(0)


@pytest.mark.parametrize(
    ("report", "words"),
    [
        (made(0.02), "needs 1,600 reward images: --task.splits.reward 1600, or a smaller budget"),
        (made(0.02, available=5000), "needs 1,600 reward images: --search.trim.repair.reward_images 1600"),
        (made(0.05), "400 reward images are enough"),
        (made(0.08), "from 100 on they would do"),
        (made(0.0), "no difference between the plans was found"),
        (made(1e-4), "no difference between the plans was found"),
    ],
)
def test_the_advice(report: NoiseReport, words: str) -> None:
    assert words in report.advice()


# ---- before a search -------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def hopeless() -> Trimmer:
    """Return the digits network with random labels on its reward images: no plan is better than another."""
    task = default_task()
    images, labels = next(iter(task.reward.batches(len(task.reward))))
    labels = torch.randint(0, 10, labels.shape, generator=torch.Generator().manual_seed(1))
    return Trimmer(replace(task, reward=(images, labels)))


SETTINGS = SearchSettings(learner=LearnerSettings(noise_start=-3.0))


def test_a_reward_that_tells_nothing_is_refused(hopeless: Trimmer, said: list[str]) -> None:
    with pytest.raises(
        UserError, match=r"tell plans apart, but 300 reward images .*24 plans.*--search.noise_check warn"
    ):
        check_noise(hopeless, SETTINGS, Progress())
    report = check_noise(hopeless, replace(SETTINGS, noise_check="warn"), Progress())
    assert report is not None
    assert report.signal_to_noise < 0.5
    assert said[-1].startswith("WARNING: the reward hardly tells plans apart")


def test_a_search_refuses_before_it_learns(hopeless: Trimmer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(search.__globals__, "learn", lambda *_, **__: pytest.fail("an agent learned"))
    with pytest.raises(UserError, match="reward must tell plans apart"):
        search(hopeless.task, settings=SETTINGS)


def test_the_plans_of_the_check_are_no_evaluations(said: list[str]) -> None:
    settings = SearchSettings(
        trim=TrimSettings(retraining=RetrainSettings(updates=2)),
        learner=LearnerSettings(episodes_per_update=2, hidden=[4]),
        max_evaluations=3,
        compare=False,
        latency_batches=(),
    )
    checked = search(prepare_task(DEFAULT_TASK, seed=0), settings=settings)
    assert any(line.startswith("reward noise: two plans") for line in said)
    unchecked = search(prepare_task(DEFAULT_TASK, seed=0), settings=replace(settings, noise_check="off"))
    assert len(checked.history.rows) == 3
    assert [row.plans for row in checked.history.rows] == [row.plans for row in unchecked.history.rows]


def test_what_was_not_measured_itself_is_not_refused(hopeless: Trimmer, said: list[str]) -> None:
    rounds = replace(SETTINGS, trim=TrimSettings(rounds=2, retrain_updates=3))
    report = check_noise(hopeless, rounds, Progress())
    assert report is not None
    assert [remark.split(":")[0] for remark in report.remarks] == [
        "the search cuts in 2 rounds",
        "the search retrains inside its episodes",
    ]
    assert said[-1].startswith("WARNING")


def test_a_good_reward_is_said_in_one_line(trimmer: Trimmer, said: list[str]) -> None:
    report = check_noise(trimmer, SearchSettings(), Progress())
    assert report is not None
    assert said == [report.finding()]
    assert "300 reward images" in said[0]


def test_off_cuts_nothing(trimmer: Trimmer, said: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Trimmer, "trim", lambda *_, **__: pytest.fail("a network was cut"))
    assert check_noise(trimmer, SearchSettings(noise_check="off"), Progress()) is None
    assert not said


def test_without_a_budget_half_is_measured(trimmer: Trimmer) -> None:
    free = TrimSettings(budget=None, action="ratio", reward=RewardSettings("accuracy_floor"))
    report = noise_for(trimmer, SearchSettings(trim=free))
    assert report.budget == 0.5
    assert report.remarks[0] == "the search has no budget: measured at 0.5 of the macs"


def test_one_group_has_one_plan(said: list[str]) -> None:
    network = Wired(
        lambda self, x: self.second(torch.relu(self.first(x))), first=nn.Linear(4, 8), second=nn.Linear(8, 3)
    )
    data = torch.randn(40, 4, generator=torch.Generator().manual_seed(0)), torch.arange(40) % 3
    trimmer = Trimmer(PruningTask(network, data, data, data, data))
    with pytest.raises(NotMeasurable, match=r"every plan at 0\.5 of the macs is the same; choose another budget"):
        measure_noise(trimmer, budget=0.5, unit="macs")
    assert check_noise(trimmer, SearchSettings(trim=TrimSettings(budget=0.5)), Progress()) is None
    assert said[-1].startswith("reward noise: not measured (")


def test_one_reward_image_is_not_measurable() -> None:
    with pytest.raises(NotMeasurable, match="two images"):
        measure_noise(Trimmer(default_task(), RepairSettings(reward_images=1)), budget=0.3, unit="macs")


def test_an_unknown_check_is_refused() -> None:
    with pytest.raises(UserError, match=r"noise_check must be one of refuse, warn, off, but got 'wran'.*'warn'"):
        SearchSettings(noise_check="wran")


# ---- the command -----------------------------------------------------------------------------------------------------
@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Return a function that runs `prunegym noise` in an empty folder and returns what it printed."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> str:
        assert main(["noise", *arguments]) == 0
        assert not list(tmp_path.glob("runs*"))
        return capsys.readouterr().out

    return run


def test_the_command_prints_table_and_advice(run: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prunegym.agent.cli.load_task", lambda *_, **__: default_task())
    printed = run("quickstart", "--budget", "0.2")
    rows = [line.split() for line in printed.splitlines()]
    present = next(row for row in rows if "present" in row or "present," in row)
    assert present[0] == "300"
    assert f"300 reward images measure to {present[1]} points" in printed
    assert "two plans at 0.2 of the params" in printed
    assert "reward images are enough" in printed


def test_a_range_is_measured_in_its_middle_as_before_a_search(
    run: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("prunegym.agent.cli.load_task", lambda *_, **__: default_task())
    levels = ["--search.trim.budget_range", "[0.1,0.4]", "--search.trim.budget_levels", "3"]  # 0.1, 0.2, 0.4
    printed = run("quickstart", "--search.trim.budget", "null", *levels)
    assert "two plans at 0.2 of the params" in printed
    assert "has no budget" not in printed


def test_the_command_names_the_nearest_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["noise", "quickstart", "--search.noise_chek", "off"]) == 2
    assert "did you mean 'search.noise_check'" in capsys.readouterr().err

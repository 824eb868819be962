"""The benchmark of scores: its statistics against hand calculations, its run against what was written before."""

import json
import math
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from prunegym.pruning import UserError
from scipy.stats import kendalltau, spearmanr
from torch import nn
from toys import benchmark

benchmark("lines")
PAGE = benchmark("fidelity_page")
RUN = benchmark("fidelity")
TRUTHS = (0.80, 0.81, 0.82, 0.83, 0.84, 0.85)


def _line(plan: int, item: str, value: float, **more: object) -> object:
    """Return a line whose accuracy is `value`, and whose loss and divergence fall with it."""
    return replace(PAGE.Line(plan, item, value, 1 - value, 2 - value, seconds=1.0, params=100 + plan), **more)


def _lines() -> list:
    """Return six plans: the cut ranks them the wrong way, repair swaps two neighbours, 10 updates rank perfectly."""
    lines = [_line(-1, "original", 0.9, selection=0.88)]
    swapped = (0.1, 0.2, 0.4, 0.3, 0.5, 0.6)
    for plan, truth in enumerate(TRUTHS):
        lines += [
            _line(plan, "delete", -truth),
            _line(plan, "recalibration", 0.5),
            _line(plan, "least_squares", swapped[plan], seconds=2.0),
            _line(plan, "10", 10 * truth, seconds=5.0),
            _line(plan, "truth", 0.7 * truth, selection=truth, seconds=100.0),
        ]
    return [*lines, *(_line(plan, "truth again", 0.5, selection=TRUTHS[plan] + 0.05) for plan in (1, 3, 5))]


def test_rank_correlations_agree_with_hand_and_scipy() -> None:
    one, other = np.array([1.0, 2.0, 3.0, 4.0]), np.array([1.0, 3.0, 2.0, 4.0])
    assert PAGE.spearman(one, other) == pytest.approx(1 - 6 * 2 / (4 * 15))  # Σd² = 2
    assert PAGE.kendall(one, other) == pytest.approx((5 - 1) / 6)
    tied = np.array([1.0, 1.0, 2.0, 0.0])
    assert PAGE.spearman(one, tied) == pytest.approx(spearmanr(one, tied).statistic)
    assert PAGE.kendall(one, tied) == pytest.approx(kendalltau(one, tied).statistic)
    assert math.isnan(PAGE.spearman(one, np.ones(4)))
    assert math.isnan(PAGE.kendall(one, np.ones(4)))


def test_bootstrap_gives_the_interval_of_a_mean() -> None:
    values = np.random.default_rng(1).normal(size=400)
    found = PAGE.bootstrap(lambda places: float(values[places].mean()), 400)
    error = values.std() / 20  # standard error of the mean of 400
    assert found.value == values.mean()
    assert found.low == pytest.approx(values.mean() - 1.96 * error, abs=0.25 * error)
    assert found.high == pytest.approx(values.mean() + 1.96 * error, abs=0.25 * error)


def test_regret_is_the_truth_given_up_and_the_mean_of_equal_plans() -> None:
    truth = np.array([0.7, 0.9, 0.8])
    assert PAGE.regret(np.array([0.0, 2.0, 1.0]), truth) == 0
    assert PAGE.regret(np.array([3.0, 2.0, 1.0]), truth) == pytest.approx(0.2)
    assert PAGE.regret(np.array([3.0, 2.0, 3.0]), truth) == pytest.approx(0.9 - 0.75)


def test_noise_ignores_a_common_shift_and_gives_the_ceiling() -> None:
    truth = np.array([0.80, 0.82, 0.84, 0.86])
    still = PAGE.noise(truth, truth + 0.01, truth)
    assert (still.deviation, still.ceiling) == (pytest.approx(0, abs=1e-9), pytest.approx(1))
    noisy = PAGE.noise(truth, truth + np.array([0.02, 0.0, 0.02, 0.0]), truth)
    variance = 0.01**2 * 4 / 3 / 2  # of the differences, of which each truth has one half
    assert noisy.deviation == pytest.approx(variance**0.5)
    assert noisy.ceiling == pytest.approx((1 - variance / np.var(truth, ddof=1)) ** 0.5)
    assert noisy.ceiling_of_better_half == pytest.approx((1 - variance / 0.0002) ** 0.5)


def test_study_ranks_scores_and_less_loss_is_better() -> None:
    found = PAGE.study(_lines(), [10, 50])
    rows = {(row.item, row.measure): row for row in found.agreements}
    assert rows["delete", "accuracy"].spearman.value == pytest.approx(-1)
    assert rows["delete", "accuracy"].regret == pytest.approx(0.05)
    assert math.isnan(rows["recalibration", "accuracy"].spearman.value)  # says the same of all plans
    for measure in ("accuracy", "loss", "divergence"):
        assert rows["10", measure].spearman.value == pytest.approx(1)
    repaired = rows["least_squares", "accuracy"]
    assert repaired.spearman.value == pytest.approx(1 - 6 * 2 / (6 * 35))
    assert repaired.better_half.value == pytest.approx(1)
    assert rows["10", "accuracy"].gain.value == pytest.approx(1 - repaired.spearman.value)
    assert ("50", "accuracy") not in rows  # not measured
    assert found.uniform == TRUTHS[0]
    assert found.original == 0.88
    assert found.noise.pairs == 3


def test_recommended_is_the_cheapest_that_is_not_worse_beyond_chance() -> None:
    lines = _lines()
    rows = [row for row in PAGE.study(lines, [10]).agreements if row.item in ("delete", "least_squares", "10")]
    best, cheapest = PAGE.recommended(lines, [row for row in rows if row.measure == "accuracy"])
    assert best.item == "10"
    assert cheapest.item == "least_squares"  # delete costs less, but is worse whatever plans are drawn


def test_page_shows_the_figures_and_the_picture_is_small(tmp_path: Path) -> None:
    lines = _lines()
    header = {
        "name": "toy", "budget": 0.4, "unit": "macs", "updates": 400, "epochs": 0.0, "batch_size": 128,
        "learning_rate": 0.05, "distillation": 0.5,
    }  # fmt: skip
    found = PAGE.study(lines, [10])
    text = "\n".join(PAGE.page(found, lines, header))
    assert "6 plans at 40% of the MACs" in text
    assert "| cut: accuracy | 6 | -1.00 [-1.00, -1.00] | -1.00 [-1.00, -1.00] |" in text
    assert "10 updates: 1.00 [1.00, 1.00] (+0.06 against the search's own" in text
    assert "at 2 times its time" in text
    PAGE.picture(found, lines).savefig(tmp_path / "picture.png", dpi=80)
    assert 5_000 < (tmp_path / "picture.png").stat().st_size < 200_000


def test_jobs_leave_the_longest_short_training_to_the_end() -> None:
    work = RUN.jobs(plans=5, again=1, short=[200, 10])
    assert work[0] == (-1, "original")
    assert [item for plan, item in work if plan == 1] == [
        "delete", "recalibration", "least_squares", "10", "truth", "truth again", "200",
    ]  # fmt: skip
    assert [plan for plan, item in work if item == "truth again"] == [1]
    assert work[-6:] == [(plan, "200") for plan in range(6)]
    assert len(set(work)) == len(work)


def test_score_of_known_outputs() -> None:
    class Outputs(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return images[:, :, 0, 0]

    images = torch.tensor([[0.0, 0.0], [2.0, 0.0]]).reshape(2, 2, 1, 1)
    known = [torch.tensor([[0.5, 0.5], [0.5, 0.5]]).log()]
    line = RUN.score(Outputs(), [(images, torch.tensor([0, 1]))], known)
    right, wrong = math.log(1 + math.exp(-2)), math.log(1 + math.exp(2))
    assert line.accuracy == 0.5  # of two equal outputs the first counts
    assert line.loss == pytest.approx((math.log(2) + wrong) / 2)
    assert line.divergence == pytest.approx((0 + math.log(0.5) + 0.5 * (right + wrong)) / 2, abs=1e-6)


def test_remembered_teacher_looks_once_and_tells_images_apart() -> None:
    calls = []
    layer = nn.Linear(3, 2)
    layer.register_forward_hook(lambda *_: calls.append(1))
    teacher = RUN.RememberedTeacher(layer)
    first, second = torch.randn(4, 3), torch.randn(4, 3)
    with torch.no_grad():
        outputs = [teacher(images) for images in (first, second, first.clone())]
    assert len(calls) == 2
    assert torch.equal(outputs[0], outputs[2])
    assert torch.equal(outputs[1], layer(second).detach())


def test_torn_lines_are_dropped_and_other_settings_refused(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    line = _line(3, "truth", 0.5, selection=0.6, widths=(1, 2))
    path.write_text(json.dumps({"updates": 4}) + "\n" + json.dumps(asdict(line)) + "\n" + '{"plan": 4, "it')
    assert RUN.read_lines(path, {"updates": 4}) == [line]
    assert path.read_text().endswith("}\n")
    with pytest.raises(UserError, match=r"must hold figures of the same settings, but updates changed; name another"):
        RUN.read_lines(path, {"updates": 5})
    assert RUN.read_lines(tmp_path / "none", {}) == []


def test_run_goes_on_where_it_was_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines, table = tmp_path / "lines.jsonl", tmp_path / "fidelity.md"
    arguments = ["fidelity.py", "quickstart", "--lines", str(lines), "--table", str(table), "--updates", "2"]
    arguments += ["--plans", "4", "--again", "1", "--short", "1", "--task.training.updates", "20", "--threads", "1"]
    monkeypatch.setattr(sys, "argv", arguments)
    monkeypatch.setattr(PAGE, "RESAMPLES", 50)
    assert RUN.main() == 0
    whole = lines.read_text().splitlines(keepends=True)
    assert len(whole) == 1 + 1 + 5 * 5 + 1  # settings, the original, five items of five plans, one plan again
    first = [json.loads(text) for text in whole[1:]]
    assert {tuple(entry["widths"]) for entry in first if entry["plan"] == 2} != {
        tuple(entry["widths"]) for entry in first if entry["plan"] == 1
    }
    lines.write_text("".join(whole[:-3]))
    assert RUN.main() == 0
    again = [json.loads(text) for text in lines.read_text().splitlines()[1:]]
    timeless = [[{**entry, "seconds": 0} for entry in entries] for entries in (first, again)]
    assert timeless[0] == timeless[1]
    assert table.with_suffix(".png").is_file()
    assert len(json.loads(table.with_suffix(".json").read_text())["lines"]) == len(first)
    monkeypatch.setattr(RUN, "load_task", None)  # nothing is missing: the page needs no task
    assert RUN.main() == 0

"""The reward model against Gaussian-process formulas written out with NumPy."""

from typing import Any

import numpy as np
import pytest
from prunegym.agent.surrogate import OUTLIER_SPREADS, RewardModel
from sklearn.gaussian_process import GaussianProcessRegressor

INPUTS = 4


def plans(count: int, seed: int) -> np.ndarray:
    """Draw (count, 4) inputs: three kept shares and a budget."""
    rng = np.random.default_rng(seed)
    return RewardModel.features(rng.uniform(0.05, 1.0, (count, INPUTS - 1)), rng.choice([0.2, 0.4], count))


def smooth(features: np.ndarray) -> np.ndarray:
    """Return rewards between -1 and 1 with some that no smooth function explains."""
    rough = np.random.default_rng(len(features)).normal(0, 0.05, len(features))
    return np.sin(features[:, 0]) - 0.3 * np.cos(2 * features[:, 1]) + 0.1 * features[:, -1] + rough


@pytest.fixture(scope="module")
def fitted() -> tuple[RewardModel, np.ndarray, np.ndarray]:
    features = plans(30, 0)
    model = RewardModel(INPUTS)
    model.fit(features, smooth(features).tolist())
    return model, features, smooth(features)


def matern(first: np.ndarray, second: np.ndarray, theta: np.ndarray) -> np.ndarray:
    """Return Matérn 5/2 (Rasmussen, Williams, equation 4.17) with a length for each input."""
    scale, lengths = np.exp(theta[0]), np.exp(theta[1:-1])
    r = np.sqrt(5 * (((first[:, None] - second[None]) / lengths) ** 2).sum(2))
    return scale * (1 + r + r**2 / 3) * np.exp(-r)


def belief(model: RewardModel, features: np.ndarray, rewards: np.ndarray, wanted: np.ndarray) -> tuple[Any, Any]:
    """Return mean (plans,) and covariance (plans, plans) by equations 2.25 and 2.26, with the model's own lengths."""
    theta = model.state()["theta"].numpy()
    middle, spread, noise = rewards.mean(), rewards.std(), np.exp(theta[-1])
    inverse = np.linalg.inv(matern(features, features, theta) + noise * np.eye(len(features)))
    across = matern(wanted, features, theta)
    mean = middle + spread * across @ inverse @ ((rewards - middle) / spread)
    covariance = matern(wanted, wanted, theta) + noise * np.eye(len(wanted)) - across @ inverse @ across.T
    return mean, spread**2 * covariance


def test_inputs_by_hand() -> None:
    features = RewardModel.features(np.array([[1.0, np.exp(-2.0)]]), np.array([np.exp(-1.0)]))
    np.testing.assert_allclose(features, [[0.0, -2.0, -1.0]], atol=1e-15)


def test_the_mean_is_that_of_a_gaussian_process(fitted: Any) -> None:
    model, features, rewards = fitted
    wanted = plans(20, 1)
    np.testing.assert_allclose(model.mean(wanted), belief(model, features, rewards, wanted)[0], rtol=0, atol=1e-7)
    error = model.mean(wanted) - smooth(wanted)
    assert np.abs(error).mean() < 0.5 * smooth(wanted).std()  # the lengths were estimated, not left at 1


def test_draws_have_mean_and_covariance_of_the_belief(fitted: Any) -> None:
    model, features, rewards = fitted
    wanted = plans(5, 2)
    wanted[1] = wanted[0] + 0.01  # nearly the same plan: the two are drawn together
    count = 40_000
    draws = model.draws(wanted, count, seed=7)
    mean, covariance = belief(model, features, rewards, wanted)
    assert draws.shape == (5, count)
    spread = np.sqrt(np.diag(covariance))
    np.testing.assert_array_less(np.abs(draws.mean(1) - mean), 4 * spread / np.sqrt(count))
    # of Gaussians, an estimated covariance has variance (c_ij^2 + c_ii c_jj) / count
    error = np.sqrt((covariance**2 + np.outer(spread, spread) ** 2) / count)
    np.testing.assert_array_less(np.abs(np.cov(draws) - covariance), 4 * error)
    assert covariance[0, 1] > 4 * error[0, 1]
    np.testing.assert_array_equal(model.draws(wanted, 3, seed=7), model.draws(wanted, 3, seed=7))
    assert (model.draws(wanted, 3, seed=7) != model.draws(wanted, 3, seed=8)).all()


@pytest.mark.filterwarnings("ignore:The optimal value found:sklearn.exceptions.ConvergenceWarning")
@pytest.mark.parametrize("worst", [-50.0, -1e9, float("-inf"), float("nan")])
def test_however_bad_a_bad_plan_is_it_counts_as_one_at_the_bound(worst: float) -> None:
    features = plans(13, 3)
    rewards = np.linspace(-0.6, 0.6, 12)
    low, middle, high = np.percentile([*rewards, -50.0], (25, 50, 75))
    if not np.isfinite(worst):
        low, middle, high = np.percentile(rewards, (25, 50, 75))  # of those that are
    bounded = [*rewards, middle - OUTLIER_SPREADS * (high - low)]
    first, second = RewardModel(INPUTS), RewardModel(INPUTS)
    first.fit(features, [*rewards, worst])
    process = GaussianProcessRegressor(second._start(), normalize_y=True).fit(features, bounded)
    wanted = plans(6, 4)
    np.testing.assert_allclose(first.mean(wanted), process.predict(wanted), atol=1e-6)


def test_a_good_plan_is_not_clipped(fitted: Any) -> None:
    features = plans(13, 3)
    model = RewardModel(INPUTS)
    model.fit(features, [*np.linspace(-0.01, 0.01, 12), 5.0])
    assert model.draws(features[-1:], 200, seed=0).mean() > 1.0


@pytest.mark.parametrize("rewards", [[0.0] * 8, [0.3] * 8, [float("nan")] * 8])
def test_rewards_that_tell_nothing_are_survived(rewards: list[float]) -> None:
    model = RewardModel(INPUTS)
    model.fit(plans(8, 0), rewards)
    expected = rewards[0] if np.isfinite(rewards[0]) else 0.0
    np.testing.assert_allclose(model.mean(plans(5, 1)), expected, atol=1e-6)
    assert np.isfinite(model.draws(plans(5, 1), 4, seed=0)).all()


def test_lengths_are_estimated_again_when_plans_have_grown_by_half() -> None:
    features = plans(40, 5)
    rewards, model, known = smooth(features), RewardModel(INPUTS), []
    for count in (8, 11, 12, 17, 18, 26, 27):
        model.fit(features[:count], rewards[:count].tolist())
        known.append((model.state()["estimated_with"], model.state()["theta"].tolist()))
    assert [estimated for estimated, _ in known] == [8, 8, 12, 12, 18, 18, 27]
    thetas = [theta for _, theta in known]
    assert thetas[0] == thetas[1] != thetas[2]
    assert thetas[2] == thetas[3] != thetas[4] == thetas[5] != thetas[6]


def test_between_estimates_every_new_plan_counts() -> None:
    features = plans(11, 6)
    rewards, model = smooth(features), RewardModel(INPUTS)
    model.fit(features[:10], rewards[:10].tolist())
    before = model.mean(features[10:])
    model.fit(features, rewards.tolist())
    mean, _ = belief(model, features, rewards, features[10:])
    np.testing.assert_allclose(model.mean(features[10:]), mean, atol=1e-7)
    assert abs(model.mean(features[10:]) - rewards[10:]) < abs(before - rewards[10:])


def test_a_restored_model_predicts_bit_by_bit_the_same() -> None:
    features, wanted = plans(34, 8), plans(50, 9)
    rewards = smooth(features)
    model, other = RewardModel(INPUTS), RewardModel(INPUTS)
    assert not model.fitted
    for count in (20, 25):  # the lengths are those of twenty
        model.fit(features[:count], rewards[:count].tolist())
    other.restore(model.state())
    assert not other.fitted
    other.fit(features[:25], rewards[:25].tolist())
    for each in (25, 34):  # as it is, and after the next estimate
        for one in (model, other):
            one.fit(features[:each], rewards[:each].tolist())
        np.testing.assert_array_equal(model.mean(wanted), other.mean(wanted))
        np.testing.assert_array_equal(model.draws(wanted, 3, seed=1), other.draws(wanted, 3, seed=1))
    assert model.state()["estimated_with"] == other.state()["estimated_with"] == 34


def test_the_state_of_a_model_that_saw_nothing() -> None:
    model = RewardModel(INPUTS)
    model.restore(RewardModel(INPUTS).state())
    assert not model.fitted
    assert model.state() == {"theta": None, "estimated_with": 0}


def test_of_many_plans_the_best_and_the_last_decide_the_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prunegym.agent.surrogate.FITTED_ON", 20)
    features = plans(50, 10)
    rewards = np.random.default_rng(0).permutation(np.linspace(-1, 1, 50))
    model, few = RewardModel(INPUTS), RewardModel(INPUTS)
    model.fit(features, rewards.tolist())
    best = sorted(range(50), key=lambda place: -rewards[place])[:10]
    last = [place for place in range(50) if place not in best][-10:]
    few.fit(features[best + last], rewards[best + last].tolist())
    assert model.state()["theta"].tolist() == few.state()["theta"].tolist()
    mean, _ = belief(model, features, rewards, plans(5, 11))  # all fifty decide the prediction
    np.testing.assert_allclose(model.mean(plans(5, 11)), mean, atol=1e-7)

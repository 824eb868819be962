"""A policy for `SelectFilters-v0` that treats every filter alike, so that its size is that of one filter; its returns.

    filters (B, N, entries) -> codes (B, N, hidden) -> mean code (B, hidden) = context
    code, normalised over the filters, and context -> a keep logit for each filter (B, N);  context -> value (B, 1)

Try-and-learn (Huang et al. 2018) runs convolutions over the matrix of a layer's filters, with an output unit for each.
Ours shares one encoder: the number of parameters does not depend on the number of filters, and filters in another order
have the same logits in that order. What all filters of a layer have in common is taken off their codes: otherwise one
update moves all of them together, and the layer is dropped or kept whole before any filter is told from another.
"""

import math
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from numpy.typing import NDArray
from stable_baselines3.common.buffers import DictRolloutBuffer
from stable_baselines3.common.distributions import BernoulliDistribution
from stable_baselines3.common.policies import MultiInputActorCriticPolicy
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.type_aliases import Schedule
from torch import Tensor, nn

from ..pruning.errors import UserError

PADDING_LOGIT = -200.0
"""Padding is dropped with a probability of exactly 1 in float32: log-probability, entropy and gradient are 0."""

NEARLY_EQUAL = 1e-5
"""Added to the variance of codes over a layer's filters, so that filters that are all alike are not told apart."""


class DivergedError(UserError):
    """The policy's logits are not finite any more."""


class FilterEncoder(BaseFeaturesExtractor):
    """Encode each filter by itself: {"filters": (B, N, entries), "mask": (B, N)} -> (B, N, hidden + 1).

    The last feature is the mask; the code of padding is 0.

    Args:
        observation_space: Of `SelectFiltersEnv`.
        hidden: Length of a code, from 1.
    """

    def __init__(self, observation_space: gym.spaces.Dict, hidden: int = 64) -> None:
        super().__init__(observation_space, features_dim=hidden + 1)
        entries = observation_space["filters"].shape[1]  # type: ignore[index]
        self.encoder = nn.Sequential(
            nn.Linear(entries, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.Tanh()
        )  # not odd and not scaled away: a filter's size is part of its code, whatever its sign

    def forward(self, observations: dict[str, Tensor]) -> Tensor:
        """Return the codes, and the mask beside them."""
        mask = observations["mask"].float().unsqueeze(-1)  # (B, N) -> (B, N, 1)
        return torch.cat((self.encoder(observations["filters"]) * mask, mask), -1)


class FilterHeads(nn.Module):
    """What follows the encoder: (B, N, hidden + 1) -> keep logits (B, N) and the pooled code (B, hidden).

    Args:
        hidden: Length of a code.
    """

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.latent_dim_pi = 1  # logits already; the distribution's own layer is the identity
        self.latent_dim_vf = hidden
        self.first = nn.Linear(2 * hidden, hidden)
        self.last = nn.Linear(hidden, 1)

    def start_at(self, keep: float) -> None:
        """Give every filter the keep probability `keep`, in (0, 1), whatever its weights."""
        with torch.no_grad():
            self.last.weight.zero_()
            self.last.bias.fill_(math.log(keep / (1 - keep)))

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Return the inputs of the action distribution and of the value layer."""
        return self.forward_actor(features), self.forward_critic(features)

    def forward_actor(self, features: Tensor) -> Tensor:
        """Return (B, N) keep logits; those of padding are `PADDING_LOGIT`.

        Raises:
            DivergedError: A logit is not finite.
        """
        codes, mask = features[..., :-1], features[..., -1]
        there = mask.unsqueeze(-1)  # (B, N) -> (B, N, 1)
        context = self.forward_critic(features).unsqueeze(1)  # (B, hidden) -> (B, 1, hidden)
        apart = (codes - context) * there
        spread = (apart.square().sum(1, keepdim=True) / there.sum(1, keepdim=True).clamp(min=1) + NEARLY_EQUAL).sqrt()
        logits = self.last(torch.tanh(self.first(torch.cat((apart / spread, context.expand_as(codes)), -1)))).squeeze(
            -1
        )
        if not torch.isfinite(logits).all():
            raise DivergedError(
                "the policy's keep logits must stay finite, but they are not; lower its learning rate or the weight of "
                "its entropy"
            )
        return torch.where(mask > 0, logits, torch.full_like(logits, PADDING_LOGIT))

    def forward_critic(self, features: Tensor) -> Tensor:
        """Return (B, hidden) the mean code of the filters that are there."""
        return features[..., :-1].sum(1) / features[..., -1].sum(1, keepdim=True).clamp(min=1)


class FilterBernoulli(BernoulliDistribution):
    """Independent keep or drop of each filter; the logits come as they are, no layer is put before them."""

    def proba_distribution_net(self, latent_dim: int) -> nn.Module:
        """Return the identity: a linear layer would have a column for each filter."""
        return nn.Identity()


class FilterwisePolicy(MultiInputActorCriticPolicy):
    """Actor and critic for `SelectFiltersEnv`, for A2C and PPO.

    Args:
        observation_space: Of `SelectFiltersEnv`.
        action_space: `MultiBinary`, a number for each filter.
        lr_schedule: As Stable-Baselines3 gives it.
        hidden: Units of each layer, from 1.
        initial_keep: Keep probability of every filter before any training, in (0, 1).
        keywords: Further arguments of Stable-Baselines3's policies, such as `optimizer_class`.

    Raises:
        UserError: A value outside its range, or an action space of another kind.
    """

    def __init__(
        self,
        observation_space: gym.spaces.Dict,
        action_space: gym.spaces.Space,
        lr_schedule: Schedule,
        *,
        hidden: int = 64,
        initial_keep: float = 0.9,
        **keywords: Any,
    ) -> None:
        if hidden < 1 or not 0 < initial_keep < 1:
            raise UserError(
                f"hidden must be at least 1 and initial_keep in (0, 1), but got {hidden} and {initial_keep}"
            )
        if not isinstance(action_space, gym.spaces.MultiBinary):
            raise UserError(
                f"the action space must be MultiBinary, one number a filter, but got {action_space}; "
                "use prunegym/SelectFilters-v0"
            )
        self.hidden, self.initial_keep = hidden, initial_keep
        keywords["features_extractor_class"] = FilterEncoder
        keywords["features_extractor_kwargs"] = {"hidden": hidden}
        super().__init__(observation_space, action_space, lr_schedule, **keywords)

    def keep_probabilities(self, observation: dict[str, Any]) -> Tensor:
        """Return (N,) the keep probability of each filter of one observation, as `reset` gives it; 0 for padding."""
        tensors, _ = self.obs_to_tensor(observation)
        with torch.no_grad():
            return self.get_distribution(tensors).distribution.probs[0]  # type: ignore[union-attr]

    def _build_mlp_extractor(self) -> None:
        self.mlp_extractor = FilterHeads(self.hidden)  # type: ignore[assignment]

    def _build(self, lr_schedule: Schedule) -> None:
        self.action_dist = FilterBernoulli(int(self.action_space.n))  # type: ignore[attr-defined]
        super()._build(lr_schedule)
        self.mlp_extractor.start_at(self.initial_keep)  # type: ignore[operator]  # after the orthogonal initialisation

    def _get_constructor_parameters(self) -> dict[str, Any]:
        return {**super()._get_constructor_parameters(), "hidden": self.hidden, "initial_keep": self.initial_keep}


class NormalisedReturns(DictRolloutBuffer):
    """Advantages are the returns of one update, with mean 0 and standard deviation 1; 0 where all are equal.

    A2C would divide by the standard deviation + 1e-8 in float32: of equal returns it makes noise of any sign and of
    size 1, from the rounding of their mean. No value function is subtracted: all samples of an update see the same
    filters, so that its share would be the same constant for each, and normalising takes a constant off.
    """

    def compute_returns_and_advantage(self, last_values: Tensor, dones: NDArray[np.bool_]) -> None:
        """Fill `returns` and `advantages`; every sample is an episode of one step."""
        returns = self.rewards.astype(np.float64)
        spread = float(returns.std(ddof=1))
        self.returns = self.rewards.copy()
        self.advantages = np.zeros_like(self.rewards)
        if spread > 1e-6 * float(np.abs(returns).max()):
            self.advantages = ((returns - returns.mean()) / spread).astype(np.float32)

"""The question asked: Gymnasium environments around `prunegym.pruning`. Importing registers them."""

import gymnasium as gym

from .observation import FEATURES
from .reward import RewardSettings
from .trim import TrimEnv, TrimSettings

TRIM = "prunegym/Trim-v0"

if TRIM not in gym.registry:
    gym.register(id=TRIM, entry_point="prunegym.envs.trim:TrimEnv")

__all__ = ["FEATURES", "TRIM", "RewardSettings", "TrimEnv", "TrimSettings"]

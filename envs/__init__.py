"""The question asked: Gymnasium environments around `prunegym.pruning`. Importing registers them."""

import gymnasium as gym

from .observation import FEATURES
from .reward import RewardSettings
from .select import SelectFiltersEnv, SelectSettings
from .trim import TrimEnv
from .trim_settings import TrimSettings

TRIM = "prunegym/Trim-v0"
SELECT_FILTERS = "prunegym/SelectFilters-v0"

if TRIM not in gym.registry:
    gym.register(id=TRIM, entry_point="prunegym.envs.trim:TrimEnv")
if SELECT_FILTERS not in gym.registry:
    gym.register(id=SELECT_FILTERS, entry_point="prunegym.envs.select:SelectFiltersEnv")

__all__ = [
    "FEATURES",
    "SELECT_FILTERS",
    "TRIM",
    "RewardSettings",
    "SelectFiltersEnv",
    "SelectSettings",
    "TrimEnv",
    "TrimSettings",
]

"""What is true of a network: groups, statistics, plans, surgery, repair, retraining, cost. No word of RL."""

from .architecture import Architecture
from .budget import solve_counts
from .compensation import COMPENSATIONS, compensate
from .cost import Cost, CostModel, count_cost
from .criteria import CRITERIA, RankingContext, normalised_scores, rank_channels
from .data import DataSplits, SplitSettings, load_data
from .errors import UserError
from .evaluation import Score, evaluate
from .grouping import find_groups, survey_groups
from .groups import ChannelGroup, shrink_groups
from .latency import Latency, measure_latency
from .networks import build_architecture, build_network, network_names
from .optimizer_state import OptimizerState, carry_optimizer, slice_state
from .oracle import Correlation, OracleLoss, oracle, rank_correlation
from .plan import PruningPlan
from .prepare import TaskSettings, prepare_task
from .recalibration import recalibrate
from .repair_settings import RepairSettings
from .retraining import RetrainSettings, retrain
from .schedule import Built, Round, Schedule, build
from .score_cache import ScoreCache
from .statistics import Statistics, measure
from .subject import Subject
from .surgery import SurgeryError, apply_plan, masked_copy, verify_cut
from .task import PruningTask
from .trimmed import Evaluated, ScoreStore, Trimmed
from .trimmer import Trimmer
from .widths import AllowedWidths, GroupSettings

__all__ = [
    "COMPENSATIONS",
    "CRITERIA",
    "AllowedWidths",
    "Architecture",
    "Built",
    "ChannelGroup",
    "Correlation",
    "Cost",
    "CostModel",
    "DataSplits",
    "Evaluated",
    "GroupSettings",
    "Latency",
    "OptimizerState",
    "OracleLoss",
    "PruningPlan",
    "PruningTask",
    "RankingContext",
    "RepairSettings",
    "RetrainSettings",
    "Round",
    "Schedule",
    "Score",
    "ScoreCache",
    "ScoreStore",
    "SplitSettings",
    "Statistics",
    "Subject",
    "SurgeryError",
    "TaskSettings",
    "Trimmed",
    "Trimmer",
    "UserError",
    "apply_plan",
    "build",
    "build_architecture",
    "build_network",
    "carry_optimizer",
    "compensate",
    "count_cost",
    "evaluate",
    "find_groups",
    "load_data",
    "masked_copy",
    "measure",
    "measure_latency",
    "network_names",
    "normalised_scores",
    "oracle",
    "prepare_task",
    "rank_channels",
    "rank_correlation",
    "recalibrate",
    "retrain",
    "shrink_groups",
    "slice_state",
    "solve_counts",
    "survey_groups",
    "verify_cut",
]

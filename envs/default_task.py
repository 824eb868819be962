"""The task behind `gym.make("prunegym/Trim-v0")`: real digits and a small LeNet, ready in seconds."""

from functools import cache

from ..pruning.data import SplitSettings
from ..pruning.prepare import TaskSettings, prepare_task
from ..pruning.retraining import RetrainSettings
from ..pruning.task import PruningTask

DEFAULT_TASK = TaskSettings(
    network="lenet_small",
    data="digits",
    splits=SplitSettings(reward=300, selection=200),
    training=RetrainSettings(updates=200, batch_size=64, learning_rate=0.05, schedule="one_cycle"),
)


@cache
def default_task() -> PruningTask:
    """Return the embedded digits task (1,797 images, nothing is downloaded); its network is trained once and kept."""
    return prepare_task(DEFAULT_TASK, seed=0)

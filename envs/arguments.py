"""What both environments are made of, checked in one way."""

from ..pruning.checks import check_kind
from ..pruning.errors import UserError
from ..pruning.repair_settings import RepairSettings
from ..pruning.task import PruningTask
from ..pruning.trimmer import Trimmer
from ..pruning.widths import GroupSettings
from .default_task import default_task


def make_trimmer(
    task: PruningTask | None, trimmer: Trimmer | None, repair: RepairSettings, groups: GroupSettings, where: str
) -> Trimmer:
    """Return the trimmer that is shared, or one for the task, the default task where neither is given.

    Args:
        task: What is pruned.
        trimmer: Of another environment; its task is then this environment's.
        repair: The environment's settings.
        groups: The environment's settings.
        where: The environment, for errors.

    Raises:
        UserError: Something else than a task or a trimmer, or a shared trimmer of another task or with other settings.
    """
    if task is not None:
        check_kind(task, PruningTask, where)
    if trimmer is None:
        return Trimmer(default_task() if task is None else task, repair, groups)
    check_kind(trimmer, Trimmer, where)
    if task is not None and task is not trimmer.task:
        raise UserError(
            "a shared trimmer must be of the environment's task, but it is of another; give one of the two, or "
            "task=trimmer.task"
        )
    if trimmer.settings != repair:
        raise UserError("a shared trimmer must have the environment's repair settings, but they differ")
    if trimmer.group_settings != groups:
        raise UserError("a shared trimmer must have the environment's group settings, but they differ")
    return trimmer

"""Every method by name, with one sentence and its paper; the learned search is compared with these."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import nn

from ..pruning.cost import CostModel
from ..pruning.errors import UserError, closest
from ..pruning.groups import ChannelGroup
from ..pruning.heuristics import (
    Goal,
    Pruned,
    RankingSettings,
    check_floor,
    check_mergeable,
    check_reach,
    check_rectified,
    check_serves,
    check_targets,
    data_free,
    network_trimming,
    rank_and_cut,
)
from ..pruning.retraining import RetrainSettings
from ..pruning.trimmer import Trimmer
from .amc import amc, check_amc
from .settings import MethodSettings
from .try_and_learn import check_layers, try_and_learn

PUBLISHED = "delete"
"""The repair of most published methods: none."""


@dataclass(frozen=True, eq=False)
class Request:
    """What a method gets.

    Attributes:
        trimmer: Task and settings; the compensation is the one asked for.
        goal: Where to end.
        methods: How each method proceeds.
        retraining: Total over all rounds.
        seed: Of the retraining and of whatever else is drawn; derived from the root seed.
        progress: Called with the number of optimizer steps done so far, or None.
        evaluated: Called with the number of networks that a learning method has scored so far, or None.
    """

    trimmer: Trimmer
    goal: Goal
    methods: MethodSettings
    retraining: RetrainSettings
    seed: int
    progress: Callable[[int], None] | None = None
    evaluated: Callable[[int], None] | None = None


@dataclass(frozen=True, eq=False)
class Prospect:
    """What is known before anything is trained or measured.

    Attributes:
        network: Its weights do not matter.
        groups: Its channel groups.
        model: Its cost.
        goal: Where to end.
        methods: How each method proceeds.
    """

    network: nn.Module
    groups: Sequence[ChannelGroup]
    model: CostModel
    goal: Goal
    methods: MethodSettings


@dataclass(frozen=True)
class Method:
    """A way to make plans.

    Attributes:
        name: As typed by users.
        description: One sentence.
        source: The paper.
        run: Makes the plans.
        compensation: Repair after a cut, as published.
        check: Refuses, before anything is trained or measured, a network that the method cannot serve, and a goal that
            is out of its reach.
        needs_data: Whether the plans depend on data; one that needs none leaves the batch norm alone, too.
    """

    name: str
    description: str
    source: str
    run: Callable[[Request], Pruned]
    check: Callable[[Prospect], None]
    compensation: str = PUBLISHED
    needs_data: bool = True


def _network_trimming(request: Request) -> Pruned:
    return network_trimming(
        request.trimmer, request.goal, request.methods.network_trimming,
        retraining=request.retraining, seed=request.seed, progress=request.progress,
    )  # fmt: skip


def _data_free(request: Request) -> Pruned:
    return data_free(
        request.trimmer, request.goal, request.methods.data_free,
        retraining=request.retraining, seed=request.seed, progress=request.progress,
    )  # fmt: skip


def _try_and_learn(request: Request) -> Pruned:
    return try_and_learn(
        request.trimmer, request.goal, request.methods.try_and_learn, retraining=request.retraining,
        seed=request.seed, progress=request.progress, evaluated=request.evaluated,
    )  # fmt: skip


def _amc(request: Request) -> Pruned:
    return amc(
        request.trimmer, request.goal, request.methods.amc, retraining=request.retraining,
        seed=request.seed, progress=request.progress, evaluated=request.evaluated,
    )  # fmt: skip


def _ranking(criterion: str) -> Callable[[Request], Pruned]:
    def run(request: Request) -> Pruned:
        return rank_and_cut(
            request.trimmer, request.goal, _ranking_settings(criterion, request.methods), criterion=criterion,
            retraining=request.retraining, seed=request.seed, progress=request.progress,
        )  # fmt: skip

    return run


def _check_ranking(criterion: str) -> Callable[[Prospect], None]:
    def check(prospect: Prospect) -> None:
        check_serves(prospect.groups, criterion)
        check_floor(prospect.model, prospect.goal, _ranking_settings(criterion, prospect.methods))

    return check


def _ranking_settings(criterion: str, methods: MethodSettings) -> RankingSettings:
    return methods.taylor if criterion.startswith("taylor") else methods.ranking


def _check_rectified(prospect: Prospect) -> None:
    check_rectified(prospect.groups)
    check_targets(prospect.model, prospect.groups, prospect.goal, prospect.methods.network_trimming)


def _check_mergeable(prospect: Prospect) -> None:
    own = prospect.methods.data_free
    check_mergeable(prospect.network, prospect.groups, own)
    check_reach(prospect.model, prospect.network, prospect.groups, prospect.goal, own)


def _check_layers(prospect: Prospect) -> None:
    check_layers(prospect.model, prospect.groups, prospect.goal, prospect.methods.try_and_learn)


def _check_amc(prospect: Prospect) -> None:
    check_amc(prospect.model, prospect.goal, prospect.methods.amc)


def _by_rank(criterion: str, description: str, source: str, compensation: str = PUBLISHED) -> Method:
    return Method(criterion, description, source, _ranking(criterion), _check_ranking(criterion), compensation)


METHODS: dict[str, Method] = {
    record.name: record
    for record in (
        Method(
            "network_trimming",
            "channels whose APoZ lies over one standard deviation above their layer's mean leave, round after round",
            "Hu, Peng, Tai, Tang 2016, arXiv 1607.03250",
            _network_trimming,
            _check_rectified,
        ),
        Method(
            "data_free",
            "nearly equal neurons are merged, in an order that the weights alone decide",
            "Srinivas, Babu 2015, arXiv 1507.06149",
            _data_free,
            _check_mergeable,
            compensation="data_free",
            needs_data=False,
        ),
        _by_rank(
            "taylor_2017",
            "the channels of least |gradient × activation| leave, a few at a time, with updates in between",
            "Molchanov, Tyree, Karras, Aila, Kautz 2017, arXiv 1611.06440",
        ),
        _by_rank(
            "taylor_2019",
            "the same with the squared gradient of a gate, not normalised by layer",
            "Molchanov, Mallya, Tyree, Frosio, Kautz 2019, arXiv 1906.10771",
        ),
        _by_rank(
            "l1",
            "the channels of smallest sum of absolute weights leave",
            "Li, Kadav, Durdanovic, Samet, Graf 2017, arXiv 1608.08710",
        ),
        _by_rank("l2", "the channels of smallest Euclidean weight norm leave", "widely used"),
        _by_rank(
            "mean_activation",
            "the channels of smallest mean activation leave",
            "compared in Molchanov et al. 2017, arXiv 1611.06440",
        ),
        _by_rank(
            "apoz",
            "the channels with the most zeros leave, at once, without the threshold of Network Trimming",
            "criterion of Hu et al. 2016, arXiv 1607.03250",
        ),
        _by_rank(
            "bn_scale",
            "the channels of smallest batch norm scale leave",
            "Liu, Li, Shen, Huang, Yan, Zhang 2017, arXiv 1708.06519",
        ),
        _by_rank(
            "least_squares",
            "the channels that the next layers miss least after a least-squares repair leave",
            "ours",
            "least_squares",
        ),
        Method(
            "try_and_learn",
            "for each layer a policy looks at its filters and learns by trying which can go; the reward is ψ · φ",
            "Huang, Zhou, You, Neumann 2018, arXiv 1801.07365",
            _try_and_learn,
            _check_layers,
        ),
        Method(
            "amc",
            "a DDPG agent walks the layers and says how much of each stays",
            "He, Lin, Liu, Wang, Li, Han 2018, arXiv 1802.03494",
            _amc,
            _check_amc,
            compensation="least_squares",
        ),
        _by_rank("random", "channels leave at random: the control", "a control"),
    )
}


def get_method(name: str) -> Method:
    """Return the method called `name`.

    Raises:
        UserError: Unknown name; the nearest one is named.
    """
    if name not in METHODS:
        raise UserError(f"method must be a known name, but got {name!r}{closest(name, METHODS)}")
    return METHODS[name]

"""Repair by the merges of data-free pruning (Srinivas & Babu 2015); `saliency` says what is published and what ours."""

from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
import torch
from torch import nn

from .affine import Stage, activation_of, compare, nonzero, norms_behind
from .groups import ChannelGroup
from .merging import StandIns, Substitution, constants, for_readers
from .saliency import NOBODY, MergeSequence, merge_problem, merge_sequence


def data_free_substitutions(
    network: nn.Module, groups: Sequence[ChannelGroup], plan: Mapping[str, Sequence[int]], *, bias: bool = True
) -> dict[str, list[Substitution]]:
    """Merge the channels that leave in the order of their saliency, and say where every chain of merges ends.

    With the plan that the same order chose this is the published procedure, step by step.

    Args:
        network: The network before the cut.
        groups: Its groups.
        plan: Channels that stay; every group named.
        bias: See `merge_problem`.

    Returns:
        layer that lost inputs -> one substitution for each group it read.
    """
    result: dict[str, list[Substitution]] = {}
    for group in groups:
        leaves = np.flatnonzero(group.leaving(plan[group.name]))
        if not len(leaves):
            continue
        sequence = merge_sequence(merge_problem(network, group, bias=bias), allowed=leaves)
        choose = partial(_stand_ins, group=group, sequence=sequence)
        norm_of = norms_behind(network, [group])
        for reader, substitution in for_readers(network, group, norm_of, sequence.removed, choose):
            result.setdefault(reader, []).append(substitution)
    return result


def _stand_ins(stages: Sequence[Stage], group: ChannelGroup, sequence: MergeSequence) -> StandIns:
    """Return (removed,) channel at the end of the chain, α_j/α of it, and the constant."""
    ends = sequence.ends()
    source = np.where(ends == NOBODY, 0, ends)
    if not stages:
        return source, np.zeros(len(ends)), np.zeros(len(ends))
    pairs = compare(stages, group.width)
    gone, stay, merged = torch.from_numpy(sequence.removed), torch.from_numpy(source), torch.from_numpy(ends != NOBODY)
    ratio = torch.where(merged, pairs.alpha[gone] / nonzero(pairs.alpha[stay]), 0.0)
    ratio = torch.where(pairs.alpha[stay] == 0, 0.0, ratio)
    likeness = torch.where(ratio > 0, pairs.cosine[gone, stay].clamp(0, 1), 0.0)
    constant = constants(stages[-1], activation_of(group), gone, stay, ratio, likeness, pairs.still[gone])
    return source, ratio.numpy(), constant.numpy()

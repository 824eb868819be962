"""Find the channel groups of a network.

Torch-Pruning's dependency graph is asked once (`depgraph`), and independently channels are followed through one forward
pass by labels (`label_groups`). The graph's answer is taken where the labels confirm it, else that of the labels, which
refuse what they do not understand. Either is compiled to the plain index maps of `groups`, and only what survives a
trial cut is offered.
"""

import warnings
from collections.abc import Sequence
from fnmatch import fnmatchcase

import numpy as np
import torch
from torch import Tensor, nn

from .comparing import check_repeatable
from .copying import copy_network
from .depgraph import graph_drafts
from .drafts import CONVOLUTIONS, Draft, finish_all
from .errors import UserError, closest
from .groups import ChannelGroup, GroupSurvey, RefusedGroup
from .label_groups import label_drafts
from .plan import PruningPlan
from .surgery import SurgeryError, apply_plan, named_tensors, verify_cut
from .tracing import Trace, trace_forward

TRIAL_TOLERANCE = 1e-3  # a wrong index map changes outputs by far more, rounding by far less
Found = list[ChannelGroup | RefusedGroup]


def find_groups(
    network: nn.Module, example_input: Tensor, *, include: Sequence[str] = (), ignore: Sequence[str] = ()
) -> tuple[ChannelGroup, ...]:
    """Find the prunable channel groups of a network, from input to output.

    Args:
        network: Any traceable network; it is examined on a copy and comes back untouched.
        example_input: (N, C, H, W) or whatever `network` takes; values do not matter.
        include: Patterns such as "layer3.*"; only groups with a producer that matches one are cut. Empty = all.
        ignore: Patterns; a group with a producer that matches one is left whole.

    Returns:
        The groups that can be cut, in order of execution. The output layer is never among them;
        `survey_groups` tells what was refused and why.

    Raises:
        UserError: The network cannot be copied, run or traced, it does not give the same output twice, nothing in it
            can be cut, or a pattern matches nothing.
    """
    survey = survey_groups(network, example_input, include=include, ignore=ignore)
    if not survey.groups:
        reasons = "; ".join(f"{item.name}: {item.reason}" for item in survey.refused) or "no layer with channels"
        raise UserError(f"a network needs at least one prunable channel group, but none was found ({reasons})")
    return survey.groups


def survey_groups(
    network: nn.Module, example_input: Tensor, *, include: Sequence[str] = (), ignore: Sequence[str] = ()
) -> GroupSurvey:
    """Find every channel group, prunable or not. Arguments as for `find_groups`."""
    devices = [example_input.device] if example_input.is_cuda else []
    with torch.inference_mode(False), torch.random.fork_rng(devices):  # a traced graph is needed, random numbers not
        return _survey(network, example_input, include, ignore)


def _survey(network: nn.Module, example_input: Tensor, include: Sequence[str], ignore: Sequence[str]) -> GroupSurvey:
    work = copy_network(network).eval()
    trial = copy_network(work, {id(tensor): tensor for tensor in named_tensors(work).values()})  # shares all tensors
    for parameter in work.parameters():
        parameter.requires_grad_(parameter.is_floating_point() or parameter.is_complex())
    example_input = example_input.detach().clone()  # a network may begin with an in-place operation
    trace = trace_forward(work, example_input.clone())
    inputs = _trial_input(trial, example_input)
    labelled = _finished(work, label_drafts(work, example_input, trace), trace, include, ignore)
    # on windows and attention by plain functions, as in Swin and MaxViT, the graph would work for many minutes
    graph = None if trace.beyond_graph else _by_graph(work, example_input, trace, include, ignore)
    if graph is not None and _outline(graph) != _outline(labelled):
        graph = None
    if inputs is None:
        warnings.warn(
            "the network's outputs are not finite, so that its channel groups could not be proved by a trial cut; "
            "give an example input on which they are, and verify each cut",
            UserWarning,
            stacklevel=4,
        )
        found = labelled if graph is None else graph
    elif graph is not None and not _wrong(trial, _groups(graph), inputs):
        found = graph
    else:
        found = _proved(trial, labelled, inputs)
    reason = "a function uses this parameter as weights; put it into a layer to have its channels followed"
    bare = [RefusedGroup(name, width, reason) for name, width in trace.bare.items()]
    return GroupSurvey(
        groups=tuple(_groups(found)),
        refused=(*(group for group in found if isinstance(group, RefusedGroup)), *bare),
    )


def _by_graph(
    network: nn.Module, example_input: Tensor, trace: Trace, include: Sequence[str], ignore: Sequence[str]
) -> Found | None:
    """Return the graph's groups; None where it fails."""
    try:
        drafts = graph_drafts(network, example_input, trace)
    except Exception:  # a graph library may fail in any way on code it does not foresee
        return None
    return _finished(network, drafts, trace, include, ignore)


def _outline(found: Found) -> set[tuple[frozenset[str], int]]:
    """Return producers and width of every group that can be cut."""
    return {(frozenset(group.producers), group.width) for group in _groups(found)}


def _groups(found: Found) -> list[ChannelGroup]:
    """Return the groups that can be cut."""
    return [group for group in found if isinstance(group, ChannelGroup)]


def _finished(
    network: nn.Module, drafts: list[Draft], trace: Trace, include: Sequence[str], ignore: Sequence[str]
) -> Found:
    """Turn drafts into groups in order of execution; layers that no draft speaks of are refused, not forgotten."""
    told = {name for draft in drafts for name in draft.layers}
    for name, module in network.named_modules():
        if isinstance(module, (*CONVOLUTIONS, nn.Linear)) and name not in told:
            draft = Draft(trace)
            draft.producers[name] = module
            draft.width = int(getattr(module, "out_channels", getattr(module, "out_features", 0)))
            unknown = "the use of its channels could not be followed"
            draft.refuse(unknown if name in trace.order else "it is not called in the forward pass")
            drafts.append(draft)
    _select(drafts, include, ignore)
    drafts.sort(key=lambda draft: draft.position)
    return finish_all(drafts, trace)


def _trial_input(network: nn.Module, example_input: Tensor) -> Tensor | None:
    """Return random values of the example's shape: zeros, say, would hide a wrong cut.

    The example itself where random values make outputs that are not finite; None where it does so too.

    Raises:
        UserError: The network does not give the same output twice.
    """
    choices = [example_input]
    if example_input.is_floating_point():
        draw = torch.randn(example_input.shape, generator=torch.Generator().manual_seed(0))
        choices.insert(0, draw.to(example_input))
    for inputs in choices:
        outputs = check_repeatable(network, inputs, TRIAL_TOLERANCE)
        if all(bool(torch.isfinite(output).all()) for output in outputs):
            return inputs
    return None


def _wrong(network: nn.Module, groups: Sequence[ChannelGroup], inputs: Tensor) -> str:
    """Cut groups on trial and compare with the mask; return what went wrong, or nothing.

    Two plans: the first half of every group stays (a split by run-time sizes would then lose channels of one piece
    only), and a random half.
    """
    if not groups:
        return ""
    rng = np.random.default_rng(0)
    first = {group.name: range(max(1, group.width // 2)) for group in groups}
    half = {group.name: rng.permutation(group.width)[: max(1, group.width // 2)].tolist() for group in groups}
    tolerance = 1e-8 if inputs.dtype == torch.float64 else TRIAL_TOLERANCE
    for plan in (PruningPlan(first), PruningPlan(half)):
        try:
            smaller = apply_plan(network, groups, plan)
            verify_cut(network, smaller, groups, plan, inputs, tolerance=tolerance)
        except (SurgeryError, UserError, RuntimeError, IndexError, ValueError) as error:
            return str(error).split("\n")[0]
    return ""


def _proved(network: nn.Module, found: Found, inputs: Tensor) -> Found:
    """Refuse groups that fail a trial cut, mostly for arithmetic on sizes in the network's own code.

    Only where all together fail are they tried in halves, quarters, and so on, down to the ones that fail.
    """
    groups = _groups(found)
    # what fails is mostly what much depends on; side by side in this order, it is found with few trials
    groups.sort(key=lambda group: len(group.producers) + len(group.consumers), reverse=True)
    failing = _failing(network, groups, inputs)
    left = [group for group in groups if group.name not in failing]
    if failing and (problem := _wrong(network, left, inputs)):
        raise UserError(f"the groups of this network can only be cut one by one, which is not supported: {problem}")
    return [
        RefusedGroup(group.name, group.width, f"a trial cut went wrong: {failing[group.name]}")
        if isinstance(group, ChannelGroup) and group.name in failing
        else group
        for group in found
    ]


def _failing(network: nn.Module, groups: Sequence[ChannelGroup], inputs: Tensor) -> dict[str, str]:
    """Return which groups fail a trial cut of their own, and how."""
    problem = _wrong(network, groups, inputs)
    if not problem:
        return {}
    if len(groups) == 1:
        return {groups[0].name: problem}
    middle = len(groups) // 2
    return _failing(network, groups[:middle], inputs) | _failing(network, groups[middle:], inputs)


def _select(drafts: Sequence[Draft], include: Sequence[str], ignore: Sequence[str]) -> None:
    """Refuse what the user's patterns leave out; a pattern that matches no producer is an error."""
    known = [name for draft in drafts for name in draft.layers]
    for pattern in (*include, *ignore):
        if not any(fnmatchcase(name, pattern) for name in known):
            hint = closest(pattern, known)
            raise UserError(f"include and ignore must match a layer with channels, but {pattern!r} matches none{hint}")
    for draft in drafts:
        hit = next((p for p in ignore if any(fnmatchcase(name, p) for name in draft.layers)), None)
        if hit is not None:
            draft.refuse(f"left alone: matches ignore pattern {hit!r}")
        elif include and not any(fnmatchcase(name, p) for name in draft.layers for p in include):
            draft.refuse("left alone: matches no include pattern")

"""Cut every torchvision classifier at 60 % and 30 % with random plans, check each cut against the masked network.

    python benchmarks/zoo.py --table docs/results/zoo.md

Weights and inputs are random (structure only). A network that cannot be cut is listed with its reason.
"""

import argparse
import os
import re
import shlex
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from prunegym.pruning import ChannelGroup, PruningPlan, UserError, apply_plan, build_network, survey_groups
from prunegym.pruning.surgery import SurgeryError
from prunegym.pruning.torchvision_compat import torchvision
from torch import nn

KEEPS = (0.6, 0.3)
SIDES = {"inception_v3": 96, "vit_h_14": 56, "maxvit_t": 224}  # 64 pixels elsewhere
SIZED = ("vit", "maxvit")  # networks that are built for one size of image
SHORT = {  # beginning of a reason -> how the table says it
    "its channels are the network's outputs": "output layer protected",
    "its channels are the network's inputs": "reads the input channel by channel",
    "it is not called in the forward pass": "layer not called as a module",
    "all its channels are tied together": "tied together by shuffles",
    "its layer is not run: a function takes the layer's weight": "read by attention",
    "attention": "part of attention",
    "getitem is not": "part of attention",  # Swin V2 looks up a network's output as bias of its attention
    "a trial cut went wrong": "fixed to other sizes by the network's code",
}


@dataclass(frozen=True)
class Row:
    """What was found about one network.

    Attributes:
        network: Its name.
        parameters: Number of parameters; 0 where it was not built.
        groups: Prunable groups.
        refused: Reasons of the groups that are left whole, with their numbers.
        prunable: Share of the parameters that belong to a channel of a prunable group, in [0, 1].
        seconds: Time to find the groups.
        verdict: "equal to the masked network", "nothing to cut", or "unsupported: ...", "skipped: ...", "WRONG: ...".
    """

    network: str
    parameters: int
    groups: int = 0
    refused: tuple[tuple[str, int], ...] = ()
    prunable: float = 0.0
    seconds: float = 0.0
    verdict: str = ""

    @property
    def cells(self) -> tuple[str, ...]:
        """Return the row of the table."""
        reasons = "; ".join(f"{count} × {reason}" if count > 1 else reason for reason, count in self.refused)
        millions = f"{self.parameters / 1e6:.1f} M"
        if not self.groups:
            return (self.network, millions, "", "", self.verdict, "", reasons)
        whole = self.groups + sum(count for _, count in self.refused)
        share, seconds = f"{self.prunable:.0%}", f"{self.seconds:.1f}"
        return (self.network, millions, f"{self.groups} of {whole}", share, self.verdict, seconds, reasons)


HEADER = ("network", "parameters", "groups", "prunable", "verified", "seconds", "left whole")


def classifiers() -> list[str]:
    """Return the names of torchvision's classification networks."""
    return list(torchvision.models.list_models(module=torchvision.models))


def main() -> int:
    """Walk the networks and write the table; exit code 1 if any cut is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", help="names; all torchvision classifiers by default")
    parser.add_argument("--table", help="Markdown file to write")
    parser.add_argument("--largest", type=float, default=150.0, help="skip networks of more million parameters")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for name in options.networks or classifiers():
        rows.append(examine(name, options.largest))
        print(" | ".join(rows[-1].cells), flush=True)
    if options.table:
        command = shlex.join(["python", "benchmarks/zoo.py", *sys.argv[1:]])
        Path(options.table).write_text(page(rows, command))
    return 1 if any(row.verdict.startswith("WRONG") for row in rows) else 0


def examine(name: str, largest: float = 150.0) -> Row:
    """Find the groups of a network, cut it at 60 % and 30 % with random plans and verify each cut.

    Args:
        name: One of `classifiers()`.
        largest: Networks of more million parameters are skipped.

    Returns:
        What was found; nothing is raised for a network that cannot be cut, or is cut wrong.
    """
    side = SIDES.get(name, 64)
    known = next(iter(torchvision.models.get_model_weights(name))).meta["num_params"]
    if known > largest * 1e6:
        return Row(name, known, verdict=f"skipped: more than {largest:g} M parameters")
    network = build_network(name, classes=10, image_size=side if name.startswith(SIZED) else None, seed=0)
    randomise_norms(network.eval())
    size = sum(parameter.numel() for parameter in network.parameters())
    inputs = torch.randn((2, 3, side, side), generator=torch.Generator().manual_seed(0))
    start = time.perf_counter()
    try:
        survey = survey_groups(network, inputs)
    except UserError as error:
        return Row(name, size, verdict="unsupported: " + re.sub(r"\s+", " ", str(error)))
    seconds = time.perf_counter() - start
    refused = tuple(Counter(shortened(group.reason) for group in survey.refused).items())
    verdict = "equal to the masked network" if survey.groups else "nothing to cut"
    for keep in KEEPS if survey.groups else ():
        try:
            apply_plan(network, survey.groups, random_plan(survey.groups, keep), verify=inputs)
        except SurgeryError as error:
            verdict = f"WRONG: {error}"
    return Row(name, size, len(survey.groups), refused, prunable_share(network, survey.groups), seconds, verdict)


def shortened(reason: str) -> str:
    """Return a reason in a few words."""
    return next((short for start, short in SHORT.items() if reason.startswith(start)), reason)


def random_plan(groups: Sequence[ChannelGroup], keep: float) -> PruningPlan:
    """Keep a random set of channels of each group, a share `keep` in (0, 1] of them and at least one."""
    rng = np.random.default_rng(0)
    return PruningPlan(
        {group.name: rng.choice(group.width, max(1, int(group.width * keep)), replace=False) for group in groups}
    )


def prunable_share(network: nn.Module, groups: Sequence[ChannelGroup]) -> float:
    """Return the share of a network's parameters, in [0, 1], that belong to a channel of some group."""
    stays = {(name, dim): np.ones(size, dtype=bool)
             for name, tensor in network.named_parameters() for dim, size in enumerate(tensor.shape)}  # fmt: skip
    for group in groups:
        for piece in group.slices:
            if (piece.tensor, piece.dim) in stays:
                stays[piece.tensor, piece.dim][piece.index] = False
    fixed = total = 0.0
    for name, tensor in network.named_parameters():
        shares = [stays[name, dim].mean() for dim in range(tensor.dim())]
        fixed += tensor.numel() * float(np.prod(shares))
        total += tensor.numel()
    return 1 - fixed / total


def randomise_norms(network: nn.Module) -> None:
    """Give batch norms statistics that would show a wrong index."""
    generator = torch.Generator().manual_seed(0)
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            module.running_mean.normal_(generator=generator)
            module.running_var.uniform_(0.5, 2.0, generator=generator)


def page(rows: Sequence[Row], command: str) -> str:
    """Return the table as Markdown."""
    lines = [
        "# Every torchvision classifier, cut and checked",
        "",
        "Two random plans each (60 % and 30 % of every group stay), random weights; the cut network's output equals "
        "the masked network's to 1e-5 relative in float32. *Groups*: those that can be cut, of all. *Prunable*: share "
        "of the parameters that belong to a channel of a group that can be cut. *Seconds*: time to find the groups, "
        "on one thread of a shared machine.",
        "",
        "| " + " | ".join(HEADER) + " |",
        "|---|--:|--:|--:|---|--:|---|",
        *("| " + " | ".join(row.cells) + " |" for row in rows),
        "",
        f"Command: `{command}`",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())

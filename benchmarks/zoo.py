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
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np
import torch
from prunegym.pruning import PruningPlan, UserError, apply_plan, build_network, network_names, survey_groups
from prunegym.pruning.networks import NETWORKS
from prunegym.pruning.surgery import SurgeryError

KEEPS = (0.6, 0.3)
SIZES = {"inception_v3": 96, "vit_h_14": 224, "maxvit_t": 224}


def main() -> int:
    """Walk the networks and write the table; exit code 1 if any cut is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", help="names; all torchvision classifiers by default")
    parser.add_argument("--table", help="Markdown file to write")
    parser.add_argument("--largest", type=float, default=150.0, help="skip networks of more million parameters")
    parser.add_argument("--skip", default="maxvit*,swin*", help="patterns of names that are listed but not tried")
    options = parser.parse_args()
    torch.set_num_threads(1)
    own = {"lenet5_caffe", "lenet_small", "lenet300_100", "cifar_resnet20", "cifar_resnet56", "cifar_vgg16_bn"}
    rows, wrong = [], 0
    for name in options.networks or [name for name in network_names() if name not in own]:
        if any(fnmatchcase(name, pattern) for pattern in options.skip.split(",")):
            row: tuple[str, ...] = (name, "", "", "", "", "", "not tried: tracing its attention windows takes minutes")
        else:
            row = examine(name, options.largest)
        wrong += row[-1].startswith("WRONG")
        rows.append(row)
        print(" | ".join(row), flush=True)
    if options.table:
        command = shlex.join(["python", "benchmarks/zoo.py", *sys.argv[1:]])
        Path(options.table).write_text(page(rows, command))
    return 1 if wrong else 0


def examine(name: str, largest: float) -> tuple[str, ...]:
    """Return one row: network, parameters, groups, refused, seconds to trace, seconds to cut, verdict."""
    side = SIZES.get(name, 224 if name.startswith("vit") else 64)
    network = build_network(name, classes=10, image_size=side if name.startswith(("vit", "maxvit")) else None, seed=0)
    randomise_norms(network.eval())
    millions = sum(parameter.numel() for parameter in network.parameters()) / 1e6
    if millions > largest:
        return (name, f"{millions:.1f} M", "", "", "", "", f"skipped: more than {largest:g} M parameters")
    inputs = torch.randn((2, *NETWORKS[name].image_shape[:1], side, side), generator=torch.Generator().manual_seed(0))
    start = time.perf_counter()
    try:
        survey = survey_groups(network, inputs)
    except UserError as error:
        reason = re.sub(r"\s+", " ", str(error))
        return (name, f"{millions:.1f} M", "0", "", "", "", f"unsupported: {reason}")
    traced = time.perf_counter() - start
    reasons = Counter(group.reason for group in survey.refused)
    refused = "; ".join(f"{count} × {reason}" if count > 1 else reason for reason, count in reasons.items())
    seconds = 0.0
    for keep in KEEPS if survey.groups else ():
        rng = np.random.default_rng(0)
        plan = PruningPlan(
            {g.name: rng.choice(g.width, max(1, int(g.width * keep)), replace=False) for g in survey.groups}
        )
        start = time.perf_counter()
        apply_plan(network, survey.groups, plan)
        seconds = time.perf_counter() - start
        try:
            apply_plan(network, survey.groups, plan, verify=inputs)
        except SurgeryError as error:
            return (name, f"{millions:.1f} M", str(len(survey.groups)), refused, "", "", f"WRONG: {error}")
    verdict = "equal to the masked network" if survey.groups else "nothing to cut"
    return (name, f"{millions:.1f} M", str(len(survey.groups)), refused, f"{traced:.1f}", f"{seconds:.2f}", verdict)


def randomise_norms(network: torch.nn.Module) -> None:
    """Give batch norms statistics that would show a wrong index."""
    generator = torch.Generator().manual_seed(0)
    for module in network.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            module.running_mean.normal_(generator=generator)
            module.running_var.uniform_(0.5, 2.0, generator=generator)


def page(rows: list[tuple[str, ...]], command: str) -> str:
    """Return the table as Markdown."""
    lines = [
        "# Every torchvision classifier, cut and checked",
        "",
        "Two random plans each (60 % and 30 % of every group stay), random weights; the cut network's output equals "
        "the masked network's to 1e-5 relative in float32. Seconds on one thread of a shared machine.",
        "",
        "| network | parameters | groups | left whole | tracing, s | one cut, s | result |",
        "|---|--:|--:|---|--:|--:|---|",
        *("| " + " | ".join(row) + " |" for row in rows),
        "",
        f"Command: `{command}`",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())

"""Which score of a plan, taken without full retraining, ranks plans as their accuracy after full retraining does.

    python benchmarks/fidelity.py configs/resnet20_cifar10.yaml --table docs/results/fidelity.md \
        --lines runs/fidelity.jsonl --data_root DATA --task.weights WEIGHTS --task.splits.heldout UNSEEN --threads 1

Plans of one budget, the uniform one and random ones, are scored in all ways and retrained. Every figure is written to
`--lines` as it comes: the same command goes on where it was stopped, and writes the page alone when nothing is missing.
No test image is read.
"""

import argparse
import hashlib
import json
import os
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from fidelity_page import AGAIN, ITEMS, SCALES, TRUTH, Line, Values, page, picture, study
from lines import whole_lines
from prunegym.agent.configuration import read_config
from prunegym.agent.loading import load_task
from prunegym.agent.progress import Progress
from prunegym.agent.settings import SearchConfig
from prunegym.envs import TrimSettings
from prunegym.pruning import RetrainSettings, Trimmer, UserError, apply_plan, retrain
from prunegym.pruning.budget import solve_counts
from prunegym.pruning.compensation import compensate
from prunegym.pruning.fingerprint import digest
from prunegym.pruning.recalibration import recalibrate
from prunegym.pruning.tracing import evaluation_mode
from prunegym.pruning.widths import CountArray
from torch import Tensor, nn


class RememberedTeacher(nn.Module):
    """The original network, which looks at the same images once: all plans are trained on the same batches.

    Args:
        original: Its outputs are remembered.
    """

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        self.original = original
        self.known: dict[bytes, Tensor] = {}

    def forward(self, images: Tensor) -> Tensor:
        """Return the original's outputs; (N, C, H, W) -> (N, classes)."""
        key = hashlib.blake2b(images.cpu().numpy().tobytes()).digest()
        if key not in self.known:
            self.known[key] = self.original(images)
        return self.known[key]


@dataclass(eq=False)
class Ground:
    """What all plans are measured on.

    Attributes:
        trimmer: Chooses the channels.
        retraining: The full one.
        trim: Budget, and what an action means.
        seed: Of plans and trainings.
    """

    trimmer: Trimmer
    retraining: RetrainSettings
    trim: TrimSettings
    seed: int
    reward: list[tuple[Tensor, Tensor]] = field(init=False)
    recalibration: list[Tensor] = field(init=False)
    teacher: RememberedTeacher = field(init=False)
    known: list[Tensor] = field(init=False)

    def __post_init__(self) -> None:
        """Lay the images out once, and ask the original for its outputs."""
        trimmer, size = self.trimmer, self.trimmer.settings.batch_size
        self.reward = [(_laid_out(images), labels) for images, labels in trimmer.reward.batches(size)]
        self.recalibration = [_laid_out(images) for images, _ in trimmer.recalibration.batches(size)]
        self.teacher = RememberedTeacher(trimmer.task.network)
        self.known = log_probabilities(trimmer.task.network, [images for images, _ in self.reward])

    def widths(self, number: int) -> CountArray:
        """Return (groups,) the widths of a plan that the score action would give."""
        model = self.trimmer.cost_model
        actions = draw_scores(self.seed, number, len(self.trimmer.groups))
        assert self.trim.budget is not None  # checked by `main`
        return solve_counts(model, self.trim.score_scale * actions, self.trim.budget, self.trim.budget_unit)

    def cut(self, widths: CountArray, repair: str, *, recalibrated: bool) -> nn.Module:
        """Return a cut and repaired network."""
        trimmer = self.trimmer
        pristine, plan = trimmer.pristine, trimmer.plan(widths)
        network = apply_plan(pristine.network, pristine.groups, plan)
        compensate(network, pristine.network, pristine.groups, plan, pristine.statistics, repair)
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if recalibrated:
            with _short_floats(self.recalibration[0]):
                recalibrate(network, self.recalibration)
        return network.eval()

    def measure(self, number: int, item: str) -> Line:
        """Cut, repair and perhaps train one plan anew, and score it.

        Args:
            number: Of the plan.
            item: See `Line`.
        """
        widths = self.widths(number)
        began = time.process_time()
        repair = "delete" if item in ("delete", "recalibration") else "least_squares"
        network = self.cut(widths, repair, recalibrated=item != "delete")
        if item not in ITEMS:
            settings = self.retraining
            if item not in (TRUTH, AGAIN):
                settings = replace(settings, updates=int(item), epochs=0.0)
            seed = self.seed + (item == AGAIN)
            retrain(network, self.trimmer.task.train, settings, seed=seed, teacher=self.teacher)
        line = score(network, self.reward, self.known)
        seconds = time.process_time() - began
        selection = None
        if item in (TRUTH, AGAIN):
            network.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
            selection = self.trimmer.score_selection(network).accuracy
        return replace(
            line, plan=number, item=item, seconds=seconds, selection=selection,
            widths=tuple(widths.tolist()), params=self.trimmer.cost_model.cost(widths).params,
        )  # fmt: skip


def main() -> int:
    """Measure what is missing; print and perhaps write page, picture and JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("--table", help="Markdown file to write; the picture and the figures go beside it")
    parser.add_argument("--lines", default="runs/fidelity.jsonl", help="file of the figures, which is gone on with")
    parser.add_argument("--plans", type=int, default=32, help="drawn at random, besides the uniform one")
    parser.add_argument("--again", type=int, default=8, help="of them, retrained with a second seed as well")
    parser.add_argument("--updates", type=int, default=0, help="of full retraining; 0 = as the configuration says")
    parser.add_argument("--short", type=int, nargs="*", default=[10, 50, 200], help="updates of short trainings")
    options, rest = parser.parse_known_args()
    config = read_config([options.config, *rest])
    if config.search.trim.budget is None:
        raise UserError("plans are compared at one budget, but the configuration has none; give --budget 0.4")
    training = config.search.trim.retraining.without_checks()
    if options.updates:
        training = replace(training, updates=options.updates, epochs=0.0)
    header = described(config, training)
    path = Path(options.lines)
    lines = read_lines(path, header)
    wanted = jobs(options.plans, options.again, options.short)
    missing = [job for job in wanted if job not in {(line.plan, line.item) for line in lines}]
    if missing:
        lines += measure_all(config, training, missing, path, header)
    lines = [line for line in lines if (line.plan, line.item) in wanted]
    command = shlex.join(["python", "benchmarks/fidelity.py", *sys.argv[1:]])
    found = study(lines, options.short)
    text = "\n".join([*page(found, lines, header), f"Command: `{command}`", ""])
    print(text)
    if options.table:
        table = Path(options.table)
        table.write_text(text)
        picture(found, lines).savefig(table.with_suffix(".png"), dpi=80)
        data = {"header": header, **asdict(found), "lines": [asdict(line) for line in lines]}
        table.with_suffix(".json").write_text(json.dumps(data) + "\n")
    return 0


def described(config: SearchConfig, training: RetrainSettings) -> dict[str, Any]:
    """Return what the figures depend on, the first line of their file."""
    trim, task = config.search.trim, asdict(config.task)
    weights = task.pop("weights")
    for elsewhere in ("data_root", "in_memory", "workers"):
        task.pop(elsewhere)
    if weights is not None:
        task["weights"] = hashlib.sha256(Path(weights).read_bytes()).hexdigest()
    return {
        "settings": digest(task, asdict(trim), asdict(training)),
        "name": config.name, "budget": trim.budget, "unit": trim.budget_unit, "seed": config.search.seed,
        "calibration_images": trim.repair.calibration_images,
        "recalibration_images": trim.repair.recalibration_images,
        "updates": training.updates, "epochs": training.epochs, "batch_size": training.batch_size,
        "learning_rate": training.learning_rate, "distillation": training.distillation,
        "precision": training.precision, "torch": torch.__version__,
    }  # fmt: skip


def jobs(plans: int, again: int, short: Sequence[int]) -> list[tuple[int, str]]:
    """Return (plan, item) in the order of work: each plan's items together, but the longest short training last of all.

    Args:
        plans: Random plans; the uniform one, number 0, comes on top.
        again: How many plans, every fourth, are retrained twice.
        short: Updates of short trainings.
    """
    early, late = sorted(short)[:-1], sorted(short)[-1:]
    result = [(-1, "original")]
    for number in range(plans + 1):
        items = [*ITEMS, *map(str, early), TRUTH]
        if number % 4 == 1 and number // 4 < again:
            items.append(AGAIN)
        result += [(number, item) for item in items]
    return result + [(number, str(updates)) for updates in late for number in range(plans + 1)]


def measure_all(
    config: SearchConfig, training: RetrainSettings, missing: Sequence[tuple[int, str]], path: Path, header: Any
) -> list[Line]:
    """Measure what is missing and append each figure to the file at once."""
    task = load_task(config, Progress(sys.stderr.isatty()))
    trim = config.search.trim
    repair = replace(trim.repair, criterion="least_squares", compensation="least_squares")
    trimmer = Trimmer(task, repair, trim.groups, lean=True)
    # 4-D weights and images channels last: a fifth faster, the same arithmetic
    ground = Ground(trimmer, replace(training, channels_last=True), trim, config.search.seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    lines: list[Line] = []
    with path.open("a") as file:
        if not file.tell():
            file.write(json.dumps(header) + "\n")
        for number, item in missing:
            if item == "original":
                network = task.network
                original = score(network, ground.reward, ground.known)
                lines.append(replace(original, selection=trimmer.score_selection(network).accuracy))
            else:
                lines.append(ground.measure(number, item))
            file.write(json.dumps(asdict(lines[-1])) + "\n")
            file.flush()
            os.fsync(file.fileno())
            print(f"{time.strftime('%H:%M:%S')} {len(lines)} of {len(missing)}: {lines[-1]}", file=sys.stderr)
    return lines


def draw_scores(seed: int, number: int, groups: int) -> Values:
    """Return a plan's actions (groups,) in [-1, 1], the same whatever other plans there are; number 0 is uniform."""
    if not number:
        return np.zeros(groups)
    return SCALES[number % len(SCALES)] * np.random.default_rng((seed, number)).uniform(-1.0, 1.0, groups)


def log_probabilities(network: nn.Module, batches: Sequence[Tensor]) -> list[Tensor]:
    """Return the logarithms of the network's class probabilities, (N, classes) for each batch of N images."""
    with evaluation_mode(network), torch.inference_mode(), _short_floats(batches[0]):
        return [F.log_softmax(network(images).float(), dim=1) for images in batches]


def score(network: nn.Module, batches: Sequence[tuple[Tensor, Tensor]], known: Sequence[Tensor]) -> Line:
    """Score a network; plan, item and time are not filled in.

    Args:
        network: Comes back as it was.
        batches: Images (N, C, H, W) and labels (N,).
        known: (N, classes) log-probabilities of the original for each batch.
    """
    right, loss, divergence, count = 0, 0.0, 0.0, 0
    for own, original, (_, labels) in zip(
        log_probabilities(network, [images for images, _ in batches]), known, batches, strict=True
    ):
        right += int((own.argmax(1) == labels).sum())
        loss += float(F.nll_loss(own, labels, reduction="sum"))
        divergence += float(F.kl_div(own, original, reduction="sum", log_target=True))
        count += len(labels)
    return Line(-1, "original", right / count, loss / count, divergence / count, 0.0)


def read_lines(path: Path, header: Mapping[str, Any]) -> list[Line]:
    """Return the figures of an earlier start; a last line that was torn is left out of the file.

    Raises:
        UserError: They were measured with other settings.
    """
    whole = whole_lines(path)
    if not whole:
        return []
    earlier = json.loads(whole[0])
    if earlier != header:
        changed = [key for key in header if earlier.get(key) != header[key]]
        raise UserError(
            f"{path} must hold figures of the same settings, but {', '.join(changed)} changed; "
            "name another file with --lines"
        )
    return [Line(**{**entry, "widths": tuple(entry["widths"])}) for entry in map(json.loads, whole[1:])]


def _laid_out(images: Tensor) -> Tensor:
    return images.contiguous(memory_format=torch.channels_last) if images.dim() == 4 else images


def _short_floats(images: Tensor) -> torch.autocast:
    """Compute in bfloat16: over twice as fast on processors that can, with the same accuracy."""
    return torch.autocast(images.device.type, dtype=torch.bfloat16)


if __name__ == "__main__":
    sys.exit(main())

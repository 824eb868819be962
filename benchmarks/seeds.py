"""Run one search configuration with several seeds and write one table: mean ± standard deviation per method.

    python benchmarks/seeds.py configs/lenet_mnist.yaml --seeds 0 1 2 --data_root DATA --table docs/results/x.md

Every seed trains its own network, learns its own schedule and runs the heuristics anew; the test split is read once
per seed, at its end. A run folder that is finished already (same name, results.json there) is not run again.
"""

import argparse
import json
import shlex
import statistics
import sys
from pathlib import Path

from prunegym.agent.cli import main as prunegym
from scipy.stats import t as student


def main() -> int:
    """Run the seeds and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", default="runs/seeds", help="folder for the run folders")
    parser.add_argument("--table", required=True, help="Markdown file to write; figures go beside it as JSON")
    parser.add_argument("--title", default="")
    options, rest = parser.parse_known_args()
    name = Path(options.table).stem
    found = []
    for seed in options.seeds:
        folder = Path(options.runs) / f"{name}-{seed}"
        if not (folder / "results.json").is_file():
            alone = ["--search.pool", "false"]  # what the agent is worth by itself
            code = prunegym(["search", options.config, "--seed", str(seed), "--output", str(folder), *alone, *rest])
            if code:
                return code
        found.append(json.loads((folder / "results.json").read_text()))
    command = shlex.join(["python", "benchmarks/seeds.py", *sys.argv[1:]])
    Path(options.table).parent.mkdir(parents=True, exist_ok=True)
    Path(options.table).write_text(table(found, options.title, command))
    Path(options.table).with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")
    return 0


def table(found: list[dict], title: str, command: str) -> str:
    """Return the page."""
    first = found[0]
    names = [(entry["name"], entry["label"]) for entry in first["finalists"]]
    lines = [
        f"# {title or first['task']}",
        "",
        f"Budget {first['budget']:.1%} of the {first['budget_unit']}; "
        f"seeds {', '.join(str(r['seed']) for r in found)}; "
        f"{first['max_evaluations']} evaluations for the agent; equal retraining for all "
        f"({first['finalists'][-1]['retrain_updates']:,} updates). Accuracies in percent, mean ± standard deviation "
        "over seeds.",
        "",
        "| network | parameters fewer | MACs fewer | after the cut (reward) | selection | test |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for name, label in names:
        entries = [next(e for e in run["finalists"] if e["name"] == name) for run in found]
        lines.append(
            f"| {label} | {_mean([1 / e['params_kept'] for e in entries], 1, '×')} | "
            f"{_mean([1 / e['macs_kept'] for e in entries], 1, '×')} | "
            + " | ".join(
                _mean([100 * e[key] for e in entries if e[key] is not None], 2)
                for key in ("accuracy_after_trim_reward_split", "accuracy_selection_split", "accuracy_test_split")
            )
            + " |"
        )
    lines += ["", "Agent minus heuristic on the test split, paired by seed, with a 95 % Student interval:", ""]
    for name, label in names[1:-1]:
        gaps = []
        for run in found:
            scores = {e["name"]: 100 * e["accuracy_test_split"] for e in run["finalists"]}
            gaps.append(scores["agent"] - scores[name])
        lines.append(f"- {label}: {_interval(gaps)}")
    splits = first["examples"]
    lines += [
        "",
        f"Splits: {splits['train']:,} train, {splits['reward']:,} reward, {splits['selection']:,} selection, "
        f"{splits['test']:,} test (read once per seed, at the end).",
        "",
        f"Command: `{command}`",
        "",
    ]
    return "\n".join(lines)


def _mean(values: list[float], digits: int, unit: str = "") -> str:
    if not values:
        return "–"
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{unit}{spread}"


def _interval(gaps: list[float]) -> str:
    mean = statistics.mean(gaps)
    if len(gaps) < 2:
        return f"{mean:+.2f} points (one seed, no interval)"
    half = student.ppf(0.975, len(gaps) - 1) * statistics.stdev(gaps) / len(gaps) ** 0.5
    outcome = "not distinguishable" if abs(mean) <= half else ("better" if mean > 0 else "worse")
    return f"{mean:+.2f} points [{mean - half:+.2f}, {mean + half:+.2f}]: {outcome}"


if __name__ == "__main__":
    sys.exit(main())

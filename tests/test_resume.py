"""Checkpoints and `prunegym search --resume`: whatever ended a search, it ends as if nothing had."""

import errno
import fcntl
import itertools
import json
import multiprocessing
import os
import pickle
import random
import shutil
import signal
import sqlite3
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import sb3_contrib
import stable_baselines3
import torch
from prunegym.agent import history as history_module
from prunegym.agent.checkpoint import (
    BEFORE,
    FILE,
    Checkpoint,
    EpisodeStart,
    capture,
    read_checkpoint,
    restore,
)
from prunegym.agent.cli import main
from prunegym.agent.history import History
from prunegym.agent.learner import FallingNoise
from prunegym.agent.resume import EpisodeBorders
from prunegym.pruning import Trimmer, UserError
from prunegym.pruning.splits import SealedSplit
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.noise import OrnsteinUhlenbeckActionNoise
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize
from toys import tiny_task

STEPS = 4  # of an episode


# ---- a learner ends in one process and goes on in another ------------------------------------------------------------
class Chase(gym.Env[Any, Any]):
    """Follow a number that every reset and every step draws anew."""

    observation_space = gym.spaces.Box(-1, 1, (2,), np.float32)
    action_space = gym.spaces.Box(-1, 1, (1,), np.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.left, self.goal = STEPS, self.np_random.uniform(-1, 1)
        return self.observe(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.left -= 1
        reward = -float((action[0] - self.goal) ** 2) + 0.1 * np.random.rand() + 0.1 * random.random()  # noqa: NPY002
        self.goal = self.np_random.uniform(-1, 1)
        return self.observe(), reward, self.left == 0, False, {}

    def observe(self) -> Any:
        return np.array([self.goal, self.left / STEPS], np.float32)


OFF_POLICY = {"learning_starts": 10, "batch_size": 8, "buffer_size": 1000}
CASES: dict[str, tuple[str, dict[str, Any], int]] = {
    "PPO": ("PPO", {"n_steps": 2 * STEPS, "batch_size": 4, "n_epochs": 2}, 1),
    "PPO on two environments": ("PPO", {"n_steps": STEPS, "batch_size": 4, "n_epochs": 2}, 2),
    "PPO, normalized": ("PPO", {"n_steps": 2 * STEPS, "batch_size": 4, "n_epochs": 2}, 1),
    "PPO, state-dependent noise": ("PPO", {"n_steps": 2 * STEPS, "batch_size": 4, "use_sde": True}, 1),
    "A2C": ("A2C", {"n_steps": 2 * STEPS}, 1),
    "TRPO": ("TRPO", {"n_steps": 2 * STEPS, "batch_size": 8}, 1),
    "RecurrentPPO": ("RecurrentPPO", {"n_steps": 2 * STEPS, "batch_size": 4, "n_epochs": 2}, 1),
    "SAC": ("SAC", OFF_POLICY, 1),
    "SAC, full small buffer": ("SAC", {**OFF_POLICY, "buffer_size": 14}, 1),
    "DDPG": ("DDPG", {**OFF_POLICY, "n_steps": STEPS, "noise": "falling"}, 1),
    "TD3 on two environments": ("TD3", {**OFF_POLICY, "noise": "wandering"}, 2),
}  # fmt: skip
ROLLOUTS = 12  # episodes per environment in all; the checkpoint is taken in the middle


def make(case: str) -> BaseAlgorithm:
    """Return the untrained learner of a case."""
    name, keywords, workers = CASES[case]
    keywords = {"policy_kwargs": {"net_arch": [8]}, "seed": 3, "device": "cpu", **keywords}
    if noise := keywords.pop("noise", None):
        wandering = OrnsteinUhlenbeckActionNoise(np.zeros(1), np.full(1, 0.3))
        keywords["action_noise"] = FallingNoise(-1.0) if noise == "falling" else wandering
    vectorised: Any = DummyVecEnv([lambda: Monitor(EpisodeStart(Chase()))] * workers)
    vectorised.seed(5)
    if "normalized" in case:
        vectorised = VecNormalize(vectorised)
    kind = getattr(stable_baselines3, name, None) or getattr(sb3_contrib, name)
    policy = "MlpLstmPolicy" if name == "RecurrentPPO" else "MlpPolicy"
    if name == "RecurrentPPO":
        keywords["policy_kwargs"] = {"net_arch": [8], "lstm_hidden_size": 8}
    return kind(policy, vectorised, **keywords)


class Until(BaseCallback):
    """Stops learning when told, as a killed process does: between two steps."""

    stop = False

    def _on_step(self) -> bool:
        return not self.stop


def end_state(learner: BaseAlgorithm) -> dict[str, Any]:
    """Return what two equal learners have in common, by names of the test's own choosing."""
    buffer: Any = getattr(learner, "replay_buffer", None)
    return {
        "weights": {name: value.numpy().copy() for name, value in learner.policy.state_dict().items()},
        "steps": learner.num_timesteps,
        "updates": learner._n_updates,
        "replay": None if buffer is None else (buffer.pos, buffer.observations.copy(), buffer.rewards.copy()),
        "rewards": [info["r"] for info in learner.ep_info_buffer or ()],
        "next": (random.random(), np.random.rand(), torch.rand(1).item(), learner.action_space.sample()),  # noqa: NPY002
    }


def total(case: str) -> int:
    return ROLLOUTS * STEPS * CASES[case][2]


def go_on(folder: Path) -> None:
    """Continue every case from its file; runs in a process of its own."""
    torch.set_num_threads(1)
    for place, case in enumerate(CASES):
        checkpoint = read_checkpoint(folder / str(place))
        assert checkpoint is not None
        learner = make(case)
        state = checkpoint.learner
        borders = EpisodeBorders(lambda _: None, begin=lambda learner, state=state: restore(learner, state))
        learner.learn(total(case), callback=borders)
        (folder / str(place) / "end").write_bytes(pickle.dumps(end_state(learner)))


@pytest.fixture(scope="module")
def continued(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every case taken to its middle here, and from there to its end in a fresh process."""
    folder = tmp_path_factory.mktemp("continued")
    for place, case in enumerate(CASES):
        (folder / str(place)).mkdir()
        learner, until, seen = make(case), Until(), []

        def reached(learner: BaseAlgorithm, place: int = place, until: Until = until, seen: list[int] = seen) -> None:
            seen.append(learner.num_timesteps)
            if len(seen) == 3:
                Checkpoint(capture(learner), 0, 0.0, "").write(folder / str(place))
                until.stop = True

        learner.learn(total(case), callback=[EpisodeBorders(reached), until])
        assert 0 < learner.num_timesteps < total(case)
    process = multiprocessing.get_context("spawn").Process(target=go_on, args=(folder,))
    process.start()
    process.join(100)
    assert process.exitcode == 0
    return folder


@pytest.mark.parametrize("case", CASES)
def test_a_learner_goes_on_in_a_fresh_process(case: str, continued: Path) -> None:
    whole = make(case)
    whole.learn(total(case), callback=EpisodeBorders(lambda _: None))
    expected = end_state(whole)
    found = pickle.loads((continued / str(list(CASES).index(case)) / "end").read_bytes())
    np.testing.assert_equal(found, expected)
    assert whole._n_updates > 0


def test_an_episode_may_begin_with_other_last_digits_but_not_otherwise() -> None:
    learner = make("PPO")
    learner.learn(4 * STEPS)
    state = capture(learner)
    state["last"]["_last_obs"] += 1e-5  # as other threads, or a GPU, make of the same data
    restore(make("PPO"), state)
    state["last"]["_last_obs"] += 0.01
    with pytest.raises(UserError, match="its environment begins its episode otherwise; bring them back"):
        restore(make("PPO"), state)


# ---- a search is killed and goes on ----------------------------------------------------------------------------------
CONFIG = (
    tiny_task()
    + """search:
  max_evaluations: 40
  candidates: 2
  compare: false
  latency_batches: []
  noise_check: "off"
  learner: {episodes_per_update: 6, hidden: [8]}
  trim:
    budget: 0.3
    retraining: {updates: 5, batch_size: 32, learning_rate: 0.01}
"""
)
OTHERS = {
    "ppo": [],
    "ddpg": [
        "--search.learner.algorithm=DDPG",
        "--search.trim.rounds=2",
        "--search.trim.budget_range=[0.2, 0.6]",
        "--search.trim.retrain_updates=2",
        "--search.learner.warmup_episodes=2",
        "--max_evaluations=14",
    ],
    "workers": [
        "--search.learner.workers=2",
        "--search.learner.imagination.updates=0",
        "--max_evaluations=13",
        "--search.learner.episodes_per_update=2",
    ],
}
"""Options of the searches that are killed."""


def after(calls: int, kind: Any, name: str, when: Callable[..., bool] = lambda *_: True) -> None:
    """Let the process be killed where a function is called for that time, before it does anything."""
    inner, count = getattr(kind, name), itertools.count(1)

    def replacement(*arguments: Any, **keywords: Any) -> Any:
        if when(*arguments) and next(count) == calls:
            os.kill(os.getpid(), signal.SIGKILL)
        return inner(*arguments, **keywords)

    setattr(kind, name, replacement)


KILLS: dict[str, tuple[str, Callable[[], None]]] = {
    "in the first rollout": ("ppo", lambda: after(4, History, "add")),
    "between the two lines of an evaluation": (
        "ppo", lambda: after(21, history_module, "append_text", lambda path, *_: path.suffix == ".csv"),
    ),
    "while a checkpoint takes its place": (
        "ppo", lambda: after(3, Path, "replace", lambda _, target: Path(target).name == FILE),
    ),
    "in the final phase": ("ppo", lambda: after(2, Trimmer, "score_selection")),
    "off policy, in two rounds, each episode with a budget drawn": ("ddpg", lambda: after(11, History, "add")),
    "with two workers": ("workers", lambda: after(7, History, "add")),
}  # fmt: skip


def run_and_die(where: str, place: Path, folder: Path) -> None:
    """Search until the kill; runs in a process of its own."""
    os.environ["XDG_CACHE_HOME"] = str(place / "cache")
    which, prepare = KILLS[where]
    prepare()
    main(["search", str(place / "tiny.yaml"), *OTHERS[which], "--output", str(folder)])


def die(where: str, place: Path, folder: Path) -> None:
    context: Any = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["prunegym.agent.cli"])  # imported once, for all that are killed
    process = context.Process(target=run_and_die, args=(where, place, folder))
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the configuration, and each search without an end before its end."""
    folder = tmp_path_factory.mktemp("searches")
    (folder / "tiny.yaml").write_text(CONFIG)
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        patch.chdir(folder)
        for name, options in OTHERS.items():
            assert main(["search", "tiny.yaml", *options, "--output", name]) == 0
    torch.set_num_threads(threads)
    return folder


@pytest.fixture
def inside(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(place / "cache"))
    monkeypatch.chdir(place)
    return place


def assert_same_run(one: Path, other: Path) -> None:
    for name in ("history.csv", "schedule.json", "pruned.safetensors", "results.json"):
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
    weights = []
    for folder in (one, other):
        with zipfile.ZipFile(folder / "policy.zip") as archive, archive.open("policy.pth") as file:
            weights.append(torch.load(file, weights_only=True))
    assert all(torch.equal(weights[1][name], value) for name, value in weights[0].items())


@pytest.mark.parametrize("where", KILLS)
def test_a_killed_search_ends_as_if_it_had_not_been(where: str, inside: Path, tmp_path: Path) -> None:
    die(where, inside, tmp_path / "run")
    assert not (tmp_path / "run" / "report.md").exists()
    assert main(["search", "--resume", str(tmp_path / "run")]) == 0
    assert_same_run(tmp_path / "run", inside / KILLS[where][0])
    if KILLS[where][0] == "ddpg":
        assert len({row.budget for row in History.restore(tmp_path / "run" / "history.csv").finished}) > 3
    assert not list((tmp_path / "run").glob("*checkpoint*"))
    assert "--resume" in (tmp_path / "run" / "command.txt").read_text()


# ---- what stands in the way ------------------------------------------------------------------------------------------
class Lost(BaseException):
    """Ends a search in this process, as nothing that it could handle does."""


def at_call(
    calls: int,
    kind: Any,
    name: str,
    do: Callable[[], Any],
    patch: pytest.MonkeyPatch,
    when: Callable[..., bool] = lambda *_: True,
) -> None:
    """Call `do` before a function is called for that time."""
    inner, count = getattr(kind, name), itertools.count(1)

    def replacement(*arguments: Any, **keywords: Any) -> Any:
        if when(*arguments) and next(count) == calls:
            do()
        return inner(*arguments, **keywords)

    patch.setattr(kind, name, replacement)


def lose() -> None:
    raise Lost


def full_disk() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.fixture(scope="module")
def ended(place: Path) -> Path:
    """A run folder whose search ended with its 21st evaluation; its last checkpoints are of 18 and of 12."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(place / "cache"))
        patch.chdir(place)
        at_call(22, History, "add", lose, patch)
        with pytest.raises(Lost):
            main(["search", "tiny.yaml", "--output", "ended"])
    return place / "ended"


@pytest.fixture
def run(ended: Path, inside: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(ended, tmp_path / "run"))


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Run a command that must be refused, and return its one line."""
    capsys.readouterr()
    assert main(list(arguments)) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("prunegym: ")]
    assert len(lines) == 1
    return lines[0]


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_the_last_two_checkpoints_are_kept(run: Path) -> None:
    last = read_checkpoint(run)
    (run / FILE).unlink()
    before = read_checkpoint(run)
    assert last is not None
    assert before is not None
    assert (last.rows, before.rows) == (18, 12)
    assert last.seconds > before.seconds > 0
    assert last.learner["states"]["policy"].keys() == before.learner["states"]["policy"].keys()


@pytest.mark.parametrize("damage", ["torn", "altered", "empty", "ahead"])
def test_a_bad_checkpoint_gives_way_to_the_one_before(damage: str, run: Path, inside: Path) -> None:
    content = (run / FILE).read_bytes()
    if damage == "ahead":
        for name in ("history.csv", "history.jsonl"):
            lines = (run / name).read_text().splitlines(keepends=True)
            (run / name).write_text("".join(lines[: 17 + (name == "history.csv")]))
        rows = 17
    else:
        rows = 21
        middle = len(content) // 2
        flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        (run / FILE).write_bytes({"torn": content[:-7], "altered": flipped, "empty": b""}[damage])
    told: list[str] = []
    found = read_checkpoint(run, lambda one: one.rows <= rows, told.append)
    assert found is not None
    assert found.rows == 12
    reason = "is ahead of the history" if damage == "ahead" else "is cut off or altered"
    assert told == [f"the checkpoint {run / FILE} {reason}; the one before it is used"]
    if damage == "altered":
        assert main(["search", "--resume", str(run)]) == 0
        assert_same_run(run, inside / "ppo")


def test_without_a_good_checkpoint_the_search_starts_anew(
    run: Path, inside: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in (FILE, BEFORE):
        (run / name).write_bytes(b"prunegym checkpoint 1\n")
    (run / "history.jsonl").write_bytes(b"{}\n" + (run / "history.jsonl").read_bytes())
    cuts: list[int] = []
    at_call(1, Trimmer, "trim", lambda: cuts.append(1), monkeypatch)
    assert main(["search", "--resume", str(run)]) == 0
    output = capsys.readouterr().out
    assert "there is no checkpoint to go on from: the search starts anew, with the scores that are known" in output
    assert "there is no other" in output
    assert_same_run(run, inside / "ppo")


def test_what_is_played_again_is_not_scored_again(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = sqlite3.connect(run / "scores.sqlite").execute("SELECT COUNT(*) FROM scores_1").fetchone()[0]
    trims: list[int] = []
    inner = Trimmer.trim

    def trim(self: Trimmer, *arguments: Any, **keywords: Any) -> Any:
        trims.append(1)
        return inner(self, *arguments, **keywords)

    monkeypatch.setattr(Trimmer, "trim", trim)
    at_call(4, History, "add", lose, monkeypatch)  # three rows are played again
    with pytest.raises(Lost):
        main(["search", "--resume", str(run)])
    store = sqlite3.connect(run / "scores.sqlite")
    assert store.execute("SELECT COUNT(*) FROM scores_1").fetchone()[0] - known == len(trims) <= 1


def test_its_minutes_count_from_the_start(run: Path) -> None:
    """What was learned before alone is more than a millionth of a minute: one step is taken."""
    assert main(["search", "--resume", str(run), "--max_minutes", "0.000001"]) == 0
    results = json.loads((run / "results.json").read_text())
    assert (results["stopped_by"], results["evaluations"]) == ("max_minutes", 18)


@pytest.mark.parametrize("file", [FILE, "history.jsonl"])
def test_a_full_disk(file: str, run: Path, inside: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        if file == FILE:
            at_call(2, os, "fsync", full_disk, patch)
        else:
            at_call(8, Path, "open", full_disk, patch, lambda path, mode="r", *_: (path.name, mode) == (file, "a"))
        line = said(capsys, "search", "--resume", str(run))
    assert "No space left on device" in line
    assert file in line
    assert line.endswith(f"; resume with: prunegym search --resume {run}")
    assert not list(run.glob(".*.part"))
    assert main(["search", "--resume", str(run)]) == 0
    assert_same_run(run, inside / "ppo")


def test_a_worker_that_dies(inside: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        at_call(11, History, "add", lambda: multiprocessing.active_children()[0].kill(), patch)
        line = said(capsys, "search", "tiny.yaml", *OTHERS["workers"], "--output", str(tmp_path / "run"))
    assert "a process that plays episodes must live as long as the search, but one ended" in line
    assert line.endswith(f"; resume with: prunegym search --resume {tmp_path / 'run'}")
    assert main(["search", "--resume", str(tmp_path / "run")]) == 0
    assert_same_run(tmp_path / "run", inside / "workers")


def test_data_that_vanished(run: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    text = (run / "config.yaml").read_text().replace("data: digits", "data: mnist")
    (run / "config.yaml").write_text(text.replace("data_root: null", f"data_root: {tmp_path / 'gone'}"))
    before = files(run)
    line = said(capsys, "search", "--resume", str(run))
    assert str(tmp_path / "gone") in line
    assert "--data_root" in line
    assert files(run) == before


def test_other_settings_are_refused(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = said(capsys, "search", "--resume", str(run), "--budget", "0.4")
    assert "only --max_minutes and --data_root may be given" in line
    assert "--budget" in line
    assert "quickstart" in said(capsys, "search", "quickstart", "--resume", str(run))
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace("episodes_per_update: 6", "episodes_per_update: 5"))
    before = files(run)
    assert "are not those that" in said(capsys, "search", "--resume", str(run))
    after = files(run)
    assert all(after[name] == before[name] for name in (FILE, BEFORE, "history.csv", "history.jsonl"))


def test_what_cannot_be_resumed(inside: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "is finished (report.md)" in said(capsys, "search", "--resume", "ppo")
    assert f"but {tmp_path} has none" in said(capsys, "search", "--resume", str(tmp_path))
    (tmp_path / "config.yaml").touch()
    (tmp_path / "command.txt").write_text("prunegym prune --method cp quickstart\n")
    line = said(capsys, "search", "--resume", str(tmp_path))
    assert "only a search can be resumed, but" in line
    assert "was made by: prunegym prune" in line


def test_two_processes_do_not_search_in_one_folder(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with (run / ".lock").open("a") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert f"another one is at work in {run}" in said(capsys, "search", "--resume", str(run))


def test_a_finished_search_has_read_the_test_split_once(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first attempt is lost while its final comparison is written; the second does it again, without learning."""
    opened: list[str] = []
    look = SealedSplit.open

    def recording(self: SealedSplit, reason: str) -> Any:
        opened.append(reason)
        return look(self, reason)

    monkeypatch.setattr(SealedSplit, "open", recording)
    with pytest.MonkeyPatch.context() as patch:
        at_call(1, Trimmer, "score_selection", lose, patch)
        with pytest.raises(Lost):
            main(["search", "--resume", str(run)])
    assert opened == []
    at_call(1, History, "add", lose, monkeypatch)  # nothing is played any more
    assert main(["search", "--resume", str(run)]) == 0
    assert len(opened) == 1

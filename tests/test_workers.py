"""Environments in processes of their own: one copy of data and weights, the parent's results, and a quick end."""

import multiprocessing
import os
import pickle
import signal
import time
from collections.abc import Callable, Iterator
from multiprocessing import reduction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium.utils import seeding
from prunegym.agent import workers
from prunegym.agent.workers import Parcel, WorkerEnvs, make_environments
from prunegym.envs import TrimEnv, TrimSettings
from prunegym.envs.trim import ActionError
from prunegym.pruning import PruningTask, RepairSettings, Trimmer, subject
from prunegym.pruning import trimmer as trimmer_module
from prunegym.pruning.splits import DatasetSplit
from stable_baselines3.common.vec_env import DummyVecEnv
from torch import nn
from torch.utils.data import Dataset

SEED = 7
SIDE = 512  # pixels; an image of float32 takes 1 MiB
SETTINGS = TrimSettings(budget=0.5, repair=RepairSettings(calibration_images=6, batch_size=4))
PLANS = np.array([[0.9, -0.9], [-0.6, 0.8]], dtype=np.float32)  # (workers, groups)


def large_images(count: int) -> PruningTask:
    """Return a task of `count` MiB of reward images, which every scoring reads, and few others."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = nn.Sequential(
            nn.Conv2d(1, 4, 8, stride=8), nn.ReLU(), nn.Conv2d(4, 6, 8, stride=8), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3),
        )  # fmt: skip
    few, many = ((torch.rand(n, 1, SIDE, SIDE), torch.arange(n) % 3) for n in (6, count))
    return PruningTask(network.eval(), few, many, few, few)


@pytest.fixture(scope="module")
def pair() -> Iterator[Callable[[int], tuple[Trimmer, WorkerEnvs]]]:
    """Return a function: MiB of reward images -> trimmer and two running workers, started anew if closed."""
    running: dict[int, tuple[Trimmer, WorkerEnvs]] = {}

    def get(count: int) -> tuple[Trimmer, WorkerEnvs]:
        if count not in running or running[count][1].closed:
            trimmer = Trimmer(large_images(count), SETTINGS.repair)
            made = make_environments(trimmer.task, SETTINGS, trimmer, workers=2, seed=SEED)
            assert isinstance(made, WorkerEnvs)
            running[count] = (trimmer, made)
        return running[count]

    yield get
    for _, environments in running.values():
        environments.close()


def play(environments: Any) -> list[Any]:
    """Play one episode of `PLANS` in each of two environments."""
    return [environments.reset(), *(environments.step(PLANS[:, place, None]) for place in range(2))]


def proportional_mib(process: Any) -> float:
    """Return a process's memory, private and shared, where a page that n processes map counts 1/n.

    Pages of files are left out: how many processes have a library loaded has nothing to do with the data.
    """
    lines = Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith(("Pss_Anon:", "Pss_Shmem:"))) / 1024


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


# ---- in processes ----------------------------------------------------------------------------------------------------
def test_two_workers_do_what_two_environments_do_in_this_process(pair: Any) -> None:
    trimmer, environments = pair(64)
    ours = DummyVecEnv([lambda: TrimEnv(settings=SETTINGS, trimmer=trimmer)] * 2)
    expected, found = play(ours), play(environments)
    np.testing.assert_array_equal(found[0], expected[0])
    for (observations, rewards, dones, infos), (our_observations, our_rewards, our_dones, our_infos) in zip(
        found[1:], expected[1:], strict=True
    ):
        np.testing.assert_array_equal(observations, our_observations)
        np.testing.assert_array_equal(rewards, our_rewards)
        np.testing.assert_array_equal(dones, our_dones)
        for info, our_info in zip(infos, our_infos, strict=True):
            assert {key: info.get(key) for key in ("loss", "accuracy", "plan", "plans")} == {
                key: our_info.get(key) for key in ("loss", "accuracy", "plan", "plans")
            }
    losses = [info["loss"] for info in found[2][3]]
    assert losses[0] != losses[1]  # of two different plans


def test_worker_i_has_the_seed_plus_i(pair: Any) -> None:
    environments = pair(64)[1]
    environments.seed(SEED)
    environments.reset()
    states = [generator.bit_generator.state for generator in environments.get_attr("np_random")]
    assert states == [seeding.np_random(SEED + place)[0].bit_generator.state for place in range(2)]


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="memory of processes is read from Linux /proc")
def test_workers_share_one_copy_of_the_data(pair: Any) -> None:
    total = {}
    for count in (64, 2):
        environments = pair(count)[1]
        play(environments)  # every image has then been read by both
        total[count] = sum(proportional_mib(process) for process in environments.processes)
    assert total[64] - total[2] == pytest.approx(62, abs=24)  # once, where two copies would be 124


def test_an_error_of_an_environment_is_raised_here(pair: Any) -> None:
    environments = pair(2)[1]
    environments.reset()
    with pytest.raises(ActionError, match=r"one finite number in \[-1, 1\], but got .*nan") as caught:
        environments.step(np.array([[0.5], [np.nan]], dtype=np.float32))
    assert any("In a worker" in note and "_scalar" in note for note in caught.value.__notes__)
    assert all(process.is_alive() for process in environments.processes)


def test_a_dead_worker_is_noticed_at_once_and_no_process_stays(pair: Any) -> None:
    environments = pair(2)[1]
    environments.reset()
    busy, dead = (process.pid for process in environments.processes)
    os.kill(busy, signal.SIGSTOP)  # never answers
    os.kill(dead, signal.SIGKILL)
    began = time.monotonic()
    with pytest.raises((EOFError, BrokenPipeError, ConnectionResetError)):
        environments.step(PLANS[:, :1])
    environments.close()
    assert time.monotonic() - began < 5
    assert not is_running(busy)
    assert not is_running(dead)
    environments.close()


def ends() -> Any:
    os._exit(3)


def test_a_worker_that_ends_while_it_starts_leaves_no_process() -> None:
    before = set(multiprocessing.active_children())
    with pytest.raises(EOFError, match="a worker ended with exit code 3 while it started"):
        WorkerEnvs([ends])
    assert set(multiprocessing.active_children()) <= before


# ---- what is sent ----------------------------------------------------------------------------------------------------
def test_workers_trace_measure_and_draw_nothing_again(monkeypatch: pytest.MonkeyPatch) -> None:
    trimmer = Trimmer(large_images(3), SETTINGS.repair)

    def opened(makers: list[Any]) -> DummyVecEnv:
        return DummyVecEnv([maker.parcel.open for maker in makers])

    monkeypatch.setattr(workers, "WorkerEnvs", opened)
    environments = make_environments(trimmer.task, SETTINGS, trimmer, workers=2, seed=0)
    first, second = environments.get_attr("trimmer")
    for name, weight in trimmer.task.network.state_dict().items():
        torch.testing.assert_close(first.task.network.state_dict()[name], weight, rtol=0, atol=0)
    assert first is not trimmer
    assert first is not second

    def again(*_: Any, **__: Any) -> None:
        raise AssertionError("this was done before")

    for name in ("find_groups", "measure", "CostModel", "log_probabilities", "takes_channels_last"):
        monkeypatch.setattr(trimmer_module, name, again)
    monkeypatch.setattr(subject, "rank_channels", again)
    monkeypatch.setattr(Trimmer, "_draw", again)
    infos = play(environments)[-1][3]
    assert all(np.isfinite(info["loss"]) for info in infos)


class Numbers(Dataset[Any]):
    """Images that are made when they are read."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, place: int) -> tuple[torch.Tensor, int]:
        return torch.full((1, 2, 2), float(place)), place % 3


def test_a_parcel_keeps_tensors_arrays_and_everything_else() -> None:
    matrix = torch.arange(12.0).reshape(3, 4)
    content = {
        "matrix": matrix,
        "turned": matrix.t(),
        "rows": matrix[1:],
        "array": np.arange(5.0),
        "empty": torch.empty(0, 3),
        "number": torch.tensor(3),
        "half": torch.ones(2, dtype=torch.bfloat16),
        "conjugate": torch.tensor([1 + 2j]).conj(),
        "trained": nn.Parameter(torch.ones(2)),
        "split": DatasetSplit(Numbers(), name="train"),
        "function": lambda x: x + 1,
    }
    with Parcel(content) as parcel:
        copy = parcel.open()
    for name in ("matrix", "turned", "rows", "empty", "number", "half", "conjugate", "trained"):
        assert torch.equal(copy[name], content[name])  # type: ignore[arg-type]
        assert copy[name].stride() == content[name].stride()  # type: ignore[attr-defined]
    np.testing.assert_array_equal(copy["array"], content["array"])
    assert copy["trained"].requires_grad
    assert copy["function"](1) == 2
    batch = next(iter(copy["split"].batches(4)))
    assert batch.images[:, 0, 0, 0].tolist() == [0, 1, 2, 3]
    copy["matrix"][1, 0] = -1  # what shared memory before shares it still
    assert copy["rows"][0, 0] == copy["turned"][0, 1] == -1


def test_what_one_copy_of_a_parcel_writes_no_other_sees() -> None:
    content = {"tensor": torch.zeros(5000), "array": np.zeros(5000)}
    with Parcel(content) as parcel:
        one, other = parcel.open(), parcel.open()
        for copy in (one, other):
            assert copy["tensor"].data_ptr() % 64 == 0
            assert copy["array"].ctypes.data % 64 == 0
        one["tensor"] += 1
        one["array"] += 1
        later = parcel.open()
    for copy in (content, other, later):
        assert float(copy["tensor"].abs().sum()) == 0
        assert float(np.abs(copy["array"]).sum()) == 0
    assert float(one["tensor"].sum()) == float(one["array"].sum()) == 5000


def test_a_parcel_is_copied_where_files_cannot_be_handed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(reduction, "DupFd")
    with Parcel({"tensor": torch.arange(7)}) as parcel:
        sent = pickle.dumps(parcel)
    with pickle.loads(sent) as received:
        assert received.open()["tensor"].tolist() == list(range(7))

"""Environments for a learner: one in this process, or several in processes that share one copy of data and weights."""

import io
import mmap
import os
import pickle
import signal
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import connection, reduction
from typing import IO, Any

import cloudpickle
import gymnasium as gym
import numpy as np
import torch
from numpy.typing import NDArray
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecEnv
from stable_baselines3.common.vec_env.base_vec_env import VecEnvStepReturn
from torch import Tensor

from ..envs.reward import Reward
from ..envs.trim import TrimEnv
from ..envs.trim_settings import TrimSettings
from ..pruning.plan import PruningPlan
from ..pruning.task import PruningTask
from ..pruning.trimmer import Trimmer
from .checkpoint import EpisodeStart

ALIGNMENT = 64
"""Bytes; PyTorch aligns its own memory so, and kernels may choose their order of summation by it."""

FAILURE = "failure"
"""Key of an info that holds the exception an environment raised in its worker."""


def make_environments(
    task: PruningTask,
    settings: TrimSettings,
    trimmer: Trimmer,
    *,
    workers: int,
    seed: int,
    budgets: Sequence[float] = (),
) -> VecEnv:
    """Return environments that all start from what `trimmer` has traced, measured and drawn.

    Several live in spawned processes, each with its share of the threads. Worker i is seeded with `seed` + i, and
    results come in the order of the workers, whichever is ready first.

    Args:
        task: What is pruned.
        settings: Of the environments.
        trimmer: Of the task, with the settings' repair and groups.
        workers: Environments, 1 or more.
        seed: Of the first one.
        budgets: Of the episodes, where they are known; by default all that the settings allow. Their uniform plans are
            scored once, for all workers.

    Raises:
        EOFError: A worker's process ended while it started.
    """
    if workers == 1:
        environment: VecEnv = DummyVecEnv([lambda: Monitor(EpisodeStart(TrimEnv(task, settings, trimmer=trimmer)))])
    else:
        model = TrimEnv(task, settings, trimmer=trimmer)
        _prepare(model, budgets)
        threads = max(1, torch.get_num_threads() // workers)
        with Parcel(model) as parcel:
            environment = WorkerEnvs([_Worker(parcel, threads)] * workers)
    environment.seed(seed)
    return environment


def _prepare(environment: TrimEnv, budgets: Sequence[float]) -> None:
    """Work out whatever every worker would have to work out for itself before its first episode ends."""
    trimmer, settings = environment.trimmer, environment.settings
    environment.reset()
    _ = trimmer.pristine.orders, trimmer.baseline, trimmer.cost_of(PruningPlan.full(trimmer.groups))
    if settings.repair.recalibration_images:
        _ = trimmer.recalibration
    if trimmer.scores is not None:
        _ = trimmer.fingerprint
    if Reward(settings.reward).needs_reference:
        for budget in budgets or settings.served:
            environment.uniform(budget)


class _Worker:
    """Makes an environment in a process of its own."""

    def __init__(self, parcel: "Parcel", threads: int) -> None:
        self.parcel, self.threads = parcel, threads

    def __call__(self) -> gym.Env[Any, Any]:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which then closes the workers
        torch.set_num_threads(self.threads)
        return _Reported(Monitor(EpisodeStart(self.parcel.open())))


class _Reported(gym.Wrapper[Any, Any, Any, Any]):
    """Sends an exception of `step` to the parent, which raises it there, instead of ending the worker."""

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Take a step; after an exception the observation is zero and the info holds the exception."""
        try:
            return self.env.step(action)  # type: ignore[return-value]
        except Exception as error:
            error.add_note(f"In a worker:\n{traceback.format_exc()}")
            space = self.observation_space
            return np.zeros(space.shape or (), space.dtype), 0.0, False, False, {FAILURE: error}


class WorkerEnvs(SubprocVecEnv):
    """Environments in spawned processes, of which the parent learns at once that one has died.

    Args:
        makers: Called once each, in its process.

    Raises:
        EOFError: A process ended before it was ready.
    """

    def __init__(self, makers: Sequence[Callable[[], gym.Env[Any, Any]]]) -> None:
        self.processes: list[Any] = []
        try:
            super().__init__(list(makers), start_method="spawn")
        except (EOFError, OSError) as error:
            code = next((code for _, code in self._ended(1.0)), None)
            raise EOFError(f"a worker ended with exit code {code} while it started") from error
        finally:
            if not hasattr(self, "num_envs"):  # which SB3 sets when it knows the spaces
                self._end()

    def step_wait(self) -> VecEnvStepReturn:
        """Return what all workers sent.

        Raises:
            EOFError: A worker has ended, however long the others would still take.
            Exception: The first one that an environment raised.
        """
        self._await_all()
        result = super().step_wait()
        for info in result[3]:
            if FAILURE in info:
                raise info[FAILURE]
        return result

    def close(self) -> None:
        """End all processes, also busy and stuck ones, by force: a worker keeps nothing that could be lost with it."""
        if self.closed:
            return
        self.closed = True
        self._end()
        for remote in self.remotes:
            remote.close()

    def _await_all(self) -> None:
        """Return when every worker has answered, raise when one has ended."""
        pending = set(self.remotes)
        while pending:
            pending.difference_update(connection.wait([*pending, *(process.sentinel for process in self.processes)]))
            for place, code in self._ended(0.0):
                raise EOFError(f"worker {place + 1} of {self.num_envs} ended with exit code {code}")

    def _ended(self, timeout_s: float) -> Iterator[tuple[int, int | None]]:
        """Yield place and exit code of every process that has ended, after waiting for the first one."""
        ready = connection.wait([process.sentinel for process in self.processes], timeout_s)
        for place, process in enumerate(self.processes):
            if process.sentinel in ready:
                process.join()  # which is on its way out, but may not be gone
                yield place, process.exitcode

    def _end(self) -> None:
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()


class Parcel:
    """An object for spawned processes, with its tensors and arrays in one block of memory that they all map.

    A page of the block takes up memory once, however many processes read it. A process that writes to a page gets its
    own: no process sees what another writes. Tensors on the CPU and numpy arrays lie in the block as they are. All
    else, such as a data set of files or a tensor on a GPU, is pickled, and each process makes its own of it.

    The block is an unnamed file in memory (where the system has none, an unnamed temporary one), which goes when the
    last process that uses it ends. A parcel is meant to be an argument of a process that is being started. Where files
    cannot be handed to processes (Windows), each gets a copy.

    Args:
        content: Whatever cloudpickle can pickle. Two tensors that share memory do so in the copies too.
    """

    def __init__(self, content: Any) -> None:
        stream = io.BytesIO()
        buffers: list[pickle.PickleBuffer] = []
        _Pickler(stream, protocol=5, buffer_callback=buffers.append).dump(content)
        self._spans: list[tuple[int, int]] = []  # first byte and length; the pickle itself is the first
        self._file: IO[bytes] | None = _unnamed_file()
        for part in (stream.getbuffer(), *(buffer.raw() for buffer in buffers)):
            start = -self._file.tell() % ALIGNMENT + self._file.tell()
            self._file.seek(start)
            self._file.write(part)
            self._spans.append((start, part.nbytes))
        self._file.flush()

    def open(self) -> Any:
        """Return a copy of the content whose tensors and arrays lie in the shared block; writing to them is private."""
        assert self._file is not None  # closed parcels are not sent
        block = memoryview(mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_COPY))
        first, *others = [block[start : start + length] for start, length in self._spans]
        return pickle.loads(first, buffers=others)

    def close(self) -> None:
        """Let the block go as soon as no process uses it; processes that were started keep theirs."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def __enter__(self) -> "Parcel":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __getstate__(self) -> tuple[Any, list[tuple[int, int]]]:
        assert self._file is not None
        if hasattr(reduction, "DupFd"):
            return reduction.DupFd(self._file.fileno()), self._spans
        self._file.seek(0)
        return self._file.read(), self._spans

    def __setstate__(self, state: tuple[Any, list[tuple[int, int]]]) -> None:
        handle, self._spans = state
        if isinstance(handle, bytes):
            self._file = _unnamed_file()
            self._file.write(handle)
            self._file.flush()
        else:
            self._file = open(handle.detach(), "r+b")  # noqa: SIM115  (open while the process lives)


class _Pickler(cloudpickle.Pickler):
    """Puts the bytes of CPU tensors beside the pickle, as numpy does with those of arrays."""

    def reducer_override(self, value: Any) -> Any:
        """Return how an object is rebuilt, or NotImplemented for the usual way."""
        if type(value) is Tensor and _plain(value):
            where = (value.storage_offset(), tuple(value.shape), value.stride())
            return _tensor, (value.untyped_storage(), value.dtype, *where)
        if type(value) is torch.UntypedStorage and value.device.type == "cpu":
            content: NDArray[np.uint8] = torch.empty(0, dtype=torch.uint8).set_(value).numpy()
            return _storage, (pickle.PickleBuffer(content.data),)
        return super().reducer_override(value)


def _plain(tensor: Tensor) -> bool:
    """Whether storage, type, offset, shape and strides tell all of a tensor."""
    return (
        tensor.device.type == "cpu"
        and tensor.layout is torch.strided
        and not (tensor.requires_grad or tensor.is_quantized or tensor.is_conj() or tensor.is_neg() or vars(tensor))
    )


def _tensor(
    storage: torch.UntypedStorage, dtype: torch.dtype, offset: int, shape: tuple[int, ...], stride: tuple[int, ...]
) -> Tensor:
    return torch.empty(0, dtype=dtype).set_(storage, offset, shape, stride)


def _storage(content: memoryview) -> torch.UntypedStorage:
    if not content.nbytes:
        return torch.UntypedStorage(0)
    return torch.frombuffer(content, dtype=torch.uint8).untyped_storage()


def _unnamed_file() -> IO[bytes]:
    if hasattr(os, "memfd_create"):  # Linux; unlike /dev/shm not limited in a container
        return open(os.memfd_create("prunegym"), "w+b")
    return tempfile.TemporaryFile()

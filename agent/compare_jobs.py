"""The missing cells of a comparison, one by one or several at a time in processes of their own."""

import multiprocessing
import signal
from collections.abc import Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager

import torch
from threadpoolctl import threadpool_limits

from ..pruning.errors import UserError
from .compare_cell import Cell, Ground
from .compare_run import run_cell
from .compare_settings import POOL, CompareConfig


def run_cells(
    ground: Ground,
    digests: Mapping[tuple[str, int], str],
    done: Mapping[tuple[str, int], Cell],
    config: CompareConfig,
) -> Iterator[Cell]:
    """Run the missing cells, the pools after all others; yields them as they finish.

    Args:
        ground: What all cells share.
        digests: (method, seed) -> digest, for every cell of the comparison.
        done: The cells that need not run again.
        config: Says how many run at the same time; one by one they run in this process.

    Raises:
        UserError: A method cannot do what is asked, or a process ended without a word.
        KeyboardInterrupt: Interrupted; running processes are ended.
    """
    cells = dict(done)
    missing = [key for key in digests if key not in cells]
    with _workers(ground, min(config.jobs, len(missing)), config.threads or 1) as workers:
        for pools in (False, True):
            keys = [key for key in missing if (key[0] == POOL) == pools]
            requests = {
                key: (*key, digests[key], {method: cells[method, key[1]] for method in config.compare.methods})
                if pools
                else (*key, digests[key], {})
                for key in keys
            }
            for key, cell in _each(ground, workers, requests):
                cells[key] = cell
                yield cell


Request = tuple[str, int, str, Mapping[str, Cell]]


def _each(
    ground: Ground, workers: ProcessPoolExecutor | None, requests: Mapping[tuple[str, int], Request]
) -> Iterator[tuple[tuple[str, int], Cell]]:
    if workers is None:
        for key, request in requests.items():
            yield key, run_cell(ground, *request)
        return
    waiting: dict[Future[Cell], tuple[str, int]] = {
        workers.submit(_run_in_worker, *request): key for key, request in requests.items()
    }
    while waiting:
        for future in wait(waiting, return_when=FIRST_COMPLETED).done:
            yield waiting.pop(future), future.result()


@contextmanager
def _workers(ground: Ground, jobs: int, threads: int) -> Iterator[ProcessPoolExecutor | None]:
    """Give processes that run cells, None for a single job; an error or an interrupt ends them at once."""
    if jobs < 2:
        yield None
        return
    before = {process.pid for process in multiprocessing.active_children()}
    context = multiprocessing.get_context("spawn")
    workers = ProcessPoolExecutor(jobs, context, _begin_worker, (ground, threads))
    try:
        yield workers
    except BaseException as error:
        for process in multiprocessing.active_children():
            if process.pid not in before:
                process.terminate()
        if isinstance(error, BrokenProcessPool):
            raise UserError(
                "a process of the comparison ended without a word, perhaps for want of memory; the finished cells are "
                f"kept: go on with --resume {ground.folder}, perhaps with fewer --jobs"
            ) from error
        raise
    finally:
        workers.shutdown(cancel_futures=True)


_GROUND: list[Ground] = []  # of a worker process


def _begin_worker(ground: Ground, threads: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which then ends the workers
    torch.set_num_threads(threads)
    threadpool_limits(threads, user_api="blas")
    _GROUND.append(ground)


def _run_in_worker(method: str, seed: int, digest: str, others: Mapping[str, Cell]) -> Cell:
    return run_cell(_GROUND[0], method, seed, digest, others)

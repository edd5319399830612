"""Work spread over processes of one thread each, which read the data once."""

import ctypes
import multiprocessing
import os
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

import torch
from tqdm import tqdm

from pyro_avrnn import data
from pyro_avrnn.data import Dataset

Task = TypeVar("Task")
Result = TypeVar("Result")
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of mallopt, in malloc.h
Progress = Callable[[int], None]  #: is told of each piece of a task that is done
_worker: dict[str, Any] = {}  # of a worker process: its data, and what is done by task


def spread(
    work: Callable[[Task, Dataset, Progress], Result],
    tasks: Sequence[Task],
    *,
    jobs: int,
    source: str,
    reader: dict[str, Any],
    pieces: int,
    bar: str,
    unit: str,
    summary: Callable[[Result], str],
) -> Iterator[Result]:
    """Work in at most ``jobs`` processes; yield each result as soon as it is there.

    Args:
        work: called with a task, the data and a function to tell progress; it goes to other
            processes, as tasks and results do.
        tasks: what to do.
        jobs: processes.
        source, reader: of ``data.load``, which each process calls.
        pieces: of a task, for the bar.
        bar, unit: what the bar calls the work, and a piece.
        summary: a finished task in a few words.

    Raises:
        OSError: a process died.
    """
    if not tasks:
        return
    context = multiprocessing.get_context("spawn")
    done = context.RawArray("q", len(tasks))  # pieces of each task, which alone writes there
    stop = context.RawValue("b", 0)
    given = (source, reader, done, stop, os.getpid())
    pool = ProcessPoolExecutor(min(jobs, len(tasks)), context, _start, given)
    with pool, tqdm(total=len(tasks) * pieces, unit=unit, desc=bar, smoothing=0.05) as shown:
        try:
            waiting = {pool.submit(_do, work, i, task, pieces) for i, task in enumerate(tasks)}
            while waiting:
                ready, waiting = wait(waiting, timeout=0.5, return_when=FIRST_COMPLETED)
                shown.update(sum(done) - shown.n)
                for result in (future.result() for future in ready):
                    shown.set_postfix_str(summary(result))
                    yield result
        except BrokenProcessPool as error:
            raise OSError(
                f"a process of the {bar} died, perhaps for want of memory; try --jobs 1 or a "
                "smaller --batch-size; finished rows stay, use --resume"
            ) from error
        except BaseException:  # the user's interrupt, or another task's error
            stop.value = 1
            raise
        finally:
            pool.shutdown(cancel_futures=True)


def _start(source: str, reader: dict[str, Any], done: Any, stop: Any, parent: int) -> None:
    threading.Thread(target=_watch, args=(stop, parent), daemon=True).start()
    tqdm.set_lock(threading.RLock())  # its own, between processes, is lost by an abrupt end
    for told in ("clip_norm=", "the gradient of a step is"):
        warnings.filterwarnings("ignore", told)  # the report says it, of all rows together
    keep_memory()
    torch.set_num_threads(1)  # small matrices: processes pay, threads do not
    os.environ["OMP_NUM_THREADS"] = "1"
    _worker.update(data=data.load(source, **reader), done=done)


def keep_memory() -> None:
    """Keep what this process frees, where the C library is GNU's, as the next step wants it again.

    Given back, it must be asked for anew, page by page: up to a quarter of the time of a step with
    tensors of 20 MB.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        most = 2**31 - 1
        mallopt(_TRIM_THRESHOLD, most)
        mallopt(_MMAP_THRESHOLD, most) or mallopt(_MMAP_THRESHOLD, 2**25)  # older ones allow less


def _watch(stop: Any, parent: int) -> None:
    """End this process when it is told to, or when its parent has died."""
    while not stop.value and os.getppid() == parent:
        time.sleep(0.2)
    os._exit(1)  # at once: every file is written elsewhere and moved into place


def _do(
    work: Callable[[Task, Dataset, Progress], Result], index: int, task: Task, pieces: int
) -> Result:
    def progress(count: int) -> None:
        _worker["done"][index] += count

    result = work(task, _worker["data"], progress)
    _worker["done"][index] = pieces  # one that stopped early has none to come
    return result

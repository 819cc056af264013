"""Reads and checks chunks in several processes; what comes back is in the order of the chunks."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing.connection import wait

from megatron_sr1.data.build.samples import BuiltSample, TextRules, build_sample
from megatron_sr1.data.sources.source import Chunk, Problem, Source

Items = list[BuiltSample | Problem]
CHUNKS_PER_WORKER = 2  # in flight: one being read, one waiting; bounds the memory
_job: list[tuple[Source, TextRules]] = []  # of a worker process: what it was started for


def built_chunks(source: Source, rules: TextRules, chunks: Iterable[Chunk], num_workers: int) -> Iterator[Items]:
    """The samples of each chunk. `num_workers` 0: in this process.

    Raises:
        ValueError: a damaged file.
        BrokenProcessPool: a worker was killed.
    """
    if num_workers == 0:
        yield from (_build_chunk(source, rules, chunk) for chunk in chunks)
        return
    # spawned: a forked process would inherit the threads' locks of the progress bar and of the tokenizer
    context = multiprocessing.get_context("spawn")
    pending: deque[Future[Items]] = deque()
    with ProcessPoolExecutor(num_workers, context, _start_worker, (source, rules)) as pool:
        try:
            for chunk in chunks:
                pending.append(pool.submit(_work, chunk))
                if len(pending) >= CHUNKS_PER_WORKER * num_workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()


def _build_chunk(source: Source, rules: TextRules, chunk: Chunk) -> Items:
    return [raw if isinstance(raw, Problem) else build_sample(raw, rules) for raw in source.read(chunk)]


def _work(chunk: Chunk) -> Items:
    return _build_chunk(*_job[0], chunk)


def _start_worker(source: Source, rules: TextRules) -> None:
    _job[:] = [(source, rules)]
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A parent that is killed cannot end its workers; they would wait for work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)

"""Many plugins in one call, several of them at once, each with ranks of its own."""

import multiprocessing
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from queue import Empty
from typing import Any, Final

from fabric_core.conformance.pool import RankPool, die_with_driver
from fabric_core.conformance.report import Report
from fabric_core.conformance.rules import rules_for
from fabric_core.conformance.runner import Verdict
from fabric_core.conformance.session import run_rules
from fabric_core.conformance.subject import Subject

__all__ = ["Progress", "run_many"]

Progress = Callable[[Subject, Verdict, int, int], None]
"""Is told of each verdict: about which plugin it is, how many rules were judged, and how many there are in all."""

_POLL: Final = 0.2
"""How many seconds the driver waits for a verdict before it asks whether a worker has ended."""

_pools: dict[int, RankPool] = {}
"""This worker's ranks, which one plugin after the other uses; they end with the worker."""
_judged: Any = None
_ends: Any = None


class _Stopped(Exception):  # noqa: N818 - it was told to
    """The driver wants no more verdicts."""


def run_many(
    subjects: Sequence[Subject],
    *,
    workers: int,
    device: str | None = None,
    progress: Progress | None = None,
    **how: Any,
) -> Generator[Report, None, None]:
    """Judge plugins by every rule of their kinds; gives their reports in their order, as they come.

    Args:
        subjects: The plugins.
        workers: How many are judged at once.
        device: The accelerator to run on; of several plugins, accelerators have their own.
        progress: Called here after each rule.
        how: What ``run_rules`` takes besides.

    Raises:
        RequestError: As ``run_rules`` does.
        concurrent.futures.process.BrokenProcessPool: Somebody killed a worker.
    """
    total = sum(len(how.get("only") or rules_for(subject.kind)) for subject in subjects)
    own = device if len(subjects) == 1 else None
    asked = [(one, {**how, "device": own if one.kind == "accelerator" else device}) for one in subjects]
    if min(workers, len(subjects)) <= 1:
        yield from _run_here(asked, total, progress)
        return
    context = multiprocessing.get_context("spawn")
    judged, ends = context.Queue(), context.Event()
    count = 0
    with ProcessPoolExecutor(min(workers, len(subjects)), context, _begin, (judged, ends)) as pool:
        try:
            for future in [pool.submit(_work, *one) for one in asked]:
                while not future.done():
                    try:
                        subject, verdict = judged.get(timeout=_POLL)
                    except Empty:
                        continue
                    count += 1
                    if progress is not None:
                        progress(subject, verdict, count, total)
                yield future.result()
        finally:
            ends.set()
            pool.shutdown(cancel_futures=True)
            judged.close()


def _run_here(
    asked: Sequence[tuple[Subject, dict[str, Any]]], total: int, progress: Progress | None
) -> Iterator[Report]:
    pools: dict[int, RankPool] = {}
    count = 0

    def tell(verdict: Verdict, *_: int) -> None:
        nonlocal count
        count += 1
        if progress is not None:
            progress(subject, verdict, count, total)

    try:
        for subject, how in asked:
            yield run_rules(subject, pools=pools, progress=tell, **how)
    finally:
        for pool in pools.values():
            pool.close()


def _begin(judged: Any, ends: Any) -> None:
    global _judged, _ends
    die_with_driver()
    judged.cancel_join_thread()
    _judged, _ends = judged, ends


def _work(subject: Subject, how: dict[str, Any]) -> Report:
    def tell(verdict: Verdict, *_: int) -> None:
        if _ends.is_set():
            raise _Stopped
        _judged.put((subject, verdict))

    return run_rules(subject, pools=_pools, progress=tell, **how)

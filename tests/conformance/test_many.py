"""Several plugins are judged at once as one after the other, and nothing of it outlives the call."""

import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from fabric_core.conformance import Report, Subject
from fabric_core.conformance.many import run_many
from fabric_core.conformance.runner import Verdict
from fabric_core.errors import RequestError

pytestmark = pytest.mark.sampled(0.5)

LAZY = Subject.of("precision", "proof.mutants.precision:Lazy")
SEVERAL = [Subject.of("precision", "64-true"), LAZY, Subject.of("precision", "16-mixed")]


def verdicts(report: Report) -> list[tuple[str, str, str]]:
    """What a report says, without how long it took."""
    return [(one.rule, str(one.outcome), one.message) for one in report.verdicts]


def soon(holds: Callable[[], bool], seconds: float = 20.0) -> bool:
    """Whether it holds within some seconds."""
    end = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


def of_session(leader: int) -> list[int]:
    """The processes of a session that run."""
    found = []
    for one in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            state, _, _, session = (one / "stat").read_text().rpartition(")")[2].split()[:4]
            if int(session) == leader and state not in "ZX":
                found.append(int(one.name))
    return found


def test_at_once_they_are_judged_as_one_after_the_other() -> None:
    """The same verdicts, in the order that was asked for, whichever is ready first."""
    rules = ["REG-005", "PRE-201", "PRE-228", "PRE-230"]
    alone = list(run_many(SEVERAL, workers=1, only=rules))
    together = list(run_many(SEVERAL, workers=2, only=rules))
    assert [one.subject for one in together] == SEVERAL
    assert [verdicts(one) for one in together] == [verdicts(one) for one in alone]
    assert not together[1].passed


@pytest.mark.parametrize("workers", [1, 2])
def test_progress_counts_the_rules_of_all_plugins(workers: int) -> None:
    """Each verdict once, with its plugin; the count ends at the total, or shortly before it."""
    told: list[tuple[str, str, int, int]] = []
    two = [Subject.of("logger", "csv"), Subject.of("logger", "jsonl")]

    def tell(subject: Subject, verdict: Verdict, count: int, of: int) -> None:
        told.append((subject.name, verdict.rule, count, of))

    reports = list(run_many(two, workers=workers, progress=tell))
    total = sum(len(one.verdicts) for one in reports)
    assert [(count, of) for _, _, count, of in told] == [(index, total) for index in range(1, len(told) + 1)]
    assert len(told) >= total - len(reports[1].verdicts)
    assert {(name, rule) for name, rule, _, _ in told} <= {
        (one.subject.name, verdict.rule) for one in reports for verdict in one.verdicts
    }


def test_whoever_stops_early_leaves_no_process() -> None:
    """What is under way ends at its next verdict; what waits is not begun."""
    before = set(multiprocessing.active_children())
    judged = run_many([Subject.of("logger", "csv"), *[Subject.of("strategy", "single_device")] * 3], workers=2)
    assert next(judged).passed
    begin = time.monotonic()
    judged.close()
    assert set(multiprocessing.active_children()) == before
    assert time.monotonic() - begin < 15


@pytest.mark.parametrize("workers", [1, 2])
def test_what_can_not_be_judged_is_said_by_the_driver(workers: int) -> None:
    """An error in a worker is the caller's."""
    with pytest.raises(RequestError, match="can't be broken"):
        list(run_many([Subject.of("precision", "32-true")] * 2, workers=workers, expected={"PRE-230": "no scale"}))


@pytest.mark.parametrize("by", [signal.SIGKILL, signal.SIGINT])
def test_a_command_that_is_ended_leaves_no_process(by: signal.Signals, tmp_path: Path) -> None:
    """Neither workers nor their ranks, whichever signal it was."""
    command = [sys.executable, "-m", "fabric_core", "conformance", "strategy:ddp", "strategy:fsdp", "--workers", "2"]
    with (tmp_path / "said").open("w") as said:
        process = subprocess.Popen(command, stdout=said, stderr=said, start_new_session=True)
        try:
            assert soon(lambda: len(of_session(process.pid)) >= 8, 60)  # the command, two workers, and their ranks
            os.kill(process.pid, by)
            assert process.wait(30) != 0
            assert soon(lambda: not of_session(process.pid)), of_session(process.pid)
        finally:
            for one in of_session(process.pid):
                os.kill(one, signal.SIGKILL)
            process.wait()

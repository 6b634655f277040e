"""What hangs, dies or can't run here is a verdict of its own, and leaves the rest of the run alone."""

import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest

from fabric_core.conformance import RankPool, Report, Subject, cases, run_rules
from fabric_core.conformance.bench import Bench
from fabric_core.conformance.rule import Broken
from fabric_core.conformance.rules import RULES_BY_ID
from fabric_core.conformance.runner import Outcome, judge

HOME = "tests.conformance.careless"


def _judged(kind: str, name: str, *only: str, **more: Any) -> Report:
    return run_rules(Subject.of(kind, f"{HOME}:{name}"), only=only or None, shrink=False, **more)


def test_what_hangs_outside_a_training_is_a_verdict_too() -> None:
    """The plugin is made in ranks alone: one that hangs there is named with its place, and the next rule is judged."""
    hangs, kept = _judged("wrapper", "Hanging", "WRA-401", "WRA-406", timeout=2.0).verdicts
    assert hangs.outcome == Outcome.HANGS
    assert "in wrap_module" in hangs.message
    assert kept.outcome == Outcome.KEPT


def test_what_ends_its_process_is_a_verdict_too() -> None:
    """The kit's own process goes on, and says with which code the plugin's ended."""
    broken, kept = _judged("wrapper", "Exiting", "WRA-401", "WRA-406").verdicts
    assert broken.outcome == Outcome.BROKEN
    assert "the process died (exit code 5)" in broken.message
    assert kept.outcome == Outcome.KEPT


def test_what_can_never_be_made_is_waited_for_once() -> None:
    """Every rule hangs for the same reason, and only the first one takes its time."""
    begin = time.monotonic()
    verdicts = _judged("precision", "Endless", timeout=2.0).verdicts
    assert {one.outcome for one in verdicts} == {Outcome.HANGS, Outcome.UNTESTED}
    assert time.monotonic() - begin < 20


def test_a_rank_that_dies_between_rules_is_started_again() -> None:
    """The rule that finds it gone says so; the ranks of the next one are new."""
    bench = Bench(Subject.of("strategy", f"{HOME}:DyingLater"))
    try:
        assert judge(RULES_BY_ID["STR-390"], bench, world_sizes=(1,)).outcome == Outcome.KEPT
        time.sleep(1)
        found = judge(RULES_BY_ID["STR-390"], bench, world_sizes=(1,))
        assert "(exit code 9) after it had answered the call before" in found.message
        assert judge(RULES_BY_ID["STR-390"], bench, world_sizes=(1,)).outcome == Outcome.KEPT
    finally:
        bench.close()


def test_a_hang_says_over_which_example() -> None:
    """It stands there as a script to run, like any other failure's."""
    (verdict,) = _judged("strategy", "WaitingForRows", "STR-354", world_sizes=(1,), timeout=2.0).verdicts
    assert verdict.outcome == Outcome.HANGS
    assert verdict.example is not None
    assert f"example = cases.{verdict.example}" in verdict.message


@pytest.mark.parametrize(("kind", "name", "rule"), [("strategy", "ForCuda", "STR-301"),
                                                    ("precision", "FullForCuda", "PRE-213")])  # fmt: skip
def test_a_plugin_for_other_devices_is_skipped(kind: str, name: str, rule: str) -> None:
    """It isn't broken on the CPU: the reason says which device to ask for."""
    made, skipped = _judged(kind, name, "REG-010", rule).verdicts
    assert made.outcome == Outcome.KEPT
    assert (skipped.outcome, skipped.message) == (Outcome.SKIPPED, "the plugin is for cuda: device='cuda'")


@pytest.mark.parametrize(("name", "world_sizes"), [("Pairwise", (1, 2)), ("ForCuda", (2,))])
def test_rules_of_every_kind_need_no_number_of_processes(name: str, world_sizes: tuple[int, ...]) -> None:
    """How a plugin is made is judged also where it takes no single process, or none was asked for."""
    (verdict,) = _judged("strategy", name, "REG-010", world_sizes=world_sizes).verdicts
    assert verdict.outcome == Outcome.KEPT


@pytest.mark.parametrize(("rule", "mutant", "example"), [
    ("STR-340", "Solitary", cases.Clipping(norm_type=float("inf"))),
    ("STR-357", "Hermit", cases.Message([1, b"a"], 1)),
    ("STR-396", "Solitary", cases.Script(1, ("pass", "step"))),
])  # fmt: skip
def test_snippets_of_every_type_run(rule: str, mutant: str, example: Any) -> None:
    """What stands in the message is a whole script, infinities and the kit's own types included."""
    from fabric_core.conformance.runner import _snippet

    bench = Bench(Subject.of("strategy", f"proof.mutants.strategy:{mutant}"))
    script = textwrap.dedent(_snippet(RULES_BY_ID[rule], bench, 2, example))
    with pytest.raises(Broken):
        exec(script, {"__name__": "__main__"})  # noqa: S102 - the kit's own


DRIVER = """
import os, signal, threading, time
from fabric_core.conformance import RankPool

if __name__ == "__main__":
    pool = RankPool(2)
    print(*pool.run(os.getpid), flush=True)
    threading.Timer(0.5, lambda: os.kill(os.getpid(), signal.SIGKILL)).start()
    pool.run(time.sleep, 100)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that hangs that its driver is gone")
def test_ranks_end_with_their_driver(tmp_path: Path) -> None:
    """Ranks that hang are gone soon after their driver was killed, and the forkserver and every file with them."""
    (tmp_path / "driver.py").write_text(DRIVER)
    command = [sys.executable, str(tmp_path / "driver.py")]
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, cwd=tmp_path) as driver:
        assert driver.stdout is not None
        ranks = [int(one) for one in driver.stdout.readline().split()]
        servers = {int(Path(f"/proc/{rank}/stat").read_text().rpartition(")")[2].split()[1]) for rank in ranks}
        driver.wait(30)
    deadline = time.monotonic() + 10
    while (left := [one for one in {*ranks, *servers} if _lives(one)]) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert len(ranks) == 2
    assert left == []
    assert not list(tmp_path.glob("fabric-*"))


def _lives(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_pool_closes_what_it_opened() -> None:
    """Many pools, one after the other, leave no file open."""

    def count() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    with RankPool(1) as pool:
        pool.run(os.getpid)
    before = count()
    for _ in range(3):
        with RankPool(1) as pool:
            pool.run(os.getpid)
    assert count() <= before


def test_what_trains_fewer_bits_is_judged_in_them() -> None:
    """A mistake in its gradients is seen as in 64 bits."""
    broken = _judged("strategy", "SummingSingles", "STR-301", "STR-308").verdicts
    assert [(one.outcome, one.world_size) for one in broken] == [(Outcome.BROKEN, 2)] * 2
    assert all("Error" not in one.message for one in broken)

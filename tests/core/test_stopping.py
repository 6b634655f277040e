"""``fabric.should_stop``: signals become a question that a loop asks."""

import gc
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from fabric_core import Fabric
from fabric_core.errors import MisuseError

SIGNALS = (signal.SIGTERM, signal.SIGINT)


@pytest.fixture(autouse=True)
def _handlers() -> Iterator[None]:
    """Each test begins with the handlers that a script has, and leaves them as they were."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    left = {number: signal.getsignal(number) for number in SIGNALS}
    for number, handler in before.items():
        signal.signal(number, handler)
    assert left == before


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_a_question_until_teardown(number: signal.Signals, in_memory: dict[str, Any]) -> None:
    """Before the first question a signal acts as usual, then it makes the answer true, and after teardown as usual."""
    before = signal.getsignal(number)
    with Fabric(**in_memory) as fabric:
        fabric.launch()
        assert signal.getsignal(number) == before
        assert [fabric.should_stop for _ in range(2)] == [False, False]
        signal.raise_signal(number)
        signal.raise_signal(number)
        assert [fabric.should_stop for _ in range(2)] == [True, True]
    assert signal.getsignal(number) == before


def test_a_second_interrupt_interrupts(in_memory: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C again is a ``KeyboardInterrupt``; one may come as two signals; SIGTERM stays a question."""
    now = [100.0]
    monkeypatch.setattr("fabric_core.running.stopping.time.monotonic", lambda: now[0])
    with Fabric(**in_memory) as fabric:
        assert not fabric.should_stop
        signal.raise_signal(signal.SIGINT)
        now[0] += 1.9
        signal.raise_signal(signal.SIGINT)
        now[0] += 0.2
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_a_handler_of_the_script_is_called_too(in_memory: dict[str, Any]) -> None:
    """What a script did at a signal it still does, and what was ignored stays ignored."""
    seen: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _frame: seen.append(number))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    mine = signal.getsignal(signal.SIGTERM)
    with Fabric(**in_memory) as fabric:
        answers = [fabric.should_stop]
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.raise_signal(number)
            answers.append(fabric.should_stop)
        assert answers == [False, False, True]
    assert seen == [signal.SIGTERM]
    assert signal.getsignal(signal.SIGTERM) is mine
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.mark.parametrize("first", [0, 1])
def test_two_at_once_are_both_told(first: int, in_memory: dict[str, Any]) -> None:
    """Each of two ``Fabric`` objects answers, whichever ends first."""
    fabrics = [Fabric(**{**in_memory, "plugins": None}) for _ in range(2)]
    assert not any(fabric.should_stop for fabric in fabrics)
    signal.raise_signal(signal.SIGTERM)
    assert all(fabric.should_stop for fabric in fabrics)
    for fabric in (fabrics[first], fabrics[1 - first]):
        fabric.teardown()


def test_one_that_is_dropped_takes_no_signal(in_memory: dict[str, Any]) -> None:
    """Without teardown too: when nobody can ask any more, signals act as usual; also if it went in another thread."""
    fabric = Fabric(**in_memory)
    assert not fabric.should_stop
    box = [fabric]
    del fabric

    def drop() -> None:
        box.clear()
        gc.collect()

    thread = threading.Thread(target=drop)
    thread.start()
    thread.join()
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def test_a_thread_can_ask_once_the_main_thread_has(in_memory: dict[str, Any]) -> None:
    """Only the main thread may take signals; another one is told so."""
    with Fabric(**in_memory) as fabric:
        fabric.launch()
        found: list[Any] = []

        def ask() -> None:
            try:
                found.append(fabric.should_stop)
            except MisuseError as error:
                found.append(error)

        for _ in range(2):
            thread = threading.Thread(target=ask)
            thread.start()
            thread.join()
            fabric.should_stop  # noqa: B018 - takes the signals
        assert isinstance(found[0], MisuseError)
        assert found[1] is False


def test_nothing_is_taken_where_nobody_asks() -> None:
    """A script that never asks ends at once by SIGTERM."""
    code = "import os, signal; from fabric_core import Fabric; Fabric(accelerator='cpu', devices=1).launch(); "
    code += "os.kill(os.getpid(), signal.SIGTERM)"
    done = subprocess.run([sys.executable, "-c", code], env=dict(os.environ), check=False, timeout=100)
    assert done.returncode == -signal.SIGTERM

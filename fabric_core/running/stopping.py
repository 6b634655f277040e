"""Stopping when asked: SIGTERM and SIGINT become a question that the script's loop asks."""

import signal
import threading
import time
from types import FrameType
from typing import Any, Final

import torch

from fabric_core.collectives import Collectives
from fabric_core.errors import MisuseError

__all__ = ["Stopping"]

_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT)
_AGAIN: Final = 2.0
"""After how many seconds another SIGINT is a second Ctrl-C. The first comes to a rank twice: from the terminal, and
from what started the ranks."""


class Stopping:
    """Notes SIGTERM and SIGINT, from when it is made until ``end``; which of them was ignored stays so.

    A handler of the script's own is called too. A second Ctrl-C, two seconds after the first at the earliest, does what
    it did before.

    Raises:
        MisuseError: This is not the main thread, which alone may handle signals.
    """

    def __init__(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            raise MisuseError(
                "only the main thread can take signals",
                where="fabric.should_stop",
                got=f"a first call in {threading.current_thread().name}",
                instead="call it once in the main thread, on every rank, before",
            )
        self.ended = False
        self._since: float | None = None  # when the first signal came
        self._agreed = False
        self.previous: dict[int, Any] = {}
        for number in _SIGNALS:
            handler = _living(signal.getsignal(number), number)
            if handler is not None and handler != signal.SIG_IGN:
                self.previous[number] = handler
                signal.signal(number, self)

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Note a signal, as its handler."""
        now, previous = time.monotonic(), _living(self.previous[number], number)
        again = self._since is not None and number == signal.SIGINT and now - self._since > _AGAIN
        if self.ended or again:
            signal.signal(number, previous)
            signal.raise_signal(number)
            return
        self._since = self._since or now
        if callable(previous) and previous is not signal.default_int_handler:
            previous(number, frame)

    def agreed(self, collectives: Collectives, device: torch.device) -> bool:
        """Say whether a signal has come to any rank; called on every rank."""
        if not self._agreed:
            own = torch.tensor(int(self._since is not None), dtype=torch.int32, device=device)
            self._agreed = bool(collectives.all_reduce(own, None, "max"))
        return self._agreed

    def end(self) -> None:
        """Put back the handlers that were there, where nobody has put others round this one since."""
        self.ended = True
        if threading.current_thread() is not threading.main_thread():
            return  # a signal puts it back
        for number, previous in self.previous.items():
            if signal.getsignal(number) is self:
                signal.signal(number, _living(previous, number))


def _living(handler: Any, number: int) -> Any:
    """Pass over those whose ``Fabric`` has ended."""
    while isinstance(handler, Stopping) and handler.ended:
        handler = handler.previous[number]
    return handler

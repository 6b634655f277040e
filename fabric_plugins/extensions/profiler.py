"""Where the time goes: PyTorch's profiler, with a named range for each behaviour of each plugin."""

from collections.abc import Generator
from pathlib import Path
from typing import Any

from fabric_core import around, hookimpl
from fabric_core.contracts import World
from fabric_core.errors import RequestError

__all__ = ["Profiler"]


class Profiler:
    """Writes a Chrome trace and a table for each rank: ``rank-0.json`` and ``rank-0.txt``, ...

    In the trace, and in the table, each call of a behaviour is a range of its name, such as ``strategy.backward``,
    round the operators that it ran. It begins at the launch, and ends after some steps of optimizers, at ``teardown``,
    or at the end of the script.

    Args:
        folder: Where to write.
        steps: After how many steps of optimizers it ends: a trace grows by some kilobytes an operator.
        rows: How many rows the table has; those that took longest on the CPU.

    Raises:
        RequestError: ``steps`` or ``rows`` is less than 1.
    """

    def __init__(self, folder: str | Path = "profile", steps: int = 20, rows: int = 50) -> None:
        if steps < 1 or rows < 1:
            raise RequestError("steps and rows are at least 1", where="Profiler", got=f"steps={steps}, rows={rows}")
        self._folder = Path(folder)
        self._steps, self._rows = steps, rows
        self._left = 0
        self._rank = 0
        self._profile: Any = None

    @around.every
    def _range(self, behaviour: str) -> Generator[None, None, None]:
        """Name what runs; the profiler knows the rest."""
        if self._profile is None:
            yield
            return
        from torch.profiler import record_function

        with record_function(behaviour):
            yield

    @hookimpl
    def launched(self, world: World) -> None:
        """Begin."""
        from torch.profiler import profile

        self._rank, self._left = world.global_rank, self._steps
        started = profile(acc_events=True)  # there is one cycle; PyTorch 2.12 warns without it
        started.start()
        self._profile = started

    @hookimpl
    def stepped(self) -> None:
        """Count, and end after as many steps as were asked for."""
        self._left -= 1
        if self._left == 0:
            self._end()

    @hookimpl
    def torn_down(self) -> None:
        """End, unless it has ended."""
        self._end()

    def _end(self) -> None:
        profile, self._profile = self._profile, None
        if profile is None:
            return
        profile.stop()
        self._folder.mkdir(parents=True, exist_ok=True)
        name = f"rank-{self._rank}"
        profile.export_chrome_trace(str(self._folder / f"{name}.json"))
        table = profile.key_averages().table(sort_by="cpu_time_total", row_limit=self._rows)
        (self._folder / f"{name}.txt").write_text(table, encoding="utf-8")

"""Interleaved measuring: every contestant runs once a round, so that a slow moment hits all alike."""

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence

__all__ = ["command_seconds", "fastest", "medians", "table"]


def medians(contestants: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, float]:
    """Measure every contestant once a round, in turn.

    Args:
        contestants: For each name a function that gives one measurement.
        rounds: How many rounds count; one more goes before to warm up.

    Returns:
        The median of each.
    """
    return {name: statistics.median(values) for name, values in _measured(contestants, rounds).items()}


def fastest(contestants: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, float]:
    """Measure as ``medians`` does, and give the fastest round of each.

    It is what a call costs, for calls of microseconds: all that is slower is the machine doing something else.
    """
    return {name: min(values) for name, values in _measured(contestants, rounds).items()}


def _measured(contestants: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    values: dict[str, list[float]] = {name: [] for name in contestants}
    for round_ in range(rounds + 1):
        for name, measure in contestants.items():
            value = measure()
            if round_ > 0:
                values[name].append(value)
    return values


def command_seconds(*arguments: str) -> float:
    """Run this interpreter in a fresh process and give the wall time in seconds; a failure is shown and raised."""
    # What was imported once is compiled, as it is once it is installed: the round that warms up writes it.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    start = time.perf_counter()
    done = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - start
    if done.returncode != 0:
        raise RuntimeError(f"the benchmarked command failed:\n{done.stderr}")
    return seconds


def table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Give a Markdown table under a title."""
    lines = [f"## {title}", "", "| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([*lines, ""])

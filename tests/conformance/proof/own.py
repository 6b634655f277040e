"""The project's own tests against the project's own code: every change of ``proof.operators`` to it should fail one.

``python -m proof.own --trace`` runs the tests once and keeps which of them runs which line; ``python -m proof.own
--sample N`` then changes N places, one at a time, in copies of the tree, and runs the tests that come by, the quickest
first, until one fails. A change that none notices is a survivor: a test is missing, or it is listed in
``proof.own_equivalent`` with the reason why no test could notice it. ``--record`` adds what was seen to the record,
from which the documentation's page is made.

Of the conformance kit itself only the rules' surroundings would count; it is left out, because its proof is the matrix.
"""

import argparse
import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from queue import SimpleQueue
from typing import Final

from proof.operators import Change, changes
from proof.own_equivalent import EQUIVALENT
from proof.record import Record, add_choices

__all__ = ["RECORD", "Own", "population", "record"]

RECORD: Final = Path(__file__).with_name("own.json")
"""What was seen of every change that was judged: the test that failed, or ``null``."""

_ROOT: Final = Path(__file__).parents[3]
_TRACES: Final = _ROOT / "build" / "traces"
_PACKAGES: Final = ("fabric_core", "fabric_plugins")
_LEFT_OUT: Final = "fabric_core.conformance"
_DRIVER: Final = "none|"
"""How contexts of pytest's own process begin; those of processes that it starts are what pytest tells them."""
_STAGE: Final = re.compile(r" \((setup|call|teardown)\)$")
_LIMIT: Final = 300.0
_FIRST: Final = 20
"""So many tests are run before the rest: most changes fail one of them, and to collect hundreds takes longer."""


@dataclass(frozen=True)
class Own:
    """One change of the project's code.

    Args:
        path: The file, from the tree's root.
        source: Its text.
        change: The change.
    """

    path: str
    source: str
    change: Change

    @property
    def key(self) -> str:
        """Its name."""
        return self.change.key

    @property
    def text(self) -> str:
        """The changed text: what is beside the place stays, comments too, where the place can be cut out."""
        old, new = self.change.old, ast.unparse(self.change.new)
        lines = self.source.encode().splitlines(keepends=True)
        assert old.end_lineno is not None
        assert old.end_col_offset is not None
        before = b"".join(lines[: old.lineno - 1]) + lines[old.lineno - 1][: old.col_offset]
        after = lines[old.end_lineno - 1][old.end_col_offset :] + b"".join(lines[old.end_lineno :])
        middle = f"({new})" if isinstance(old, ast.expr) else new.replace("\n", "\n" + " " * old.col_offset)
        text = (before + middle.encode() + after).decode()
        try:
            same = ast.unparse(ast.parse(text)) == self.change.source
        except SyntaxError:  # inside an f-string, whose parts have no places of their own
            same = False
        return text if same else self.change.source

    @property
    def lines(self) -> range:
        """The lines of the place."""
        return range(self.change.old.lineno, (self.change.old.end_lineno or self.change.old.lineno) + 1)


@cache
def population() -> tuple[Own, ...]:
    """Give every change of the project's code, but of the kit's."""
    found: list[Own] = []
    for package in _PACKAGES:
        for path in sorted((_ROOT / package).rglob("*.py")):
            module = ".".join(path.relative_to(_ROOT).with_suffix("").parts)
            if module.startswith(_LEFT_OUT) or path.name == "__init__.py":
                continue
            source = path.read_text(encoding="utf-8")
            found += [Own(str(path.relative_to(_ROOT)), source, one) for one in changes(source, module)]
    return tuple(found)


class _Traces:
    """Which tests run which lines, and how long each lasts."""

    def __init__(self, seconds: float) -> None:
        from coverage import CoverageData

        self._data = CoverageData(str(_TRACES / "lines"))
        self._data.read()
        self._within = seconds
        facts: dict[str, dict[str, object]] = json.loads((_TRACES / "tests.json").read_text(encoding="utf-8"))
        self._tests = {name: one for name, one in facts.items() if one["seconds"] and not one["failed"]}

    def tests_of(self, one: Own) -> list[str]:
        """Give the tests that run a line of the place, or its module where the place runs at import; quickest first."""
        by_line = self._data.contexts_by_lineno(one.path)
        names = self._among(by_line, one.lines) or self._among(by_line, by_line)
        chosen: list[str] = []
        total = 0.0
        for name in sorted(names, key=self._seconds):
            total += self._seconds(name)
            if chosen and total > self._within:
                break
            chosen.append(name)
        return chosen

    def _among(self, by_line: dict[int, list[str]], lines: Sequence[int] | dict[int, list[str]]) -> set[str]:
        names = {context for line in lines for context in by_line.get(line, ())}
        found: set[str] = set()
        for context in names:
            name = _STAGE.sub("", context.removeprefix(_DRIVER))
            known = self._tests.get(name)
            if known is None:
                continue
            found.add(name)
            if known["pool"] and not context.startswith(_DRIVER):  # ranks stay up for all tests of a file
                file = name.partition("::")[0]
                found |= {other for other, facts in self._tests.items() if other.startswith(file) and facts["pool"]}
        return found

    def _seconds(self, name: str) -> float:
        return float(str(self._tests[name]["seconds"]))


_CONFIGURATION: Final = """\
[run]
source = fabric_core,fabric_plugins
data_file = {folder}/lines
relative_files = true
parallel = true
patch = _exit,subprocess
context = ${{PYTEST_CURRENT_TEST-none}}
disable_warnings = no-data-collected,module-not-measured,module-not-imported,couldnt-parse
"""


def _trace(arguments: Sequence[str]) -> int:
    """Run the tests once, in all processes under coverage."""
    shutil.rmtree(_TRACES, ignore_errors=True)
    _TRACES.mkdir(parents=True)
    configuration = _TRACES / "coveragerc"
    configuration.write_text(_CONFIGURATION.format(folder=_TRACES), encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    coverage = [sys.executable, "-m", "coverage"]
    subprocess.run(
        [*coverage, "run", f"--rcfile={configuration}", "-m", "pytest", "-q", "-p", "proof.tracing", *arguments],
        env=environment, cwd=_ROOT, check=False,
    )  # fmt: skip
    return subprocess.run(
        [*coverage, "combine", f"--rcfile={configuration}", "--quiet"], cwd=_ROOT, check=False
    ).returncode


_RUNNER: Final = """\
import json, os, signal, sys, time
import pytest, torch
for line in sys.stdin:
    order = json.loads(line)
    child = os.fork()
    if child == 0:
        os.setsid()
        out = os.open(order["out"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for number, file in ((0, os.open(os.devnull, os.O_RDONLY)), (1, out), (2, out)):
            os.dup2(file, number)
        sys.exit(int(pytest.main(order["arguments"])))
    end = time.monotonic() + order["limit"]
    while (ended := os.waitpid(child, os.WNOHANG))[0] == 0 and time.monotonic() < end:
        time.sleep(0.05)
    if ended[0] == 0:
        os.killpg(child, signal.SIGKILL)
        os.waitpid(child, 0)
    print("late" if ended[0] == 0 else os.waitstatus_to_exitcode(ended[1]), flush=True)
"""
"""Imports once what every run of pytest needs, and runs each in a fork of itself."""


class _Copy:
    """A copy of the tree, and a process that runs tests in it."""

    def __init__(self, folder: Path, names: Sequence[str]) -> None:
        self._folder = folder / "tree"
        self._out = folder / "out"
        for name in names:
            (self._folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(_ROOT / name, self._folder / name)
        self._runner = subprocess.Popen(
            [sys.executable, "-c", _RUNNER], cwd=self._folder, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": str(self._folder), "PYTHONDONTWRITEBYTECODE": "1"},
        )  # fmt: skip

    def judged(self, one: Own, tests: Sequence[str]) -> tuple[str | None, float]:
        """Run tests over a change until one fails; give its name, or ``None``, and the seconds."""
        begin = time.perf_counter()
        place = self._folder / one.path
        place.write_text(one.text, encoding="utf-8")
        try:
            failed = self._failing(tests[:_FIRST]) or self._failing(tests[_FIRST:])
            return failed, time.perf_counter() - begin
        finally:
            place.write_text(one.source, encoding="utf-8")

    def _failing(self, tests: Sequence[str]) -> str | None:
        if not tests:
            return None
        arguments = ["-x", "-q", "--no-header", "--tb=no", "-p", "no:cacheprovider", *tests]
        assert self._runner.stdin is not None
        assert self._runner.stdout is not None
        order = {"arguments": arguments, "limit": _LIMIT, "out": str(self._out)}
        self._runner.stdin.write(json.dumps(order) + "\n")
        self._runner.stdin.flush()
        code = self._runner.stdout.readline().strip()
        if code == "0":
            return None
        printed = self._out.read_text(encoding="utf-8", errors="replace").splitlines()
        failed = [line.partition(" ")[2] for line in printed if line.startswith(("FAILED ", "ERROR "))]
        if not failed:
            return f"(pytest ends: {code})"
        return max((one for one in tests if failed[0].startswith(one)), key=len, default=failed[0].partition(" - ")[0])

    def close(self) -> None:
        """End the process."""
        self._runner.communicate()


class _Copies:
    """Copies of the tree, one for each that works at a time."""

    def __init__(self, folder: Path, count: int) -> None:
        listed = subprocess.run(
            ["git", "ls-files"],  # noqa: S607 - whoever has a checkout has git
            cwd=_ROOT, check=True, capture_output=True, text=True,
        )  # fmt: skip
        self._all = [_Copy(folder / str(index), listed.stdout.splitlines()) for index in range(count)]
        self._free: SimpleQueue[_Copy] = SimpleQueue()
        for copy in self._all:
            self._free.put(copy)

    def judged(self, one: Own, tests: Sequence[str]) -> tuple[str | None, float]:
        """Judge in a copy that is free."""
        copy = self._free.get()
        try:
            return copy.judged(one, tests)
        finally:
            self._free.put(copy)

    def close(self) -> None:
        """End what runs the tests."""
        for copy in self._all:
            copy.close()


def record() -> Record:
    """Read what was seen of every change."""
    return Record(RECORD, [one.key for one in population()], EQUIVALENT)


def _run(given: argparse.Namespace, chosen: Sequence[Own]) -> Iterator[tuple[Own, str | None, float, int]]:
    tests, workers = given.tests, given.workers
    traces = None if tests else _Traces(given.seconds)
    selected = [list(tests) if traces is None else traces.tests_of(one) for one in chosen]
    with (
        tempfile.TemporaryDirectory(prefix="fabric-own-") as folder,
        closing(_Copies(Path(folder), workers)) as copies,
        ThreadPoolExecutor(workers) as pool,
    ):
        verdicts = pool.map(lambda one, some: copies.judged(one, some) if some else (None, 0.0), chosen, selected)
        for one, some, (test, seconds) in zip(chosen, selected, verdicts, strict=True):
            yield one, test, seconds, len(some)


def main(arguments: Sequence[str] | None = None) -> int:
    """Judge; the exit code is 1 where one survives that isn't listed as equivalent, nor known to survive."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trace", action="store_true", help="run the tests under coverage first; then no judging")
    parser.add_argument("--tests", nargs="*", default=[], help="run these, not those that come by the place")
    parser.add_argument("--seconds", type=float, default=60.0, help="of tests, as traced, for one change")
    add_choices(parser)
    given = parser.parse_args(arguments)
    if given.trace:
        return _trace(given.tests)
    kept = record()
    known = set(kept.survivors)
    chosen = [population()[index] for index in kept.choose(given)]
    sys.stdout.write(f"{len(chosen)} of {len(population())} changes, seed {given.seed}\n")
    fresh = 0
    for one, test, seconds, count in _run(given, chosen):
        fresh += test is None and one.key not in EQUIVALENT and one.key not in known
        kept.seen[one.key] = test
        sys.stdout.write(f"{'killed' if test else 'SURVIVES'} {seconds:5.1f} s {count:4} tests  {one.key}\n")
        sys.stdout.write(f"    {test}\n" if test else "")
        sys.stdout.flush()
        if given.record:
            kept.save()
    sys.stdout.write(f"{fresh} new survivors; score so far {kept.score:.1%}\n")
    return 1 if fresh else 0


if __name__ == "__main__":
    sys.exit(main())

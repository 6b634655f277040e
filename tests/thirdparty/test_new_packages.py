"""``fabric-core new`` makes packages that install, are found by name, and keep every rule of their kind."""

import io
import json
import os
import subprocess
import sys
import tokenize
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fabric_core.kinds import EXTENSION, KINDS

pytestmark = pytest.mark.timeout(600)  # two minutes each where cores are free

ALL = [*KINDS, EXTENSION]


def _new(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "fabric_core", "new", *arguments],
        cwd=folder,
        env={**os.environ, "COLUMNS": "300"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


@pytest.fixture(scope="module")
def environment(make_environment: Callable[[str], Any]) -> Any:
    """Give an environment with a package of each kind, each under the name ``demo``."""
    environment = make_environment("new")
    folders = []
    for kind in ALL:
        done = _new(environment.folder, kind, "demo", kind, "--distribution", f"acme-{kind}", "--author", "Acme")
        assert done.returncode == 0, done.stderr
        folders.append(str(environment.folder / kind))
    # Editable, as an author installs it; several in one call, for the time that each takes.
    environment.pip("install", "--no-deps", "--no-index", "--no-build-isolation", *[f"-e{one}" for one in folders])
    return environment


def _lines_of_code(source: str) -> int:
    """Count the lines that hold more than comments and docstrings."""
    kept = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    lines: set[int] = set()
    previous = tokenize.NEWLINE
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        docstring = token.type == tokenize.STRING and previous in {tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT}
        if token.type not in kept and not docstring:
            lines.update(range(token.start[0], token.end[0] + 1))
        if token.type not in {tokenize.COMMENT, tokenize.NL}:
            previous = token.type
    return len(lines)


def test_lines_of_code_are_counted() -> None:
    """Docstrings and comments count as none, each line of a call counts."""
    assert (
        _lines_of_code('"""A page."""\n\n# a word\nx = f(  # two\n    1,\n)\n\n\ndef f() -> None:\n    """Do."""\n')
        == 4
    )


@pytest.mark.authors
def test_each_is_found_by_its_name(environment: Any) -> None:
    """A package of each kind is listed with its distribution, and loads."""
    done = environment.run("-m", "fabric_core", "plugins", "list", "--json")
    listed = {(one["kind"], one["distribution"]) for one in json.loads(done.stdout) if one["name"] == "demo"}
    assert listed == {(kind, f"acme-{kind}") for kind in ALL}
    done = environment.run("-m", "fabric_core", "plugins", "doctor", "--json")
    statuses = {one["kind"]: one["status"] for one in json.loads(done.stdout) if one["name"] == "demo"}
    assert set(statuses) == set(ALL)
    assert set(statuses.values()) == {"ok"}, statuses


def test_a_generated_strategy_is_short(tmp_path: Path) -> None:
    """It has at most 30 lines of code."""
    assert _new(tmp_path, "strategy", "demo").returncode == 0
    source = (tmp_path / "demo" / "fabric_demo" / "__init__.py").read_text()
    assert _lines_of_code(source) <= 30


def test_what_is_there_is_left(tmp_path: Path) -> None:
    """A folder that exists is an error, and stays as it was."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "note").write_text("keep")
    done = _new(tmp_path, "strategy", "mine")
    assert done.returncode == 2
    assert "there is something already, which is left as it is" in done.stderr
    assert [one.name for one in (tmp_path / "mine").iterdir()] == ["note"]
    assert [one.name for one in tmp_path.iterdir()] == ["mine"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(("strategi", "mine"), "there is no such kind"), (("strategy", "Mine!"), "a name is written in small letters")],
)
def test_a_wrong_call_is_told_what_to_write(tmp_path: Path, arguments: tuple[str, str], said: str) -> None:
    """Without a traceback, and without a folder."""
    done = _new(tmp_path, *arguments)
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_the_words_are_the_author_s(tmp_path: Path) -> None:
    """Options go where they belong; a name that is no identifier makes one."""
    done = _new(tmp_path, "precision", "8-bit", "--author", "A. Author", "--description", "Eight bits")
    assert done.returncode == 0, done.stderr
    made = tmp_path / "8-bit"
    project = (made / "pyproject.toml").read_text()
    assert 'description = "Eight bits."' in project
    assert '"8-bit" = "fabric_8_bit:Precision8Bit"' in project
    assert "A. Author" in (made / "LICENSE").read_text()
    assert 'Fabric(precision="8-bit")' in (made / "README.md").read_text()


@pytest.mark.authors
@pytest.mark.parametrize("kind", ALL)
def test_each_passes_its_own_tests(environment: Any, kind: str) -> None:
    """As an author's first command runs them: every rule of its kind is kept."""
    done = environment.run("-m", "pytest", "-q", "-p", "no:cacheprovider", kind)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "passed" in done.stdout


@pytest.mark.authors
@pytest.mark.parametrize("kind", ALL)
def test_each_passes_strict_type_checks(environment: Any, kind: str) -> None:
    """With the settings that the package came with."""
    script = "import os, sys; os.chdir(sys.argv.pop()); from mypy.__main__ import console_entry; console_entry()"
    done = environment.run("-c", script, kind, MYPY_CACHE_DIR=str(environment.folder / "mypy"))
    assert done.returncode == 0, done.stdout + done.stderr

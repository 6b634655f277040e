"""Every command of the command line keeps the same promises: JSON, an example, exit codes, completion, no traceback."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import typer
from rich.console import Console

from fabric_core import cli
from fabric_core.cli import _doctor, _output
from fabric_core.cli._output import progress
from fabric_core.conformance.rules import rules_for
from fabric_core.kinds import KINDS


def _commands(command: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    # Not by class: typer brings a click of its own in newer versions.
    for name, one in getattr(command, "commands", {}).items():
        yield from _commands(one, (*path, name))
    if not hasattr(command, "commands"):
        yield " ".join(path), command


COMMANDS = dict(_commands(typer.main.get_command(cli._make_app())))

each_command = pytest.mark.parametrize("name", COMMANDS)


@pytest.fixture
def fabric(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """Give a function that runs the command and returns exit code, output and errors."""

    def run(*arguments: str) -> tuple[Any, str, str]:
        monkeypatch.setattr("sys.argv", ["fabric-core", *arguments])
        code: Any = None
        try:
            cli.main()
        except SystemExit as end:
            code = end.code
        return code, *capsys.readouterr()

    return run


def test_the_commands_are_found() -> None:
    """Those in groups too: what follows is about all of them."""
    assert {"explain", "plugins list", "checkpoint verify"} <= set(COMMANDS)


@each_command
def test_every_command_prints_json(name: str) -> None:
    """It has the option ``--json``."""
    assert any("--json" in parameter.opts for parameter in COMMANDS[name].params)


@each_command
def test_a_configuration_file_is_asked_for_alike_by_every_command(name: str) -> None:
    """Where a command takes one, its help says of which formats; every command that is asked for a plan takes one."""
    options = {opt: parameter for parameter in COMMANDS[name].params for opt in parameter.opts}
    assert ("--config" in options) >= ("--strategy" in options)
    if "--config" in options:
        assert options["--config"].help == "A configuration file, TOML or YAML."


@each_command
def test_the_help_of_every_command_has_an_example_that_can_be_parsed(name: str) -> None:
    """The example begins with the command's own name, and its options and arguments are those that there are."""
    begin = f"Example: fabric-core {name}"
    example = COMMANDS[name].epilog
    assert example.startswith(begin)
    words = example.removeprefix(begin).partition(">")[0].split()
    COMMANDS[name].make_context(name, words).close()
    rules = {rule.id for kind in KINDS for rule in rules_for(kind)}
    assert {word for word in words if re.fullmatch(r"[A-Z]{3}-[0-9]+", word)} <= rules


@pytest.mark.parametrize(
    ("arguments", "kind", "what"),
    [
        (("explain", "--strategy", "dpp"), "UnknownPluginError", "there is no strategy 'dpp'"),
        (("explain", "--config", "absent.toml"), "RequestError", "the configuration file can't be read"),
        (("plugins", "show", "dpp"), "UnknownPluginError", "there is no plugin 'dpp'"),
        (("doctor", "--strategy", "dpp"), "UnknownPluginError", "there is no strategy 'dpp'"),
        (("checkpoint", "info", "absent"), "NoCheckpointError", "there is no checkpoint"),
        (("checkpoint", "diff", "absent"), "MissingParameter", "Missing argument"),
        (("explain", "--strateg", "ddp"), "NoSuchOption", "No such option: --strateg"),
        (("explain", "--num-nodes", "two"), "BadParameter", "Invalid value for '--num-nodes'"),
        (("contract", "samplers"), "RequestError", "there is no such kind"),
        (("conformance", "strategy"), "RequestError", "what to judge can't be parsed"),
        (("new", "strategy", "A B"), "RequestError", "a name is written in small letters"),
        (("run", "absent.py"), "RequestError", "there is no such script"),
    ],
)
def test_a_mistake_is_a_message_or_json(fabric: Any, arguments: tuple[str, ...], kind: str, what: str) -> None:
    """Exit code 2 and no traceback; with ``--json`` standard output is one JSON document, which says the same."""
    code, out, err = fabric(*arguments)
    assert code == 2
    assert not out
    assert what in " ".join(err.split())
    assert "Traceback" not in err
    command, *rest = arguments
    group = [rest.pop(0)] if command in {"plugins", "checkpoint"} else []
    code, out, err = fabric(command, *group, "--json", *rest)
    assert code == 2
    assert not err
    error = json.loads(out)["error"]
    assert error["type"] == kind
    assert error["what"].startswith(what)
    assert set(error) == {"type", "what", "where", "got", "instead"}


def test_without_a_command_there_is_help(fabric: Any) -> None:
    """That of all commands; what was asked for was given, so the exit code is 0."""
    code, out, _ = fabric()
    assert code == 0
    assert all(name.partition(" ")[0] in out for name in COMMANDS)


def test_json_says_what_the_text_says(fabric: Any, tmp_path: Path) -> None:
    """A contract's page, and where a new package lies."""
    page = fabric("contract", "strategy")[1]
    assert json.loads(fabric("contract", "strategy", "--json")[1]) == {"kind": "strategy", "page": page.rstrip("\n")}
    folder = str(tmp_path / "mine")
    code, out, _ = fabric("new", "strategy", "my_own", folder, "--author", "Ada", "--description", "Mine.", "--json")
    expected = {"folder": folder, "kind": "strategy", "name": "my_own", "distribution": "fabric-my-own"}
    assert (code, json.loads(out)) == (0, expected)


@pytest.mark.parametrize(("status", "code"), [("ok", 0), ("not installed", 0), ("crashed", 1)])
def test_the_doctor_of_plugins_says_no_where_one_is_unsound(
    fabric: Any, monkeypatch: pytest.MonkeyPatch, status: str, code: int
) -> None:
    """As a table and as JSON, with the exit code."""
    finding = _doctor.Finding("strategy", "mine", "acme 1.0", status, "why", 1.256)
    monkeypatch.setattr(_doctor, "examine", lambda _registry, timeout: [finding] * int(timeout == 7))
    found, out, _ = fabric("plugins", "doctor", "--timeout", "7")
    cells = [cell.strip() for cell in out.splitlines()[-2].split("│")[1:-1]]
    assert (found, cells) == (code, ["strategy", "mine", "acme 1.0", status, "1.26", "why"])
    found, out, _ = fabric("plugins", "doctor", "--timeout", "7", "--json")
    assert (found, json.loads(out)) == (code, [asdict(finding)])


def test_what_the_system_refuses_is_a_mistake_too(fabric: Any, tmp_path: Any) -> None:
    """A folder where a file should be made: the system's words, and no traceback."""
    (tmp_path / "file").touch()
    code, _, err = fabric("new", "strategy", "mine", str(tmp_path / "file" / "below"), "--author", "Ada")
    assert code == 2
    assert "Not a directory" in err or "File exists" in err
    assert "Traceback" not in err


def test_a_bug_has_an_exit_code_of_its_own(fabric: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """3, with the traceback on the error stream, and JSON where JSON was asked for."""

    def broken(_kind: str) -> str:
        raise KeyError("broken")

    monkeypatch.setattr("fabric_core.cli.contract_page", broken)
    code, out, err = fabric("contract", "strategy", "--json")
    assert (code, json.loads(out)["error"]["type"]) == (3, "KeyError")
    assert "Traceback" in err
    assert fabric("contract", "strategy")[:2] == (3, "")


def test_an_interrupt_ends_quietly(fabric: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exit code 130, as shells have it."""

    def interrupted(_kind: str) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr("fabric_core.cli.contract_page", interrupted)
    code, _, err = fabric("contract", "strategy")
    assert (code, "Traceback" in err) == (130, False)


def test_a_reader_that_has_seen_enough_gets_no_traceback() -> None:
    """``| head -1``: what it saw, and nothing on the error stream."""
    done = subprocess.run(
        ["bash", "-c", f"'{sys.executable}' -m fabric_core contract strategy | head -1"],  # noqa: S607 - the reader's
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.stdout == "# The contract of a strategy\n"
    assert not done.stderr


@pytest.mark.parametrize(
    ("words", "completed"),
    [
        ("fabric-core pl", "plugins"),
        ("fabric-core explain --strategy mod", "model_parallel"),
        ("fabric-core plugins show chan", "channels_last"),
        ("fabric-core explain --prec", "--precision"),
    ],
)
def test_a_shell_completes_commands_options_and_names(
    fabric: Any, monkeypatch: pytest.MonkeyPatch, words: str, completed: str
) -> None:
    """As bash asks for it; the script that it needs is printed by ``--show-completion``."""
    monkeypatch.setenv("_FABRIC_CORE_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", words)
    monkeypatch.setenv("COMP_CWORD", str(len(words.split()) - 1))
    assert completed in fabric()[1].split()


def test_the_script_for_a_shell_can_be_had(fabric: Any) -> None:
    """It is what ``--install-completion`` would install."""
    assert "_FABRIC_CORE_COMPLETE" in fabric("--show-completion", "bash")[1]


@pytest.mark.parametrize(("seconds", "terminal", "shown"), [(0.4, True, True), (0.0, True, False), (0.4, False, False)])
def test_a_bar_comes_late_and_on_a_terminal_alone(
    monkeypatch: pytest.MonkeyPatch, seconds: float, terminal: bool, shown: bool
) -> None:
    """What is quick shows none, and what goes to a file has none."""
    import io

    written = io.StringIO()
    console = Console(file=written, force_terminal=terminal, width=120)
    monkeypatch.setattr(_output, "Console", lambda **_: console)
    monkeypatch.setattr(_output, "_PATIENCE", 0.1)
    for total, in_bytes in ((2, False), (4_000_000, True)):
        with progress("reading", total, in_bytes=in_bytes) as advance:
            advance(total / 2, "the first half")
            time.sleep(seconds)
            advance(total / 2, "the second half")
    for text in ("reading", "the first half", "1/2", "2.0/4.0 MB"):
        assert (text in written.getvalue()) == shown


_HANDING_ON = """
import os
from fabric_core.cli._output import _data_alone, handing_on
with handing_on():
    os.write(1, b'data without --json\\n')
with _data_alone():
    os.write(1, b'before\\n')
    with handing_on():
        os.write(1, b'data of a rank\\n')
    os.write(1, b'after\\n')
os.write(1, b'the end\\n')
"""


def test_standard_output_is_handed_on_to_ranks_for_as_long_as_they_run() -> None:
    """What is printed before and after goes to the error stream, until the command is over."""
    done = subprocess.run(
        [sys.executable, "-c", _HANDING_ON], capture_output=True, text=True, check=True, timeout=100
    )  # fmt: skip
    assert done.stdout.splitlines() == ["data without --json", "data of a rank", "the end"]
    assert done.stderr.splitlines() == ["before", "after"]


_LOUD = """
import os
from fabric_plugins.precisions.full import FullPrecision
class Loud(FullPrecision):
    def __init__(self, options):
        super().__init__(options)
        print('made')
        os.write(1, b'written\\n')
"""
_MAIN = "import fabric_core.cli, loud; fabric_core.register('precision', 'loud', loud.Loud); fabric_core.cli.main()"
_WITH_PLUGINS = {
    "explain": ["--precision", "loud"],
    "plugins why": ["single_device", "--precision", "loud"],
    "plugins matrix": ["--accelerator", "cpu", "--strategy", "single_device", "--devices", "1", "--precision", "loud"],
    "config make": ["made.toml", "--precision", "loud", "--accelerator", "cpu"],
    "conformance": ["precision:loud:Loud", "--rule", "PRE-201"],
    "doctor": ["--accelerator", "cpu", "--strategy", "single_device", "--devices", "1", "--precision", "loud"],
}


@pytest.mark.parametrize("name", _WITH_PLUGINS)
def test_what_a_plugin_prints_is_not_among_the_data(name: str, tmp_path: Path) -> None:
    """Whoever prints, Python or a library below it, in this process or a rank."""
    (tmp_path / "loud.py").write_text(_LOUD, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-c", _MAIN, *name.split(), *_WITH_PLUGINS[name], "--json"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )
    json.loads(done.stdout)
    assert {"made", "written"} <= set(done.stderr.split()), done.stderr

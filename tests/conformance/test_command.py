"""The command `fabric-core conformance`: what it takes, what it prints, and how it ends."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fabric_core import cli
from fabric_core.cli import _conformance
from fabric_core.conformance.rules import rules_for

LAZY = "precision:proof.mutants.precision:Lazy"


@pytest.fixture
def conformance(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """Give a function that runs the command and returns exit code, output and errors."""

    def run(*arguments: str) -> tuple[Any, str, str]:
        monkeypatch.setattr("sys.argv", ["fabric-core", "conformance", *arguments])
        monkeypatch.setenv("COLUMNS", "250")
        code: Any = 0
        try:
            cli.main()
        except SystemExit as end:
            code = end.code or 0
        return code, *capsys.readouterr()

    return run


def test_a_right_plugin_ends_with_zero_and_a_wrong_one_with_one(conformance: Any) -> None:
    """The wrong one's failure is printed whole; the last line counts."""
    code, out, _ = conformance("precision:32-true", "--rule", "PRE-228")
    assert (code, out) == (0, f"precision 32-true: judged by 1 of {len(rules_for('precision'))} rules (1 kept)\n")
    code, out, _ = conformance(LAZY, "--rule", "PRE-228")
    assert code == 1
    assert "instead: call step(closure) in optimizer_step" in out
    assert out.endswith("Lazy: breaks the contract (1 broken)\n")


def test_several_plugins_in_one_call_give_one_report_each(conformance: Any) -> None:
    """As JSON alone, in the order asked for; one that is wrong decides the exit code."""
    code, out, _ = conformance("precision:32-true", LAZY, "--rule", "PRE-228", "--json")
    assert code == 1
    assert [(one["plugin"]["name"], one["passed"]) for one in json.loads(out)] == [("32-true", True), ("Lazy", False)]


def test_a_device_is_for_those_of_several_that_need_one(conformance: Any) -> None:
    """An accelerator among them has its own."""
    asked = ("accelerator:cpu", "precision:32-true", "--device", "cpu", "--rule", "REG-005", "--json")
    code, out, _ = conformance(*asked)
    assert code == 0
    assert [one["device"] for one in json.loads(out)] == ["the kit's own accelerator", "cpu"]


def test_a_star_is_every_plugin_of_a_kind(conformance: Any) -> None:
    """Each class with its options once: an alias is no second plugin."""
    code, out, _ = conformance("logger:*", "--rule", "REG-005", "--json")
    names = [one["plugin"]["name"] for one in json.loads(out)]
    assert code == 0
    assert {"csv", "tensorboard"} <= set(names)
    assert len(names) == len(set(names))


def test_a_star_leaves_out_what_needs_options_and_says_so(conformance: Any) -> None:
    """A plugin that nobody can make without options would break every rule by that alone."""
    code, out, err = conformance("strategy:*", "--rule", "REG-005", "--json")
    assert code == 0
    assert "model_parallel" not in {one["plugin"]["name"] for one in json.loads(out)}
    assert "strategy model_parallel: not judged: option 'parallelize_fn'" in err
    assert "strategy:model_parallel:NAME=VALUE" in err


def test_a_terminal_shows_how_far_it_is(
    conformance: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On one line of the error stream, which is cleared at the end; a file gets nothing of it."""
    rules = ("--rule", "PRE-228", "--rule", "PRE-201")
    assert conformance("precision:32-true", *rules)[2] == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    code, out, err = conformance("precision:32-true", *rules)
    assert (code, "\r" in out) == (0, False)
    assert [text.partition(",")[0] for text in err.split("\r") if text.strip()] == [
        "precision 32-true: 1 of 2 rules", "precision 32-true: 2 of 2 rules",
    ]  # fmt: skip
    assert err.endswith("\r" + " " * 79 + "\r")


def test_the_time_left_is_what_the_rules_took_so_far(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """After 12 s for three of four rules: 4 s. A shorter line covers a longer one."""
    clock = iter((100.0, 110.0, 112.0))
    monkeypatch.setattr(_conformance, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    progress = _conformance._Progress()
    ddp: Any = SimpleNamespace(kind="strategy", name="ddp")
    for count, rule in ((1, "STR-301"), (3, "STR-302")):
        verdict: Any = SimpleNamespace(rule=rule)
        progress(ddp, verdict, count, 4)
    assert capsys.readouterr().err == (
        f"\r{'strategy ddp: 1 of 4 rules, STR-301, some 30 s left':<79}"
        f"\r{'strategy ddp: 3 of 4 rules, STR-302, some 4 s left':<79}"
    )


def test_nothing_checked_ends_with_one(conformance: Any) -> None:
    """A run in which every rule was skipped isn't green."""
    code, out, _ = conformance("strategy:ddp:bucket_cap_mb=1", "--rule", "STR-319")
    assert code == 1
    assert "(1 skipped)" in out


def test_expected_failures_come_with_their_reason(conformance: Any) -> None:
    """What is in --xfail and broken ends with zero; a reason is needed."""
    assert conformance(LAZY, "--rule", "PRE-228", "--xfail", "PRE-228=https://x.org/1 why")[0] == 0
    code, _, err = conformance(LAZY, "--rule", "PRE-228", "--xfail", "PRE-228")
    assert code == 2
    assert "xfail gives no reason" in err


def test_the_report_lies_where_it_is_asked_for(conformance: Any, tmp_path: Path) -> None:
    """In a folder that is made; a rule left out shows, and options and device are stated."""
    path = tmp_path / "new" / "report.json"
    asked = ("precision:16-mixed:init_scale=256.0", "--rule", "PRE-230", "--device", "cpu", "--seed", "3")
    assert conformance(*asked, "--report", str(path))[0] == 0
    report = json.loads(path.read_text())
    assert (report["device"], report["seed"], report["complete"], report["passed"]) == ("cpu", 3, False, True)
    assert report["plugin"]["options"] == {"init_scale": "256.0"}
    assert report["profiles"] == {}
    assert path.with_suffix(".md").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("strategy",), "what to judge"),
        (("strategyy:ddp",), "no such kind"),
        (("strategy:dpp",), "did you mean 'ddp'"),
        (("strategy:ddp:bucket_cap_mb=1,2",), "name=value"),
        (("strategy:ddp", "--rule", "PRE-999"), "no such rule"),
        (("strategy:ddp", "--world-size", "3"), "number of processes"),
        (("strategy:ddp", "--device", "nope"), "no accelerator 'nope'"),
        (("accelerator:cpu", "--device", "cpu"), "an accelerator runs on its own devices"),
        (("strategy:ddp", "--report", "x.md"), "x.json"),
        (("strategy:ddp", "strategy:fsdp", "--report", "x.json"), "one report is for one plugin"),
        (("strategy:ddp", "--report", "/proc/no/x.json"), "there can be no report"),
    ],
)
def test_mistakes_end_with_two_before_a_rule_is_judged(
    conformance: Any, arguments: tuple[str, ...], message: str
) -> None:
    """The message says what can't be as it was written."""
    code, out, err = conformance(*arguments)
    assert (code, out) == (2, "")
    assert message in err

"""How the kit speaks: verdicts, reports, expected failures, hangs and examples."""

import json
import operator
import time
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from fabric_core.conformance import RankPool, Report, Subject, replay, run_rules, suite
from fabric_core.conformance.bench import Bench
from fabric_core.conformance.cases import Training
from fabric_core.conformance.pool import RankHang
from fabric_core.conformance.report import SCHEMA
from fabric_core.conformance.rule import Broken
from fabric_core.conformance.rules import RULES_BY_ID, rules_for
from fabric_core.conformance.runner import Outcome, Verdict, judge
from fabric_core.conformance.session import Session
from fabric_core.errors import FabricError, RequestError

LAZY = "proof.mutants.precision:Lazy"
ALONE = "fabric_core.conformance.references:Alone"
SUMMING = "proof.mutants.strategy:Summing"


def _run(value: str, *only: str, **more: Any) -> Report:
    return run_rules(Subject.of("precision" if "precision" in value else "strategy", value), only=only, **more)


def _fits(data: Any, schema: Any) -> bool:
    """Check data against the parts of JSON schema that the report's uses."""
    kinds: dict[str, Any] = {
        "object": dict,
        "array": list,
        "string": str,
        "integer": int,
        "number": (int, float),
        "boolean": bool,
    }
    names = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
    if not any(data is None if name == "null" else isinstance(data, kinds[name]) for name in names):
        return False
    if isinstance(data, list):
        return all(_fits(one, schema["items"]) for one in data)
    if isinstance(data, dict):
        known = schema.get("properties", {})
        other = schema.get("additionalProperties")
        return set(schema.get("required", ())) <= set(data) and all(
            _fits(value, known[name]) if name in known else bool(other) and _fits(value, other)
            for name, value in data.items()
        )
    return True


def test_a_failure_says_what_to_change_and_how_to_see_it_again() -> None:
    """The smallest failing example comes as a script, which fails in the same way when it runs."""
    (verdict,) = _run(SUMMING, "STR-301").failures
    assert verdict.world_size == 2
    assert "average gradients over the ranks" in verdict.message
    assert "steps=1" in verdict.message
    begin = verdict.message.index("example = ") + len("example = cases.")
    example = eval(verdict.message[begin:].partition("\n")[0])  # noqa: S307 - the kit's own snippet
    assert isinstance(example, Training)
    with pytest.raises(Broken, match="parameters differ"):
        replay("strategy", SUMMING, "STR-301", example, world_size=2)


def test_one_cause_is_told_once() -> None:
    """Of rules that one error breaks, the first shows it without the kit's own lines, the others name the first."""
    loose = Subject.of("logger", "proof.mutants.registration:Loose")
    broken = run_rules(loose, only=["LOG-701", "LOG-702"]).failures
    first, second = (verdict.message for verdict in broken)
    assert "conformance/bench.py" not in first
    assert second.endswith("the error that breaks LOG-701 too; see there")


def test_report_fits_its_schema_and_is_written(tmp_path: Path) -> None:
    """JSON, Markdown and the badge say the same: what is broken, and on what it ran."""
    report = _run(LAZY, "PRE-228", "PRE-229", "PRE-236", "REG-005")
    assert _fits(report.as_dict(), SCHEMA)
    assert not _fits({**report.as_dict(), "seed": "text"}, SCHEMA)
    report.write(tmp_path / "report.json")
    data = json.loads((tmp_path / "report.json").read_text())
    assert data["counts"] == {"kept": 1, "broken": 1, "skipped": 1, "untested": 1}
    assert {"torch", "python", "fabric-registry"} == set(data["versions"])
    assert "## PRE-228" in (tmp_path / "report.md").read_text()
    assert json.loads((tmp_path / "report.badge.json").read_text())["color"] == "red"


def test_a_rule_is_skipped_for_the_capability_that_is_missing() -> None:
    """A rule that says nothing about a plugin names the capability that the plugin doesn't declare."""
    (verdict,) = _run(ALONE, "STR-319", world_sizes=(1,)).verdicts
    assert verdict.outcome == Outcome.SKIPPED
    assert "'sharded'" in verdict.message


def test_expected_failures_are_counted_apart_and_strict() -> None:
    """A rule in xfail that is broken is no failure; one that is kept is."""
    report = _run(LAZY, "PRE-228", "PRE-203", expected={"PRE-228": "known", "PRE-203": "not true"})
    assert [one.rule for one in report.failures] == ["PRE-203"]
    assert report.as_dict()["counts"] == {"expected": 1, "unexpectedly kept": 1}


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"kind": "strategyy"}, "no such kind"),
        ({"plugin": "dpp"}, "did you mean 'ddp'"),
        ({"xfail": {"STR-999": "why"}}, "no rule of this kind"),
        ({"xfail": {"STR-301": " "}}, "no reason"),
        ({"xfail": {"STR-397": "why"}}, "doesn't check"),
        ({"world_sizes": ()}, "number of processes"),
        ({"world_sizes": (3,)}, "number of processes"),
        ({"kind": "wrapper", "plugin": "compile", "world_sizes": (2,)}, "number of processes"),
        ({"device": "nope"}, "there is no accelerator 'nope'"),
        ({"kind": "accelerator", "plugin": "cpu", "device": "cpu"}, "its own devices"),
        ({"report": "report.md"}, "report.json"),
    ],
)
def test_what_can_not_be_asked_is_refused_when_the_suite_is_made(asked: dict[str, Any], message: str) -> None:
    """A typing error anywhere is one error, before any rule is judged."""
    with pytest.raises(FabricError, match=message):
        suite(**{"kind": "strategy", "plugin": "ddp", **asked})


def test_rules_that_there_are_not_are_refused() -> None:
    """An unknown id, or none at all, is no run that passes."""
    for only in (["PRE-999"], []):
        with pytest.raises(RequestError, match="no such rule"):
            run_rules(Subject.of("precision", LAZY), only=only)


def test_an_expected_failure_that_says_nothing_is_refused() -> None:
    """A rule that is skipped for what the plugin declares can't be in xfail."""
    with pytest.raises(RequestError, match=r"STR-319 can't be broken: it does not apply without 'sharded'"):
        _run(ALONE, "STR-319", expected={"STR-319": "why"})


def test_a_run_that_checked_nothing_does_not_pass() -> None:
    """Where every rule was skipped or can't be checked, nothing is kept."""
    report = _run(ALONE, "STR-319", "STR-397")
    assert not report.failures
    assert not report.passed


def _colour(verdicts: list[Verdict], **more: Any) -> tuple[str, str, str]:
    report = Report(Subject.of("precision", LAZY), verdicts, **more)
    badge = report.badge()
    return report.summary, badge["message"], badge["color"]


def test_a_report_claims_what_was_checked() -> None:
    """Profiles stand for a whole run of the kind's own rules, and an expected failure takes one away."""
    kept = [Verdict(rule.id, Outcome.KEPT) for rule in rules_for("precision")]
    others = [one for one in kept if one.rule != "PRE-228"]
    broken = Verdict("PRE-228", Outcome.BROKEN, "why")
    assert _colour(kept) == ("keeps the contract", "Core + Distributed", "brightgreen")
    assert _colour(kept[:1]) == (f"judged by 1 of {len(kept)} rules",) * 2 + ("lightgrey",)
    assert _colour([*others, broken]) == ("breaks the contract", "1 rules broken", "red")
    known = ("breaks the contract where it says so", "Distributed", "yellow")
    assert _colour([*others, broken], expected={"PRE-228": "why"}) == known
    made = [one if one.rule.startswith("REG") else Verdict(one.rule, Outcome.SKIPPED) for one in kept]
    assert _colour(made) == ("could not be checked here",) * 2 + ("lightgrey",)


def test_a_report_is_written_when_all_rules_were_judged(tmp_path: Path) -> None:
    """Not when a run was interrupted, or only some tests were chosen; its folder is made before the first one."""
    path = tmp_path / "build" / "report.json"
    session = Session(Subject.of("logger", "fabric_core.conformance.references:Remembering"), report=path)
    try:
        for rule in session.rules[:-1]:
            session.judge(rule)
        assert path.parent.is_dir()
        assert not path.exists()
        session.judge(session.rules[-1])
        assert json.loads(path.read_text())["complete"]
        assert not session.bench._pools
    finally:
        session.close()
    (tmp_path / "file").touch()
    with pytest.raises(RequestError, match="there can be no report"):
        _run(LAZY, "PRE-203", report=tmp_path / "file" / "report.json")


def test_options_are_written_as_in_a_request() -> None:
    """After a name and after a place, as text; those that are given apart win."""
    assert Subject.of("strategy", "ddp:bucket_cap_mb=1").options == {"bucket_cap_mb": 1}
    assert Subject.of("strategy", "ddp:bucket_cap_mb=1", {"bucket_cap_mb": 2}).options == {"bucket_cap_mb": 2}
    scaled = Subject.of("precision", "fabric_core.conformance.references:Scaled:scale=3.0")
    assert (scaled.name, scaled.options) == ("Scaled", {"scale": 3.0})


def test_a_hang_is_a_verdict_with_the_rank_and_the_place() -> None:
    """A rank that doesn't come back is named, with the line where it is; the next call works again."""
    bench = Bench(Subject.of("strategy", "proof.mutants.strategy:Waiting"), timeout=3.0)
    bench.world_size = 2
    try:
        verdict = judge(RULES_BY_ID["STR-359"], bench, world_sizes=(2,))
        assert verdict.outcome == Outcome.HANGS
        assert "rank 0:" in verdict.message
        assert "barrier" in verdict.message
    finally:
        bench.close()


def test_pool_survives_a_hang() -> None:
    """After a hang the pool's next call starts new ranks."""
    with RankPool(1, timeout=1.0) as pool:
        with pytest.raises(RankHang, match=r"ranks \[0\] did not come back in 1 s"):
            pool.run(time.sleep, 30)
        assert pool.run(operator.add, 1, 2) == [3]


def _asked_before() -> int:
    store: dist.Store = next(dist.rendezvous("env://"))[0]
    return store.add("asked", 1) - 1


def test_each_call_of_a_pool_is_a_job_of_its_own() -> None:
    """Who joins through the environment finds no key, so no address, that an earlier call left in the store."""
    with RankPool(1) as pool:
        assert [pool.run(_asked_before) for _ in range(2)] == [[0], [0]]

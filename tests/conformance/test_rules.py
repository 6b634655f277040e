"""The table of rules, and the pages that are made from it."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from proof.matrix import MUTANTS, unproven
from proof.pages import pages

from fabric_core.conformance import Subject
from fabric_core.conformance.bench import Bench
from fabric_core.conformance.rule import Level
from fabric_core.conformance.rules import RULES, RULES_BY_ID
from fabric_core.conformance.runner import Outcome, judge, why_not

DOCS = Path(__file__).parents[2] / "docs"


def test_there_are_enough_rules_and_mutants() -> None:
    """At least 80 rules can be checked, and at least 60 mutants prove them."""
    assert len([rule for rule in RULES if rule.level != Level.UNTESTED]) >= 80
    assert len(MUTANTS) >= 60


def test_rules_are_numbered_once_and_written_out() -> None:
    """Every rule has a number of its own, and says what holds, why, and what to change."""
    assert len(RULES_BY_ID) == len(RULES)
    for rule in RULES:
        assert rule.sentence.endswith(".")
        assert rule.reason.endswith((".", "!"))
        assert not rule.advice.endswith(".")


def test_mutants_name_rules_that_there_are() -> None:
    """What a mutant is expected to fail are rules of its kind; every mutant is expected to fail one."""
    for mutant in MUTANTS:
        assert mutant.fails, mutant.name
        assert {RULES_BY_ID[rule].kind for rule in mutant.fails} <= {"any", mutant.subject.kind}


def test_few_rules_are_unproven() -> None:
    """Of the rules of the level MUST, nine in ten are failed by a mutant."""
    must = [rule for rule in RULES if rule.level == Level.MUST]
    assert len(unproven()) <= len(must) / 10


def test_named_examples_are_always_tried() -> None:
    """What chance would leave out is tried first, in the order of the table, whatever is drawn."""
    tried: list[Any] = []
    rule = replace(RULES_BY_ID["STR-354"], check=lambda _bench, example: tried.append(example), count=1)
    bench = Bench(Subject.of("strategy", "fabric_core.conformance.references:Alone"))
    assert judge(rule, bench).outcome == Outcome.KEPT
    assert tried[: len(rule.first)] == list(rule.first)
    assert {one.dtype for one in rule.first} == {"float32", "float64", "int32"}


def test_a_launcher_of_another_system_is_not_called_right() -> None:
    """One that detects nothing here is skipped by the rules about what it detects, and the reason says so."""
    for number in ("LAU-503", "LAU-504"):
        reason = why_not(RULES_BY_ID[number], {"detects": False})
        assert reason is not None
        assert "plugin's own system" in reason


@pytest.mark.parametrize("place", list(pages()))
def test_pages_are_fresh(place: str) -> None:
    """The published pages are those that the tables make: python -m proof.pages docs."""
    assert (DOCS / place).read_text(encoding="utf-8") == pages()[place]


def test_matrix_picture_is_published() -> None:
    """The picture of the matrix lies beside its page."""
    assert (DOCS / "reference" / "conformance-matrix.png").stat().st_size > 10_000


def test_published_schema_is_fresh() -> None:
    """The report's schema in the documentation is the kit's."""
    from fabric_core.conformance.report import SCHEMA

    published = json.loads((DOCS / "reference" / "conformance-report.schema.json").read_text(encoding="utf-8"))
    assert published == json.loads(json.dumps(SCHEMA))

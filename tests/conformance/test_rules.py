"""The table of rules, and the pages that are made from it."""

import json
from pathlib import Path

import pytest

from fabric_core.conformance.matrix import MUTANTS, unproven
from fabric_core.conformance.pages import pages
from fabric_core.conformance.rule import Level
from fabric_core.conformance.rules import RULES, RULES_BY_ID

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


@pytest.mark.parametrize("place", list(pages()))
def test_pages_are_fresh(place: str) -> None:
    """The published pages are those that the tables make: python -m fabric_core.conformance.pages docs."""
    assert (DOCS / place).read_text(encoding="utf-8") == pages()[place]


def test_matrix_picture_is_published() -> None:
    """The picture of the matrix lies beside its page."""
    assert (DOCS / "reference" / "conformance-matrix.png").stat().st_size > 10_000


def test_published_schema_is_fresh() -> None:
    """The report's schema in the documentation is the kit's."""
    from fabric_core.conformance.report import SCHEMA

    published = json.loads((DOCS / "reference" / "conformance-report.schema.json").read_text(encoding="utf-8"))
    assert published == json.loads(json.dumps(SCHEMA))

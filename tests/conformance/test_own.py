"""Changes of the project's own code: they change one place and nothing beside it, and the record is of this code."""

import ast
import os
import random

import pytest
from proof.own import Own, population, record
from proof.own_equivalent import EQUIVALENT

SAMPLE = random.Random(os.environ["FABRIC_SAMPLE_SEED"]).sample(population(), 20)  # noqa: S311 - a choice of tests


@pytest.mark.parametrize("one", SAMPLE, ids=lambda one: one.key)
def test_a_change_is_one_place(one: Own) -> None:
    """The text is what the operator made of the source; lines before and after the place stay as they are written."""
    assert ast.unparse(ast.parse(one.text)) == one.change.source
    assert ast.unparse(ast.parse(one.text)) != ast.unparse(ast.parse(one.source))
    if one.text != one.change.source:  # but inside an f-string
        before = one.source.splitlines()[: one.lines.start - 1]
        after = one.source.splitlines()[one.lines.stop - 1 :]
        assert one.text.splitlines()[: len(before)] == before
        assert not after or one.text.splitlines()[-len(after) :] == after


def test_enough_were_judged_and_most_were_noticed() -> None:
    """Two hundred at least, of which the tests noticed 95 in a hundred; what is called equivalent was not noticed."""
    kept = record()
    assert len(kept.seen) >= 200
    assert kept.score >= 0.95
    assert set(kept.equivalent) == set(EQUIVALENT)

"""Changes that nobody chose: they are made as they should be, and the kit notices those that it noticed before."""

import ast
import os
import random
import re
import sys
from pathlib import Path

import pytest
from proof.generated import TARGETS, Target, judged, population, record, unchanged
from proof.operators import changes

SEED = os.environ["FABRIC_SAMPLE_SEED"]
"""Another one every day, so that in the long run all of them are judged again."""

SOURCE = """
class Plugin:
    def average(self, gradients, enabled):
        \"\"\"Say nothing.\"\"\"
        if enabled:
            self.total = sum(gradients)
        try:
            return self.total.clone() / self.world_size
        finally:
            self.busy = False
"""


def test_each_operator_changes_one_place() -> None:
    """A change is valid source that differs from the original in what its key says; docstrings are left alone."""
    found = changes(SOURCE, "module")
    assert {one.operator for one in found} == {
        "negate a condition",
        "drop a statement",
        "forget an undo",
        "reuse a stale value",
        "swap an operation",
        "drop a copy",
        "swap a name",
        "flip a constant",
    }
    assert len({one.key for one in found}) == len(found)
    for one in found:
        assert one.source != ast.unparse(ast.parse(SOURCE))
        assert "Say nothing." in one.source
        compile(one.source, "source", "exec")


def test_there_are_enough_changes() -> None:
    """At least 400 of them; each changed module compiles, and none is its original."""
    assert len(population()) >= 400
    for one in random.Random(SEED).sample(population(), 20):  # noqa: S311 - a choice of tests
        compile(one.change.source, one.key, "exec")


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: f"{target.place}, {target.changed[0]}")
def test_copies_import_copies(target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copied plugin runs on the copies of all changed modules: none that is changed is left out, as by a package."""
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    subject = unchanged(target).write(tmp_path)
    package = subject.value.partition(".")[0]
    lines = (tmp_path / package).glob("*.py")
    imported = {found for one in lines for found in re.findall(rf"from {package}\.(\w+) import", one.read_text())}
    own = target.place.partition(":")[0]
    assert {one.replace(".", "_") for one in target.changed if one != own} <= imported


CHEAP = ("precision", "checkpoint", "logger", "accelerator")
"""Kinds whose rules take seconds; `make generated` judges all kinds."""

KNOWN = record().seen
SAMPLE = sorted(one.key for one in population() if one.target.kind in CHEAP and KNOWN.get(one.key) is not None)
random.Random(SEED).shuffle(SAMPLE)  # noqa: S311 - a choice of tests


@pytest.mark.parametrize("key", SAMPLE[:3])
def test_what_was_noticed_is_noticed(key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong plugin that a rule noticed once doesn't slip through later."""
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    (one,) = [one for one in population() if one.key == key]
    assert judged(one, tmp_path)[0] is not None

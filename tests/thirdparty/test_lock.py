"""Under a lock no other code of a plugin runs: it is refused before it is imported, and what differs is named."""

import json
from collections.abc import Callable
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).with_name("_locked.py")

STRATEGY = "from fabric_plugins.strategies import SingleDeviceStrategy\n\nclass Acme(SingleDeviceStrategy):\n    pass\n"
WRAPPER = "from fabric_core import Wrapper\n\nclass Acme(Wrapper):\n    pass\n"
UNINVITED = "raise SystemExit('this must not be imported')\n"


def _distributions(make: Any) -> tuple[list[Any], list[Any]]:
    """Give those that are installed when the lock is written, and those that come along later."""
    package = {"acme_strategy/__init__.py": "", "acme_strategy/plug.py": STRATEGY, "acme_strategy/helper.py": ""}
    points = {"fabric.strategies": {"acme": "acme_strategy.plug:Acme"}}
    locked = [
        make("acme-strategy", files=package, points=points),
        make("acme-space", files={"acme_space/part.py": WRAPPER},
             points={"fabric.wrappers": {"spaced": "acme_space.part:Acme"}}),
    ]  # fmt: skip
    later = [make("acme-strategy", version="2.0", files=package, points=points)]
    for kind, name, auto in (
        ("twin", "strategies", None),
        ("extension", "extensions", "extension"),
        ("launcher", "launchers", "launcher"),
        ("checkpoint", "checkpoints", "checkpoint"),
        ("logger", "loggers", None),
        ("wrapper", "wrappers", None),
        ("precision", "precisions", None),
    ):
        place = f"acme_{kind}:Acme"
        groups = {f"fabric.{name}": {"acme": place}}
        if auto is not None:
            groups["fabric.auto"] = {f"{auto}/-5/acme": place}
        later.append(make(f"acme-{kind}", source=UNINVITED, points=groups))
    return locked, later


@pytest.fixture(scope="module")
def answers(
    make_environment: Callable[[str], Any], distribution: Any, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """Install, lock, change one thing after the other, and give what came of each."""
    environment = make_environment("locked")
    wheels, beside = tmp_path_factory.mktemp("wheels"), tmp_path_factory.mktemp("beside")
    locked, later = _distributions(distribution)
    environment.install([one.write(wheels) for one in locked])
    for one in later:
        one.write(beside)
    # An editable install: its metadata and a .pth file are in the environment, its sources lie elsewhere.
    edited = environment.folder / "source" / "acme_edited"
    edited.mkdir(parents=True)
    (edited / "__init__.py").write_text(WRAPPER)
    pth = {"__editable__.acme_edited-1.0.pth": f"{edited.parent}\n"}
    points = {"fabric.wrappers": {"edited": "acme_edited:Acme"}}
    environment.install([distribution("acme-edited", files=pth, points=points).write(wheels)])
    done = environment.run(str(SCRIPT), str(beside))
    assert done.returncode == 0, done.stdout + done.stderr
    return dict(json.loads(done.stdout))


REFUSED = {
    "changed": "acme_strategy/helper.py was changed",
    "missing": "acme_strategy/helper.py is missing",
    "added": "acme_strategy/added.py is no file of the distribution, and would be imported",
    "binary": f"acme_strategy/plug{EXTENSION_SUFFIXES[-1]} is no file of the distribution, and would be imported",
    "record": "acme_strategy/other.txt is missing",
    "other version": "its version is 2.0, and the lock has 1.0",
    "twin": "the lock has no distribution acme-twin",
    "extension": "the lock has no distribution acme-extension",
    "launcher": "the lock has no distribution acme-launcher",
    "checkpoint": "the lock has no distribution acme-checkpoint",
    "logger": "the lock has no distribution acme-logger",
    "wrapper": "the lock has no distribution acme-wrapper",
    "precision": "the lock has no distribution acme-precision",
    "earlier on the path": "acme_strategy/__init__.py is no file of the distribution, and would be imported",
    "namespace, earlier on the path": "acme_space/part.py is no file of the distribution, and would be imported",
    "variable": "the lock has no distribution acme-extension",
    "file": "the lock has no distribution acme-extension",
    "editable, not in the lock": "the lock has no distribution acme-edited",
    "editable, changed": "acme_edited/__init__.py was changed",
    "pth, changed": "__editable__.acme_edited-1.0.pth was changed",
}

RUN = ["__init__", "plug"]
"""What of the locked strategy's files is run."""

LATE = {"launcher", "checkpoint", "pth, changed"}
"""Looked at when the strategy that was named, and is locked, has been imported."""


@pytest.mark.parametrize("name", REFUSED)
def test_what_differs_is_named_and_nothing_of_it_is_imported(answers: dict[str, Any], name: str) -> None:
    """Whatever changed, whichever kind it is: an error that says what, and no module of a third party was run."""
    answer = answers[name]
    assert answer["error"] == "LockError"
    assert answer["got"].startswith(REFUSED[name])
    allowed = RUN if name in LATE else []
    assert (answer["run"], answer["imported"]) == (allowed, ["acme_strategy", "acme_strategy.plug"] if allowed else [])


def test_a_module_that_was_imported_from_elsewhere_is_refused(answers: dict[str, Any]) -> None:
    """It would be used for the one that is locked."""
    answer = answers["imported before"]
    assert answer["error"] == "LockError"
    assert answer["got"].startswith("acme_strategy/__init__.py is no file of the distribution")


@pytest.mark.parametrize(
    "name", ["unlocked", "as locked", "added, unlocked", "twin, the other named", "not asked for", "switched off"]
)
def test_what_is_as_locked_runs(answers: dict[str, Any], name: str) -> None:
    """And so does everything where there is no lock; what nobody asked for is not imported."""
    assert answers[name]["error"] is None
    assert answers[name]["run"] == RUN


def test_without_a_lock_all_is_as_before(answers: dict[str, Any]) -> None:
    """Two that offer one name are a conflict; an extension that came along is imported."""
    assert answers["twin, unlocked"]["error"] == "ConflictError"
    assert "acme_extension" in answers["extension, unlocked"]["run"]


def test_namespace_packages_and_editable_installs_can_be_locked(answers: dict[str, Any]) -> None:
    """A part of a namespace package is its own distribution's; sources elsewhere are hashed where they lie."""
    for name in ("namespace", "editable"):
        assert answers[name]["error"] is None
        assert answers[name]["run"]


def test_writing_and_comparing_a_lock_imports_nothing(answers: dict[str, Any]) -> None:
    """The command lists distributions, and says what differs; with exit code 1 if anything does."""
    for name in ("lock", "unchanged", "lock with it", "differences"):
        assert answers[name]["run"] == []
    assert "acme-strategy 1.0: 1" in answers["lock"]["out"]
    assert "acme-edited" not in answers["lock"]["out"]
    assert answers["differences"]["code"] == 1
    (difference,) = json.loads(answers["differences"]["out"])["differences"]
    assert difference == "wrapper edited of acme-edited 1.0: acme_edited/__init__.py was changed"


def test_commands_that_import_plugins_mind_the_lock(answers: dict[str, Any]) -> None:
    """With FABRIC_LOCK, ``plugins show`` says why it doesn't import one."""
    assert answers["commands"]["run"] == []
    assert "the lock has no distribution acme-edited" in answers["commands"]["out"]

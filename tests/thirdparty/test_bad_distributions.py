"""Bad distributions are told apart, each by its own message, and take nothing else down."""

import json
from collections.abc import Callable
from typing import Any

import pytest

pytestmark = pytest.mark.sampled(0.4)

STRATEGY = """
from fabric_core import Strategy
from fabric_core.contracts import PluginOptions, PrecisionPolicy, StrategyCapabilities, World
class Bad(Strategy):
    def connect(self, world, policy): pass
"""

GALLERY: dict[str, dict[str, Any]] = {
    "import-error": {"source": "raise ImportError('libacme.so is missing')"},
    "system-exit": {"source": "raise SystemExit(3)"},
    "wrong-base": {"source": "class Bad: pass"},
    "missing-method": {"source": "from fabric_core import Strategy\nclass Bad(Strategy): pass"},
    "wrong-arguments": {"source": STRATEGY + "    def backward(self, loss): pass"},
    "default-values": {"source": STRATEGY + "    def clip_grad_value(self, parameters, clip_value=1.0): pass"},
    "bad-options": {"source": STRATEGY + "    class Options:\n        speed = 1"},
    "loose-options": {
        "source": STRATEGY
        + "    class Options(PluginOptions):\n        model_config = {'extra': 'allow'}\n        speed: int = 1"
    },
    "bad-capabilities": {"source": STRATEGY + "    capabilities = {'sharded': True}"},
    "bad-init": {"source": STRATEGY + "    def __init__(self, options=None, /, **given): raise KeyError('acme')"},
    "bad-validator": {
        "source": "from pydantic import model_validator\n"
        + STRATEGY
        + "    class Options(PluginOptions):\n"
        + "        @model_validator(mode='before')\n"
        + "        def check(cls, given): raise LookupError('acme')"
    },
    "old-api": {"source": STRATEGY + "    api_version = 0"},
    "old-core": {
        "source": "open('imported', 'w').close()",
        "requires": ["fabric-registry<0.1", "numpy; python_version > '3'"],
    },
    "needs-extra": {
        "source": "open('imported', 'w').close()",
        "extras": ["gpu"],
        "requires": ["acme-driver>=2; extra == 'gpu'"],
        "value": "needs_extra:Bad [gpu]",
    },
    "no-module": {"value": "gone.away:Bad"},
    "no-attribute": {"source": "class Good: pass"},
    "no-value": {"value": "not an object reference!"},
}
"""Bad strategies, each under the name of its distribution."""

SILENT = "import-error"
"""The one that isn't offered to the automatic choice."""

OTHERS: list[dict[str, Any]] = [
    {"name": "twin", "source": STRATEGY, "points": {"fabric.strategies": {"ddp": "twin:Bad"}}},
    {
        "name": "misspelt-hook",
        "source": "from fabric_core import around\n"
        "class Bad:\n    @around.strategy\n    def bakward(self, loss):\n        return (yield)",
        "points": {
            "fabric.extensions": {"misspelt-hook": "misspelt_hook:Bad"},
            "fabric.auto": {"extension/0/misspelt-hook": "misspelt_hook:Bad"},
        },
    },
    {
        "name": "slow-import",
        "source": "import time\ntime.sleep(1.2)\nfrom fabric_core import Logger\n"
        "class Slow(Logger):\n    def log_metrics(self, metrics, step): pass",
        "points": {"fabric.loggers": {"slow-import": "slow_import:Slow"}},
    },
    {
        "name": "stranger",
        "source": "raise SystemExit('not to be imported')",
        "points": {"fabric.auto": {"strategy/99/ddp": "stranger:Bad"}},
    },
    {
        "name": "segfault",
        "source": "import ctypes\nctypes.string_at(0)",
        "points": {"fabric.loggers": {"segfault": "segfault:Bad"}},
    },
]


@pytest.fixture(scope="module")
def environment(make_environment: Callable[[str], Any], distribution: Any) -> Any:
    """Give an environment with all bad distributions."""
    environment = make_environment("bad")
    wheels = []
    for name, what in GALLERY.items():
        value = what.get("value", f"{name.replace('-', '_')}:Bad")
        rest = {key: part for key, part in what.items() if key != "value"}
        points = {"fabric.strategies": {name: value}}
        if name != SILENT:
            points["fabric.auto"] = {f"strategy/50/{name}": value}
        wheels.append(distribution(name=name, points=points, **rest))
    wheels += [distribution(**other) for other in OTHERS]
    environment.install([wheel.write(environment.folder) for wheel in wheels])
    return environment


ASK = """
import json, sys, warnings
from fabric_core import Fabric
from fabric_core.errors import FabricError
answers = {}
for name in json.loads(sys.argv[1]):
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        try:
            Fabric(accelerator="cpu", devices=1, strategy=name, precision="32-true")
            answers[name] = ["fine", "", ""]
        except FabricError as error:
            answers[name] = [type(error).__name__, str(error), repr(error.__cause__)]
print(json.dumps(answers))
"""


@pytest.fixture(scope="module")
def answers(environment: Any) -> dict[str, list[str]]:
    """Ask for each by its name, in one process."""
    done = environment.run("-c", ASK, json.dumps([*GALLERY, "ddp", "fabric-registry/ddp", "twin/ddp"]))
    assert done.returncode == 0, done.stdout + done.stderr
    return dict(json.loads(done.stdout))


@pytest.mark.parametrize(
    ("name", "error", "message", "cause"),
    [
        ("import-error", "QuarantinedError", "importing import_error:Bad failed: ImportError", "libacme.so"),
        ("system-exit", "QuarantinedError", "importing system_exit:Bad failed: SystemExit(3)", "SystemExit(3)"),
        ("wrong-base", "QuarantinedError", "which is no subclass of Strategy", "None"),
        ("missing-method", "QuarantinedError", "Bad lacks connect", "None"),
        (
            "wrong-arguments",
            "QuarantinedError",
            "instead: backward(self, loss, module, arguments)",
            "None",
        ),
        ("default-values", "QuarantinedError", "got:     clip_grad_value(self, parameters, clip_value=1.0)", "None"),
        ("bad-options", "QuarantinedError", "which is no subclass of PluginOptions", "None"),
        ("loose-options", "QuarantinedError", "Bad.Options takes unknown options", "None"),
        ("bad-capabilities", "QuarantinedError", "which is no StrategyCapabilities", "None"),
        ("bad-init", "QuarantinedError", "making it failed: KeyError('acme')", "KeyError('acme')"),
        ("bad-validator", "QuarantinedError", "making it failed: LookupError('acme')", "LookupError('acme')"),
        ("old-api", "IncompatibleApiError", "was written for version 0 of the contracts", "None"),
        ("old-core", "IncompatibleApiError", "needs fabric-registry<0.1, and 0.1.0 is installed", "None"),
        ("needs-extra", "NotInstalledError", "instead: pip install 'needs-extra[gpu]'", "None"),
        ("no-module", "QuarantinedError", "ModuleNotFoundError(\"No module named 'gone'\")", "ModuleNotFoundError"),
        ("no-attribute", "QuarantinedError", "has no attribute 'Bad'", "AttributeError"),
        ("no-value", "QuarantinedError", "importing not an object reference! failed", "AttributeError"),
        ("ddp", "ConflictError", '"fabric-registry/ddp" or "twin/ddp"', "None"),
        ("fabric-registry/ddp", "fine", "", ""),
        ("twin/ddp", "fine", "", ""),
    ],
)
def test_each_bad_plugin_has_its_own_error(
    answers: dict[str, list[str]], name: str, error: str, message: str, cause: str
) -> None:
    """The class says what sort of failure it is, the message what to do, and the cause is chained."""
    got = answers[name]
    assert got[0] == error, got
    assert message in got[1], got[1]
    assert cause in got[2], got[2]
    if error == "QuarantinedError":
        assert f"of {name} 1.0 can't be used" in got[1]


def test_nothing_incompatible_or_lacking_was_imported(environment: Any, answers: dict[str, list[str]]) -> None:
    """What a distribution requires is checked before its code runs."""
    assert answers
    assert not (environment.folder / "imported").exists()


REST = """
import json, sys, warnings
from fabric_core import Fabric
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    fabric = Fabric(accelerator="cpu", devices=1)
print(json.dumps({
    "strategy": fabric.plan.strategy.name,
    "rejected": dict(fabric.plan.strategy.rejected),
    "warnings": [[type(one.message).__name__, str(one.message)] for one in caught],
    "segfault": "segfault" in sys.modules,
}))
"""


def test_the_rest_keeps_working_and_says_what_it_left_out(environment: Any) -> None:
    """``auto`` chooses among the sound ones; each broken one that is offered is in the plan, and is warned of."""
    done = environment.run("-c", REST)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(done.stdout)
    assert result["strategy"] == "single_device"
    assert not result["segfault"]
    assert SILENT not in result["rejected"]
    broken = [name for name in GALLERY if name not in {SILENT, "needs-extra"}]
    for name in broken:
        assert result["rejected"][name]
        texts = [text for kind, text in result["warnings"] if kind == "FabricWarning" and repr(name) in text]
        assert len(texts) == 1, name
    assert "acme-driver>=2" in result["rejected"]["needs-extra"]
    hook = [text for _, text in result["warnings"] if "misspelt-hook" in text]
    assert len(hook) == 1
    assert "did you mean backward(self, loss, module, arguments)?" in hook[0]
    assert len(result["warnings"]) == len(broken) + 1


def test_what_is_switched_off_is_neither_used_nor_warned_of(environment: Any) -> None:
    """FABRIC_DISABLE_PLUGINS takes names and distributions; asked for by name, one says so; a typo is warned of."""
    off = ",".join([*GALLERY, "twin", "misspelt-hook/misspelt-hook", "misspeld-hook"])
    done = environment.run("-c", REST, FABRIC_DISABLE_PLUGINS=off)
    assert done.returncode == 0, done.stdout + done.stderr
    warned = [text for _, text in json.loads(done.stdout)["warnings"]]
    assert len(warned) == 1
    assert "FABRIC_DISABLE_PLUGINS has 'misspeld-hook', which is the name of nothing that is installed" in warned[0]
    done = environment.run("-c", ASK, json.dumps(["ddp", "old-api"]), FABRIC_DISABLE_PLUGINS=off)
    asked = json.loads(done.stdout)
    assert asked["ddp"][0] == "fine"
    assert asked["old-api"][0] == "UnavailableError"
    assert "take it out of FABRIC_DISABLE_PLUGINS" in asked["old-api"][1]


def test_the_doctor_survives_all_of_them(environment: Any) -> None:
    """Each is a row with its status, a crash too, and the exit code says that something is to be mended."""
    done = environment.run("-m", "fabric_core", "plugins", "doctor", "--json")
    assert done.returncode == 1, done.stderr
    rows = {(row["distribution"].split()[0], row["name"]): row for row in json.loads(done.stdout)}
    status = {name: rows[name, name]["status"] for name in GALLERY}
    special = {"old-api": "incompatible", "old-core": "incompatible", "needs-extra": "not installed"}
    assert status == {name: special.get(name, "quarantined") for name in GALLERY}
    assert rows["segfault", "segfault"]["status"] == "crashed"
    assert "signal SIGSEGV" in rows["segfault", "segfault"]["note"]
    assert rows["misspelt-hook", "misspelt-hook"]["status"] == "quarantined"
    slow = rows["slow-import", "slow-import"]
    assert slow["status"] == "ok"
    assert slow["seconds"] > 1.2
    assert "slow to import" in slow["note"]
    assert rows["fabric-registry", "ddp"]["status"] == rows["twin", "ddp"]["status"] == "conflict"
    assert 'choose with "twin/ddp"' in rows["twin", "ddp"]["note"]
    stray = rows["stranger", "strategy/99/ddp"]
    assert (stray["kind"], stray["status"]) == ("auto", "not counted")
    assert "its own distribution has no strategy 'ddp'" in stray["note"]
    own = [row for (owner, name), row in rows.items() if owner == "fabric-registry" and name != "ddp"]
    assert {row["status"] for row in own} <= {"ok", "unavailable", "not installed"}


LISTING = """
import sys
from fabric_core import cli
sys.argv = ["fabric-core", "plugins", "list", "--json"]
try:
    cli.main()
except SystemExit as end:
    assert not end.code
print(sorted(name for name in sys.modules if "fabric_plugins" in name or "fsdp" in name or "twin" in name))
"""


def test_listing_imports_no_plugin(environment: Any) -> None:
    """All names are listed, bad ones too, and no module of any plugin is there afterwards."""
    done = environment.run("-c", LISTING)
    assert done.returncode == 0, done.stdout + done.stderr
    listing, _, modules = done.stdout.rstrip().rpartition("\n")
    names = {offer["name"] for offer in json.loads(listing)}
    assert {*GALLERY, "segfault", "slow-import", "misspelt-hook", "ddp", "cpu"} <= names
    assert modules == "[]"

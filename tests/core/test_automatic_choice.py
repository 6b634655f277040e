"""``auto`` takes what was offered to it, in order, and imports nothing else."""

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fabric_core import Fabric
from fabric_core.choosing.registry import Registry
from fabric_core.errors import ConflictError, DeviceError, FabricWarning, PlanError, QuarantinedError

SOUND = """
from fabric_core import Accelerator, Strategy
class Good(Strategy):
    def connect(self, world, policy): pass
class Narrow(Good):
    capabilities = Good.capabilities.model_copy(update={"min_world_size": 3})
"""

Install = Callable[..., None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_memory: dict[str, Any]) -> Install:
    """Give a function that installs a distribution; the in-memory plugins beside it are named, not automatic."""
    monkeypatch.syspath_prepend(tmp_path)
    if importlib.util.find_spec("fabric_plugins") is not None:
        monkeypatch.setenv("FABRIC_DISABLE_PLUGINS", "fabric-registry")

    def write(name: str, source: str, **points: dict[str, str]) -> None:
        module = name.replace("-", "_")
        (tmp_path / f"{module}.py").write_text(source)
        monkeypatch.delitem(sys.modules, module, raising=False)
        info = tmp_path / f"{module}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        groups = [
            f"[fabric.{group}]\n" + "\n".join(f"{key} = {value}" for key, value in entries.items())
            for group, entries in points.items()
        ]
        (info / "entry_points.txt").write_text("\n".join(groups) + "\n")

    return write


def _fabric(**given: Any) -> Fabric:
    return Fabric(**{"accelerator": "host", "precision": "plain", "devices": 1, **given})


def test_the_first_that_fits_is_taken_and_what_comes_after_is_not_imported(install: Install) -> None:
    """Candidates are made one after the other; what nobody offered is never made."""
    install(
        "acme-narrow",
        SOUND,
        strategies={"narrow": "acme_narrow:Narrow"},
        auto={"strategy/30/narrow": "acme_narrow:Narrow"},
    )
    install("acme-good", SOUND, strategies={"good": "acme_good:Good"}, auto={"strategy/20/good": "acme_good:Good"})
    install(
        "acme-later",
        "raise ImportError",
        strategies={"later": "acme_later:Good"},
        auto={"strategy/-5/later": "acme_later:Good"},
    )
    install("acme-silent", "raise ImportError", strategies={"silent": "acme_silent:Good"})
    plan = _fabric().plan
    assert plan.strategy.name == "good"
    rejected = dict(plan.strategy.rejected)
    assert rejected["narrow"] == "it declares at least 3 processes, and there would be 1"
    assert rejected["later"] == "its priority is -5, and that of good is 20"
    assert "silent" not in rejected
    assert not {"acme_later", "acme_silent"} & sys.modules.keys()
    with pytest.raises(QuarantinedError, match="importing acme_silent:Good failed"):
        _fabric(strategy="silent")


BROKEN = {
    "import": "raise ImportError('libacme.so is missing') from OSError('no such file')",
    "exit": "raise SystemExit(3)",
    "own": "class Stop(BaseException): pass\nraise Stop('no')",
    "making": SOUND + "class Bad(Good):\n    def __init__(self, options=None, /, **given): raise SystemExit(4)",
    "repr": SOUND + "class Bad(Good):\n    def __repr__(self): raise LookupError('no words')",
    "declared": SOUND + "class Bad(Good):\n    start_method = 7",
}
WHOLE = {
    "import": "importing acme_bad:Bad failed: ImportError('libacme.so is missing'), caused by OSError('no such file')",
    "exit": "SystemExit(3)",
    "own": "Stop('no')",
    "making": "making it failed: SystemExit(4)",
    "repr": "making it failed: LookupError('no words')",
    "declared": "Bad.start_method is 7, and must be of the type str or NoneType",
}


@pytest.mark.parametrize("how", BROKEN)
def test_one_that_is_offered_and_broken_is_left_out_with_a_warning_that_has_the_cause(
    install: Install, how: str
) -> None:
    """However it breaks, it takes nothing down and nothing is silent; by its name it is an error."""
    install("acme-bad", BROKEN[how], strategies={"bad": "acme_bad:Bad"}, auto={"strategy/90/bad": "acme_bad:Bad"})
    with pytest.warns(FabricWarning) as caught:
        plan = _fabric().plan
    (warning,) = caught
    assert "the strategy 'bad' of acme-bad 1.0 was left out" in str(warning.message)
    assert WHOLE[how] in str(warning.message)
    assert plan.strategy.name == "alone"
    assert "can't be used" in dict(plan.strategy.rejected)["bad"]
    with pytest.raises(QuarantinedError):
        _fabric(strategy="bad")


ASKED = {
    "is_available": ("def is_available(self): raise SystemExit(9)", r"asking whether it fits failed: SystemExit\(9\)"),
    "perhaps": ("def is_available(self): return 1", r"is_available\(\) gave 1, and no bool"),
    "parse_devices": ("def parse_devices(self, spec): raise KeyError('no')", "asking whether it fits failed: KeyError"),
    "device_count": ("def device_count(self): raise OSError('driver')", "asking whether it fits failed: OSError"),
    "no indices": ("def parse_devices(self, spec): return None", "parse_devices gave None"),
}


@pytest.mark.parametrize("how", ASKED)
def test_an_accelerator_that_fails_when_it_is_asked_is_left_out_with_a_warning(install: Install, how: str) -> None:
    """It is never a silent turn to the processor; by its name it is an error."""
    method, message = ASKED[how]
    source = (
        "import torch\nfrom fabric_core import Accelerator\nclass Bad(Accelerator):\n"
        "    device_type = 'acme'\n    process_group_backend = 'none'\n"
        "    def is_available(self): return True\n    def device_count(self): return 1\n"
        f"    def devices(self, indices): return []\n    def supports(self, dtype): return True\n    {method}\n"
    )
    install("acme-bad", source, accelerators={"bad": "acme_bad:Bad"}, auto={"accelerator/90/bad": "acme_bad:Bad"})
    with pytest.warns(FabricWarning, match=message):
        plan = Fabric(precision="plain", devices=1).plan
    assert plan.accelerator.name == "host"
    with pytest.raises(QuarantinedError, match=message):
        _fabric(accelerator="bad")


def test_devices_that_an_automatic_accelerator_does_not_have_are_told(install: Install) -> None:
    """They are the user's, and no reason to take another accelerator."""
    with pytest.raises(DeviceError, match="there are "):
        _fabric(accelerator="auto", devices=70)


@pytest.mark.parametrize(
    ("entry", "value", "reason"),
    [
        ("strategy/10/theirs", "acme_two:Good", "its own distribution has no strategy 'theirs'"),
        ("strategy/10/good", "acme_two:Narrow", "it names acme_two:Narrow, and the strategy 'good' is acme_two:Good"),
        ("strategy/good", "acme_two:Good", "it is not KIND/PRIORITY/NAME"),
        ("strategy/high/good", "acme_two:Good", "it is not KIND/PRIORITY/NAME"),
        ("stratgy/10/good", "acme_two:Good", "it is not KIND/PRIORITY/NAME"),
    ],
)
def test_an_entry_that_is_wrong_or_for_anothers_plugin_does_not_count(
    install: Install, entry: str, value: str, reason: str
) -> None:
    """It chooses nothing, and stands among those that ``doctor`` reports."""
    install("acme-one", SOUND, strategies={"theirs": "acme_one:Good"})
    install("acme-two", SOUND, strategies={"good": "acme_two:Good"}, auto={entry: value})
    registry = Registry()
    assert {"good", "theirs"} & {one.name for one in registry.automatic("strategy")} == set()
    (stray,) = registry.strays
    assert (stray.entry, stray.owner) == (entry, "acme-two 1.0")
    assert reason in stray.reason


def test_two_that_are_equal_are_a_conflict_where_they_would_be_chosen(install: Install) -> None:
    """Which distribution's it would be, nobody could say; named with its distribution, one can."""
    for name in ("acme-one", "acme-two"):
        module = name.replace("-", "_")
        install(name, SOUND, strategies={"good": f"{module}:Good"}, auto={"strategy/50/good": f"{module}:Good"})
    with pytest.raises(ConflictError, match="2 distributions offer the strategy 'good'"):
        _fabric()
    assert _fabric(strategy="acme-two/good").plan.strategy.distribution == "acme-two 1.0"


def test_launchers_and_checkpoints_are_loaded_when_it_is_their_turn(install: Install, tmp_path: Path) -> None:
    """They stand in the plan in their order, not imported; a broken one is left out with a warning when it is asked."""
    launcher = (
        "from fabric_core import Launcher\nclass Good(Launcher):\n    def detect(self, environment): return None\n"
        "    def start(self, order): return 'started'\n"
    )
    install(
        "acme-broken",
        "raise ImportError('gone')",
        launchers={"broken": "acme_broken:Good"},
        auto={"launcher/99/broken": "acme_broken:Good"},
    )
    install(
        "acme-start", launcher, launchers={"start": "acme_start:Good"}, auto={"launcher/98/start": "acme_start:Good"}
    )
    fabric = _fabric()
    names = [choice.name for choice in fabric.plan.launchers]
    assert names[:2] == ["broken", "start"]
    assert fabric.plan.launchers[0].reason == "asked in this order: its priority is 99"
    assert not {"acme_broken", "acme_start"} & sys.modules.keys()
    with pytest.warns(FabricWarning, match="the launcher 'broken' of acme-broken 1.0 was left out.*gone"):
        fabric.launch()
    assert "acme_start" in sys.modules
    fabric.teardown()


@pytest.mark.parametrize(
    ("answer", "message"),
    [("raise SystemExit(5)", r"detect failed: SystemExit\(5\)"), ("return 3", "detect gave an object of the type int")],
)
def test_a_launcher_that_fails_as_it_is_asked_is_an_error_that_names_it(
    install: Install, monkeypatch: pytest.MonkeyPatch, answer: str, message: str
) -> None:
    """It may be the one that started this process, so it isn't passed over; without it the script runs."""
    source = (
        f"from fabric_core import Launcher\nclass Odd(Launcher):\n    def detect(self, environment): {answer}\n"
        "    def start(self, order): pass\n"
    )
    install("acme-odd", source, launchers={"odd": "acme_odd:Odd"}, auto={"launcher/99/odd": "acme_odd:Odd"})
    with pytest.raises(QuarantinedError, match=f"the launcher 'odd' can't be used: {message}") as caught:
        _fabric().launch()
    assert "FABRIC_DISABLE_PLUGINS=odd" in str(caught.value)
    there = importlib.util.find_spec("fabric_plugins") is not None
    monkeypatch.setenv("FABRIC_DISABLE_PLUGINS", "fabric-registry,odd" if there else "odd")
    with _fabric() as fabric:
        fabric.launch()


def test_a_kind_of_which_none_is_offered_says_so(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error says to name one; what is installed, but not offered, is not taken in its place."""
    install("acme-good", SOUND, strategies={"good": "acme_good:Good"})
    there = importlib.util.find_spec("fabric_plugins") is not None
    monkeypatch.setenv("FABRIC_DISABLE_PLUGINS", "fabric-registry,alone" if there else "alone")
    with pytest.raises(PlanError) as caught:
        _fabric()
    assert "alone: the strategy 'alone' of (this process) is switched off" in str(caught.value)
    assert "acme_good" not in sys.modules

"""Offers are found by name, told apart, and imported only when they are named."""

import pickle
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from fabric_core import Fabric, Strategy, register
from fabric_core.choosing.offers import Offer
from fabric_core.choosing.registry import IN_PROCESS, Registry, registered
from fabric_core.collectives import Collectives, SingleProcess
from fabric_core.contracts import PluginOptions, PrecisionPolicy, Preset, World
from fabric_core.errors import (
    ConflictError,
    FabricWarning,
    NotInstalledError,
    OptionError,
    QuarantinedError,
    RequestError,
    UnavailableError,
    UnknownPluginError,
)


class Speed(PluginOptions):
    speed: int = 1


class Fast(Strategy):
    """A strategy for these tests."""

    Options = Speed
    options: Speed

    def connect(self, world: World, policy: PrecisionPolicy) -> Collectives:
        return SingleProcess()


def _offer(name: str, distribution: str = "acme", value: str = f"{__name__}:Fast") -> Offer:
    return Offer("strategy", name, distribution, "1.0", value)


def test_names_match_exactly_first_then_whatever_their_case() -> None:
    """``Fast`` beats ``fast``; ``FAST`` is ambiguous between them; ``Slow`` finds ``slow``."""
    registry = Registry([_offer("fast"), _offer("Fast"), _offer("slow")])
    assert registry.find("strategy", "Fast").name == "Fast"
    assert registry.find("strategy", "SLOW").name == "slow"
    with pytest.raises(ConflictError, match="several names are the strategy 'FAST' in another case"):
        registry.find("strategy", "FAST")


def test_two_distributions_with_one_name_are_a_conflict_that_says_how_to_choose() -> None:
    """The error names both; the distribution before the name chooses, in any spelling; so does switching one off."""
    registry = Registry([_offer("fast", "acme-one"), _offer("fast", "acme-two")])
    with pytest.raises(ConflictError) as caught:
        registry.find("strategy", "fast")
    assert caught.value.instead == '"acme-one/fast" or "acme-two/fast"'
    assert registry.find("strategy", "fast", "Acme_Two").distribution == "acme-two"
    one = Registry([_offer("fast", "acme-one"), _offer("fast", "acme-two")], disabled=["acme-two"])
    assert one.find("strategy", "fast").distribution == "acme-one"
    with pytest.raises(UnavailableError, match="is switched off"):
        one.find("strategy", "fast", "acme-two")


@pytest.mark.parametrize(
    ("name", "distribution", "error", "message"),
    [
        ("fsat", None, UnknownPluginError, "did you mean 'fast'"),
        ("nothing-like-it", None, UnknownPluginError, "There are: fast"),
        ("fast", "absent-distribution", NotInstalledError, "pip install absent-distribution"),
        ("fast", "pytest", UnknownPluginError, "no strategy 'fast' in pytest"),
    ],
)
def test_a_name_that_nobody_offers(name: str, distribution: str | None, error: type[Exception], message: str) -> None:
    """Unknown with the nearest names, or not installed with what to install."""
    with pytest.raises(error) as caught:
        Registry([_offer("fast")]).find("strategy", name, distribution)
    assert message in str(caught.value)


@pytest.mark.parametrize("kind", ["accelerator", "strategy", "precision"])
def test_without_any_plugin_the_error_is_the_command_that_installs_them(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A source tree that was never installed provides no plugin: named or not, the error says how to install it."""
    tree = Path(__file__).parents[2]
    registry = Registry([])
    for directory, command in ((tree, "pip install -e .,"), (tmp_path, f"pip install -e {tree},")):
        monkeypatch.chdir(directory)
        for choose in (lambda: registry.require(kind), lambda: registry.find(kind, "cpu")):
            with pytest.raises(NotInstalledError, match=f"no distribution that provides .* {kind} is inst") as caught:
                choose()
            assert command in str(caught.value)


def test_outside_of_a_source_tree_the_command_names_the_distribution(monkeypatch: pytest.MonkeyPatch) -> None:
    """A core that lies alone among installed packages says which distribution to install."""
    monkeypatch.setattr("fabric_core.choosing.registry.__file__", "/usr/lib/fabric_core/choosing/registry.py")
    with pytest.raises(NotInstalledError, match="pip install fabric-registry"):
        Registry([]).require("strategy")


def test_a_kind_that_a_run_can_do_without_needs_no_plugin() -> None:
    """No logger at all is no error, and an unknown one is just that."""
    Registry([]).require("logger")
    with pytest.raises(UnknownPluginError, match="There are: none"):
        Registry([]).find("logger", "csv")


def test_a_name_of_another_kind_says_so(in_memory: dict[str, Any]) -> None:
    """Giving a precision's name as a strategy's is a common slip."""
    with pytest.raises(UnknownPluginError, match="there is no strategy 'plain'; it is a precision"):
        Fabric(**{**in_memory, "strategy": "plain"})


def test_registering_checks_and_refuses_a_second_time_unless_overriding() -> None:
    """A registration is checked at once; a name is taken once; the context manager restores what was there."""

    class Other(Fast):
        pass

    with registered("strategy", "mine", Fast):
        with pytest.raises(ConflictError, match="registered already"):
            register("strategy", "mine", Other)
        with registered("strategy", "mine", Other):
            assert Registry([]).find("strategy", "mine").load().plugin is Other
        found = Registry([]).find("strategy", "mine")
        assert (found.load().plugin, found.distribution) == (Fast, IN_PROCESS)
    assert Registry([]).offers("strategy") == []
    with pytest.raises(RequestError, match="no such kind"):
        register("stratgy", "mine", Fast)
    with pytest.raises(QuarantinedError, match="no subclass of Strategy"):
        register("strategy", "mine", int)  # type: ignore[arg-type]


@pytest.mark.parametrize("options", [int, PluginOptions(), None])
def test_options_that_are_no_model_are_refused(options: Any) -> None:
    """What describes the options is a subclass of ``PluginOptions``: no other class, and no object."""

    class Loose(Fast):
        Options = options

    with pytest.raises(QuarantinedError, match=r"Loose\.Options is .*, which is no subclass of PluginOptions"):
        register("strategy", "loose", Loose)


def test_one_registered_here_hides_the_installed_one() -> None:
    """So that a test or a notebook can stand in for an installed plugin."""
    with registered("strategy", "fast", Fast):
        assert [offer.distribution for offer in Registry([_offer("fast")]).offers("strategy")] == [IN_PROCESS]


def test_an_alias_presets_options_that_a_users_own_win_over(in_memory: dict[str, Any]) -> None:
    """An alias is chosen by name alone, with its options; the plan shows those that differ from the defaults."""
    with registered("strategy", "faster", Preset.of(Fast, speed=7)):
        alias = Fabric(**{**in_memory, "strategy": "faster"})
        own = Fabric(**{**in_memory, "strategy": "faster:speed=9"})
        assert alias.plan.strategy.options == {"speed": 7}
        assert own.plan.strategy.options == {"speed": 9}
        auto = Fabric(**{**in_memory, "strategy": "auto"})
        assert "faster" not in {auto.plan.strategy.name, *dict(auto.plan.strategy.rejected)}


@pytest.mark.parametrize(
    ("write", "what", "got", "instead"),
    [
        ("fast:sped=2", "has no option 'sped'", "2", "the options are: speed"),
        ("fast:speed=quick", "option 'speed' of Fast can't take this value", "'quick'", "speed: int"),
    ],
)
def test_a_wrong_option_names_the_option_the_value_and_what_is_allowed(
    in_memory: dict[str, Any], write: str, what: str, got: str, instead: str
) -> None:
    """Options are validated by the plugin's own model."""
    with registered("strategy", "fast", Fast), pytest.raises(OptionError) as caught:
        Fabric(**{**in_memory, "strategy": write})
    assert what in caught.value.what
    assert got in str(caught.value.got)
    assert instead in str(caught.value.instead)


def test_an_offer_travels_as_data() -> None:
    """What crosses to another process names the plugin and imports nothing on the way."""
    offer = _offer("fast", value="gone.away:Fast")
    assert pickle.loads(pickle.dumps(offer)) == offer  # noqa: S301 - made here


def _install(folder: Path, name: str, points: str, version: str = "1.0", kind: str = "dist-info") -> Path:
    info = folder / f"{name.replace('-', '_')}-{version}.{kind}"
    info.mkdir(parents=True)
    file = "METADATA" if kind == "dist-info" else "PKG-INFO"
    (info / file).write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (info / "entry_points.txt").write_text(points)
    return info


def test_the_same_distribution_seen_twice_counts_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stale metadata further down the path, under another version or spelling, is no conflict."""
    points = "[fabric.strategies]\nacme_twice = acme:Fast\n"
    _install(tmp_path / "one", "acme-twice", points)
    _install(tmp_path / "two", "Acme.Twice", points, "0.9", "egg-info")
    monkeypatch.syspath_prepend(tmp_path / "two")
    monkeypatch.syspath_prepend(tmp_path / "one")
    found = Registry().find("strategy", "acme_twice")
    assert (found.version, found.distribution) == ("1.0", "acme-twice")


@pytest.mark.usefixtures("in_memory")
def test_what_is_installed_while_the_process_runs_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The entry points are scanned once, and again once a folder of the path changes."""
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UnknownPluginError):
        Registry().find("strategy", "acme_late")
    _install(tmp_path, "acme-late", "[fabric.strategies]\nacme_late = acme:Fast\n")
    assert Registry().find("strategy", "acme_late").owner == "acme-late 1.0"


def test_damaged_metadata_is_warned_of_and_takes_nothing_down(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A distribution whose entry points can't be read is left out, and the others are found."""
    _install(tmp_path, "acme-sound", "[fabric.strategies]\nacme_sound = acme:Fast\n")
    damaged = _install(tmp_path, "acme-damaged", "")
    (damaged / "entry_points.txt").write_bytes(b"[fabric.strategies]\n\xff\xfe = x\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.warns(FabricWarning, match="can't be read"):
        assert Registry().find("strategy", "acme_sound").owner == "acme-sound 1.0"


def test_a_look_up_imports_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Listing and finding leave the plugin's module alone; loading imports it once."""
    _install(tmp_path, "acme-lazy", "[fabric.strategies]\nacme_lazy = acme_lazy_module:Fast\n")
    (tmp_path / "acme_lazy_module.py").write_text("class Fast: pass")
    monkeypatch.syspath_prepend(tmp_path)
    offer = Registry().find("strategy", "acme_lazy")
    assert "acme_lazy_module" not in sys.modules
    with pytest.raises(QuarantinedError, match="no subclass of Strategy"):
        offer.load()
    monkeypatch.delitem(sys.modules, "acme_lazy_module")


@pytest.fixture
def extensions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Mapping[str, Path]:
    """Install two extensions, each of which writes its name when it is made; one is offered to automatic choice."""
    for name in ("acme_one", "acme_two"):
        source = (
            "from fabric_core import hookimpl\n"
            "class Extension:\n"
            "    @hookimpl\n"
            "    def configured(self, plan):\n"
            f"        print('{name} heard')\n"
        )
        (tmp_path / f"{name}_module.py").write_text(source)
        points = f"[fabric.extensions]\n{name} = {name}_module:Extension\n"
        if name == "acme_one":
            points += f"[fabric.auto]\nextension/10/{name} = {name}_module:Extension\n"
        _install(tmp_path, name.replace("_", "-"), points)
    monkeypatch.syspath_prepend(tmp_path)
    return dict.fromkeys(("acme_one", "acme_two"), tmp_path)


@pytest.mark.usefixtures("extensions")
@pytest.mark.parametrize(
    ("variables", "heard"),
    [
        ({}, ["acme_one heard"]),
        ({"FABRIC_EXTENSIONS": "acme_two"}, ["acme_two heard"]),
        ({"FABRIC_EXTENSIONS": "acme-one/acme_one"}, ["acme_one heard"]),
        ({"FABRIC_EXTENSIONS": ""}, []),
        ({"FABRIC_EXTENSIONS": "acme_one,acme_two"}, ["acme_one heard", "acme_two heard"]),
        ({"FABRIC_DISABLE_PLUGINS": "acme-one"}, []),
        ({"FABRIC_EXTENSIONS": "acme_one,acme_two", "FABRIC_DISABLE_PLUGINS": "acme_two"}, ["acme_one heard"]),
    ],
)
def test_variables_choose_among_the_installed_extensions(
    in_memory: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    variables: dict[str, str],
    heard: list[str],
) -> None:
    """One acts where its distribution offers it to automatic choice; FABRIC_EXTENSIONS says which act instead."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    fabric = Fabric(**in_memory)
    assert sorted(capsys.readouterr().out.split("\n")[:-1]) == heard
    assert sorted(f"{choice.name} heard" for choice in fabric.plan.extensions) == heard


@pytest.mark.usefixtures("extensions")
@pytest.mark.parametrize("part", ["extension=acme_two", {"kind": "extension", "name": "acme_two"}])
def test_code_names_an_installed_extension(
    in_memory: dict[str, Any], capsys: pytest.CaptureFixture[str], part: object
) -> None:
    """Named in ``plugins`` it acts, beside those that are automatic; twice is an error."""
    fabric = Fabric(**{**in_memory, "plugins": [part]})
    assert [choice.name for choice in fabric.plan.extensions] == ["acme_two", "acme_one"]
    assert sorted(capsys.readouterr().out.split()) == ["acme_one", "acme_two", "heard", "heard"]
    with pytest.raises(RequestError, match="one extension twice"):
        Fabric(**{**in_memory, "plugins": [part, part]})


@pytest.mark.usefixtures("extensions")
def test_a_typo_in_the_allow_list_is_warned_of(in_memory: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that means nothing installed would otherwise switch an extension off in silence."""
    monkeypatch.setenv("FABRIC_EXTENSIONS", "acme_one,acme_tow")
    with pytest.warns(FabricWarning, match="FABRIC_EXTENSIONS has 'acme_tow'.*there are: acme_one, acme_two"):
        Fabric(**in_memory)
    monkeypatch.setenv("FABRIC_EXTENSIONS", "acme_one")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Fabric(**in_memory)

"""Whatever lists the kinds derives from one table: a new kind is a row and a contract."""

import inspect
import json
from pathlib import Path
from typing import Any

import pytest

from fabric_core import Fabric, around, cli
from fabric_core.assembly import make_plan
from fabric_core.choosing.registry import Registry, registered
from fabric_core.choosing.request import Request, fill, read_environment, read_file
from fabric_core.contracts import Plugin, PluginOptions
from fabric_core.errors import RequestError
from fabric_core.kinds import KINDS, Count, Kind, argument_defaults
from fabric_core.markers import behaviour


class Sampler(Plugin):
    """Says in which order data is read."""

    kind = "sampler"

    @behaviour
    def order(self, count: int) -> list[int]:
        """Give the order."""
        return list(range(count))


class Options(PluginOptions):
    seed: int = 0


class Backwards(Sampler):
    """Reads from the end."""

    Options = Options

    def order(self, count: int) -> list[int]:
        return list(range(count))[::-1]


class Shifted:
    @around.strategy
    def data_shard(self) -> Any:
        return (yield)


@pytest.fixture
def sampler(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Any:
    """Add a kind: one row, in memory."""
    monkeypatch.setitem(KINDS, "sampler", request.param)
    with registered("sampler", "backwards", Backwards, auto=3):
        yield request.param


OWN = Kind("sampler", Sampler, "fabric.samplers", Count.MANY, "samplers")
AMONG = Kind("sampler", Sampler, "fabric.samplers", Count.ONE, in_plugins=True)


def _command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: str) -> str:
    monkeypatch.setattr("sys.argv", ["fabric-core", *arguments])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert not end.value.code
    return capsys.readouterr().out


@pytest.mark.parametrize("sampler", [OWN], indirect=True)
def test_a_new_kind_with_an_argument_of_its_own_is_one_row(
    sampler: Kind,
    in_memory: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Request, variables, file, plan, registry, command line, schema and reference know it."""
    rest = {name: value for name, value in in_memory.items() if name != "plugins"}
    request = Request.of(**rest, samplers="backwards:seed=3")
    assert str(request.samplers[0]) == "backwards:seed=3"
    assert request.arguments()["samplers"] == ["backwards:seed=3"]
    (choice,) = make_plan(request, {}).samplers
    assert (choice.kind, choice.name, choice.options) == ("sampler", "backwards", {"seed": 3})
    variables = read_environment({"FABRIC_SAMPLERS": "backwards;backwards:seed=1"})
    assert [str(one) for one in Request.of(**fill({}, variables)).samplers] == ["backwards", "backwards:seed=1"]
    path = tmp_path / "run.toml"
    path.write_text('samplers = "backwards"\n')
    assert [str(one) for one in Request.of(**read_file(path)).samplers] == ["backwards"]
    assert [one.name for one in Registry([]).offers("sampler")] == ["backwards"]
    assert "samplers" in json.loads(_command(capsys, monkeypatch, "config", "schema"))["properties"]
    chosen = ["--accelerator", "host", "--strategy", "alone", "--precision", "plain", "--devices", "1"]
    out = json.loads(_command(capsys, monkeypatch, "explain", *chosen, "--sampler", "backwards", "--json"))
    assert [one["name"] for one in out["choices"] if one["kind"] == "sampler"] == ["backwards"]
    assert any(
        one["kind"] == "sampler" for one in json.loads(_command(capsys, monkeypatch, "plugins", "list", "--json"))
    )
    assert "### `order(count)`" in _command(capsys, monkeypatch, "contract", "sampler")


@pytest.mark.parametrize("sampler", [AMONG], indirect=True)
def test_a_new_kind_that_goes_into_plugins_is_one_row_of_a_fabric_too(sampler: Kind, in_memory: dict[str, Any]) -> None:
    """Named, given, or chosen automatically; an extension wraps it, and it belongs to one ``Fabric``."""

    class Doubled:
        @around.sampler
        def order(self, count: int) -> Any:
            return [*(yield), count]

    assert Fabric(**in_memory).plan.sampler.reason == "the highest priority that fits, here"
    assert Fabric(**{**in_memory, "plugins": ["sampler=backwards:seed=2"]}).plan.sampler.options == {"seed": 2}
    given = Backwards()
    fabric = Fabric(**{**in_memory, "plugins": [given, Doubled()]})
    assert fabric.plan.sampler.distribution == "(given)"
    assert given.order(2) == [1, 0, 2]
    with pytest.raises(RequestError, match="a sampler was given twice"):
        Fabric(**{**in_memory, "plugins": ["sampler=backwards", given]})


def test_fabric_has_the_arguments_of_the_table() -> None:
    """They are written out for editors and type checkers, with the table's defaults."""
    parameters = list(inspect.signature(Fabric).parameters.values())
    assert {one.name: one.default for one in parameters} == dict(argument_defaults())
    assert all(one.kind is one.KEYWORD_ONLY for one in parameters)

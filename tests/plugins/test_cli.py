"""The command line says what is installed, what it declares, and why it would be chosen."""

import json
from pathlib import Path
from typing import Any

import pytest

from fabric_core import Fabric, cli
from fabric_core.choosing.offers import Offer
from fabric_core.choosing.registry import Registry
from fabric_core.choosing.request import file_arguments, read_file
from fabric_core.errors import FabricError


def _run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: str) -> tuple[int, str, str]:
    monkeypatch.setattr("sys.argv", ["fabric-core", *arguments])
    monkeypatch.setenv("COLUMNS", "250")
    code: Any = 0
    try:
        cli.main()
    except SystemExit as end:
        code = end.code or 0
    out, err = capsys.readouterr()
    return code, out, err


@pytest.fixture
def fabric(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """Give a function that runs the command and returns exit code, output and errors."""
    return lambda *arguments: _run(capsys, monkeypatch, *arguments)


def test_listing_has_every_plugin_with_its_distribution(fabric: Any) -> None:
    """Kind, name, distribution, version and place, as a table and as JSON."""
    code, out, _ = fabric("plugins", "list", "--json")
    offers = json.loads(out)
    assert code == 0
    assert {"kind": "strategy", "name": "ddp", "distribution": "fabric-registry", "version": "0.1.0",
            "value": "fabric_plugins.strategies.ddp:DDPStrategy"} in offers  # fmt: skip
    _, table, _ = fabric("plugins", "list")
    assert all(offer["name"] in table and offer["value"] in table for offer in offers)


def test_showing_has_options_declarations_and_presets(fabric: Any) -> None:
    """Each option with type, default and meaning; an alias with what it presets."""
    _, out, _ = fabric("plugins", "show", "ddp", "--json")
    (ddp,) = json.loads(out)
    kind, default, meaning = ddp["options"]["static_graph"]
    assert (kind, default) == ("bool", "False")
    assert "never changes" in meaning
    assert ddp["declares"]["intercepts_forward"] is True
    _, out, _ = fabric("plugins", "show", "DDP_spawn", "--json")
    assert json.loads(out)[0]["preset"] == {"start_method": "spawn"}
    _, text, _ = fabric("plugins", "show", "fabric-registry/ddp")
    assert "static_graph" in text
    assert "intercepts_forward" in text
    (one,) = json.loads(fabric("plugins", "show", "ddp_spawn", "--json")[1])
    assert fabric("plugins", "show", "DDP_spawn")[1].splitlines()[:4] == [
        "strategy ddp_spawn",
        f"  fabric-registry 0.1.0, {one['value']}",
        f"  {one['summary']}",
        "  presets: {'start_method': 'spawn'}",
    ]
    _, out, _ = fabric("plugins", "show", "profiler", "--json")
    (profiler,) = json.loads(out)
    assert (profiler["kind"], profiler["options"], profiler["error"]) == ("extension", {}, None)
    assert profiler["summary"].endswith(".")


def test_showing_what_cannot_be_imported_says_why(fabric: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """With where it lies, and nothing of what only the plugin itself could say."""
    offer = Offer("strategy", "absent", "acme", "1.0", "acme_absent:Absent")
    monkeypatch.setattr("fabric_core.cli._plugins.find_registry", lambda: Registry([offer]))
    code, out, _ = fabric("plugins", "show", "absent")
    lines = out.splitlines()
    assert (code, lines[:2]) == (0, ["strategy absent", "  acme 1.0, acme_absent:Absent"])
    assert "acme_absent" in lines[2]
    (shown,) = json.loads(fabric("plugins", "show", "acme/absent", "--json")[1])
    assert shown["error"].splitlines() == lines[2:]
    assert (shown["options"], shown["declares"]) == ({}, {})


def test_why_answers_for_the_chosen_the_rejected_and_the_alias(fabric: Any) -> None:
    """The reason comes from the plan of the request that is asked about."""
    asked = ("--accelerator", "cpu", "--devices", "2")
    assert "strategy ddp: chosen, the highest priority that fits" in fabric("plugins", "why", "ddp", *asked)[1]
    assert "not chosen, it declares at most 1 process" in fabric("plugins", "why", "single_device", *asked)[1]
    assert "not chosen, it is another name" in fabric("plugins", "why", "ddp_spawn", *asked)[1]
    assert "isn't offered to the automatic choice" in fabric("plugins", "why", "model_parallel", *asked)[1]
    assert (
        "isn't offered to the automatic choice"
        not in fabric("plugins", "why", "model_parallel", *asked, "--strategy", "ddp")[1]
    )
    _, out, _ = fabric("plugins", "why", "ddp", *asked, "--strategy", "fsdp", "--json")
    assert json.loads(out)[0]["reason"] == "the request leaves it out: fsdp"


def test_explaining_gives_the_plan_of_fabric(fabric: Any, tmp_path: Path) -> None:
    """As JSON it is what ``fabric.plan.as_dict()`` gives for the same request, which may come from a file too."""
    path = tmp_path / "run.toml"
    path.write_text('accelerator = "cpu"\nstrategy = "ddp:static_graph=true"\ndevices = 2\n')
    code, out, _ = fabric("explain", "--config", str(path), "--precision", "bf16-mixed", "--json")
    assert code == 0
    assert json.loads(out) == Fabric.from_config(path, precision="bf16-mixed").plan.as_dict()
    _, table, _ = fabric("explain", "--config", str(path))
    assert "ddp:static_graph=true" in table
    assert "2 processes, devices [0, 1]" in table


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("explain", "--strategy", "dpp"), "did you mean 'ddp'"),
        (("explain", "--config", "absent.toml"), "can't be read"),
        (("plugins", "show", "dpp"), "did you mean 'ddp"),
        (("plugins", "why", "nothing-like-it"), "`fabric-core plugins list` shows all"),
        (("explain", "--accelerator", "cpu", "--strategy", "single_device", "--devices", "2"), "devices=1"),
    ],
)
def test_an_error_is_a_message_and_exit_code_2(fabric: Any, arguments: tuple[str, ...], message: str) -> None:
    """No traceback: what is wrong and what to write, on standard error."""
    code, out, err = fabric(*arguments)
    assert code == 2
    assert message in err
    assert "Traceback" not in out + err


def _fits(schema: Any, value: Any, root: Any) -> bool:
    """Judge by the words of JSON Schema that ours uses; an oracle that goes round what made the schema."""
    import re

    if "$ref" in schema:
        for part in schema["$ref"].split("/")[1:]:
            root = root[part]
        return _fits(root, value, root)
    kinds: dict[str, Any] = {"object": dict, "array": list, "string": str, "integer": int, "null": type(None)}
    kinds["number"] = (int, float)
    typed = isinstance(value, kinds.get(schema.get("type", "object"), object)) and not isinstance(value, bool)
    checks = [
        "anyOf" not in schema or any(_fits(one, value, root) for one in schema["anyOf"]),
        "const" not in schema or value == schema["const"],
        "enum" not in schema or value in schema["enum"],
        "type" not in schema or (isinstance(value, bool) if schema["type"] == "boolean" else typed),
        "pattern" not in schema or (isinstance(value, str) and re.search(schema["pattern"], value) is not None),
        "minimum" not in schema or not isinstance(value, int) or value >= schema["minimum"],
    ]  # fmt: skip
    if isinstance(value, dict):
        known = schema.get("properties", {})
        checks.append(set(schema.get("required", [])) <= set(value))
        checks.append(schema.get("additionalProperties") is not False or set(value) <= set(known))
        checks += [_fits(known[name], part, root) for name, part in value.items() if name in known]
    if isinstance(value, list) and "items" in schema:
        checks += [_fits(schema["items"], part, root) for part in value]
    return all(checks)


@pytest.mark.parametrize(
    ("text", "good"),
    [
        ('strategy = "ddp"\ndevices = 2\nprecision = "bf16-mixed"', True),
        ('strategy = "fabric-registry/ddp:static_graph=true"', True),
        ('strategy = {name = "ddp", options = {static_graph = true, bucket_cap_mb = 5.5}}', True),
        ("precision = 32", True),
        ('plugins = [{kind = "launcher", name = "elastic"}, "checkpoint=single_file"]', True),
        ('strategy = "dpp"', False),
        ('strategy = {name = "ddp", options = {static_grap = true}}', False),
        ('strategy = {name = "ddp", options = {static_graph = "perhaps"}}', False),
        ('stratgy = "ddp"', False),
        ("num_nodes = 0", False),
        ('plugins = ["elastic"]', False),
    ],
)
def test_the_schema_accepts_what_fabric_accepts(fabric: Any, tmp_path: Path, text: str, good: bool) -> None:
    """A file fits the schema if, and only if, a ``Fabric`` can be made of it: options of plugins included."""
    import tomllib

    schema = json.loads(fabric("config", "schema")[1])
    assert set(schema["properties"]) == set(file_arguments())
    assert _fits(schema, tomllib.loads(text), schema) == good
    path = tmp_path / "run.toml"
    path.write_text(text)
    try:
        Fabric(**{"accelerator": "cpu", **read_file(path)})
        accepted = True
    except FabricError:
        accepted = False
    assert accepted == good


def test_no_table_cuts_a_path_or_a_cause_where_the_output_is_no_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What goes into a file or a pipe is whole, however narrow a terminal would be; so is an error."""
    monkeypatch.setattr("sys.argv", ["fabric-core", "plugins", "list"])
    monkeypatch.setenv("COLUMNS", "40")
    with pytest.raises(SystemExit):
        cli.main()
    assert "fabric_plugins.strategies.ddp:DDP_FIND_UNUSED_PARAMETERS_TRUE" in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", ["fabric-core", "explain", "--strategy", "dpp"])
    with pytest.raises(SystemExit):
        cli.main()
    assert "instead: did you mean 'ddp' or 'fsdp' or 'ddp_spawn'? There are: ddp, ddp_find" in capsys.readouterr().err


def test_the_command_says_its_version(fabric: Any) -> None:
    """That of the package."""
    import fabric_core

    assert fabric("--version")[1].strip() == f"fabric-core {fabric_core.__version__}"

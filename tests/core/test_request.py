"""What a user writes becomes a request, or an error that says what to write."""

import json
import random
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fabric_core import Fabric
from fabric_core.choosing.parsing import PluginRef, parse_plugin
from fabric_core.choosing.request import Request, fill, read_environment, read_file
from fabric_core.errors import FabricError, FabricWarning, RequestError

NAMES = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_.+-]{0,8}", fullmatch=True)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
REFS = st.builds(
    PluginRef,
    name=NAMES,
    distribution=st.none() | NAMES,
    options=st.dictionaries(st.from_regex(r"[A-Za-z_][A-Za-z0-9_]{0,6}", fullmatch=True), JSON, max_size=3),
    source=st.just("strategy"),
)
COUNTS = st.integers(-(10**8), 65_536)  # no machine has more
QUIET = settings(max_examples=200, derandomize=True, deadline=None, database=None)


@QUIET
@given(REFS)
def test_a_reference_survives_the_way_through_text(ref: PluginRef) -> None:
    """Whatever a mapping can say in JSON, text can say too: to text and back gives the same reference."""
    assert parse_plugin(str(ref), "strategy") == ref


@pytest.mark.parametrize("value", ["a[b", "a]b", "{", "}]", 'a"b', "a,b", " a", "[1", "1", "true", "", "\\", "=", ":"])
def test_text_that_looks_like_something_else_stays_the_text(value: str) -> None:
    """Brackets, quotes, commas and JSON inside a text don't swallow or split the options that follow."""
    ref = PluginRef(name="x", options={"first": value, "then": [1, {"a": 2}], "last": value}, source="strategy")
    assert parse_plugin(str(ref), "strategy") == ref


@QUIET
@given(REFS)
def test_a_mapping_says_what_text_says(ref: PluginRef) -> None:
    """A mapping and its text parse to the same reference."""
    mapping = {"name": ref.name, "distribution": ref.distribution, "options": ref.options}
    assert parse_plugin(mapping, "strategy") == parse_plugin(str(ref), "strategy")


@QUIET
@given(
    st.fixed_dictionaries(
        {"strategy": REFS, "accelerator": REFS},
        optional={
            "precision": REFS,
            "devices": COUNTS | st.text(max_size=4) | st.lists(COUNTS, max_size=3),
            "num_nodes": st.integers(1, 9),
            "wrappers": st.lists(REFS.filter(lambda ref: ref.name != "auto"), max_size=2),
        },
    )
)
def test_a_request_survives_the_way_through_its_arguments(arguments: dict[str, Any]) -> None:
    """The arguments that a request gives make the same request, also after a way through JSON."""
    request = Request.of(**arguments)
    again = Request.of(**json.loads(json.dumps(request.arguments())))
    assert again.arguments() == request.arguments()
    assert str(again.strategy) == str(request.strategy)
    assert again.devices == request.devices


PIECES = [*string.printable, "ddp", "auto", ":", "=", ",", "/", '"', "[", "]", "{", "}", "\\", "é", "\u2028", "\x00"]
PIECES += ["a=1", "true", "null", "1e999", "NaN", "-1", '"a,b"', "launcher=", "9" * 5000, "[" * 1200, "\ud800"]
TOML = ["strategy", "devices", "=", '"ddp"', "[", "]", "\n", "2", "{", "}", "[[plugins]]", "#", "'", "2001-13-45", "=="]
YAML = [
    "strategy",
    ": ",
    "ddp",
    "\n",
    "- ",
    "!!int ''",
    "!!bool x",
    "!!timestamp y",
    "&a",
    "*a",
    "|",
    "%",
    "{",
    "[",
]


def _text(random_: random.Random, pieces: list[str]) -> str:
    return "".join(random_.choices(pieces, k=random_.randrange(9)))


def _value(random_: random.Random, depth: int = 0) -> Any:
    makers: list[Callable[[], Any]] = [
        lambda: _text(random_, PIECES),
        lambda: random_.choice([None, True, 0, -1, 2**70, 10**5000, 1.5, float("nan"), b"x", object(), str, 3j]),
        lambda: [_value(random_, depth + 1) for _ in range(random_.randrange(3))],
        lambda: {_text(random_, PIECES): _value(random_, depth + 1) for _ in range(random_.randrange(3))},
        lambda: {
            "name": _value(random_, depth + 1),
            random_.choice(["options", "distribution", "kind", "x", 3]): _value(random_, depth + 1),
        },
    ]
    return random_.choice(makers[: 2 if depth > 2 else None])()


def _accept(make: Callable[[], Any]) -> bool:
    """Say whether it was a valid request; it must be that, or an error of ours with a message."""
    try:
        made = make()
    except FabricError as error:
        if not error.what or len(str(error)) > 20_000:
            raise AssertionError("no message for people") from error
        return False
    if isinstance(made, PluginRef) and made.instance is None:
        again = parse_plugin(str(made), made.source)
        assert str(again) == str(made)
    return True


def test_twenty_thousand_random_inputs_are_a_request_or_an_error(tmp_path: Path) -> None:
    """Strings, mappings, variables and files: nothing raises anything but a ``FabricError`` with a message."""
    random_ = random.Random(20_000)  # noqa: S311 - the same inputs every time
    arguments = ["accelerator", "strategy", "devices", "num_nodes", "precision", "wrappers", "plugins", "loggers"]
    file = {suffix: tmp_path / f"request{suffix}" for suffix in (".toml", ".yaml")}
    seen = {True: 0, False: 0}
    for turn in range(20_000):
        text, value, argument = _text(random_, PIECES), _value(random_), random_.choice(arguments)
        if turn % 10 == 8:
            file[".toml"].write_text(_text(random_, [*TOML, *PIECES]), encoding="utf-8", errors="surrogatepass")
            accepted = _accept(lambda: Request.of(**read_file(file[".toml"])))
        elif turn % 10 == 9:
            file[".yaml"].write_text(_text(random_, [*YAML, *PIECES[:-5]]), encoding="utf-8", errors="surrogatepass")
            accepted = _accept(lambda: Request.of(**read_file(file[".yaml"])))
        elif turn % 5 == 2:
            variables = {f"FABRIC_{argument.upper()}": text}
            accepted = _accept(lambda: Request.of(**read_environment(variables)))  # noqa: B023 - called at once
        elif turn % 5 == 1:
            accepted = _accept(lambda: Request.of(**{argument: value}))  # noqa: B023
        else:
            accepted = _accept(lambda: parse_plugin(text, "strategy"))  # noqa: B023
        seen[accepted] += 1
    assert min(seen.values()) > 2_000, seen


@pytest.mark.parametrize("path", ["", None, 3, b"run.toml"])
def test_what_is_no_path_of_a_file_is_an_error(path: Any) -> None:
    """It isn't taken for no file."""
    with pytest.raises(RequestError, match="the configuration file"):
        Fabric.from_config(path)


@pytest.mark.parametrize("kind", ["bytes", "folder", "absent", "nested", "laughs", "null"])
def test_a_file_that_is_no_request_is_an_error(kind: str, tmp_path: Path) -> None:
    """Bytes that are no text, a folder, no file, nesting without end, and a YAML bomb are errors with a message."""
    path = tmp_path / "request.yaml"
    if kind == "null":
        path = tmp_path / "a\0b.yaml"
    elif kind == "bytes":
        path.write_bytes(bytes(range(256)))
    elif kind == "folder":
        path.mkdir()
    elif kind == "nested":
        path.write_text("[" * 1_500)
    elif kind == "laughs":
        lines = [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9) if n else 'ha'}]" for n in range(12)]
        path.write_text("strategy:\n  - " + "\n    ".join(lines))
    with pytest.raises(RequestError, match=r"configuration file|can't be parsed") as caught:
        Request.of(**read_file(path))
    assert str(path).replace("\0", "\\0") in str(caught.value)
    assert len(str(caught.value)) < 20_000


def test_code_beats_variables_and_variables_beat_the_file(tmp_path: Path) -> None:
    """Each argument comes from the first that says anything; what is left at its default says nothing."""
    path = tmp_path / "run.toml"
    path.write_text(
        'strategy = "from_file"\nprecision = "from_file"\naccelerator = "from_file:size=2"\nnum_nodes = 3\n'
        'plugins = ["launcher=from_file", {kind = "checkpoint", name = "theirs"}]\n'
    )
    variables = {
        "FABRIC_STRATEGY": "from_variable",
        "FABRIC_PRECISION": "from_variable",
        "FABRIC_NUM_NODES": "2",
        "FABRIC_WRAPPERS": "first:a=1,b=2;second",
        "FABRIC_DEVICES": "0,1",
        "FABRIC_SOMETHING": "else",
    }
    code = {"strategy": "from_code", "devices": "auto", "num_nodes": 1, "precision": None}
    request = Request.of(**fill(code, read_environment(variables), read_file(path)))
    assert str(request.strategy) == "from_code"
    assert str(request.precision) == "from_variable"
    assert request.precision.source == "FABRIC_PRECISION"
    assert (str(request.accelerator), request.accelerator.options) == ("from_file:size=2", {"size": 2})
    assert request.accelerator.source == f"{path}: accelerator"
    assert (request.num_nodes, request.devices) == (2, "0,1")
    assert [str(ref) for ref in request.wrappers] == ["first:a=1,b=2", "second"]
    assert [str(ref) for ref in request.plugins] == ["launcher=from_file", "checkpoint=theirs"]


def test_yaml_says_what_toml_says(tmp_path: Path) -> None:
    """The same content in both formats gives the same request."""
    toml, yaml = tmp_path / "run.toml", tmp_path / "run.yaml"
    toml.write_text('devices = [0, 1]\n[strategy]\nname = "x"\noptions = {deep = [1, {a = true}]}\n')
    yaml.write_text("devices: [0, 1]\nstrategy:\n  name: x\n  options: {deep: [1, {a: true}]}\n")
    one, other = (Request.of(**read_file(path)) for path in (toml, yaml))
    assert one.arguments() == other.arguments() == {"devices": [0, 1], "strategy": 'x:deep=[1, {"a": true}]'}


@pytest.mark.parametrize(
    ("write", "message"),
    [
        ("stratgy = 'x'", "did you mean 'strategy'"),
        ("strategy = 3.5", "run.toml: strategy can't be parsed"),
        ("num_nodes = 'two'", "num_nodes must be a positive whole number"),
        ("devices = ['a']", "devices can't be parsed"),
        ("callbacks = []", "which is no argument"),
        ("plugins = ['slurm']", "the kind before the name"),
        ("wrappers = 'auto'", "never chosen automatically"),
        ("strategy = ", "is damaged"),
    ],
)
def test_a_wrong_file_names_the_place_and_what_to_write(write: str, message: str, tmp_path: Path) -> None:
    """The message has the file, and what is wrong or what was meant."""
    path = tmp_path / "run.toml"
    path.write_text(write)
    with pytest.raises(RequestError) as caught:
        read_file(path)
    assert message in str(caught.value)
    assert "run.toml" in str(caught.value)


def test_a_misspelt_variable_is_warned_of() -> None:
    """A variable that is nearly one of ours says so; one of somebody else's is left alone."""
    with pytest.warns(FabricWarning, match="FABRIC_STRATGY is unknown; did you mean FABRIC_STRATEGY"):
        assert read_environment({"FABRIC_STRATGY": "ddp", "FABRIC_CFG_PATH": "/x"}) == {}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a:b", "options as name=value"),
        ("a:b=1,b=2", "'b' twice"),
        ("", "can't be parsed"),
        ("a b", "can't be parsed"),
        ("/a", "can't be parsed"),
    ],
)
def test_wrong_text_says_what_to_write(text: str, message: str) -> None:
    """Each way of being wrong has its own message, which names the argument."""
    with pytest.raises(RequestError) as caught:
        parse_plugin(text, "strategy")
    assert message in str(caught.value)
    assert "strategy" in str(caught.value)

"""``fabric-core config`` makes files that a ``Fabric`` can be made of, and says what is wrong with others."""

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fabric_core import Fabric, cli
from fabric_core.choosing.request import Request, read_file
from fabric_core.cli import _config

CPU = ("--accelerator", "cpu", "--devices", "2")


@pytest.fixture
def config(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Give a function that runs the command in a folder of its own and returns exit code, output and errors."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str, command: str = "config") -> tuple[Any, str, str]:
        monkeypatch.setattr("sys.argv", ["fabric-core", command, *arguments])
        with pytest.raises(SystemExit) as end:
            cli.main()
        return end.value.code, *capsys.readouterr()

    return run


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Give a function that answers questions, as on a terminal; it returns the questions that were asked."""

    def give(*texts: str) -> list[str]:
        left, questions = list(texts), []

        def ask(question: str, default: str) -> str:
            questions.append(question)
            return left.pop(0) or default

        monkeypatch.setattr(_config, "_on_terminal", lambda: True)
        monkeypatch.setattr("typer.prompt", ask)
        return questions

    return give


@pytest.mark.parametrize("suffix", [".toml", ".yaml"])
def test_every_answer_is_an_option_too(config: Any, suffix: str) -> None:
    """A file of options alone; ``Fabric.from_config`` chooses what the command said."""
    asked = (*CPU, "--strategy", "ddp:static_graph=true", "--precision", "bf16-mixed", "--wrapper", "channels_last")
    code, out, _ = config("make", f"run{suffix}", *asked, "--logger", "csv:root_dir=logs", "--json")
    assert code == 0
    with Fabric.from_config(f"run{suffix}") as fabric:
        assert fabric.plan.world_size == 2
        names = [choice["name"] for choice in json.loads(out)["plan"]["choices"]]
        assert names == [choice.name for choice in fabric.plan.choices]
        assert fabric.plan.strategy.options == {"static_graph": True}
    assert config("check", f"run{suffix}")[0] == 0


def test_what_is_not_said_is_not_in_the_file(config: Any) -> None:
    """So it stays what the defaults are."""
    config("make", "run.toml", *CPU)
    assert tomllib.loads(Path("run.toml").read_text()) == {"accelerator": "cpu", "devices": 2}


def test_questions_offer_what_works_here_and_refuse_the_rest(config: Any, answers: Any) -> None:
    """Each answer narrows what comes after it; what doesn't work is said with its reason, and asked for again."""
    questions = answers("cuda", "cpu", "0", "2", "single_device", "fsdp", "", "none", "csv")
    code, out, _ = config("make", "run.toml")
    assert code == 0
    assert "cuda" not in questions[0]
    assert "no cuda device can be used here" in out
    assert questions[2] == "devices (auto, a count, indices)"
    assert "single_device" not in questions[4]
    assert "it declares at most 1 process, and there would be 2" in out
    assert tomllib.loads(Path("run.toml").read_text()) == {
        "accelerator": "cpu", "strategy": "fsdp", "loggers": ["csv"], "devices": 2,
    }  # fmt: skip


def test_what_an_option_says_is_not_asked(config: Any, answers: Any) -> None:
    """The rest is."""
    questions = answers("", "", "")
    assert config("make", "run.toml", *CPU, "--strategy", "ddp")[0] == 0
    assert [question.partition(" ")[0] for question in questions] == ["precision", "wrapper", "logger"]


def test_what_does_not_work_here_is_not_written(config: Any) -> None:
    """Nor is a file replaced, or one of another format made."""
    for arguments, message in (
        (("run.toml", *CPU, "--strategy", "single_device"), "it declares at most 1 process"),
        (("run.json", *CPU), "a configuration file has no such ending"),
        (("absent/run.toml", *CPU), "No such file or directory"),
    ):
        code, _, err = config("make", *arguments)
        assert (code, message in err) == (2, True), err
    assert not list(Path().iterdir())
    config("make", "run.toml", *CPU)
    before = Path("run.toml").read_text()
    code, _, err = config("make", "run.toml", "--accelerator", "cpu")
    assert (code, "left as it is" in err, Path("run.toml").read_text()) == (2, True, before)
    assert config("make", "run.toml", "--accelerator", "cpu", "--force")[0] == 0
    assert Path("run.toml").read_text() == 'accelerator = "cpu"\n'


def test_an_older_file_is_where_a_new_one_begins(config: Any) -> None:
    """Options win over it."""
    Path("old.toml").write_text('accelerator = "cpu"\ndevices = 2\nstrategy = "ddp"\nwarn_after = 0\ncheck = true\n')
    assert config("make", "new.toml", "--config", "old.toml", "--strategy", "fsdp")[0] == 0
    expected = {"accelerator": "cpu", "devices": 2, "strategy": "fsdp", "warn_after": 0, "check": True}
    assert tomllib.loads(Path("new.toml").read_text()) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('stratgy = "ddp"', "did you mean 'strategy'"),
        ('strategy = "dpp"', "did you mean 'ddp'"),
        ('strategy = "ddp:static_grap=true"', "no option 'static_grap'"),
        ('loggers = ["csv:colour=3"]', "no option 'colour'"),
        ('plugins = ["extension=nothing_like_it"]', "there is no extension 'nothing_like_it'"),
        ("devices = ", "damaged"),
    ],
)
def test_a_wrong_file_is_wrong_elsewhere_too(config: Any, text: str, message: str) -> None:
    """Names and options are checked whatever is here; the message says what is wrong."""
    Path("run.toml").write_text(text)
    for more in ((), ("--elsewhere",)):
        code, _, err = config("check", "run.toml", *more)
        assert (code, message in err) == (2, True), err


def test_a_file_for_another_machine_can_be_checked(config: Any) -> None:
    """As on the first node of a cluster, which has no such device."""
    Path("run.toml").write_text('accelerator = "cuda"\ndevices = 8\nstrategy = "fsdp"\nnum_nodes = 2\n')
    assert config("check", "run.toml")[0] == 2
    code, out, _ = config("check", "run.toml", "--elsewhere", "--json")
    assert (code, json.loads(out)["plan"]) == (0, None)


def test_a_variable_names_the_file_for_every_fabric(
    config: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Code, other variables and a file that is given win over it; commands read it, and ``run`` passes it on."""
    Path("run.toml").write_text('accelerator = "cpu"\ndevices = 2\nprecision = "bf16-mixed"\nstrategy = "fsdp"\n')
    Path("given.toml").write_text('strategy = "ddp"\n')
    Path("script.py").touch()
    plan = json.loads(config("--dry-run", "--json", "--config", "run.toml", "script.py", command="run")[1])
    assert plan[0]["variables"] == {"FABRIC_CONFIG": str(tmp_path / "run.toml")}
    assert "2" in plan[0]["command"]
    monkeypatch.setenv("FABRIC_CONFIG", "run.toml")
    monkeypatch.setenv("FABRIC_PRECISION", "64-true")
    with Fabric.from_config("given.toml", devices=1) as fabric:
        chosen = fabric.plan
        assert (chosen.strategy.name, chosen.precision.name, chosen.world_size) == ("ddp", "64-true", 1)
    with Fabric() as fabric:
        assert (fabric.plan.strategy.name, fabric.plan.world_size) == ("fsdp", 2)
    assert json.loads(config("--json", command="explain")[1])["world_size"] == 2
    monkeypatch.setenv("FABRIC_CONFIG", "absent.toml")
    assert "absent.toml" in config(command="explain")[2]


_OPTIONS = st.dictionaries(
    st.from_regex(r"[a-z_]{1,8}", fullmatch=True), st.text(st.characters(codec="utf-8"), max_size=8) | st.booleans()
    | st.integers(-9, 9), max_size=2,
)  # fmt: skip
_REF = st.builds(lambda name, options: {"name": name, "options": options}, st.sampled_from("ab"), _OPTIONS)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    strategy=_REF,
    wrappers=st.lists(_REF, max_size=2),
    devices=st.integers(1, 9),
    suffix=st.sampled_from([".toml", ".yaml"]),
)
def test_whatever_is_written_is_read_as_it_was(
    tmp_path: Path, strategy: Any, wrappers: Any, devices: int, suffix: str
) -> None:
    """In both formats, options of any text."""
    request = Request.of(strategy=strategy, wrappers=wrappers, devices=devices, warn_after=None)
    path = tmp_path / f"run{suffix}"
    path.write_text(_config._written(request.arguments(), suffix), encoding="utf-8")
    assert Request.of(**read_file(path)).arguments() == request.arguments()

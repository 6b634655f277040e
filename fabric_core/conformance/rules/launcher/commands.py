"""Rules for launchers: how a command is run again, and what can't be."""

import json
import os
import pickle
import sys
import time
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any, Final

from fabric_core.conformance.bench import Bench, Place, folder_of_its_own
from fabric_core.conformance.rule import Broken, Table
from fabric_core.conformance.rules.launcher.measures import SOON, alone, end_with_parent, refuses, run, start
from fabric_core.contracts import Launcher, LaunchOrder
from fabric_core.errors import LaunchError

TABLE: Final = Table("launcher", inside=False)

_SCRIPT: Final = f"from {__name__} import play\n\nif __name__ == '__main__':\n    play(__file__)\n"
_REFUSED: Final = 100
_RETURNED: Final = 101


def play(script: str) -> None:
    """Do what the kit's script does: start the command again, or be a rank of it."""
    folder = Path(script).resolve().parent
    place, code = pickle.loads((folder / "order").read_bytes())  # noqa: S301 - our own
    plugin = place.plugin()
    info = plugin.detect(dict(os.environ))
    if info is None:
        end_with_parent()
        print("before")  # noqa: T201 - in what order it is shown is what is asked
        os.chdir("elsewhere")
        try:
            plugin.start(LaunchOrder(processes=2))
        except LaunchError as error:
            if refuses(error):
                sys.exit(_REFUSED)
            raise
        sys.exit(_RETURNED)
    plugin.setup_process(info)
    seen = {"words": sys.argv[1:], "folder": str(Path.cwd()), "ranks": info.world_size}
    print("rank", flush=True)  # noqa: T201 - as above
    said = folder / f"rank{info.global_rank}"
    if code and info.global_rank == 0:
        seen["peers"] = _watch(plugin, info, folder)
    said.write_text(json.dumps(seen))
    if code and info.global_rank == 1:
        _come(folder / "ready")
        sys.exit(0)
    _come(folder / f"rank{1 - info.global_rank}")
    sys.exit(code)


def _watch(plugin: Launcher, info: Any, folder: Path) -> str:
    """Look for a rank that ends without having come; say what ``check_peers`` says while it is there, and after."""
    _come(folder / "rank1")
    try:
        plugin.check_peers(info)
    except LaunchError as error:
        return f"it raises {error} while every rank is there"
    (folder / "ready").touch()
    if type(plugin).check_peers is Launcher.check_peers:
        return ""
    end = time.monotonic() + SOON
    while time.monotonic() < end:
        try:
            plugin.check_peers(info)
        except LaunchError:
            return ""
        time.sleep(0.2)
    return f"rank 1 ended, and it notices nothing in {SOON:.0f} s"


def _come(file: Path) -> None:
    end = time.monotonic() + SOON
    while not file.exists() and time.monotonic() < end:
        time.sleep(0.05)


def _run_command(place: Place, words: list[str], code: int) -> tuple[int, str, str, list[dict[str, Any] | None]]:
    """Run the script as it is typed in its folder; give its exit code, what it showed, and what its ranks saw."""
    alone()
    with folder_of_its_own() as folder:
        (folder / "elsewhere").mkdir()
        (folder / "script.py").write_text(_SCRIPT)
        (folder / "order").write_bytes(pickle.dumps((place, code)))
        done = run([sys.executable, *words], folder)
        ranks = [folder / f"rank{rank}" for rank in range(2)]
        seen = [json.loads(one.read_text()) if one.exists() else None for one in ranks]
        for one in seen:
            if one is not None:
                one["folder"] = one["folder"] == str(folder.resolve())
        return done.returncode, done.stdout, done.stderr, seen


@TABLE.rule(
    "LAU-520",
    "A command is run again as it was typed, where it was typed, after what was printed before; its exit code is that "
    "of its ranks.",
    reason="A script that reads its arguments, opens files beside it and ends with a code does so in every rank.",
    advice="run sys.orig_argv in the folder of its beginning; flush standard output; exit with the ranks' code",
)
def _reruns(bench: Bench) -> None:
    for words, code in ((["-B", "script.py", "--word", "7"], 0), (["script.py"], 3)):
        got, shown, trouble, seen = bench.fresh(_run_command, words, code)
        if got == _REFUSED:
            return
        typed = " ".join(["python", *words])
        if got != code:
            raise Broken(f"`{typed}`, whose ranks exit with {code}, exits with {got}: {trouble[-500:]}")
        expected = {"words": words[words.index("script.py") + 1 :], "folder": True, "ranks": 2}
        for rank, one in enumerate(seen):
            if one is None or {name: one[name] for name in expected} != expected:
                raise Broken(f"of `{typed}` rank {rank} finds {one}, and it should be {expected}")
            if one.get("peers"):
                raise Broken(f"check_peers: {one['peers']}")
        if not shown.startswith("before"):
            raise Broken(f"what was printed before is shown as {shown[:200]!r}")


def _add(one: int, other: int) -> int:
    return one + other


def _call(function: Any, *args: Any) -> Any:
    return function(*args)


def _start_at_a_prompt(place: Place) -> tuple[Any, Any]:
    """Start what a module defines, and what was typed, in a process whose main module is no file."""
    alone()
    main = ModuleType("__main__")
    typed_there: Any = FunctionType(_add.__code__, vars(main))
    typed_there.__module__ = "__main__"
    vars(main)[typed_there.__qualname__] = typed_there
    sys.modules["__main__"] = main
    plugin = place.plugin()
    return start(plugin, _call, _add, 40, 2), start(plugin, _call, typed_there, 40, 3)


def _start_no_script(place: Place) -> list[str]:
    """Start the command of an interpreter that was given no script, or has a prompt."""
    alone()
    outcomes = []
    for words, prompt in (([], False), (["-"], False), (["-i", "script.py"], True)):
        sys.orig_argv[1:] = words
        if prompt:
            sys.ps1 = ">>> "
        outcomes.append(start(place.plugin(), None)[0])
    return outcomes


@TABLE.rule(
    "LAU-521",
    "At a prompt, and in a notebook, `start` runs a function that a module defines; one typed there it runs, or "
    "refuses with LaunchError, as it refuses a command, which can't be run again.",
    reason="Ranks that can't import the function end with an error that doesn't name the notebook, or never.",
    advice="where ranks import, and order.args hold what __main__ defines that has no file, raise LaunchError",
)
def _at_a_prompt(bench: Bench) -> None:
    imported, typed = bench.fresh(_start_at_a_prompt)
    if imported[0] != "refused" and imported != ("ran", 42):
        raise Broken(f"a function that a module defines: {' '.join(map(str, imported))}")
    if typed[0] != "refused" and typed != ("ran", 43):
        raise Broken(f"a function that was typed: {' '.join(map(str, typed))}")
    commands = bench.fresh(_start_no_script)
    if any(one != "refused" for one in commands):
        raise Broken(f"without a script, from standard input, and at a prompt a command is {', '.join(commands)}")

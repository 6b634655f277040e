"""Runs in an environment of its own: makes a Fabric under a lock, again and again, after something was changed.

Each attempt is a forked process, in which imports are watched. Prints what came of each as JSON.
"""

import json
import os
import shutil
import site
import sys
import sysconfig
import zipfile
from collections.abc import Callable
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

from fabric_core import Fabric, cli
from fabric_core.errors import FabricError

SITE = Path(sysconfig.get_path("purelib"))
WHEELS = Path(sys.argv[1])
LOCK = "fabric.lock"


def attempt(act: Callable[[], object]) -> dict[str, Any]:
    """Act in a process of its own, and tell how it ended and which modules of third parties were imported."""
    ours, theirs = os.pipe()
    if os.fork() == 0:
        watched: list[str] = []
        # Whatever imports a module runs its code by `exec`.
        sys.addaudithook(lambda event, given: watched.append(given[0].co_filename) if event == "exec" else None)
        answer: dict[str, Any] = {"error": None}
        try:
            act()
        except FabricError as error:
            answer = {"error": type(error).__name__, "what": error.what, "got": error.got}
        except SystemExit as end:
            answer = {"error": None, "code": end.code}
        answer["run"] = sorted({Path(name).stem for name in watched if "acme" in name})
        answer["imported"] = sorted(name for name in sys.modules if name.startswith("acme"))
        os.write(theirs, json.dumps(answer).encode())
        os._exit(0)
    os.close(theirs)
    with os.fdopen(ours) as pipe:
        text = pipe.read()
    os.wait()
    answer = json.loads(text)
    return dict(answer)


def fabric(*beside: str, first: str | None = None, lock: str | None = LOCK, **asked: Any) -> dict[str, Any]:
    """Make a Fabric; ``beside`` are wheels to install first, ``first`` a folder that comes first on the path."""

    def act() -> None:
        for name in beside:
            install(name)
        if first is not None:
            sys.path.insert(0, first)
        Fabric(accelerator="cpu", devices=1, lock=lock, **asked)

    return attempt(act)


def from_file() -> None:
    """Make a Fabric of a configuration file that names the lock."""
    install("acme_extension")
    Fabric.from_config("run.toml")


def imported_before() -> None:
    """Make a Fabric when a module of the plugin's name was imported from elsewhere."""
    sys.path.insert(0, "first")
    __import__("acme_strategy")
    del sys.path[0]
    Fabric(accelerator="cpu", devices=1, lock=LOCK, strategy="acme")


def install(name: str) -> None:
    """Install a wheel into a folder of its own, as installers do: unpacked, and its .pth files read."""
    folder = Path("beside") / name
    if not folder.exists():
        with zipfile.ZipFile(next(WHEELS.glob(f"{name}-*.whl"))) as wheel:
            wheel.extractall(folder)
    site.addsitedir(str(folder.resolve()))


def command(*words: str) -> dict[str, Any]:
    """Run ``fabric-core``."""

    def act() -> None:
        sys.argv = ["fabric-core", *words]
        with open("command.out", "w") as out:  # noqa: PTH123
            os.dup2(out.fileno(), 1)
            cli.main()

    return {**attempt(act), "out": Path("command.out").read_text()}


def with_change(path: str, text: str | None, **asked: Any) -> dict[str, Any]:
    """Make a Fabric while a file of the installed distribution has another content, or is away."""
    file = SITE / path
    before = file.read_text() if file.exists() else None
    try:
        if text is None:
            file.unlink()
        else:
            file.write_text((before or "") + text)
        return fabric(**{"strategy": "acme", **asked})
    finally:
        if before is None:
            file.unlink()
        else:
            file.write_text(before)


def editable(answers: dict[str, Any]) -> None:
    """Go through what may happen to an editable install."""
    # The sources of an editable install are no files of its RECORD: the lock has their hashes.
    answers["editable, not in the lock"] = fabric(wrappers=["edited"])
    answers["lock with it"] = command("plugins", "lock", "second.lock")
    answers["editable"] = fabric(wrappers=["edited"], lock="second.lock")
    pth = "__editable__.acme_edited-1.0.pth"
    answers["pth, changed"] = with_change(pth, "# another line\n", wrappers=["edited"], lock="second.lock")
    source = Path("source/acme_edited/__init__.py")
    source.write_text(source.read_text() + "\n")
    answers["editable, changed"] = fabric(wrappers=["edited"], lock="second.lock")
    answers["differences"] = command("plugins", "lock", "second.lock", "--check", "--json")


def main() -> None:
    """Go through all, in an order in which each leaves the environment as it was."""
    answers: dict[str, Any] = {"unlocked": fabric(strategy="acme", lock=None)}
    os.environ["FABRIC_DISABLE_PLUGINS"] = "acme-edited"
    answers["lock"] = command("plugins", "lock")
    del os.environ["FABRIC_DISABLE_PLUGINS"]
    answers["as locked"] = fabric(strategy="acme")
    answers["unchanged"] = command("plugins", "lock", "--check")
    for name, path, text in (
        ("changed", "acme_strategy/helper.py", "\n"),
        ("missing", "acme_strategy/helper.py", None),
        ("added", "acme_strategy/added.py", ""),
        ("binary", f"acme_strategy/plug{EXTENSION_SUFFIXES[-1]}", ""),
    ):
        answers[name] = with_change(path, text)
    answers["added, unlocked"] = with_change("acme_strategy/added.py", "", lock=None)
    info = next(SITE.glob("acme_strategy-1.0.dist-info"))
    answers["record"] = with_change(f"{info.name}/RECORD", "acme_strategy/other.txt,sha256=abc,3\n")
    shutil.move(info, "kept")
    answers["other version"] = fabric("acme_strategy", strategy="acme")
    shutil.move("kept", info)
    answers["twin"] = fabric("acme_twin", strategy="acme")
    answers["twin, unlocked"] = fabric("acme_twin", strategy="acme", lock=None)
    answers["twin, the other named"] = fabric("acme_twin", strategy="acme-strategy/acme")
    answers["extension"] = fabric("acme_extension", strategy="acme")
    answers["extension, unlocked"] = fabric("acme_extension", strategy="acme", lock=None)
    answers["launcher"] = fabric("acme_launcher", strategy="acme")
    answers["checkpoint"] = fabric("acme_checkpoint", strategy="acme")
    answers["logger"] = fabric("acme_logger", loggers=["acme"])
    answers["wrapper"] = fabric("acme_wrapper", wrappers=["acme"])
    answers["precision"] = fabric("acme_precision", precision="acme")
    answers["not asked for"] = fabric("acme_wrapper", "acme_precision", strategy="acme")
    os.environ["FABRIC_DISABLE_PLUGINS"] = "acme-extension"
    answers["switched off"] = fabric("acme_extension", strategy="acme")
    del os.environ["FABRIC_DISABLE_PLUGINS"]
    Path("first/acme_strategy").mkdir(parents=True)
    Path("first/acme_strategy/__init__.py").touch()
    answers["earlier on the path"] = fabric(first="first", strategy="acme")
    answers["imported before"] = attempt(imported_before)
    Path("namespace/acme_space").mkdir(parents=True)
    Path("namespace/acme_space/part.py").touch()
    answers["namespace"] = fabric(wrappers=["spaced"])
    answers["namespace, earlier on the path"] = fabric(first="namespace", wrappers=["spaced"])
    os.environ["FABRIC_LOCK"] = LOCK
    answers["variable"] = fabric("acme_extension", strategy="acme", lock=None)
    answers["commands"] = command("plugins", "show", "edited")
    del os.environ["FABRIC_LOCK"]
    Path("run.toml").write_text(f'accelerator = "cpu"\ndevices = 1\nlock = "{LOCK}"\n')
    answers["file"] = attempt(from_file)
    editable(answers)
    sys.stdout.write(json.dumps(answers))


if __name__ == "__main__":
    main()

"""Rules for launchers: how launches end, and what is left of them."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from multiprocessing import util
from pathlib import Path
from typing import Any, Final

from fabric_core.conformance.bench import Bench, Place, folder_of_its_own
from fabric_core.conformance.rule import Broken, Level, Table
from fabric_core.conformance.rules.launcher.measures import (
    SOON,
    alone,
    end_with_parent,
    in_new_interpreter,
    refuses,
    start,
    two_ranks,
)
from fabric_core.contracts import LaunchOrder

TABLE: Final = Table("launcher", inside=False)

_LONG: Final = 120.0
"""How many seconds a rank, or what it started, lives that nobody ends."""


def _runs(pid: int) -> bool:
    """Say whether a process runs: one that has ended may wait for being asked how."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    with suppress(OSError):
        os.kill(pid, 0)
        return sys.platform != "linux"
    return False


def _stay(place: Place, folder: str, fails: int | None) -> None:
    """Take part as a rank; start a process, make a temporary folder and a semaphore; fail, or stay."""
    plugin = place.plugin()
    info = plugin.detect(dict(os.environ))
    plugin.setup_process(info)
    child = subprocess.Popen([sys.executable, "-c", f"import time; time.sleep({_LONG})"])
    told: dict[str, list[Any]] = {"ranks": [os.getpid()], "processes": [child.pid], "files": []}
    if fails is not None:
        lock = multiprocessing.get_context("spawn").Lock()
        semaphore = vars(lock)["_semlock"].name.removeprefix("/")  # nothing public tells its name
        told["files"] = [util.get_temp_dir(), f"/dev/shm/sem.{semaphore}"]  # noqa: S108 - where Linux has it
    aside = Path(folder, f".{info.global_rank}")
    aside.write_text(json.dumps(told))
    aside.rename(Path(folder, str(info.global_rank)))
    if info.global_rank == fails:
        _reported(folder)
        raise ZeroDivisionError("the kit's own")
    time.sleep(_LONG)


def _reported(folder: str, *, within: float = 3 * SOON) -> dict[str, list[Any]]:
    """Wait until both ranks have said what they made; give it."""
    end = time.monotonic() + within
    while not all(Path(folder, rank).exists() for rank in "01"):
        if time.monotonic() > end:
            return {"ranks": [], "processes": [], "files": []}
        time.sleep(0.05)
    both = [json.loads(Path(folder, rank).read_text()) for rank in "01"]
    return {name: both[0][name] + both[1][name] for name in both[0]}


def _remains(told: dict[str, list[Any]], within: float) -> list[str]:
    """Wait for all of it to be gone; say what remains, and end it."""
    end = time.monotonic() + within
    while True:
        alive = {name: [pid for pid in told[name] if _runs(pid)] for name in ("ranks", "processes")}
        files = [one for one in told["files"] if Path(one).exists()]
        if time.monotonic() > end or not (files or any(alive.values())):
            break
        time.sleep(0.05)
    for pid in (pid for pids in alive.values() for pid in pids):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    words = {"ranks": "ranks", "processes": "processes that ranks started"}
    return [*(words[name] for name, pids in alive.items() if pids), *files]


def _fail_beside(place: Place, folder: str) -> list[str]:
    alone()
    outcome, _ = start(place.plugin(), _stay, place, folder, 0)
    if outcome == "refused":
        return []
    told = _reported(folder, within=0)
    told["files"] = [one for one in told["files"] if one != util.get_temp_dir()]  # ranks may share this process's
    return _remains(told, 5.0)


@TABLE.rule(
    "LAU-517",
    "Where a rank fails, what the others had started, and what `multiprocessing` keeps for them, goes with them.",
    reason="Temporary folders and semaphores fill machines that train for years, and processes keep devices.",
    advice="let a rank that is ended run its exit handlers, or remove after it what it kept; end its process group",
    level=Level.SHOULD,
)
def _clears(bench: Bench) -> None:
    if two_ranks(bench)[0] == "refused":
        return
    with folder_of_its_own() as folder:
        left, said = bench.fresh(in_new_interpreter, _fail_beside, str(folder))
    if left:
        raise Broken(f"after rank 0 failed there are {', '.join(left)}")
    if "resource_tracker" in said:
        raise Broken(f"as the process that started the ranks ends it says {said[-300:]!r}")


_ENDS: Final = {"refused": 100, "interrupted": 101, "raised": 102, "returned": 103}
"""With which codes a process ends that started ranks."""


def _start_and_wait(place: Place, folder: str, method: str | None) -> None:
    end_with_parent()
    alone()
    code = "returned"
    try:
        order = LaunchOrder(processes=2, start_method=method, function=_stay, args=(place, folder, None))
        place.plugin().start(order)
    except KeyboardInterrupt:
        code = "interrupted"
    except SystemExit as error:
        os._exit(error.code if isinstance(error.code, int) else 1)
    except BaseException as error:  # noqa: BLE001 - what it is says how it ended
        code = "refused" if refuses(error) else "raised"
    os._exit(_ENDS[code])


def _end_by(place: Place, folder: str, sign: int, method: str | None) -> tuple[int | None, list[str]]:
    """Send a signal to a process that started ranks; give how it ended, and what is left."""
    process: Any = multiprocessing.get_context("fork").Process(target=_start_and_wait, args=(place, folder, method))
    process.start()
    try:
        told = _waited(process, folder)
        if process.exitcode is None:
            os.kill(process.pid, sign)
            process.join(2 * SOON)
        return process.exitcode, _remains(told, SOON)
    finally:
        process.kill()
        process.join()


def _waited(process: Any, folder: str) -> dict[str, list[Any]]:
    end = time.monotonic() + 3 * SOON
    while process.is_alive() and time.monotonic() < end:
        told = _reported(folder, within=0)
        if told["ranks"]:
            return told
        time.sleep(0.05)
    return _reported(folder, within=0)


def _end_by_signals(place: Place, folder: str, signs: tuple[int, ...], methods: tuple[str | None, ...]) -> list[Any]:
    """Give how the process ended that started ranks, by each signal, and what is left; by the first method it takes."""
    alone()
    seen = []
    for sign in signs:
        for method in methods:
            here = Path(folder, f"{sign}-{method}")
            here.mkdir()
            code, left = _end_by(place, str(here), sign, method)
            if code != _ENDS["refused"]:
                break
        seen.append((code, left))
    return seen


@TABLE.rule(
    "LAU-518",
    "A process that is told to end while it waits for ranks leaves none: SIGINT raises KeyboardInterrupt, SIGTERM ends "
    "the process, and not as one that succeeded.",
    reason="Schedulers and people end a training by these; a rank that goes on keeps its device.",
    advice="catch both signals, or whatever they raise; end the ranks, wait for them, and raise it on",
)
def _is_told_to_end(bench: Bench) -> None:
    if two_ranks(bench)[0] == "refused":
        return
    signs = (signal.SIGINT, signal.SIGTERM)
    with folder_of_its_own() as folder:  # forking is the fastest
        seen, _ = bench.fresh(in_new_interpreter, _end_by_signals, str(folder), signs, ("fork", None))
    for sign, (code, left) in zip(signs, seen, strict=True):
        if code == _ENDS["refused"]:
            return
        right = code == _ENDS["interrupted"] if sign == signal.SIGINT else code not in {None, 0, *_ENDS.values()}
        if not right:
            words = {number: word for word, number in _ENDS.items()}
            raise Broken(f"at {sign.name} the process that started ranks {words.get(code, f'ends with {code}')}")
        if "ranks" in left:
            raise Broken(f"after {sign.name} there are {', '.join(left)}")


@TABLE.rule(
    "LAU-519",
    "Ranks, and what they started, end where the process that started them was killed.",
    reason="Nobody else knows them: they keep their devices until somebody finds them.",
    advice="let a thread of each rank wait for the end of whoever started it, and end the rank's process group",
    level=Level.SHOULD,
)
def _is_killed(bench: Bench) -> None:
    if two_ranks(bench)[0] == "refused":
        return
    with folder_of_its_own() as folder:
        seen, _ = bench.fresh(in_new_interpreter, _end_by_signals, str(folder), (signal.SIGKILL,), (None,))
    code, left = seen[0]
    if code != _ENDS["refused"] and left:
        raise Broken(f"after the process that started ranks was killed there are {', '.join(left)}")

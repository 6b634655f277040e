"""Processes by torchelastic: started here in place of ``torchrun``, or by ``torchrun`` itself."""

import contextlib
import gc
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping
from multiprocessing import forkserver
from pathlib import Path
from typing import Any, Final, Literal

import torch

from fabric_core.contracts import Launcher, LauncherCapabilities, LaunchOrder, PluginOptions, ProcessInfo
from fabric_core.errors import LaunchError, RankFailedError
from fabric_plugins.launchers._folder import launch_folder, remove_semaphores
from fabric_plugins.launchers._reports import (
    REPORT,
    failed,
    missing_ranks,
    note_return,
    read_report,
    report_agent,
    report_folder,
    was_ended,
    write_report,
)
from fabric_plugins.launchers._variables import Variables
from fabric_plugins.launchers._watching import end_with

__all__ = ["ElasticLauncher", "ElasticOptions"]

_OURS: Final = "fabric-"
_ADDRESS: Final = "127.0.0.1"
_PRELOADED: Final = ("torch", "fabric_core.fabric", "fabric_plugins.strategies", __name__, f"{__package__}._agent")
_HERE: Final = 'under strategy="ddp_notebook" (or "fsdp:start_method=fork"), which forks this process'
"""How to run a function that is defined in a notebook."""
_SIGNALS: Final = ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT")


class ElasticOptions(PluginOptions):
    """The options of the elastic launcher."""

    start_method: Literal["spawn", "forkserver", "fork"] = "spawn"
    """How the processes of a function are started; a command's are always new ones."""
    shutdown_timeout: int = 10
    """How many seconds the other ranks have to end after one failed, before they are killed."""


class ElasticLauncher(Launcher):
    """Starts ranks with torchelastic, which also ends all of them when one fails.

    A plain script becomes its own launcher: the process that the user started is the agent, and each rank re-runs
    exactly the command that was typed. Under ``torchrun`` the process joins.
    """

    Options = ElasticOptions
    options: ElasticOptions
    capabilities = LauncherCapabilities(multi_node=True)

    def __init__(self, options: ElasticOptions | None = None, /, **given: Any) -> None:
        super().__init__(options, **given)
        self._undo: list[Callable[[], None]] = []

    def detect(self, environment: Mapping[str, str]) -> ProcessInfo | None:
        """Recognise ``torchrun``, or an agent of this launcher."""
        if "TORCHELASTIC_RUN_ID" not in environment:
            return None
        names = Variables(environment, "torchelastic", "start with torchrun, or unset TORCHELASTIC_RUN_ID")
        rank, world, local_rank, local_world = names.place("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
        restarts = "TORCHELASTIC_RESTART_COUNT"
        ours = environment["TORCHELASTIC_RUN_ID"].startswith(_OURS)
        return ProcessInfo(
            global_rank=rank,
            local_rank=local_rank,
            node_rank=names.number("GROUP_RANK", below=world // local_world),
            world_size=world,
            local_world_size=local_world,
            main_address=names.host("MASTER_ADDR"),
            main_port=names.number("MASTER_PORT", low=1, below=65_536),
            attempt=names.number(restarts) if restarts in names else 0,
            agent_store=environment.get("TORCHELASTIC_USE_AGENT_STORE", "").lower() == "true",
            owner="elastic" if ours else "torchrun",
        )

    def start(self, order: LaunchOrder) -> Any:
        """Become the agent of new ranks."""
        if order.nodes != 1:
            raise LaunchError(
                f"{order.nodes} nodes can't be started from one of them",
                where="Fabric(num_nodes=)",
                instead=f"on every node: torchrun --nnodes {order.nodes} --nproc-per-node {order.processes} "
                "--rdzv-backend c10d --rdzv-endpoint HOST:PORT script.py",
            )
        if order.function is None:
            return self._start_command(order)
        return self._start_function(order, order.function)

    def setup_process(self, info: ProcessInfo) -> None:
        """Let the rank die with its agent; in one that this launcher started, share the cores too."""
        if info.owner == "torchrun":
            end_with(os.getppid(), None)
            return
        if info.owner != "elastic":
            return
        end_with(report_agent(), report_folder())
        self._keep_temporary_files()
        threads = torch.get_num_threads()
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // info.local_world_size))
            self._undo.append(lambda: torch.set_num_threads(threads))

    def _keep_temporary_files(self) -> None:
        """Let the files and semaphores of ``multiprocessing`` (of a loader's workers, say) go with the agent's."""
        config = multiprocessing.current_process()._config  # type: ignore[attr-defined] # noqa: SLF001 - no public way
        before = {name: config.get(name) for name in ("tempdir", "semprefix")}
        folder = report_folder()  # a rank that is ended removes nothing
        config.update(tempdir=str(folder), semprefix=f"/{folder.name}")
        self._undo.append(lambda: config.update(before))

    def check_peers(self, info: ProcessInfo) -> None:
        """Notice that a rank of this node has ended before it came."""
        missing = missing_ranks(info)
        if missing:
            raise LaunchError(
                f"rank {', '.join(map(str, missing))} ended before it called fabric.launch(), for which this one waits",
                where="fabric.launch()",
                instead="fabric.launch() on every rank",
                ranks=missing,
            )

    def report_failure(self, error: BaseException, rank: int) -> bool:
        """Leave a report for the agent; of a function it shows the error, where the user called."""
        return write_report(error, rank)

    def teardown(self) -> None:
        """Undo what ``setup_process`` did."""
        while self._undo:
            self._undo.pop()()

    def _start_command(self, order: LaunchOrder) -> Any:
        arguments = sys.orig_argv[1:]
        if not arguments or arguments[0] == "-" or hasattr(sys, "ps1"):
            raise LaunchError(
                "the command that was typed can't be run again: it is no script",
                where="fabric.launch()",
                got=" ".join(sys.orig_argv),
                instead=f"in a notebook or at a prompt, fabric.launch(function) {_HERE}; or put the code into a script",
            )
        sys.stdout.flush()
        code = 0
        try:
            with contextlib.chdir(_typed_in()), launch_folder() as folder:
                self._run(order, folder, sys.executable, arguments)
        except RankFailedError as error:
            print(error, file=sys.stderr)  # noqa: T201 - the agent's last word, after the ranks' tracebacks
            code = error.fields["exit_code"]
        # The interpreter looks for garbage as it ends, among all that torch made: a third of a second for nothing.
        gc.freeze()
        raise SystemExit(code)

    def _start_function(self, order: LaunchOrder, function: Callable[..., Any]) -> Any:
        method = order.start_method or self.options.start_method
        if method != "fork":
            _check_importable(order)
        with launch_folder() as folder:
            result = folder / "result"
            try:
                self._run(order, folder, _run_rank, (function, result, *order.args), method)
            finally:
                remove_semaphores(folder, tracked=method != "fork")
            # Without a file rank 0 ended by sys.exit(0).
            return pickle.loads(result.read_bytes()) if result.exists() else None  # noqa: S301 - our own rank 0's

    def _run(self, order: LaunchOrder, folder: Path, entry: Any, arguments: Any, start_method: str = "spawn") -> None:
        from torch.distributed.elastic.multiprocessing.api import SignalException

        from fabric_plugins.launchers._agent import run_agent

        report = folder / "failure.json"
        with _restored(), _preloaded() if start_method == "forkserver" else contextlib.nullcontext():
            os.environ[REPORT] = f"{'command' if order.function is None else 'function'}:{os.getpid()}:{report}"
            try:
                failures, gone = run_agent(
                    entry,
                    arguments if order.function is None else (os.environ[REPORT], *arguments),
                    processes=order.processes,
                    run_id=f"{_OURS}{uuid.uuid4().hex}",
                    address=_ADDRESS,
                    start_method=start_method,
                    shutdown_timeout=self.options.shutdown_timeout,
                    logs=str(folder),
                )
                caught = 0
            except SignalException as error:
                failures, gone, caught = {}, [], int(error.sigval)
        told = read_report(report)
        if caught == signal.SIGINT and order.function is not None:
            raise KeyboardInterrupt
        if caught:
            raise SystemExit(128 + caught)
        if failures:
            # Raised here, and not from torchelastic's error: that one keeps its agent, files and threads alive.
            raise failed(failures, told, gone)


def _check_importable(order: LaunchOrder) -> None:
    """Refuse what processes that are not forked can't import.

    Raises:
        LaunchError: The function, or the class of the ``Fabric``, is defined in no file.
    """
    lost = [one for one in order.args if getattr(one, "__module__", None) == "__main__"]
    if lost and getattr(sys.modules["__main__"], "__file__", None) is None:
        raise LaunchError(
            "a started process can't import what is defined in a notebook, at a prompt or in python -c",
            where="fabric.launch(function)",
            got=", ".join(getattr(one, "__qualname__", type(one).__qualname__) for one in lost),
            instead=f"what is defined in a module that both import, or launch {_HERE}",
        )


def _typed_in() -> str:
    """Give the folder in which the command was typed, which a script may have left since (Hydra's do).

    The interpreter makes the path of a script that it was given absolute; what came before the words that were typed is
    the folder. For anything else but a script it is the current one.
    """
    path = getattr(sys.modules["__main__"], "__file__", None) or ""
    typed = next((word for word in sys.orig_argv[1:] if path.endswith(os.sep + word)), "")
    return path.removesuffix(typed) if typed else str(Path.cwd())


def _run_rank(report: str, function: Callable[..., Any], result: Path, *args: Any) -> None:
    """Run a function in a rank, and leave rank 0's result in a file: a pipe would fill up.

    [Note: the end of a rank] It ends by SystemExit without a code. After a return, and after the code 0, torchelastic
    would let it wait for the other ranks; and what still refers to its process group, such as a model in a variable,
    would keep the connections open for which they wait.
    """
    os.environ[REPORT] = report  # a rank of the fork server has the environment of the first launch
    os.setpgid(0, 0)  # as a command's ranks are: what it starts can be ended with it
    # A forked rank has its agent's handlers, which would wait for the interpreter while a collective waits for others.
    for name in _SIGNALS:
        signal.signal(getattr(signal, name), signal.default_int_handler if name == "SIGINT" else signal.SIG_DFL)
    hook = sys.excepthook
    try:
        value = function(*args)
    except SystemExit as error:
        if error.code:
            raise
    except BaseException as error:  # noqa: BLE001 - whatever it is, the caller wants to know
        if sys.excepthook is hook:  # it failed before it joined
            write_report(error, int(os.environ["RANK"]))
        else:  # the first that fails reports, the others say that they follow
            sys.excepthook(type(error), error, error.__traceback__)
        # Another error would be written to a file that nobody removes, and shown again.
        raise SystemExit(1) from None
    else:
        if os.environ["RANK"] == "0":
            result.write_bytes(pickle.dumps(value))
    if was_ended():
        # It came here though it was told to end, with a last checkpoint, say.
        raise SystemExit(128 + signal.SIGTERM)
    note_return(int(os.environ["RANK"]))
    gc.freeze()  # as in the agent
    raise SystemExit


@contextlib.contextmanager
def _preloaded() -> Iterator[None]:
    """Let the fork server, if it starts now, import once what every rank would import again for seconds.

    There is one in a process, whose list is the user's too.
    """
    server: Any = forkserver._forkserver  # noqa: SLF001 - nothing public tells what is preloaded
    before = server._preload_modules  # noqa: SLF001
    multiprocessing.set_forkserver_preload([*before, *_PRELOADED])
    try:
        yield
    finally:
        multiprocessing.set_forkserver_preload(before)


@contextlib.contextmanager
def _restored() -> Iterator[None]:
    """Restore the environment and the signal handlers that torchelastic changes."""
    environment = dict(os.environ)
    in_main = threading.current_thread() is threading.main_thread()
    handlers = {name: signal.getsignal(getattr(signal, name)) for name in _SIGNALS} if in_main else {}
    try:
        yield
    finally:
        for name in set(os.environ) - set(environment):
            del os.environ[name]
        os.environ.update(environment)
        for name, handler in handlers.items():
            signal.signal(getattr(signal, name), handler)

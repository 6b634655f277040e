"""Processes by torchelastic: started here in place of ``torchrun``, or by ``torchrun`` itself."""

import contextlib
import gc
import os
import pickle
import signal
import sys
import tempfile
import threading
import traceback
import uuid
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Literal

import torch
from torch.distributed import PrefixStore, TCPStore

from fabric_core.contracts import Launcher, LauncherCapabilities, LaunchOrder, PluginOptions, ProcessInfo
from fabric_core.errors import LaunchError, RankFailedError

__all__ = ["ElasticLauncher", "ElasticOptions"]

_OURS: Final = "fabric-"
_ADDRESS: Final = "127.0.0.1"
_NUMBERS: Final = ("RANK", "LOCAL_RANK", "GROUP_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_PORT")
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
        missing = [name for name in (*_NUMBERS, "MASTER_ADDR") if name not in environment]
        if missing:
            raise LaunchError(
                "the variables that torchelastic sets are incomplete",
                where="environment",
                got=f"no {', '.join(missing)}",
                instead="start with torchrun, or unset TORCHELASTIC_RUN_ID",
            )
        try:
            rank, local_rank, node, world, local_world, port = (int(environment[name]) for name in _NUMBERS)
            attempt = int(environment.get("TORCHELASTIC_RESTART_COUNT", "0"))
        except ValueError as error:
            raise LaunchError(
                "a variable that torchelastic sets is no number",
                where="environment",
                got=str(error),
            ) from error
        ours = environment["TORCHELASTIC_RUN_ID"].startswith(_OURS)
        return ProcessInfo(
            global_rank=rank,
            local_rank=local_rank,
            node_rank=node,
            world_size=world,
            local_world_size=local_world,
            main_address=environment["MASTER_ADDR"],
            main_port=port,
            attempt=attempt,
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
        """In a rank that this launcher started: share the cores, die with the agent, let the first failure speak."""
        if info.owner != "elastic":
            return
        _die_with_parent()
        threads = torch.get_num_threads()
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // info.local_world_size))
            self._undo.append(lambda: torch.set_num_threads(threads))
        previous = sys.excepthook

        def report(kind: type[BaseException], value: BaseException, trace: TracebackType | None) -> None:
            _speak(info, value, lambda: previous(kind, value, trace))

        sys.excepthook = report

        def restore() -> None:
            if sys.excepthook is report:
                sys.excepthook = previous

        self._undo.append(restore)

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
                instead="put the code into a script, or give a function: fabric.launch(function)",
            )
        sys.stdout.flush()
        try:
            with contextlib.chdir(_typed_in()):
                self._run(order, sys.executable, arguments)
        except RankFailedError as error:
            print(error, file=sys.stderr)  # noqa: T201 - the agent's last word, after the ranks' tracebacks
            code = error.fields["exit_code"]
        else:
            code = 0
        # The interpreter looks for garbage as it ends, among all that torch made: a third of a second for nothing.
        gc.freeze()
        raise SystemExit(code)

    def _start_function(self, order: LaunchOrder, function: Callable[..., Any]) -> Any:
        method = order.start_method or self.options.start_method
        with tempfile.TemporaryDirectory(prefix="fabric-launch-") as folder, _restored():
            result = Path(folder) / "result"
            self._run(order, _run_rank, (function, result, *order.args), method)
            return pickle.loads(result.read_bytes())  # noqa: S301 - written by our own rank 0

    def _run(self, order: LaunchOrder, entry: Any, arguments: Any, start_method: str = "spawn") -> None:
        from torch.distributed.elastic.multiprocessing.api import (
            DefaultLogsSpecs,
            SignalException,
        )
        from torch.distributed.elastic.multiprocessing.errors import (
            ChildFailedError,
        )
        from torch.distributed.launcher.api import (
            LaunchConfig,
            elastic_launch,
        )

        with tempfile.TemporaryDirectory(prefix="fabric-logs-") as logs:
            config = LaunchConfig(
                min_nodes=1,
                max_nodes=1,
                nproc_per_node=order.processes,
                run_id=f"{_OURS}{uuid.uuid4().hex}",
                rdzv_backend="c10d",
                rdzv_endpoint=f"{_ADDRESS}:0",
                local_addr=_ADDRESS,
                max_restarts=0,
                monitor_interval=0.05,
                start_method=start_method,
                shutdown_timeout=self.options.shutdown_timeout,
                logs_specs=DefaultLogsSpecs(log_dir=logs),
            )
            try:
                elastic_launch(config, entry)(*arguments)
            except ChildFailedError as error:
                rank, failure = error.get_first_failure()
                code = failure.exitcode
                how = f"by signal {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
                raise RankFailedError(
                    f"rank {rank} failed first, {how}; the other ranks were ended",
                    where=f"rank {rank}, process {failure.pid}",
                    rank=rank,
                    exit_code=128 - code if code < 0 else code,
                    trace=failure.message,
                ) from error
            except SignalException as error:
                raise SystemExit(128 + error.sigval) from None


def _typed_in() -> str:
    """Give the folder in which the command was typed, which a script may have left since (Hydra's do).

    The interpreter makes the path of a script that it was given absolute; what came before the words that were typed is
    the folder. For anything else but a script it is the current one.
    """
    path = getattr(sys.modules["__main__"], "__file__", None) or ""
    typed = next((word for word in sys.orig_argv[1:] if path.endswith(os.sep + word)), "")
    return path.removesuffix(typed) if typed else str(Path.cwd())


def _run_rank(function: Callable[..., Any], result: Path, *args: Any) -> None:
    """Run a function in a rank, and leave rank 0's result in a file: a pipe would fill up."""
    try:
        value = function(*args)
    except BaseException as error:
        ranks = ElasticLauncher().detect(os.environ)
        if ranks is not None:
            _speak(ranks, error, partial(traceback.print_exception, error))
        raise
    if os.environ["RANK"] == "0":
        result.write_bytes(pickle.dumps(value))


def _speak(ranks: ProcessInfo, error: BaseException, show: Callable[[], None]) -> None:
    """Show a failure if it is the first of all ranks; a line where it only follows from another's."""
    first = ranks.global_rank
    try:
        store = TCPStore(ranks.main_address, ranks.main_port, is_master=False, timeout=timedelta(seconds=5))
        claims = PrefixStore(f"fabric/{ranks.attempt}", store)
        first = int(claims.compare_set("first-failure", "", str(ranks.global_rank)))
    except (RuntimeError, ValueError):
        pass  # The store is gone: whoever made it failed before, or the agent did; better to say too much.
    if first == ranks.global_rank:
        print(f"[rank {ranks.global_rank}] failed:", file=sys.stderr)  # noqa: T201 - in place of the interpreter's own
        show()
    else:
        text = str(error).partition("\n")[0]
        print(  # noqa: T201
            f"[rank {ranks.global_rank}] ended after rank {first} had failed: {type(error).__name__}: {text}",
            file=sys.stderr,
        )
    sys.stderr.flush()


def _die_with_parent() -> None:
    """End this rank when its agent ends, even where the agent was killed and could not end it."""
    if not sys.platform.startswith("linux"):
        return
    import ctypes

    set_parent_death_signal = 1
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGTERM)


@contextlib.contextmanager
def _restored() -> Iterator[None]:
    """Bring back the environment and the signal handlers that torchelastic changes."""
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

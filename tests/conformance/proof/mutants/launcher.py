"""Wrong launchers."""

import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any, Final

import torch

from fabric_core.conformance.references import Surroundings
from fabric_core.contracts import LaunchOrder, ProcessInfo
from fabric_core.errors import LaunchError
from proof.forking import Forking
from proof.mutants import Mutants

MUTANTS: Final = Mutants()
mutant = MUTANTS.mutant


@mutant("believes in ranks that there can't be", "LAU-504")
class Believing(Surroundings):
    def detect(self, environment: Mapping[str, str]) -> ProcessInfo | None:
        found = super().detect({**environment, "RANK": "0"}) if "RANK" in environment else None
        try:
            return None if found is None else replace(found, global_rank=int(environment["RANK"]))
        except ValueError as error:
            raise LaunchError("no rank") from error


@mutant("starts on this node alone, however many there are", "LAU-512")
class Narrowing(Surroundings):
    def start(self, order: LaunchOrder) -> Any:
        return super().start(replace(order, nodes=1))


@mutant("counts no restarts", "LAU-513")
class Fresh(Surroundings):
    def detect(self, environment: Mapping[str, str]) -> ProcessInfo | None:
        found = super().detect(environment)
        return None if found is None else replace(found, attempt=0)


@mutant("lets rank 0 make a store where there is one", "LAU-514")
class Serving(Surroundings):
    def detect(self, environment: Mapping[str, str]) -> ProcessInfo | None:
        found = super().detect(environment)
        return None if found is None else replace(found, agent_store=False)


@mutant("takes other threads than the user said, and keeps them", "LAU-515")
class Spinning(Surroundings):
    def setup_process(self, info: ProcessInfo) -> None:
        torch.set_num_threads(torch.get_num_threads() + info.local_world_size)


@mutant("forks whatever it is told", "LAU-516")
class Stubborn(Forking):
    def start(self, order: LaunchOrder) -> Any:
        return super().start(replace(order, start_method=None))


@mutant("gives again what its first launch gave", "LAU-521")
class Stale(Forking):
    def start(self, order: LaunchOrder) -> Any:
        if "_first" not in vars(self):
            self._first = super().start(order)
        return self._first


@mutant("starts ranks that hear no signal", "LAU-516")
class Deaf(Forking):
    def begin(self) -> None:
        super().begin()
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


@mutant("kills ranks, so that they clear nothing away", "LAU-517")
class Killing(Forking):
    def end(self, ranks: list[Any]) -> None:
        for rank in ranks:
            with suppress(ProcessLookupError):
                os.killpg(rank.pid, signal.SIGKILL)
            rank.join()


@mutant("forgets its ranks where it is interrupted", "LAU-518", "LAU-519")
class Forgetful(Forking):
    def begin(self) -> None:
        os.setpgid(0, 0)


@mutant("runs a command without its words, and asks for no exit code", "LAU-520", "LAU-521")
class Wordless(Surroundings):
    def start(self, order: LaunchOrder) -> Any:
        if order.function is not None:
            return super().start(order)
        ranks = []
        for rank in range(order.processes):
            own = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0, "WORLD_SIZE": order.processes}
            more = {"LOCAL_WORLD_SIZE": order.processes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 29_512}
            environment = {**os.environ, **{name: str(value) for name, value in {**own, **more}.items()}}
            ranks.append(subprocess.Popen([sys.executable, *sys.orig_argv[1:2]], env=environment))
        for one in ranks:
            one.wait()
        raise SystemExit

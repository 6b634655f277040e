"""What a rank asks of the store at its start, for 16 to 4,096 ranks.

The ranks are threads, each with its own connection to a real store, and run what the ranks of a job run before their
first collective: they find each other as under a scheduler, compare the plan with rank 0's, and wait for each other.
Ending is one operation more. The process group that PyTorch makes in between is not in it.
"""

import argparse
import resource
import sys
import threading
import time
from collections import Counter
from dataclasses import replace
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

from _rounds import table

from fabric_core.collectives.process_group import wait_until_connected
from fabric_core.contracts import ProcessInfo
from fabric_core.running.launching import agree, make_world
from fabric_plugins.accelerators import CPUAccelerator
from fabric_plugins.launchers import ElasticLauncher
from fabric_plugins.strategies import DDPStrategy

_TIMEOUT = timedelta(minutes=5)


class Counted:
    """A store that counts what it is asked; a look whether a key is there yet is counted apart."""

    def __init__(self, store: Any, counts: Counter[str]) -> None:
        self._store = store
        self._counts = counts

    def __getattr__(self, name: str) -> Any:
        self._counts["looks" if name == "check" else "operations"] += 1
        return getattr(self._store, name)


def start(ranks: int, port: int) -> tuple[float, list[Counter[str]]]:
    """Start that many ranks; gives the seconds until the last one was through, and what each asked.

    Args:
        ranks: Their number.
        port: The first of the ports that they look for each other at, as under a scheduler.
    """
    job = f"start-{time.time_ns()}"
    chosen = [SimpleNamespace(kind="wrapper", name=f"w{one}", distribution="", options="{}") for one in range(8)]
    plan: Any = SimpleNamespace(world_size=ranks, num_nodes=ranks, device_indices=[0], choices=chosen)
    counts: list[Counter[str]] = [Counter() for _ in range(ranks)]
    errors: list[BaseException] = []
    failures: Any = SimpleNamespace(meet=lambda _store: None)
    launcher, accelerator, strategy = ElasticLauncher(), CPUAccelerator(), DDPStrategy()

    def rank(number: int) -> None:
        try:
            info = ProcessInfo(global_rank=number, node_rank=number, world_size=ranks, main_port=port, job_id=job)
            world = make_world(info, plan, accelerator, strategy, _TIMEOUT)
            assert world.open_store is not None
            store: Any = Counted(world.open_store(), counts[number])
            # Opening asked whose store it is (rank 0 said it), and how often this rank has joined.
            counts[number].update(operations=2, looks=int(number > 0))
            agree(replace(world, open_store=lambda: store), plan, launcher, failures)
            wait_until_connected(store, ranks, _TIMEOUT)
        except BaseException as error:  # noqa: BLE001 - raised below
            errors.append(error)

    threads = [threading.Thread(target=rank, args=(number,)) for number in range(ranks)]
    begin = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - begin
    if errors:
        raise errors[0]
    return seconds, counts


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, nargs="*", default=[16, 64, 256, 1024, 4096])
    parser.add_argument("--port", type=int, default=29_870)
    given = parser.parse_args()
    files = 2 * max(given.ranks) + 200  # both ends of each connection are in this process
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if files > hard != resource.RLIM_INFINITY:
        sys.exit(f"{max(given.ranks)} ranks need {files} open files, and {hard} are allowed: ulimit -Hn, or --ranks")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, files), hard))
    rows = []
    for ranks in given.ranks:
        seconds, counts = start(ranks, given.port)
        asked = [one["operations"] for one in counts]
        looks = sum(one["looks"] for one in counts) / ranks
        rows.append(
            (
                f"{ranks:,}",
                f"{min(asked)} to {max(asked)}",
                f"{looks:.1f}",
                f"{sum(asked):,}",
                f"{seconds:.2f}",
                f"{1000 * seconds / ranks:.2f}",
            )
        )
    header = ("ranks", "operations of a rank", "looks of a rank", "operations in all", "seconds", "ms for each rank")
    print(table("Ranks that start together", header, rows))


if __name__ == "__main__":
    main()

"""What launchers that recognise a scheduler share: reading its variables, and where the ranks meet."""

import hashlib
import re
from collections.abc import Mapping
from typing import Final

from fabric_core.contracts import ProcessInfo
from fabric_core.errors import LaunchError

__all__ = ["LOOPBACK", "Variables", "first_host"]

LOOPBACK: Final = "127.0.0.1"
_NUMBER: Final = re.compile(r"[0-9]{1,9}")
_HOST: Final = re.compile(r"[A-Za-z0-9_.:-]{1,255}")
_FIRST_PORT: Final = 15_000
_PORTS: Final = 16_000
"""Below 31,000: from 32,768 on Linux gives ports to whoever asks for any."""
_LAST_PORT: Final = 65_535
_SHOWN: Final = 80
"""How many characters of a variable a message shows."""


class Variables:
    """The variables of one system, read strictly: whatever is wrong is a ``LaunchError`` that names the variable.

    Args:
        environment: The environment variables.
        system: What sets them, for messages.
        instead: What to do where they are wrong, for messages.
    """

    def __init__(self, environment: Mapping[str, str], system: str, instead: str) -> None:
        self._environment = environment
        self.system = system
        self.instead = instead

    def __contains__(self, name: str) -> bool:
        """Whether a variable is there and not empty."""
        return bool(self._environment.get(name))

    def wrong(self, what: str, *names: str) -> LaunchError:
        """Make the error of some variables."""
        got = ", ".join(f"{name}={_short(self._environment[name])}" for name in names if name in self._environment)
        return LaunchError(
            f"{what}, which {self.system} sets", where="environment", got=got or None, instead=self.instead
        )

    def text(self, name: str) -> str:
        """Give a variable.

        Raises:
            LaunchError: It is absent or empty.
        """
        if name not in self:
            raise self.wrong(f"the variable {name} is {'empty' if name in self._environment else 'missing'}", name)
        return self._environment[name]

    def number(self, name: str, *, low: int = 0, below: int | None = None) -> int:
        """Give a variable as a number.

        Raises:
            LaunchError: It is absent, no whole number, or out of bounds.
        """
        text = self.text(name).strip()
        if not _NUMBER.fullmatch(text):
            raise self.wrong(f"the variable {name} is no whole number", name)
        value = int(text)
        if value < low or (below is not None and value >= below):
            bounds = f"at least {low}" if below is None else f"from {low} to {below - 1}"
            raise self.wrong(f"the variable {name} must be {bounds}", name)
        return value

    def host(self, name: str) -> str:
        """Give a variable as the name or address of a host.

        Raises:
            LaunchError: It is absent, or has what no host's name has.
        """
        text = self.text(name).strip()
        if not _HOST.fullmatch(text):
            raise self.wrong(f"the variable {name} is no host name and no address", name)
        return text

    def place(self, rank: str, size: str, local_rank: str, local_size: str) -> tuple[int, int, int, int]:
        """Give rank, world size, local rank and local world size, out of the variables of these names.

        Raises:
            LaunchError: One is absent or no number, or they contradict each other.
        """
        sizes = self.number(size, low=1), self.number(local_size, low=1)
        if sizes[1] > sizes[0] or sizes[0] % sizes[1]:
            raise LaunchError(
                f"{self.system} started {sizes[0]} processes, {sizes[1]} of them on this node, and all need as many",
                where="environment",
                got=f"{size}={sizes[0]}, {local_size}={sizes[1]}",
                instead="the same number of processes on every node",
            )
        return self.number(rank, below=sizes[0]), sizes[0], self.number(local_rank, below=sizes[1]), sizes[1]

    def meet_at(self, host: str, job: str) -> tuple[str, int, str]:
        """Give where the ranks of a job meet: address, port, and the job's id.

        ``MASTER_ADDR`` and ``MASTER_PORT`` win over what is derived; a port that was given is taken as it is, one that
        is derived from the job's id may be in use, so that the ranks look for the job's id at it and at those after it.

        Raises:
            LaunchError: One of the two variables is malformed.
        """
        address = self.host("MASTER_ADDR") if "MASTER_ADDR" in self else host
        if "MASTER_PORT" in self:
            return address, self.number("MASTER_PORT", low=1, below=_LAST_PORT + 1), ""
        digest = hashlib.sha256(job.encode(errors="surrogateescape")).hexdigest()
        return address, _FIRST_PORT + int(digest[:8], 16) % _PORTS, digest

    def known(self, name: str, value: str, expected: object) -> None:
        """Check that two variables which say the same agree.

        Raises:
            LaunchError: They don't.
        """
        if value != str(expected):
            raise self.wrong(f"the variable {name} contradicts the others", name)


def first_host(nodelist: str) -> tuple[str, int] | None:
    """Give the first host of a compressed list such as ``node[03-05,9],login``, and how many there are.

    Returns:
        The host's name and the number of hosts, or ``None`` where the text is no such list.
    """
    first, count = "", 0
    for item in re.findall(r"(?:[^\[\],]|\[[^\]]*\])+|,,+|^,|,$|[\[\]]", nodelist):
        name, product = "", 1
        for literal, ranges in re.findall(r"([^\[\]]+)|\[([^\]]*)\]|.", item):
            if literal:
                if not _HOST.fullmatch(literal):
                    return None
                name += literal
                continue
            size = 0
            for one in ranges.split(","):
                match = re.fullmatch(r"([0-9]{1,9})(?:-([0-9]{1,9}))?", one)
                if match is None:
                    return None
                low, high = match[1], match[2] or match[1]
                if int(high) < int(low):
                    return None
                name += low if size == 0 else ""
                size += int(high) - int(low) + 1
            product *= size
        first = first or name
        count += product
    return (first, count) if first else None


def alone(info: ProcessInfo) -> ProcessInfo | None:
    """Give ``None`` for a job of one process: it may start others, as from a shell."""
    return info if info.world_size > 1 else None


def _short(text: str) -> str:
    return repr(text if len(text) <= _SHOWN else f"{text[:_SHOWN]}...")

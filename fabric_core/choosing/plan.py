"""What was chosen for every kind, and why: data, without any live object."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any, Final

from pydantic import BaseModel

from fabric_core.choosing.parsing import PluginRef
from fabric_core.contracts._spec import by_name
from fabric_core.kinds import EXTENSION, KINDS, Count, by_attribute

__all__ = ["Choice", "Plan", "plain_options", "processes"]

_PLAIN: Final = (bool, int, float, str, type(None))


@dataclass(frozen=True)
class Choice:
    """What was chosen for one kind.

    Args:
        kind: The kind.
        name: The lookup string.
        distribution: The distribution that provides it, with its version.
        options: The options that differ from their defaults, as plain values.
        reason: Why it was chosen.
        rejected: What else there was, and why it was not chosen.
    """

    kind: str
    name: str
    distribution: str
    options: Mapping[str, Any]
    reason: str
    rejected: tuple[tuple[str, str], ...] = ()

    @property
    def text(self) -> str:
        """The text that names it in a request."""
        return str(PluginRef(name=self.name, options=self.options))


@dataclass(frozen=True)
class Plan:
    """What was chosen for every kind, and why; the same on every rank.

    The choices of a kind are attributes too: ``plan.strategy`` where there is one, ``plan.wrappers`` where there may be
    several. ``launchers`` and ``checkpoints`` stand in the order in which they are asked: the launchers whether they
    started this process (the first starts processes where none did), the checkpoint formats whether they recognise a
    checkpoint. ``wrappers`` and ``extensions`` stand in the order in which they act, the outermost first.

    Args:
        choices: Every choice, in the order of the kinds, extensions last.
        device_indices: The devices of this node, one for each of its processes.
        num_nodes: The number of nodes.
    """

    choices: tuple[Choice, ...]
    device_indices: tuple[int, ...]
    num_nodes: int

    def of(self, kind: str) -> tuple[Choice, ...]:
        """Give the choices of a kind."""
        return tuple(choice for choice in self.choices if choice.kind == kind)

    def __getattr__(self, name: str) -> Any:
        """Give the choices of a kind by its name in a plan."""
        kind = None if name.startswith("_") else by_attribute(name)
        if kind is None:
            raise AttributeError(f"a plan has no {name!r}")
        found = self.of(kind)
        return found[0] if kind != EXTENSION and KINDS[kind].count is Count.ONE else found

    @property
    def world_size(self) -> int:
        """The number of processes."""
        return len(self.device_indices) * self.num_nodes

    def as_dict(self) -> dict[str, Any]:
        """Give the plan as plain data, for JSON and for comparing ranks."""
        return {
            "choices": [
                {
                    "kind": choice.kind,
                    "name": choice.name,
                    "distribution": choice.distribution,
                    "options": {name: str(value) for name, value in choice.options.items()},
                    "reason": choice.reason,
                    "rejected": [{"name": name, "reason": why} for name, why in choice.rejected],
                }
                for choice in self.choices
            ],
            "devices": list(self.device_indices),
            "num_nodes": self.num_nodes,
            "world_size": self.world_size,
        }

    def _rows(self) -> list[tuple[str, str, str, str]]:
        rows = [(choice.kind, choice.text, choice.distribution, choice.reason) for choice in self.choices]
        devices = ", ".join(str(device) for device in self.device_indices)
        nodes = f"{self.num_nodes} node{'s' if self.num_nodes != 1 else ''}"
        return [*rows, ("devices", devices, "", f"{processes(self.world_size)} on {nodes}")]

    def __str__(self) -> str:
        """Show the plan as a table of plain text."""
        rows = self._rows()
        widths = [max(len(row[column]) for row in rows) for column in range(3)]
        return "\n".join(
            "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[3]]).rstrip()
            for row in rows
        )

    def _repr_html_(self) -> str:
        """Show the plan as a table in a notebook."""
        head = "".join(f"<th>{title}</th>" for title in ("kind", "choice", "from", "because"))
        body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in self._rows())
        return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def processes(count: int) -> str:
    """Write a number of processes."""
    return f"{count} process{'es' if count != 1 else ''}"


def plain_options(plugin: Any) -> dict[str, Any]:
    """Give the options of a plugin that differ from their defaults, as plain values: alike on every rank."""
    options = getattr(plugin, "options", None)
    if not isinstance(options, BaseModel):
        return {}
    return {name: _plain(value) for name, value in options.model_dump(exclude_defaults=True).items()}


def _plain(value: Any) -> Any:
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, Mapping):
        return {str(name): _plain(one) for name, one in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, bytes | bytearray):
        return [_plain(one) for one in value]
    named = by_name(value)
    if named is not value:
        return named
    shown = str(value)
    # The default repr has an address, which differs between ranks.
    return f"{type(value).__module__}.{type(value).__qualname__}" if hex(id(value)) in shown else shown

"""Draws the matrix of what works together."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from fabric_core.errors import NotInstalledError

if TYPE_CHECKING:
    from fabric_core.cli._matrix import Cell

__all__ = ["draw"]

_COLOURS: Final = {
    "works": "#7fbf7b",
    "trained": "#4dac26",
    "refused": "#d9d9d9",
    "not tried": "#fff7bc",
    "failed": "#d6604d",
}


def draw(cells: "Sequence[Cell]", path: Path) -> None:
    """Draw a panel for each accelerator and wrapper of which something works, and write the picture.

    Raises:
        NotInstalledError: Matplotlib isn't installed.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.patches import Patch
    except ImportError as error:
        raise NotInstalledError(
            "a picture needs a package that isn't installed", where="--png", instead="pip install matplotlib"
        ) from error
    groups = [list(group) for _, group in itertools.groupby(cells, lambda one: (one.accelerator, one.wrapper))]
    shown = [one for one in groups if any(cell.status == "works" for cell in one)] or groups
    rows, columns = (
        max(len({getattr(one, axis) for one in group}) for group in shown) for axis in ("strategy", "precision")
    )
    figure = Figure(figsize=(3.5 + 0.9 * columns, (1.6 + 0.32 * rows) * len(shown)), layout="constrained")
    for panel, group in zip(figure.subplots(len(shown), 1, squeeze=False)[:, 0], shown, strict=True):
        strategies, precisions = (
            list(dict.fromkeys(getattr(one, axis) for one in group)) for axis in ("strategy", "precision")
        )
        for cell in group:
            place = precisions.index(cell.precision), strategies.index(cell.strategy)
            panel.broken_barh([(place[0] - 0.48, 0.96)], (place[1] - 0.46, 0.92), color=_COLOURS[cell.shown])
            panel.text(*place, cell.shown, ha="center", va="center", fontsize=7)
        first = group[0]
        panel.set_title(first.accelerator if first.wrapper is None else f"{first.accelerator} with {first.wrapper}")
        panel.set_xticks(range(len(precisions)), precisions)
        panel.set_yticks(range(len(strategies)), strategies)
        panel.invert_yaxis()
        panel.spines[:].set_visible(False)
    used = [name for name in _COLOURS if any(cell.shown == name for group in shown for cell in group)]
    figure.legend(
        handles=[Patch(color=_COLOURS[name], label=name) for name in used], loc="outside lower center", ncols=5
    )
    figure.savefig(path, dpi=150, format="png")

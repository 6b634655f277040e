"""One word per concept, the field's where it has one: what was replaced stands nowhere in packages or pages."""

import re
from pathlib import Path
from typing import Final

import pytest

_ROOT: Final = Path(__file__).parents[2]
_WHERE: Final = ("fabric_core", "fabric_plugins", "docs", "README.md", "CONTRIBUTING.md", "CHANGELOG.md")
_ENDINGS: Final = {".py", ".md", ".toml", ".txt", ".ipynb", ".yml", ".json"}

REPLACED: Final = {
    r"carries_policy": "applies_mixed_precision",
    r"places_module": "handles_device_placement",
    r"wraps_forward": "intercepts_forward",
    r"needs_backward": "requires_strategy_backward",
    r"strategies_sharded": "supports_sharded_parameters",
    r"class Ranks\b": "ProcessInfo",
    r"\bLauncher\.joined\b": "setup_process",
    r"\bdef (look|settle)\b": "unscale_and_check, update_scale, as torch.amp says; or a verb that says what is done",
    r"how far an optimizer is": "per-optimizer loss-scaling state",
    r"gradients (stay |are (left |still )?)?apart|leaves? (\w+ )*(gradients|them) apart": "skip synchronization",
    r"\b(_apart|_held|_know|_divide|_add_up)\b": "_no_sync, _unsynced, _track_units, _reshard, _reduce_partial_...",
    r"_OnWholes|_Undrawn|\b[Hh]ollow\b": "full-tensor init mode, skip-init mode, meta modules",
    r"no sum of them to step on": "gradients are not synchronized; run the last backward outside no_backward_sync",
    r"went past Fabric|past the strategy|past Fabric": "was called directly; call fabric.backward(loss) instead",
    r"can('t|not) be had": "is not available, or can't be loaded",
    r"\bsa(ys?|id) nothing\b": "unknown environment variable; is left at its default; does not apply",
    r"what there isn't|a hook, that there is": "implements an unknown life-cycle hook",
    r"nobody says how to": "... is required",
    r"hang the checkpointing on": "apply activation checkpointing to each block",
    r"\b([Gg](ive|ives|iven|ave|iving)) (it |them |everything |that )?back\b": "return; release resources; restore",
    r"learn how to ask the other ranks": "receive the collectives",
    r"\b[Bb]rings?\b": "provides (a distribution a plugin); imports; writes",
    r"can('t|not) be understood": "can't parse ...",
    r"\b[Mm]end(s|ed|ing)?\b": "fix",
    r"\bFABRIC_PLUGINS\b|(?<!lightning\.)\bfabric\.plugins\b": "FABRIC_EXTENSIONS, fabric.extensions",
    r"\bway through (a|the) (tree|state)\b": "key path",
    r"\b[Bb]y hand\b": "plain PyTorch; manually",
}
"""What was replaced, as a regular expression, and what to write."""


def _files() -> list[Path]:
    named = [_ROOT / name for name in _WHERE]
    inside = [file for one in named if one.is_dir() for file in one.rglob("*") if "__pycache__" not in file.parts]
    return [file for file in (*named, *inside) if file.suffix in _ENDINGS]


@pytest.mark.parametrize("replaced", REPLACED)
def test_replaced_words_stand_nowhere(replaced: str) -> None:
    """In no docstring, comment, name, message or page."""
    files = _files()
    assert len(files) > 200
    found = [
        f"{file.relative_to(_ROOT)}:{number}: {line.strip()}"
        for file in files
        for number, line in enumerate(file.read_text("utf-8").splitlines(), 1)
        if re.search(replaced, line)
    ]
    assert not found, f"write: {REPLACED[replaced]}\n" + "\n".join(found)

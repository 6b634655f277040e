"""The reference of strategies and accelerators has every option, with its default."""

from pathlib import Path

import pytest

from fabric_core import Accelerator, Strategy
from fabric_plugins import accelerators, strategies

PAGE = Path(__file__).parents[2] / "docs/reference/strategies.md"
PLUGINS: list[type[Strategy] | type[Accelerator]] = [
    *(getattr(strategies, name) for name in strategies.__all__),
    *(one for name in accelerators.__all__ if isinstance(one := getattr(accelerators, name), type)),
]


@pytest.mark.parametrize("plugin", PLUGINS, ids=lambda plugin: plugin.__name__)
def test_every_option_is_documented(plugin: type[Strategy]) -> None:
    """A plugin's class and each of its options have a row, with the option's default."""
    text = PAGE.read_text(encoding="utf-8")
    assert f"`{plugin.__name__}`" in text
    for name, field in plugin.Options.model_fields.items():
        default = "required" if field.is_required() else repr(field.default)
        assert f"| `{name}` | `{default}` |" in text, name

"""The pages that are made from the code say what the code says."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest


def _generator() -> Any:
    place = Path(__file__).with_name("generated_pages.py")
    spec = importlib.util.spec_from_file_location("generated_pages", place)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("page", ["api.md", "options.md"])
def test_a_page_is_what_the_code_says(page: str) -> None:
    """What changed in the code shows here; the message says how to write the page anew."""
    generator = _generator()
    said = (generator.REFERENCE / page).read_text(encoding="utf-8")
    assert said == generator.PAGES[page](), "write it anew: python tests/docs/generated_pages.py"


def test_every_name_of_the_top_level_has_an_example() -> None:
    """A new public name needs one."""
    import fabric_core

    assert set(_generator().EXAMPLES) >= set(fabric_core.__all__)

"""The pages that are made from the code say what the code says."""

import importlib
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


def test_every_public_name_has_an_example() -> None:
    """A new public name needs one; a name of several modules at the first of them."""
    examples = _generator().EXAMPLES
    seen: set[str] = set()
    for module in examples:
        names = set(importlib.import_module(module).__all__) - seen
        assert set(examples[module]) >= names
        seen |= names

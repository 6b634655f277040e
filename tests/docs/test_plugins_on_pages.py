"""Every plugin that a page defines keeps the rules of its kind."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from markdown_it import MarkdownIt

from fabric_core.conformance import Subject, run_rules
from fabric_core.kinds import KINDS

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md"))]
CONTRACTS = {kind.contract.__name__: kind.name for kind in KINDS.values()}


class Defined(NamedTuple):
    """A plugin that a page defines: its page, kind and class, and the code that it needs."""

    page: str
    kind: str
    name: str
    code: str


def _blocks(page: Path) -> list[str]:
    return [
        token.content
        for token in MarkdownIt().parse(page.read_text(encoding="utf-8"))
        if token.type == "fence" and token.info.strip() == "python"
    ]


def defined(page: Path) -> Iterator[Defined]:
    """Find the plugins of a page; their code is every definition and import of the page before them."""
    kept: list[str] = []
    for block in _blocks(page):
        try:
            tree = ast.parse(block)
        except SyntaxError:
            continue
        for node in tree.body:
            if isinstance(node, ast.Import | ast.ImportFrom | ast.FunctionDef | ast.ClassDef | ast.Assign):
                kept.append(ast.unparse(node))
            if isinstance(node, ast.ClassDef):
                bases = [base.id for base in node.bases if isinstance(base, ast.Name)]
                for base in bases:
                    if base in CONTRACTS:
                        where = str(page.relative_to(ROOT))
                        own = [one for one in kept if not one.startswith(("FABRIC", "fabric =", "model", "counter"))]
                        yield Defined(where, CONTRACTS[base], node.name, "\n\n".join(own))


ALL = [one for page in PAGES for one in defined(page)]


def test_pages_define_a_plugin_of_every_kind() -> None:
    """The guides are there, and what they define is found."""
    assert {one.kind for one in ALL} == set(KINDS)


@pytest.mark.authors
@pytest.mark.parametrize("one", ALL, ids=[f"{one.page}:{one.name}" for one in ALL])
def test_a_plugin_on_a_page_keeps_every_rule(one: Defined, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On one process and on two, as the kit judges anybody's."""
    module = f"page_{Path(one.page).stem.replace('-', '_')}_{one.name.lower()}"
    (tmp_path / f"{module}.py").write_text(one.code + "\n")
    monkeypatch.syspath_prepend(tmp_path)
    report = run_rules(Subject.of(one.kind, f"{module}:{one.name}"))
    sys.modules.pop(module, None)
    assert report.passed, "\n\n".join(verdict.message for verdict in report.failures)

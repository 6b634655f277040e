"""Every plugin that a page defines keeps the rules of its kind."""

import ast
import os
import symtable
import sys
from collections.abc import Iterator, Sequence
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


def _makes(statement: ast.stmt) -> set[str]:
    """Give the names that an import, a definition or an assignment makes."""
    if isinstance(statement, ast.Import | ast.ImportFrom):
        return {one.asname or one.name.partition(".")[0] for one in statement.names}
    if isinstance(statement, ast.FunctionDef | ast.ClassDef):
        return {statement.name}
    if isinstance(statement, ast.Assign):
        return {one.id for target in statement.targets for one in ast.walk(target) if isinstance(one, ast.Name)}
    return set()


def _uses(table: symtable.SymbolTable) -> set[str]:
    """Give the names of the module that code asks for; arguments and the like are its own."""
    module = table.get_type() == "module"
    used = {one.get_name() for one in table.get_symbols() if one.is_referenced() and (module or one.is_global())}
    return used.union(*map(_uses, table.get_children()))


def _code(wanted: ast.stmt, before: Sequence[ast.stmt]) -> str:
    """Give a definition with what it needs of the statements before it."""
    code, names = [ast.unparse(wanted)], {"*"}
    names |= _uses(symtable.symtable(code[0], "page", "exec"))
    for statement in reversed(before):
        if _makes(statement) & names:
            code.append(ast.unparse(statement))
            names |= _uses(symtable.symtable(code[-1], "page", "exec"))
    return "\n\n".join(reversed(code))


def defined(page: Path) -> Iterator[Defined]:
    """Find the plugins of a page, each with what it needs of the page before it."""
    before: list[ast.stmt] = []
    for block in _blocks(page):
        try:
            tree = ast.parse(block)
        except SyntaxError:
            continue
        for node in tree.body:
            if isinstance(node, ast.ClassDef):
                for base in node.bases:
                    if isinstance(base, ast.Name) and base.id in CONTRACTS:
                        where = str(page.relative_to(ROOT))
                        yield Defined(where, CONTRACTS[base.id], node.name, _code(node, before))
            before.append(node)


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
    # New processes find it too, as what is installed.
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (str(tmp_path), os.environ.get("PYTHONPATH")))))
    report = run_rules(Subject.of(one.kind, f"{module}:{one.name}"))
    sys.modules.pop(module, None)
    assert report.passed, "\n\n".join(verdict.message for verdict in report.failures)

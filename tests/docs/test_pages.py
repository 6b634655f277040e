"""The documentation is true: its code runs and its links lead somewhere.

A page is README.md, CONTRIBUTING.md or a Markdown file below docs/. Its `python` blocks share one
namespace from top to bottom, as a reader would type them, and its `console` blocks run the lines
that begin with `$ `, whose output must match what the block shows (`...` stands for anything).
A block that cannot run says why in a comment right above it: `<!-- not-run: the reason -->`.
"""

import doctest
import itertools
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/**/*.md"))]

RUN_LANGUAGES = ("python", "console")
SHOWN_LANGUAGES = ("text", "mermaid", "toml", "yaml", "json", "makefile")

NOT_RUN = re.compile(r"<!--\s*not-run:?(?P<reason>.*?)-->", re.DOTALL)
OUTPUT_FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE

each_page = pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])


class Block(NamedTuple):
    """A fenced block: its language, its code, and the line of the page where its code begins."""

    language: str
    code: str
    line: int


def read_blocks(text: str, page: str) -> Iterator[Block]:
    """Yield the blocks of a page that are to be run; raise where one has no language or reason."""
    tokens = MarkdownIt().parse(text)
    for before, token in zip([None, *tokens], tokens, strict=False):
        if token.type != "fence" or token.map is None:
            continue
        where = f"{page}:{token.map[0] + 1}"
        mark = NOT_RUN.search(before.content) if before and before.type == "html_block" else None
        if mark and not mark["reason"].strip():
            raise ValueError(
                f"{where}: a block that is not run has no reason; write one: <!-- not-run: starts two processes -->"
            )
        language = token.info.strip()
        if language not in (*RUN_LANGUAGES, *SHOWN_LANGUAGES):
            raise ValueError(
                f"{where}: a block has the language {language!r}; write one of "
                f"{', '.join(RUN_LANGUAGES)} (run by the tests) or {', '.join(SHOWN_LANGUAGES)} "
                "(shown only)"
            )
        if language in RUN_LANGUAGES and not mark:
            yield Block(language, token.content, token.map[0] + 2)


def run_python(block: Block, page: str, namespace: dict[str, Any]) -> None:
    """Run a block in its page's namespace, so that a traceback shows the line in the page."""
    exec(compile("\n" * (block.line - 1) + block.code, page, "exec"), namespace)  # noqa: S102 the page's own code


def run_console(block: Block, page: str) -> None:
    """Run each `$ ` line of a block and compare what it prints with the lines that follow."""
    before, *chunks = re.split(r"^\$ ", block.code, flags=re.MULTILINE)
    if before.strip() or not chunks:
        pytest.fail(f"{page}:{block.line}: a console block begins with `$ ` and a command")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    for chunk in chunks:
        command, _, expected = chunk.partition("\n")
        where = f"{page}:{block.line}: $ {command}"
        result = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", command],  # noqa: S607 the reader's shell
            cwd=ROOT,
            env={**os.environ, "PATH": path, "COLUMNS": "100"},
            capture_output=True,
            text=True,
            check=False,
        )
        if result.returncode != 0:
            pytest.fail(f"{where}\nexit code {result.returncode}\n{result.stdout}{result.stderr}")
        matches = doctest.OutputChecker().check_output(expected, result.stdout, OUTPUT_FLAGS)
        if expected.strip() and not matches:
            pytest.fail(f"{where}\nthe page says:\n{expected}\nit prints:\n{result.stdout}")


def read_links(text: str) -> Iterator[str]:
    """Yield where the links and images of a page point to."""
    stack: list[Token] = MarkdownIt().parse(text)
    while stack:
        token = stack.pop()
        stack.extend(token.children or [])
        target = token.attrs.get("href") or token.attrs.get("src")
        if isinstance(target, str):
            yield target


@lru_cache(maxsize=8)
def read_anchors(text: str) -> set[str]:
    """Return the anchors of a page's headings, made the way that GitHub makes them."""
    tokens = MarkdownIt().parse(text)
    headings = [inline.content for opening, inline in itertools.pairwise(tokens) if opening.type == "heading_open"]
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@each_page
def test_code_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every code block of a page runs, in order, in the page's own namespace."""
    monkeypatch.chdir(tmp_path)
    # What a page registers in this process ends with the page.
    monkeypatch.setattr("fabric_core.choosing.registry._registrations", {})
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for block in read_blocks(page.read_text(encoding="utf-8"), str(page)):
        if block.language == "python":
            run_python(block, str(page), namespace)
        else:
            run_console(block, str(page))


@each_page
def test_links_lead_somewhere(page: Path) -> None:
    """Every relative link of a page names a file of the project, and its anchor a heading there."""
    for link in read_links(page.read_text(encoding="utf-8")):
        if re.match(r"[a-z]+:", link):
            continue
        file, _, anchor = link.partition("#")
        target = (page.parent / file).resolve() if file else page
        assert target.is_relative_to(ROOT), f"{page}: {link} leads out of the project"
        assert target.exists(), f"{page}: {link} names no file; got {target}"
        if anchor:
            anchors = read_anchors(target.read_text(encoding="utf-8"))
            assert anchor in anchors, f"{page}: {link} names no heading; there are {anchors}"


def test_every_page_is_reachable_from_the_readme() -> None:
    """A reader who follows links from the README comes to every page."""
    reached: set[Path] = set()
    waiting = [ROOT / "README.md"]
    while waiting:
        page = waiting.pop()
        if page in reached or page not in PAGES:
            continue
        reached.add(page)
        links = read_links(page.read_text(encoding="utf-8"))
        files = [link.partition("#")[0] for link in links if not re.match(r"[a-z]+:", link)]
        waiting.extend((page.parent / file).resolve() for file in files if file)
    assert set(PAGES) - reached == set()


def test_the_tree_in_contributing_names_every_module_of_the_core() -> None:
    """Who adds a module to the core says in the tree what it is for, and none stays that is gone."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    tree = text.partition("fabric_core/  ")[2].partition("fabric_plugins/")[0]
    named = set(re.findall(r"^  ([\w.]+)", tree, re.MULTILINE))
    modules = {path.name for path in (ROOT / "fabric_core").glob("*.py")}
    packages = {path.parent.name for path in (ROOT / "fabric_core").glob("*/__init__.py")}
    assert named == (modules | packages) - {"__main__.py"}


def test_a_block_that_is_not_run_needs_a_reason() -> None:
    """A block marked as not run is left out if it says why, and refused if it does not."""
    block = "```python\nraise SystemExit\n```\n"
    assert list(read_blocks(f"<!-- not-run: ends the process -->\n{block}", "page")) == []
    with pytest.raises(ValueError, match=r"page:2: .* has no reason"):
        list(read_blocks(f"<!-- not-run: -->\n{block}", "page"))


@pytest.mark.parametrize("language", ["", "py", "bash"])
def test_a_block_needs_a_language_that_says_whether_it_runs(language: str) -> None:
    """A block without a known language is refused, so that none escapes by a spelling."""
    with pytest.raises(ValueError, match=r"page:3: .* write one of python, console"):
        list(read_blocks(f"# Title\n\n```{language}\nx = 1\n```\n", "page"))


def test_blocks_of_a_page_share_a_namespace_and_name_their_line() -> None:
    """A later block sees what an earlier one defined, and an error names the line in the page."""
    text = "```python\nx = 1\n```\n\nThen:\n\n- indented\n\n  ```python\n  y = x\n  x / 0\n  ```\n"
    first, second = read_blocks(text, "page.md")
    namespace: dict[str, Any] = {}
    run_python(first, "page.md", namespace)
    with pytest.raises(ZeroDivisionError) as caught:
        run_python(second, "page.md", namespace)
    assert namespace["y"] == 1
    assert (caught.traceback[-1].path, caught.traceback[-1].lineno + 1) == ("page.md", 11)


def test_a_console_block_is_compared_with_what_it_shows() -> None:
    """A command must succeed and print what the page shows, where the page shows anything."""
    run_console(Block("console", "$ echo one two\none ...\n$ true\n", 1), "page.md")
    with pytest.raises(pytest.fail.Exception, match="it prints:\ntwo"):
        run_console(Block("console", "$ echo two\nthree\n", 1), "page.md")
    with pytest.raises(pytest.fail.Exception, match=r"page\.md:1: \$ false"):
        run_console(Block("console", "$ false\n", 1), "page.md")

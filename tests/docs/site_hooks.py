"""What the site needs beyond MkDocs: links to files of the project that are no pages stay text."""

import posixpath
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
_LINK = re.compile(r"(?<!!)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)#\s]+)(#[^)\s]*)?\)")


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Let a link to a script, a folder or a page outside of docs/ be its words alone."""
    folder = posixpath.dirname(page.file.src_uri)

    def written(match: re.Match[str]) -> str:
        target = match[2]
        if re.match(r"[a-z]+:", target):
            return match[0]
        place = posixpath.normpath(posixpath.join(folder, target))
        return match[0] if not place.startswith("..") and place.endswith((".md", ".png", ".json")) else match[1]

    return _LINK.sub(written, markdown)

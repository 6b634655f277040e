"""The reference pages of the contracts say what the contracts say."""

from pathlib import Path

import pytest

from fabric_core import cli
from fabric_core.kinds import groups

PAGES = Path(__file__).parents[2] / "docs" / "reference" / "contracts"


@pytest.mark.parametrize("kind", groups())
def test_a_page_is_what_its_contract_says(
    kind: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each page is exactly what the command prints; a contract that changed shows here."""
    monkeypatch.setattr("sys.argv", ["fabric-core", "contract", kind])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert not end.value.code
    page = PAGES / f"{kind}.md"
    said = capsys.readouterr().out
    assert page.read_text(encoding="utf-8") == said, f"write it anew: fabric-core contract {kind} > {page}"


def test_there_is_no_other_page() -> None:
    """A kind that is gone leaves no page behind."""
    assert {page.stem for page in PAGES.glob("*.md")} == set(groups())

"""The page on chats and instructions has every finding of the gate, and every pair of columns that is recognised."""

from __future__ import annotations

from pathlib import Path

import pytest

from qlora_core.data.findings import FINDINGS
from qlora_records.forms import PAIRS

PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "train-on-chats-and-instructions.md"


@pytest.mark.parametrize("code", FINDINGS)
def test_every_finding_is_documented_with_its_remedy(code: str) -> None:
    kind = FINDINGS[code]
    row = f"| `{code}` | {kind.what} | {kind.remedy} | {'stops' if kind.error else 'warns'} |\n"
    assert row in PAGE.read_text(encoding="utf-8")


def test_no_finding_is_documented_that_does_not_exist() -> None:
    _, _, table = PAGE.read_text(encoding="utf-8").partition("| code | a row with | remedy | by default |\n|---|---|---|---|\n")
    codes = [line.split("`")[1] for line in table.partition("\n\n")[0].splitlines()]
    assert codes == list(FINDINGS)


def test_every_pair_of_columns_that_is_recognised_is_documented() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert [pair for pair in PAIRS if f"`{pair[0]}`/`{pair[1]}`" not in text] == []

"""The tables of README.md are those of the generated RESULTS.md files."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from splitformer.errors import UserError
from splitformer.report.readme import MARKED, refresh

RESULTS = """# Results

### 1best

words

| layer | test<br>small | test<br>large | dev<br>small |
| --- | ---: | ---: | ---: |
| 1 | 9.0 | 8.0 | 7.5 |

### empty

## next

| x |
"""


def refreshed(folder: Path, mark: str) -> str:
    (folder / "RESULTS.md").write_text(RESULTS)
    (folder / "README.md").write_text(f"before\n<!-- from RESULTS.md: {mark} -->\nold 3.0\n<!-- end -->\nafter\n")
    return refresh(folder / "README.md")


def test_a_marked_table_is_replaced_and_the_rest_kept(tmp_path: Path) -> None:
    text = refreshed(tmp_path, "### 1best")
    assert "| 1 | 9.0 | 8.0 | 7.5 |\n" in text and "old" not in text
    assert text.startswith("before\n") and text.endswith("<!-- end -->\nafter\n")
    (tmp_path / "README.md").write_text(text)
    assert refresh(tmp_path / "README.md") == text


def test_columns_are_selected_by_name(tmp_path: Path) -> None:
    text = refreshed(tmp_path, "### 1best; columns: layer, test<br>large, small")
    assert "| layer | test<br>large | test<br>small | dev<br>small |\n| --- | ---: | ---: | ---: |\n" in text
    assert "| 1 | 8.0 | 9.0 | 7.5 |\n" in text
    (tmp_path / "README.md").write_text(text)
    assert refresh(tmp_path / "README.md") == text


@pytest.mark.parametrize(
    ("mark", "message"),
    [
        ("### empty", "has no table under '### empty'"),
        ("### other", "has no table under '### other'"),
        ("### 1best; columns: layer, huge", r"has the columns .*'test<br>small'.*, not \['huge'\]"),
    ],
)
def test_a_table_or_column_that_does_not_exist(tmp_path: Path, mark: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        refreshed(tmp_path, mark)


def test_the_readme_is_up_to_date_and_its_files_exist(repo_root: Path) -> None:
    readme = repo_root / "README.md"
    text = readme.read_text()
    assert MARKED.search(text)
    assert refresh(readme) == text, "run python -m local.update_readme"
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (repo_root / target).exists(), f"README.md links to {target}"

"""README's tables are those of the generated RESULTS.md files."""

from __future__ import annotations

import re

import pytest

from splitformer.report.readme import MARKED, refresh

RESULTS = """# Results

### 1best

words

| layer | test |
| --- | ---: |
| 1 | 9.0 |

### empty

## next

| x |
"""


def test_a_marked_table_is_replaced_and_the_rest_kept(tmp_path):
    (tmp_path / "RESULTS.md").write_text(RESULTS)
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- from RESULTS.md: ### 1best -->\nold 7.0\n<!-- end -->\nafter\n")
    text = refresh(readme)
    assert "| 1 | 9.0 |" in text and "old" not in text and text.startswith("before\n") and text.endswith("after\n")
    readme.write_text(text)
    assert refresh(readme) == text
    readme.write_text("<!-- from RESULTS.md: ### empty -->\n<!-- end -->")
    with pytest.raises(ValueError, match="has no table under '### empty'"):
        refresh(readme)


def test_the_readme_is_up_to_date_and_its_files_exist(repo_root):
    readme = repo_root / "README.md"
    text = readme.read_text()
    assert MARKED.search(text)
    assert refresh(readme) == text, "run local/update_readme.py"
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (repo_root / target).exists(), f"README.md links to {target}"

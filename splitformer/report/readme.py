"""Copy tables of generated RESULTS.md files into README.md, so that no number there is typed by hand."""

from __future__ import annotations

import re
from pathlib import Path

MARKED = re.compile(r"(<!-- from (?P<file>\S+): (?P<heading>#+ [^\n]+?) -->\n).*?(<!-- end -->)", re.DOTALL)


def refresh(readme: Path) -> str:
    """The text of `readme` with the table below `heading` of `file` between each pair of marks.

        <!-- from egs/NAME/RESULTS.md: ### 1best -->
        <!-- end -->

    Files are relative to the folder of `readme`.

    Raises:
      FileNotFoundError, ValueError: a file, or a heading with a table in it, is not there.
    """

    def table(match: re.Match[str]) -> str:
        path, heading = readme.parent / match["file"], match["heading"]
        section = path.read_text(encoding="utf-8").partition(f"\n{heading}\n")[2]
        rows = re.search(r"^\|.*?(?=\n\n|\Z)", section, re.DOTALL | re.MULTILINE)
        if rows is None or re.search(r"^#", section[: rows.start()], re.MULTILINE):
            raise ValueError(f"{path} has no table under '{heading}', which {readme} asks for")
        return f"{match[1]}\n{rows[0].strip()}\n\n{match[4]}"

    return MARKED.sub(table, readme.read_text(encoding="utf-8"))

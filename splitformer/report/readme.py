"""Tables of generated RESULTS.md files in README.md, so that no number there is typed by hand."""

from __future__ import annotations

import re
from pathlib import Path

from splitformer.errors import UserError

MARKED = re.compile(
    r"(<!-- from (?P<file>\S+): (?P<heading>#+ [^\n;]+?)(?:; columns: (?P<columns>[^\n]+?))? -->\n)"
    r".*?(?P<end><!-- end -->)",
    re.DOTALL,
)


def refresh(readme: Path) -> str:
    """Return the text of `readme` with a table between each pair of marks.

    The table is the first one below a heading of a file, whose path is relative to `readme`. Columns may be selected:

        <!-- from egs/NAME/RESULTS.md: ### 1best; columns: layer, ee-baseline, splitformer -->
        <!-- end -->

    A column is named by its header, or by the last line of it: `splitformer` is `test<br>splitformer`.

    Raises:
      UserError: the heading has no table, or the table has no such column.
      FileNotFoundError: there is no such file.
    """

    def table(match: re.Match[str]) -> str:
        path, heading = readme.parent / match["file"], match["heading"]
        section = path.read_text(encoding="utf-8").partition(f"\n{heading}\n")[2]
        found = re.search(r"^\|.*?(?=\n\n|\Z)", section, re.DOTALL | re.MULTILINE)
        if found is None or re.search(r"^#", section[: found.start()], re.MULTILINE):
            raise UserError(f"{path} has no table under '{heading}', which {readme} asks for")
        rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in found[0].splitlines()]
        places = list(range(len(rows[0])))
        if match["columns"]:
            names = [name.strip() for name in match["columns"].split(",")]
            if unknown := set(names) - {*rows[0], *map(_short, rows[0])}:
                raise UserError(f"{path}: the table under '{heading}' has the columns {rows[0]}, not {sorted(unknown)}")
            places = [place for name in names for place in places if name in (rows[0][place], _short(rows[0][place]))]
        lines = ["| " + " | ".join(row[place] for place in places) + " |" for row in rows]
        return "\n".join([match[1], *lines, "", match["end"]])

    return MARKED.sub(table, readme.read_text(encoding="utf-8"))


def _short(header: str) -> str:
    return header.rpartition("<br>")[2]

"""Error counts and icefall's two files, compared with alignments made by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from splitformer.scoring import score, write_errs, write_recogs

# not in order; GO, TO, B, A, A are correct; GO -> NO, TWO -> TO; FOUR is deleted, and OH inserted twice
RESULTS = [
    ("utt-2", ["GO", "TWO", "B"], ["NO", "TO", "B", "OH"]),
    ("utt-1", ["GO", "TO", "FOUR"], ["GO", "TO"]),
    ("utt-3", [], ["OH"]),
    ("utt-4", ["A", "A"], ["A", "A"]),
]


def test_counts() -> None:
    scored = score(RESULTS)
    assert (scored.insertions, scored.deletions, scored.substitutions) == (2, 1, 2)
    assert (scored.errors, scored.ref_words) == (5, 8)
    assert scored.wer == 62.5
    assert [utterance.cut_id for utterance in scored.utterances] == ["utt-1", "utt-2", "utt-3", "utt-4"]


def test_recogs(tmp_path: Path) -> None:
    write_recogs(tmp_path / "recogs-test.txt", score(RESULTS[:2]))
    assert (tmp_path / "recogs-test.txt").read_text().splitlines() == [
        "utt-1:\tref=['GO', 'TO', 'FOUR']",
        "utt-1:\thyp=['GO', 'TO']",
        "utt-2:\tref=['GO', 'TWO', 'B']",
        "utt-2:\thyp=['NO', 'TO', 'B', 'OH']",
    ]


def test_errs(tmp_path: Path) -> None:
    write_errs(tmp_path / "errs-test.txt", score(RESULTS))
    text = (tmp_path / "errs-test.txt").read_text()
    assert text.startswith(
        "%WER = 62.50\n"
        "Errors: 2 insertions, 1 deletions, 2 substitutions, over 8 reference words (5 correct)\n"
    )
    sections = {}
    for part in text.split("\n\n")[1:]:
        title, *lines = part.strip().splitlines()
        sections[title.split(":")[0]] = lines
    assert sections["PER-UTT DETAILS"] == [
        "utt-1:\tGO TO (FOUR->*)",
        "utt-2:\t(GO->NO) (TWO->TO) B (*->OH)",
        "utt-3:\t(*->OH)",
        "utt-4:\tA A",
    ]
    assert sections["SUBSTITUTIONS"] == ["1   GO -> NO", "1   TWO -> TO"]
    assert sections["DELETIONS"] == ["1   FOUR"]
    assert sections["INSERTIONS"] == ["2   OH"]
    assert sections["PER-WORD STATS"] == [
        "OH   0 2 0 2",
        "FOUR   0 1 1 0",
        "GO   1 1 2 1",
        "NO   0 1 0 1",
        "TO   1 1 1 2",
        "TWO   0 1 1 0",
        "A   2 0 2 2",
        "B   1 0 1 1",
    ]


@pytest.mark.parametrize(
    ("results", "message"),
    [
        ([("a", ["X"], []), ("a", ["X"], [])], "there are two results for cut 'a'"),
        ([("a", [], ["X"])], "the 1 utterances have no reference word"),
        ([], "the 0 utterances have no reference word"),
        ([("a", ["X", ""], ["X"])], "cut 'a' has an empty word"),
    ],
)
def test_what_cannot_be_scored_is_refused(results: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        score(results)


def test_the_score_is_the_edit_distance_of_the_whole_set() -> None:
    """Compare with plain dynamic programming on pseudo-random word sequences."""

    def distance(a: list[str], b: list[str]) -> int:
        row = list(range(len(b) + 1))
        for i, x in enumerate(a, start=1):
            diagonal, row[0] = row[0], i
            for j, y in enumerate(b, start=1):
                diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y))
        return row[-1]

    results = []
    for i in range(50):
        ref = [str((i * 7 + j * j) % 5) for j in range(i % 13)]
        hyp = [str((i * 3 + j * j + j) % 5) for j in range((i * 5) % 11)]
        results.append((f"utt-{i:02d}", ref, hyp))
    assert score(results).errors == sum(distance(ref, hyp) for _, ref, hyp in results)

"""The search methods: the one list that commands, drivers and the report read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from splitformer.errors import UserError

Head = Literal["ctc", "transducer"]


@dataclass(frozen=True)
class SearchMethod:
    """What is known of a method without running it. Names are icefall's; both heads have a greedy search.

    head: the head whose output it searches.
    graphs: files of the lang_dir that it reads; words: whether it reads words.txt there.
    lattice: methods that read the same lattice share its options, which are tuned for the first of them.
    selectable: whether a choice among methods may fall on it: not on an oracle, nor on a correction after the search.
    """

    name: str
    head: Head
    graphs: tuple[str, ...] = ()
    words: bool = False
    lattice: str = ""
    selectable: bool = True


METHODS: dict[str, SearchMethod] = {
    method.name: method
    for method in (
        SearchMethod("greedy_search", "ctc"),
        SearchMethod("greedy_search+lexicon", "ctc", words=True, selectable=False),
        SearchMethod("prefix_beam_search", "ctc"),
        SearchMethod("ctc-decoding", "ctc"),
        SearchMethod("1best", "ctc", ("HLG.pt",), words=True, lattice="HLG"),
        SearchMethod("nbest", "ctc", ("HLG.pt",), words=True, lattice="HLG"),
        SearchMethod("nbest-rescoring", "ctc", ("HLG.pt", "G.pt"), words=True, lattice="HLG"),
        SearchMethod("whole-lattice-rescoring", "ctc", ("HLG.pt", "G.pt"), words=True, lattice="HLG"),
        SearchMethod("nbest-oracle", "ctc", ("HLG.pt",), words=True, lattice="HLG", selectable=False),
        SearchMethod("transducer-greedy_search", "transducer"),
        SearchMethod("modified_beam_search", "transducer"),
        SearchMethod("fast_beam_search", "transducer", lattice="transducer"),
        SearchMethod("fast_beam_search_nbest", "transducer", lattice="transducer"),
        SearchMethod("fast_beam_search_nbest_LG", "transducer", ("LG.pt",), words=True),
    )
}
"""Simple methods first, CTC's before the transducer's: the order of tables."""


def default_methods(heads: Sequence[str]) -> list[str]:
    """Names for a model with these heads: for CTC alone the greedy path, the same by k2, and HLG; else all."""
    if "transducer" not in heads:
        return ["greedy_search", "ctc-decoding", "1best"]
    return [method.name for method in METHODS.values() if method.head in heads]


def methods_of(names: Sequence[str] | None, heads: Sequence[str]) -> list[SearchMethod]:
    """The methods of these names (None: the default ones) for a model with these heads.

    Raises:
      UserError: a name that is no method, or a method of a head that the model lacks.
    """
    names = default_methods(heads) if names is None else names
    known = [method.name for method in METHODS.values() if method.head in heads]
    if wrong := [name for name in names if name not in known]:
        raise UserError(
            f"--methods {' '.join(wrong)}: the model has {' and '.join(heads)} heads; choose among {', '.join(known)}"
        )
    return [METHODS[name] for name in names]

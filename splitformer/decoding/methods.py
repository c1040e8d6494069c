"""The list of search methods, which commands, drivers and the report read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from splitformer.errors import UserError

Head = Literal["ctc", "transducer"]


@dataclass(frozen=True)
class SearchMethod:
    """The properties of a method that are known without running it. Names are those of icefall.

    head: the head whose output is searched.
    graphs: graphs of the lang_dir that it reads.
    words: whether it reads words.txt of the lang_dir.
    follows: cheaper methods that read the same lattice. The method takes the weights of the first of them that is run:
      tuning it by itself would cost many times as much, and an oracle would choose by the references.
    selectable: whether calibration may choose it; not an oracle, nor a correction that follows the search.
    """

    name: str
    head: Head
    graphs: tuple[str, ...] = ()
    words: bool = False
    follows: tuple[str, ...] = ()
    selectable: bool = True


_HLG = ("1best", "nbest", "whole-lattice-rescoring", "nbest-rescoring")
"""methods that read the lattice of HLG, the cheapest first"""

METHODS: dict[str, SearchMethod] = {
    method.name: method
    for method in (
        SearchMethod("greedy_search", "ctc"),
        SearchMethod("greedy_search+lexicon", "ctc", words=True, selectable=False),
        SearchMethod("prefix_beam_search", "ctc"),
        SearchMethod("ctc-decoding", "ctc"),
        SearchMethod("1best", "ctc", ("HLG.pt",), words=True),
        SearchMethod("nbest", "ctc", ("HLG.pt",), words=True, follows=_HLG[:1]),
        SearchMethod("nbest-rescoring", "ctc", ("HLG.pt", "G.pt"), words=True, follows=_HLG[:3]),
        SearchMethod("whole-lattice-rescoring", "ctc", ("HLG.pt", "G.pt"), words=True, follows=_HLG[:2]),
        SearchMethod("nbest-oracle", "ctc", ("HLG.pt",), words=True, follows=_HLG, selectable=False),
        SearchMethod("transducer-greedy_search", "transducer"),
        SearchMethod("modified_beam_search", "transducer"),
        SearchMethod("fast_beam_search", "transducer"),
        SearchMethod("fast_beam_search_nbest", "transducer", follows=("fast_beam_search",)),
        SearchMethod("fast_beam_search_nbest_LG", "transducer", ("LG.pt",), words=True),
    )
}
"""in the order of tables: simple methods first, CTC's before the transducer's"""


def default_methods(heads: Sequence[str]) -> list[str]:
    """Return names for a model with these heads. CTC alone: greedy search, the same with k2, and HLG; otherwise all."""
    if "transducer" not in heads:
        return ["greedy_search", "ctc-decoding", "1best"]
    return [method.name for method in METHODS.values() if method.head in heads]


def methods_of(names: Sequence[str] | None, heads: Sequence[str]) -> list[SearchMethod]:
    """Return the methods of these names (None: the default ones) for a model with these heads.

    Raises:
      UserError: a name is no method, or a method of a head that the model lacks.
    """
    names = default_methods(heads) if names is None else names
    known = [method.name for method in METHODS.values() if method.head in heads]
    if wrong := [name for name in names if name not in known]:
        raise UserError(
            f"--methods {' '.join(wrong)}: the model has {' and '.join(heads)} heads; choose among {', '.join(known)}"
        )
    return [METHODS[name] for name in names]

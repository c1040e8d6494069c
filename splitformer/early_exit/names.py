"""The exit policies: the one list that commands, drivers and the report read."""

from __future__ import annotations

POLICIES = (
    "fixed",
    "entropy",
    "entropy_non_blank",
    "posterior",
    "nbest_posterior",
    "patience",
    "learned",
    "learned_nbest",
    "budget",
    "deadline",
)
"""In the order of tables; docs/dynamic_exits.md describes them."""

WITHOUT_CTC = ("fixed", "deadline")
"""Policies that read no CTC log-probabilities."""

DEFAULT = "learned_nbest"
"""The policy that the recipe fits and decodes with."""

"""The rule that nothing is evaluated on what it was fitted to."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from splitformer.errors import UserError


def check_disjoint(
    fitted_on: str,
    fitted_utterances: Iterable[str],
    fitted_speakers: Iterable[str],
    test: str,
    speakers: Mapping[str, str],
) -> str:
    """Check that a test set has no utterance, and no known speaker, of the set that a policy is fitted on.

    Splits that were drawn by utterance share all of their speakers, and cannot be other than that: disjoint utterances
    then suffice, and the results carry a warning.

    Args:
      fitted_on, test: names of the sets, for messages.
      fitted_utterances, fitted_speakers: of the set that the policy is fitted on; unknown speakers are "".
      speakers: {utterance: speaker} of the test set.
    Returns:
      the warning, or "".
    Raises:
      UserError: the sets share an utterance, or some of the speakers but not all.
    """
    known = set(fitted_speakers) - {""}
    shared_utterances, shared_speakers = set(fitted_utterances) & speakers.keys(), known & set(speakers.values())
    if shared_speakers == known and shared_speakers and not shared_utterances:
        return (
            f"{fitted_on} and {test} share all {len(known)} speakers of {fitted_on}, only their utterances differ: "
            "results for speakers that the policy has not seen may be worse"
        )
    for what, shared in (("utterances", shared_utterances), ("speakers", shared_speakers)):
        if shared:
            raise UserError(
                f"{fitted_on} and the test set {test} share {len(shared)} {what} ({', '.join(sorted(shared)[:5])}): a "
                "policy cannot be evaluated on what it was fitted to; calibrate on a set of other speakers"
            )
    return ""

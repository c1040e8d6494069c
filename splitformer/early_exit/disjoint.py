"""The rule that a policy is not evaluated on what it was fitted to."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from splitformer.errors import UserError


def check_disjoint(
    fitted_on: str, utterances: Iterable[str], speakers: Iterable[str], test: str, test_speakers: Mapping[str, str]
) -> str:
    """Check that a test set has no utterance and no speaker of the set that a policy is fitted on.

    If splits were drawn by utterance, the sets share all speakers. Then disjoint utterances suffice, with a warning.

    Args:
      fitted_on, test: names of the sets, for messages.
      utterances, speakers: of the set that the policy is fitted on. Unknown speakers are "".
      test_speakers: {utterance: speaker} of the test set.
    Returns:
      the warning, or "".
    Raises:
      UserError: the sets share an utterance, or some of the known speakers but not all.
    """
    known = set(speakers) - {""}
    shared = known & set(test_speakers.values())
    same = set(utterances) & test_speakers.keys()
    if shared and shared == known and not same:
        return (
            f"{test} has all {len(known)} speakers of {fitted_on}, with other utterances: results may be worse for "
            "speakers that the policy was not fitted on"
        )
    for what, names in (("utterances", same), ("speakers", shared)):
        if names:
            raise UserError(
                f"{fitted_on} and {test} share {len(names)} {what} ({', '.join(sorted(names)[:5])}): a policy cannot "
                "be evaluated on what it was fitted to; calibrate on a set of other speakers"
            )
    return ""

"""Names of parts (`_target_`): what checkpoints call them, whatever they are called today.

The fingerprint of the data and the check of a resumed run compare targets. A part that has been renamed keeps the name that
checkpoints have of it, so that runs from before go on.
"""

from __future__ import annotations

# Today's name -> the name in checkpoints.
RECORDED = {"chattrain.data.collators.Padded": "chattrain.data.collators.Masked"}


def recorded_target(target: str) -> str:
    """The name of a `_target_` in checkpoints.

    >>> recorded_target("chattrain.data.collators.Padded"), recorded_target("my.package.Collator")
    ('chattrain.data.collators.Masked', 'my.package.Collator')
    """
    return RECORDED.get(target, target)


def current_target(target: str) -> str:
    """The part that a `_target_` means, which may be the name of an earlier version.

    >>> current_target("chattrain.data.collators.Masked")
    'chattrain.data.collators.Padded'
    """
    return next((today for today, recorded in RECORDED.items() if recorded == target), target)

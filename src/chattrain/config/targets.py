"""Classes named by `_target_` that have been renamed: checkpoints keep the name from before.

The fingerprint of the data and the check of a resumed run compare targets. Both use the recorded name, so that runs of earlier
versions can be resumed.
"""

from __future__ import annotations

# Current name -> name in checkpoints.
RECORDED = {"chattrain.data.collators.Padded": "chattrain.data.collators.Masked"}


def recorded_target(target: str) -> str:
    """The name of a `_target_` in checkpoints.

    >>> recorded_target("chattrain.data.collators.Padded"), recorded_target("my.package.Collator")
    ('chattrain.data.collators.Masked', 'my.package.Collator')
    """
    return RECORDED.get(target, target)


def current_target(target: str) -> str:
    """The current name of a `_target_`, which may be the name in an earlier version.

    >>> current_target("chattrain.data.collators.Masked")
    'chattrain.data.collators.Padded'
    """
    return next((current for current, recorded in RECORDED.items() if recorded == target), target)

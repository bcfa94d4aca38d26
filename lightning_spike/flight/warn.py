"""Warnings of ours, which must never stop a training: not even where Python has been told to make errors of them."""

import contextlib

from lightning.pytorch.utilities import rank_zero_warn


def warn(message: str) -> None:
    """Warn once, on rank 0, under our name.

    Under ``-W error`` the warning is lost: the report names everything that is warned of here too.
    """
    with contextlib.suppress(Warning):
        rank_zero_warn(f"lightning_spike: {message}", stacklevel=6)

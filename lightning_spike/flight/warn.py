"""Warnings that never stop a training, even under ``-W error``."""

import contextlib

from lightning.pytorch.utilities import rank_zero_warn


def warn(message: str) -> None:
    """Warn on rank 0; under ``-W error`` only the report has the warning."""
    with contextlib.suppress(Warning):
        rank_zero_warn(f"lightning_spike: {message}", stacklevel=6)

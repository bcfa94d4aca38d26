"""Why something could not be run again."""

from lightning_spike.errors import SpikeError

__all__ = ["CannotReplay", "OnsetGone"]


class CannotReplay(SpikeError):  # noqa: N818 - it is an answer more than an error: who asks turns it into a finding
    """The moment cannot be run again in a way that leaves no trace, or not with the same numbers; the message says why, for a person.

    Raised inside the lab only. Callers turn it into a finding of kind "not_run"; it never reaches the training.
    """


class OnsetGone(CannotReplay):
    """The beginning of the trouble is out of reach, while the present can still be looked into."""

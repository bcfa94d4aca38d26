"""The errors that this package raises on purpose.

```
SpikeError
├── ConfigurationError(ValueError)   an argument or a combination of callbacks makes no sense; raised at construction or
in `setup` ├── MissingExtraError(ImportError)   an optional package is needed for what was asked └──
UnreadableReportError            a report.json that is not ours, or of another schema ```

Nothing here is raised from inside a running training: there an error of ours switches the part off and is named in the
report.
"""


class SpikeError(Exception):
    """Base of everything that `lightning_spike` raises on purpose."""


class ConfigurationError(SpikeError, ValueError):
    """An argument is not usable; the message says what was expected, what was given and what to do."""

    @classmethod
    def of(cls, name: str, *, expected: str, given: object, do: str) -> "ConfigurationError":
        """Build the message in its one form.

        Args:
            name: The argument, as the user writes it: ``"AnomalyRollback(max_rollbacks)"``.
            expected: What would have been accepted, in words.
            given: What came instead; its ``repr`` is shown, cut at 80 characters.
            do: What to change.
        """
        shown = repr(given)
        if len(shown) > 80:  # noqa: PLR2004 - one terminal line
            shown = shown[:77] + "..."
        return cls(f"{name}: expected {expected}, was given {shown}. {do}")


class MissingExtraError(SpikeError, ImportError):
    """An optional package is not installed; the message names the extra that brings it."""

    @classmethod
    def of(cls, what: str, *, extra: str, package: str) -> "MissingExtraError":
        """Say what needs which package, and the command that installs it."""
        return cls(f"{what} needs the package {package!r}. Install it with: pip install 'lightning-spike[{extra}]'")


class UnreadableReportError(SpikeError):
    """A file that should hold a report does not, or holds one of a schema this version cannot read."""


class CannotReplay(SpikeError):  # noqa: N818 - it is an answer more than an error: who asks turns it into a finding
    """The moment cannot be run again in a way that leaves no trace, or not with the same numbers.

    The message says why, for a person.

    Raised inside the lab only. Callers turn it into a finding of kind "not_run"; it never reaches the training.
    """


class OnsetGone(CannotReplay):
    """The beginning of the trouble is out of reach, while the present can still be looked into."""

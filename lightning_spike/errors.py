"""The errors that this package raises on purpose.

```
SpikeError
├── ConfigurationError(ValueError)   an unusable argument or combination, raised at construction or in `setup`
├── MissingExtraError(ImportError)   an optional package is missing
├── UnreadableReportError            no report.json, or one of another schema
└── CannotReplay                     a moment cannot be replayed; stays inside the lab
    └── OnsetGone                    the onset is no longer recorded
```

None of them is raised inside a running training: there a failing part is switched off and named in the report.
"""


class SpikeError(Exception):
    """Base of everything that `lightning_spike` raises on purpose."""


class ConfigurationError(SpikeError, ValueError):
    """An unusable argument; the message says what was expected, what was given and what to do."""

    @classmethod
    def of(cls, name: str, *, expected: str, given: object, do: str) -> "ConfigurationError":
        """Returns the error with its standard message.

        Args:
            name: The argument, as the user writes it: ``"AnomalyRollback(max_rollbacks)"``.
            expected: The accepted values, in words.
            given: The given value; its ``repr`` is shown, cut at 80 characters.
            do: The change to make.
        """
        shown = repr(given)
        if len(shown) > 80:  # noqa: PLR2004 - one terminal line
            shown = shown[:77] + "..."
        return cls(f"{name}: expected {expected}, was given {shown}. {do}")


class MissingExtraError(SpikeError, ImportError):
    """A missing optional package; the message names the extra to install."""

    @classmethod
    def of(cls, what: str, *, extra: str, package: str) -> "MissingExtraError":
        """Returns the error with the missing package and the command that installs it."""
        return cls(f"{what} needs the package {package!r}. Install it with: pip install 'lightning-spike[{extra}]'")


class UnreadableReportError(SpikeError):
    """A file without a report, or with one of another schema version."""


class CannotReplay(SpikeError):  # noqa: N818 - callers turn it into a result
    """The moment cannot be replayed without a trace, or not with the same numbers; the message is the reason.

    It is raised inside the lab only. Callers turn it into a result that was "not_run"; it never reaches the training.
    """


class OnsetGone(CannotReplay):
    """The onset is no longer recorded; tests at the current weights are still possible."""

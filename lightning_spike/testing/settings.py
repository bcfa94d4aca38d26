"""`SettingsFault`: changes settings of the optimizers for some batches."""

from collections.abc import Mapping
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from typing_extensions import override

from lightning_spike.testing.fault import LastingFault, param_groups


class SettingsFault(LastingFault):
    """Base of the faults that change an optimizer's settings for some batches: epsilon, betas, momentum, weight decay.

    They change before any callback sees the first of the batches, and are restored after the last or when the fit
    ends.
    """

    _saved: list[tuple[dict[str, Any], dict[str, Any]]]
    _initial: list[tuple[dict[str, Any], dict[str, Any]]]

    def settings(self, group: Mapping[str, Any]) -> dict[str, Any]:
        """The changed settings of a parameter group; empty for a group that is not affected."""
        raise NotImplementedError

    @override
    def prepare(self, trainer: Trainer, module: LightningModule) -> None:
        self._saved = []
        self._initial = [(group, {key: group[key] for key in self.settings(group)}) for group in param_groups(trainer)]
        self.later(self._restore_initial)

    @override
    def begin(self, trainer: Trainer, module: LightningModule) -> None:
        for group in param_groups(trainer):
            new = self.settings(group)
            self._saved.append((group, {key: group[key] for key in new}))
            group.update(new)

    @override
    def end(self) -> None:
        for group, values in self._saved:
            group.update(values)
        self._saved = []

    def _restore_initial(self) -> None:
        """Restores the settings from before the fit: those at the batch `at` may be of another fault, which ended."""
        if self._saved:
            self._saved = self._initial
        self.end()

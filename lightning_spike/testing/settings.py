"""Settings of an optimizer that a fault puts into its groups and takes out again."""

from collections.abc import Mapping
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from typing_extensions import override

from lightning_spike.testing.fault import LastingFault


class SettingsFault(LastingFault):
    """Base of the faults that change an optimizer's settings for some batches: epsilon, betas, momentum, weight decay.

    They are changed before any callback sees the first of the batches, and put back after the last, or when the fit
    ends.
    """

    _kept: list[tuple[dict[str, Any], dict[str, Any]]]
    _at_first: list[tuple[dict[str, Any], dict[str, Any]]]

    def settings(self, group: Mapping[str, Any]) -> dict[str, Any]:
        """What a parameter group gets while the fault lasts; none of it for a group that it does not concern."""
        raise NotImplementedError

    @override
    def prepare(self, trainer: Trainer, module: LightningModule) -> None:
        self._kept = []
        groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
        self._at_first = [(group, {key: group[key] for key in self.settings(group)}) for group in groups]
        self.later(self._leave)

    @override
    def before_batch(self, trainer: Trainer, module: LightningModule, batch: Any, ordinal: int) -> Any:
        if not self._kept:
            for optimizer in trainer.optimizers:
                for group in optimizer.param_groups:
                    new = self.settings(group)
                    self._kept.append((group, {key: group[key] for key in new}))
                    group.update(new)
        return batch

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if not self.lasts(self._begun):
            self._put_settings_back()

    def _leave(self) -> None:
        """As at first: what was found at the batch `at` may be another fault's, which has left already."""
        if self._kept:
            self._kept = self._at_first
        self._put_settings_back()

    def _put_settings_back(self) -> None:
        for group, values in self._kept:
            group.update(values)
        self._kept = []

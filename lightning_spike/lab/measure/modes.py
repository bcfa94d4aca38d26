"""An ordinary batch in train and in eval mode.

Running statistics that do not fit the weights, a forgotten train mode.
"""

from collections.abc import Mapping

from torch import Tensor

from lightning_spike.experiments import ModeMeasurement
from lightning_spike.record.batch_ring import RingEntry
from lightning_spike.record.state_copy import load_module
from lightning_spike.sandbox.isolation import Sandbox, loss_of


def measure_modes(
    sandbox: Sandbox, entry: RingEntry, *, old: Mapping[str, Tensor], new: Mapping[str, Tensor]
) -> ModeMeasurement | None:
    """Four forward passes, two where the modes make no difference; `None` where a step gives no loss.

    Args:
        sandbox: Inside `isolated`.
        entry: An ordinary batch.
        old: Weights and buffers from before.
        new: Those at the onset.
    """
    now = [_loss(sandbox, new, entry, in_eval=in_eval) for in_eval in (False, True)]
    differ = now[0] != now[1]
    then = [_loss(sandbox, old, entry, in_eval=in_eval) for in_eval in (False, True)] if differ else [None, None]
    if now[0] is None or now[1] is None:
        return None
    sandbox.rewind()
    return ModeMeasurement(train=now[0], eval=now[1], usual_train=then[0], usual_eval=then[1], frozen=_frozen(sandbox))


def _loss(sandbox: Sandbox, weights: Mapping[str, Tensor], entry: RingEntry, *, in_eval: bool) -> float | None:
    sandbox.rewind()
    load_module(sandbox.module, weights)
    if in_eval:
        sandbox.module.eval()
    loss = loss_of(sandbox.step(entry.batch, entry.at.batch_idx, random=entry.rng, at=entry.at))
    return None if loss is None else float(sandbox.ranks.mean("a loss", [float(loss.detach())])[0])


def _frozen(sandbox: Sandbox) -> tuple[str, ...]:
    resting = [name for name, part in sandbox.module.named_modules() if not part.training]
    outermost = [n for n in resting if not any(o != n and (not o or n.startswith(f"{o}.")) for o in resting)]
    return tuple(outermost)

"""State of the global random generators: Python, NumPy, torch on the CPU and on the devices."""

import dataclasses
import random
from collections.abc import Mapping
from typing import Any, Final, Self

import numpy as np
import torch
from torch import Tensor

ACCELERATORS: Final = ("cuda", "xpu")
"""Device types with one generator per device, whose state is on the host."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RandomState:
    """State of all global random generators of this process."""

    python: tuple[Any, ...]
    """As `random.getstate()` gives it."""
    numpy: Any
    """As `numpy.random.get_state()` gives it: the legacy global generator."""
    torch: Tensor
    """The CPU generator's state, uint8, on the CPU."""
    devices: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)
    """By device (`"cuda:0"`), uint8, on the CPU; only devices that this process has in use. The MPS generator is under
    `"mps"`."""

    @classmethod
    def take(cls) -> Self:
        """Copy the states; draws nothing, starts no device, never blocks."""
        return cls(
            python=random.getstate(),
            numpy=np.random.get_state(),  # noqa: NPY002 - the legacy generator is the one that user code draws from
            torch=torch.get_rng_state(),
            devices=_device_states(),
        )

    def restore(self) -> None:
        """Restore the states; ignores missing devices."""
        random.setstate(self.python)
        np.random.set_state(self.numpy)  # noqa: NPY002 - the same
        torch.set_rng_state(self.torch)
        for device, state in self.devices.items():
            if device == "mps":
                torch.mps.set_rng_state(state)
            elif torch.device(device).index < _module(torch.device(device).type).device_count():
                _module(torch.device(device).type).set_rng_state(state, device)


def _device_states() -> dict[str, Tensor]:
    states: dict[str, Tensor] = {}
    for kind in ACCELERATORS:
        module = _module(kind)
        if module.is_available() and module.is_initialized():
            states |= {f"{kind}:{k}": module.get_rng_state(f"{kind}:{k}") for k in range(module.device_count())}
    if torch.backends.mps.is_available():
        states["mps"] = torch.mps.get_rng_state()
    return states


def _module(kind: str) -> Any:
    return getattr(torch, kind)

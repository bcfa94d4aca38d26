"""Recorder: copies device values to the host without waiting for them.

Signals of the open row stay on their device. Closing the row joins them into one vector and starts its copy into pinned
host memory. Rows come out in order once their copy is complete: on a CUDA device some steps later, on the CPU at once.
"""

import dataclasses
from collections import deque
from collections.abc import Iterator
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lightning_spike.records import LayerRow, Moment, StepRow

ROWS_PER_READ: Final = 32
"""Rows per blocking read on an accelerator without CUDA events; engineering choice."""

Key = tuple[torch.device, torch.dtype]


@dataclasses.dataclass(frozen=True, slots=True)
class Arrival:
    """One batch's signals, on the host."""

    row: StepRow
    layers: tuple[LayerRow, ...]


@dataclasses.dataclass(slots=True)
class _Transfer:
    """One vector on its way to the host."""

    host: Tensor
    event: torch.cuda.Event | None

    def has_arrived(self) -> bool:
        return self.event is None or bool(self.event.query())  # type: ignore[no-untyped-call]

    def numbers(self) -> npt.NDArray[np.float64]:
        """The vector; blocks only while the copy is incomplete."""
        if self.event is not None:
            self.event.synchronize()
        host = self.host.float() if self.host.dtype == torch.bfloat16 else self.host
        return np.asarray(host.cpu().numpy(), dtype=np.float64)


@dataclasses.dataclass(slots=True)
class _OpenRow:
    at: Moment
    batch_size: int | None
    usual_batch_size: int | None
    numbers: dict[str, float] = dataclasses.field(default_factory=dict)
    scalars: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    vectors: dict[str, Tensor] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(slots=True)
class _Closed:
    """A row whose device values are being copied, by device and dtype."""

    row: _OpenRow
    transfers: list[tuple[list["_Part"], _Transfer]]


@dataclasses.dataclass(frozen=True, slots=True)
class _Part:
    """Meaning of a range of a transferred vector."""

    signal: str
    size: int
    is_vector: bool


class Recorder:
    """Collects the signals of each batch and returns them as rows once they are on the host."""

    def __init__(self) -> None:
        self._open: _OpenRow | None = None
        self._under_way: deque[_Closed] = deque()

    @property
    def lag(self) -> int:
        """Number of rows that are closed but not returned."""
        return len(self._under_way)

    def begin(self, at: Moment, *, batch_size: int | None = None, usual_batch_size: int | None = None) -> None:
        """Open the row of a batch; drops one that is still open."""
        self._open = _OpenRow(at, batch_size, usual_batch_size)

    def put(self, signal: str, value: Tensor | float) -> None:
        """Add a scalar to the open row; ignored without one (in a hook outside a batch).

        Args:
            signal: The series' name.
            value: A number, or a tensor with one element of any dtype and device, which is not read here.
        """
        if self._open is None:
            return
        if isinstance(value, Tensor):
            self._open.scalars[signal] = value.detach().reshape(1)
        else:
            self._open.numbers[signal] = float(value)

    def put_vector(self, signal: str, value: Tensor) -> None:
        """Add a vector of shape `(n,)` to the open row, whose names the store keeps. Never blocks."""
        if self._open is not None:
            self._open.vectors[signal] = value.detach()

    def end(self) -> None:
        """Close the open row and start its copy; never blocks."""
        if self._open is not None:
            self._under_way.append(_Closed(self._open, list(_start(self._open))))
            self._open = None

    def arrived(self) -> list[Arrival]:
        """Rows that reached the host since the last call, in order; never blocks (but see `ROWS_PER_READ`)."""
        out = []
        while self._under_way and self._is_ready(self._under_way[0]):
            out.append(_arrival(self._under_way.popleft()))
        return out

    def flush(self) -> list[Arrival]:
        """All remaining rows; blocks until the device has finished, so only for the end of a run."""
        out = [_arrival(closed) for closed in self._under_way]
        self._under_way.clear()
        return out

    def _is_ready(self, closed: _Closed) -> bool:
        if any(t.host.device.type != "cpu" for _, t in closed.transfers):
            return len(self._under_way) >= ROWS_PER_READ
        return all(t.has_arrived() for _, t in closed.transfers)


def _start(row: _OpenRow) -> Iterator[tuple[list[_Part], _Transfer]]:
    """Join the row's tensors per device and dtype, and start their copies."""
    groups: dict[Key, list[tuple[_Part, Tensor]]] = {}
    for is_vector, signals in ((False, row.scalars), (True, row.vectors)):
        for name, tensor in signals.items():
            part = _Part(name, tensor.numel(), is_vector)
            groups.setdefault((tensor.device, tensor.dtype), []).append((part, tensor))
    for members in groups.values():
        yield [part for part, _ in members], _send(torch.cat([tensor for _, tensor in members]))


def _send(vector: Tensor) -> _Transfer:
    """Start the copy to the host; on the CPU `torch.cat` has made a new tensor already."""
    if vector.device.type != "cuda":
        return _Transfer(vector, None)
    host = torch.empty(vector.shape, dtype=vector.dtype, pin_memory=True)
    host.copy_(vector, non_blocking=True)
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record(torch.cuda.current_stream(vector.device))
    return _Transfer(host, event)


def _arrival(closed: _Closed) -> Arrival:
    row = closed.row
    values, layers = dict(row.numbers), []
    for parts, transfer in closed.transfers:
        numbers, start = transfer.numbers(), 0
        for part in parts:
            if part.is_vector:
                vector = numbers[start : start + part.size].astype(np.float32)
                layers.append(LayerRow(at=row.at, signal=part.signal, values=vector))
            else:
                values[part.signal] = float(numbers[start])
            start += part.size
    step_row = StepRow(at=row.at, values=values, batch_size=row.batch_size, usual_batch_size=row.usual_batch_size)
    return Arrival(step_row, tuple(layers))

import math

import numpy as np
import pytest
import torch

from lightning_spike.record.recorder import Recorder
from lightning_spike.records import Moment


def moment(ordinal: int) -> Moment:
    return Moment(ordinal=ordinal, step=ordinal, epoch=0, batch_idx=ordinal)


def test_a_row_arrives_with_all_its_values_though_a_scalar_and_a_vector_share_a_name():
    recorder = Recorder()
    recorder.begin(moment(3), batch_size=7, usual_batch_size=8)
    recorder.put("loss", torch.tensor(1.5))
    recorder.put("lr", 0.25)
    recorder.put("count", torch.tensor([4]))
    recorder.put("low", torch.tensor(0.5, dtype=torch.bfloat16))
    recorder.put_vector("loss", torch.arange(3.0))
    recorder.end()
    (arrival,) = recorder.arrived()
    assert arrival.row.at == moment(3)
    assert dict(arrival.row.values) == {"loss": 1.5, "lr": 0.25, "count": 4.0, "low": 0.5}
    assert (arrival.row.batch_size, arrival.row.usual_batch_size) == (7, 8)
    assert [(layer.signal, layer.values.tolist()) for layer in arrival.layers] == [("loss", [0.0, 1.0, 2.0])]
    assert arrival.layers[0].values.dtype == np.float32
    assert recorder.arrived() == []


def test_non_finite_values_stay_what_they_are():
    recorder = Recorder()
    recorder.begin(moment(0))
    recorder.put("a", torch.tensor(math.nan))
    recorder.put("b", torch.tensor(-math.inf))
    recorder.end()
    values = recorder.arrived()[0].row.values
    assert math.isnan(values["a"])
    assert values["b"] == -math.inf


def test_a_value_is_a_copy_and_carries_no_graph():
    recorder = Recorder()
    weight = torch.ones(1, requires_grad=True)
    recorder.begin(moment(0))
    recorder.put("loss", weight * 2)
    recorder.end()
    with torch.no_grad():
        weight.zero_()
    assert recorder.arrived()[0].row.values["loss"] == 2.0


def test_outside_a_row_nothing_is_recorded():
    recorder = Recorder()
    recorder.put("loss", 1.0)
    recorder.put_vector("norms", torch.ones(2))
    recorder.end()
    assert recorder.arrived() == []


def test_a_row_that_never_ended_is_dropped():
    recorder = Recorder()
    recorder.begin(moment(0))
    recorder.put("loss", 1.0)
    recorder.begin(moment(1))
    recorder.put("loss", 2.0)
    recorder.end()
    assert [a.row.at.ordinal for a in recorder.arrived()] == [1]


def test_flush_gives_what_is_under_way():
    recorder = Recorder()
    for i in range(3):
        recorder.begin(moment(i))
        recorder.put("loss", torch.tensor(float(i)))
        recorder.end()
    assert recorder.lag == 3
    assert [a.row.values["loss"] for a in recorder.flush()] == [0.0, 1.0, 2.0]
    assert recorder.lag == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_no_call_waits_for_the_device():
    recorder = Recorder()
    values = torch.rand(100, device="cuda")
    arrived = []
    torch.cuda.set_sync_debug_mode("error")
    try:
        for i in range(100):
            recorder.begin(moment(i))
            recorder.put("loss", values[i])
            recorder.put_vector("norms", values[:10])
            recorder.end()
            arrived += recorder.arrived()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    arrived += recorder.flush()
    assert [a.row.values["loss"] for a in arrived] == values.tolist()

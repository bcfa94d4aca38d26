"""signals/ as NumPy reads it, without this package, against the store."""

import numpy as np
import pytest

from lightning_spike.records import LayerRow, Moment, RunFacts, StepRow
from lightning_spike.report.signals_file import read_signals, write_signals
from lightning_spike.store import TrainerStateStore


def at(ordinal):
    return Moment(ordinal=ordinal, step=ordinal // 2, epoch=0, batch_idx=ordinal)


def test_plain_numpy_reads_every_column(troubled_run, tmp_path):
    folder = write_signals(troubled_run, tmp_path / "signals")
    series = np.load(folder / "series.npz", allow_pickle=False)
    assert series["step"].tolist() == list(range(1200))
    for signal in ("loss", "grad_norm", "lr-AdamW"):
        np.testing.assert_array_equal(series[signal], troubled_run.history.series(signal))
    validation = np.load(folder / "validation.npz", allow_pickle=False)
    assert validation["metric"].tolist() == ["val_loss"] * 4
    assert validation["step"].tolist() == [299, 599, 899, 1199]
    layers = np.load(folder / "layers.npz", allow_pickle=False)
    assert layers["grad_norm:names"].tolist() == ["net.0.weight", "net.0.bias"]
    assert layers["grad_norm:values"].shape == (512, 2)
    assert layers["grad_norm:ordinal"][-1] == 1199


def test_the_readme_names_every_signal(troubled_run, tmp_path):
    text = (write_signals(troubled_run, tmp_path / "signals") / "README.md").read_text(encoding="utf-8")
    for signal in troubled_run.history.signals:
        assert f"`{signal}`" in text


def test_it_is_read_back(troubled_run, tmp_path):
    signals = read_signals(write_signals(troubled_run, tmp_path / "signals"))
    np.testing.assert_array_equal(signals.series["loss"], troubled_run.history.series("loss"))
    table = signals.layers["grad_norm"]
    assert table.names == ("net.0.weight", "net.0.bias")
    np.testing.assert_array_equal(table.values[-1], troubled_run.layers["grad_norm"][-1].values)
    assert signals.validation["train_loss"].dtype == np.float64


@pytest.mark.parametrize("name", ["file", "loss/aux", "lr-AdamW/pg2", "ä ö", "a:b"])
def test_any_name_of_a_signal_survives(tmp_path, name):
    store = TrainerStateStore(RunFacts(started="now"))
    store.layer_names[name] = ("w",)
    store.append(
        StepRow(at=at(0), values={name: 1.5}), [LayerRow(at=at(0), signal=name, values=np.ones(1, dtype=np.float32))]
    )
    signals = read_signals(write_signals(store, tmp_path / "signals"))
    assert signals.series[name].tolist() == [1.5]
    assert signals.layers[name].values.tolist() == [[1.0]]


def test_a_value_that_was_nan_is_told_from_none(tmp_path):
    store = TrainerStateStore(RunFacts(started="now"))
    for i, values in enumerate([{"loss": 1.0}, {}, {"loss": float("nan")}, {"aux": 2.0}]):
        store.append(StepRow(at=at(i), values=values))
    folder = write_signals(store, tmp_path / "signals")
    assert np.load(folder / "nan.npz")["loss"].tolist() == [2]
    signals = read_signals(folder)
    assert np.isnan(signals.series["loss"]).tolist() == [False, True, True, True]
    assert {name: rows.tolist() for name, rows in signals.nan.items()} == {"loss": [2]}


def _cut(path):
    path.write_bytes(path.read_bytes()[:-30])


def _without_step(path):
    np.savez(path, ordinal=np.arange(3))


@pytest.mark.parametrize(
    "spoil", [_cut, _without_step, lambda path: path.write_bytes(b""), lambda path: path.unlink()],
    ids=["cut", "no step", "empty", "gone"],
)  # fmt: skip
def test_a_table_that_is_none_is_named(troubled_run, tmp_path, spoil):
    folder = write_signals(troubled_run, tmp_path / "signals")
    spoil(folder / "series.npz")
    with pytest.raises(OSError, match=r"series\.npz"):
        read_signals(folder)


def test_an_empty_store_gives_empty_tables(tmp_path):
    signals = read_signals(write_signals(TrainerStateStore(RunFacts(started="now")), tmp_path / "signals"))
    assert signals.series["ordinal"].tolist() == []
    assert signals.layers == {}
    assert signals.validation["value"].tolist() == []


def test_a_table_that_cannot_be_written_leaves_the_old_folder(troubled_run, tmp_path, monkeypatch):
    folder = write_signals(TrainerStateStore(RunFacts(started="now")), tmp_path / "signals")

    def no_space(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np.lib.format, "write_array", no_space)
    with pytest.raises(OSError, match="No space"):
        write_signals(troubled_run, folder)
    assert read_signals(folder).series["ordinal"].tolist() == []
    assert [p.name for p in tmp_path.iterdir()] == ["signals"]

"""The report comes out however a real training ends, and what ends it is as it would be without us."""

import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from training_tasks import Digits, train

from lightning_spike.callbacks.root_cause_report import RootCauseReport
from lightning_spike.errors import ConfigurationError
from lightning_spike.record.recorder import Recorder
from lightning_spike.records import RunStatus
from lightning_spike.report import html, json_file, model
from lightning_spike.report.json_file import read_report
from lightning_spike.report.signals_file import read_signals


class At(Callback):
    """Does something to the training at the end of one batch."""

    def __init__(self, batch, what):
        self.batch, self.what, self.seen = batch, what, 0

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.seen += 1
        if self.seen == self.batch:
            self.what(trainer, pl_module)


def quick(**options):
    """A report without the page, which takes a second to draw."""
    return RootCauseReport(**({"formats": ("terminal", "json", "signals")} | options))


def poison(trainer: object, module: LightningModule) -> None:
    with torch.no_grad():
        module.net[-1].weight.fill_(float("nan"))


def fail(trainer: object, module: LightningModule) -> None:
    msg = "the user's own"
    raise ZeroDivisionError(msg)


def stop(trainer, module):
    trainer.should_stop = True


def test_a_finished_run_is_reported_once_and_written(tmp_path, capsys):
    report = RootCauseReport()
    trainer = train(Digits(), [report], tmp_path, validate=True)
    assert sorted(p.name for p in (tmp_path / "spike").iterdir()) == ["report.html", "report.json", "signals"]
    written = read_report(tmp_path / "spike" / "report.json")
    assert written["run"]["status"] == "finished"
    assert written["run"]["steps"] == trainer.global_step == 64
    assert written["run"]["epochs"] == 2
    assert capsys.readouterr().out.count("lightning-spike") == 1
    assert report.report.status is RunStatus.FINISHED
    signals = read_signals(tmp_path / "spike" / "signals")
    assert signals.series["step"].tolist() == list(range(64))
    assert torch.isfinite(torch.tensor(signals.series["loss"])).all()


def test_a_run_stopped_early_says_so(tmp_path):
    train(Digits(), [quick(), At(5, stop)], tmp_path, min_epochs=0)
    assert read_report(tmp_path / "spike" / "report.json")["run"]["status"] == "stopped_early"


def test_the_users_exception_comes_through_and_is_named(tmp_path, capsys):
    report = quick()
    with pytest.raises(ZeroDivisionError, match="the user's own"):
        train(Digits(), [report, At(7, fail)], tmp_path)
    run = read_report(tmp_path / "spike" / "report.json")["run"]
    assert (run["status"], run["error"], run["steps"]) == ("exception", "ZeroDivisionError: the user's own", 7)
    assert "ZeroDivisionError: the user's own" in capsys.readouterr().out.replace("\n", " ")


def test_a_run_that_turned_to_nan_has_an_episode(tmp_path, capsys):
    train(Digits(), [quick(), At(30, poison)], tmp_path)
    text = (tmp_path / "spike" / "report.json").read_text(encoding="utf-8")
    written = json.loads(text, parse_constant=pytest.fail)
    assert [(e["kind"], e["onset_step"]) for e in written["episodes"]] == [("nonfinite", 30)]
    assert "nonfinite" in capsys.readouterr().out


def test_before_the_first_batch_there_is_nothing_to_report(tmp_path, capsys):
    class Broken(Digits):
        def on_train_start(self):
            fail(None, self)

    report = quick()
    with pytest.raises(ZeroDivisionError):
        train(Broken(), [report], tmp_path)
    assert report.report is None
    assert not (tmp_path / "spike").exists()
    assert "lightning-spike" not in capsys.readouterr().out


def test_a_second_fit_has_its_own_report(tmp_path):
    report = quick(dirpath=tmp_path / "mine")
    train(Digits(), [report, At(30, poison)], tmp_path)
    train(Digits(), [report], tmp_path, max_epochs=1)
    written = read_report(tmp_path / "mine" / "report.json")
    assert (written["run"]["steps"], written["episodes"]) == (32, [])
    assert sorted(p.name for p in (tmp_path / "mine").iterdir()) == ["report.json", "signals"]


def test_a_file_in_place_of_the_folder_costs_only_the_files(tmp_path, capsys):
    (tmp_path / "spike").write_text("in the way")
    report = RootCauseReport()
    train(Digits(), [report], tmp_path, max_epochs=1)
    assert (tmp_path / "spike").read_text() == "in the way"
    out = capsys.readouterr().out
    assert "no trouble in 32 steps" in out
    assert [form for form in ("json", "signals", "html") if f"{form} could not be written" in out] == [
        "json",
        "signals",
        "html",
    ]
    assert report.report is not None


def no_space(*args, **kwargs):
    raise OSError(28, "No space left on device")


def test_a_disk_that_fills_up_leaves_no_half_file_and_the_printed_report(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(os, "fsync", no_space)
    train(Digits(), [quick()], tmp_path, max_epochs=1)
    assert list((tmp_path / "spike").iterdir()) == []
    assert "No space left on device" in capsys.readouterr().out


def test_a_page_that_breaks_costs_only_the_page(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(html, "render_page", no_space)
    train(Digits(), [RootCauseReport()], tmp_path, max_epochs=1)
    assert sorted(p.name for p in (tmp_path / "spike").iterdir()) == ["report.json", "signals"]
    assert "html could not be written" in capsys.readouterr().out


def test_without_the_extra_the_report_says_how_to_get_it(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(html.importlib.util, "find_spec", lambda name: None)
    train(Digits(), [RootCauseReport()], tmp_path, max_epochs=1)
    assert "pip install 'lightning-spike[html]'" in " ".join(capsys.readouterr().out.split())
    assert (tmp_path / "spike" / "report.json").exists()


def test_a_ranking_that_breaks_costs_only_the_causes(tmp_path, monkeypatch):
    monkeypatch.setattr(model, "diagnose", no_space)
    train(Digits(), [quick(), At(30, poison)], tmp_path)
    written = read_report(tmp_path / "spike" / "report.json")
    assert [d["part"] for d in written["disabled"]] == ["diagnosis"]
    assert len(written["episodes"]) == 1
    assert written["causes"] == []


def test_a_device_that_can_no_longer_be_read_costs_only_the_last_rows(tmp_path, monkeypatch):
    def dead(self):
        msg = "CUDA error: device-side assert triggered"
        raise RuntimeError(msg)

    monkeypatch.setattr(Recorder, "flush", dead)
    with pytest.raises(ZeroDivisionError):
        train(Digits(), [quick(), At(7, fail)], tmp_path)
    written = read_report(tmp_path / "spike" / "report.json")
    assert [(d["part"], d["reason"][:24]) for d in written["disabled"]] == [("recorder", "RuntimeError: CUDA error")]
    assert written["run"]["batches"] == 7


def test_a_report_that_breaks_altogether_does_not_hide_the_users_exception(tmp_path, monkeypatch):
    monkeypatch.setattr(model.Report, "__init__", no_space)
    with pytest.raises(ZeroDivisionError), pytest.warns(UserWarning, match="RootCauseReport broke"):
        train(Digits(), [quick(), At(7, fail)], tmp_path)


def test_an_output_that_nobody_reads_does_not_end_the_program(tmp_path, monkeypatch):
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as closed:
        monkeypatch.setattr(sys, "stdout", closed)
        with pytest.warns(UserWarning, match="could not be printed"):
            train(Digits(), [quick()], tmp_path, max_epochs=1)
    assert (tmp_path / "spike" / "report.json").exists()


def test_what_is_not_asked_for_is_not_made(tmp_path, capsys):
    train(Digits(), [RootCauseReport(formats=["json"])], tmp_path, max_epochs=1)
    assert [p.name for p in (tmp_path / "spike").iterdir()] == ["report.json"]
    assert "lightning-spike" not in capsys.readouterr().out


def test_what_cannot_be_written_is_warned_of_where_nothing_is_printed(tmp_path, monkeypatch):
    monkeypatch.setattr(json_file, "write_whole", no_space)
    with pytest.warns(UserWarning, match="json could not be written"):
        train(Digits(), [RootCauseReport(formats=["json"])], tmp_path, max_epochs=1)


def test_it_prints_above_a_running_rich_bar(tmp_path, capsys):
    from lightning.pytorch.callbacks import RichProgressBar  # noqa: PLC0415 - only here

    train(Digits(), [quick(), RichProgressBar()], tmp_path, max_epochs=1, enable_progress_bar=True)
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith("lightning-spike: no trouble")] != []


@pytest.mark.parametrize(
    "options",
    [{"formats": []}, {"formats": "json"}, {"formats": ["pdf"]}, {"dirpath": __file__}],
    ids=["none", "a string", "unknown", "a file"],
)
def test_wrong_arguments_are_refused_at_construction(options):
    with pytest.raises(ConfigurationError, match=rf"RootCauseReport\({next(iter(options))}\): expected"):
        RootCauseReport(**options)


SCRIPT = textwrap.dedent("""
    import os, signal, sys, time
    from pathlib import Path
    import torch
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job is started with it ignored
    from lightning.pytorch import Callback
    from training_tasks import Digits, train
    how, ours, root = sys.argv[1], sys.argv[2] == "with", Path(sys.argv[3])

    class End(Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            if batch_idx == 9 and how == "exception":
                raise ZeroDivisionError("the user's own")
            if batch_idx == 9 and how == "interrupt":
                print("READY", flush=True)
            if batch_idx >= 9 and how == "interrupt":
                time.sleep(0.05)

    callbacks = [End()]
    if ours:
        from lightning_spike.callbacks.root_cause_report import RootCauseReport
        callbacks = [RootCauseReport(formats=["terminal", "json"]), *callbacks]
        if how == "killed":
            os.fsync = lambda handle: os.kill(os.getpid(), signal.SIGKILL)
    train(Digits(), callbacks, root, max_epochs=200 if how == "interrupt" else 1)
    print("AFTER FIT")
""")


def started(how, ours, root):
    root.mkdir(parents=True, exist_ok=True)
    here = Path(__file__).parent.parent
    environment = os.environ | {"PYTHONPATH": f"{here}{os.pathsep}{here.parent}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-c", SCRIPT, how, ours, str(root)]
    return subprocess.Popen(  # noqa: S603
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """Four trainings in processes of their own, by how and whether with us: exit code, output, errors, folder."""
    wanted = [
        ("exception", "with"),
        ("interrupt", "with"),
        ("interrupt", "without"),
        ("killed", "with"),
    ]
    root = tmp_path_factory.mktemp("ended")
    write_old = root / "killed-with" / "spike" / "report.json"
    write_old.parent.mkdir(parents=True)
    write_old.write_text('{"old": "report"}')
    running = {key: started(*key, root / "-".join(key)) for key in wanted}
    results = {}
    for key, process in running.items():
        if key[0] == "interrupt":
            first = process.stdout.readline()
            while first and first != "READY\n":
                first = process.stdout.readline()
            process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=300)
        results[key] = process.returncode, out, err, root / "-".join(key) / "spike"
    return results


@pytest.mark.slow
def test_an_exception_ends_the_program_with_its_own_traceback_and_exit_code(ended):
    code, out, err, folder = ended["exception", "with"]
    assert code == 1
    assert err.count("Traceback") == 1
    assert err.splitlines()[-1] == "ZeroDivisionError: the user's own"
    assert "lightning_spike" not in err
    assert "lightning-spike" in out
    assert read_report(folder / "report.json")["run"]["error"] == "ZeroDivisionError: the user's own"


@pytest.mark.slow
def test_ctrl_c_ends_the_program_as_it_would_without_us(ended):
    code, out, err, folder = ended["interrupt", "with"]
    plain_code, _, plain_err, _ = ended["interrupt", "without"]
    assert code == plain_code
    assert err.splitlines()[-1:] == plain_err.splitlines()[-1:]
    assert "AFTER FIT" not in out
    assert "interrupted" in out
    run = read_report(folder / "report.json")["run"]
    assert (run["status"], run["error"]) == ("interrupted", None)


@pytest.mark.slow
def test_a_process_killed_while_it_writes_leaves_the_old_report_whole(ended):
    code, out, _, folder = ended["killed", "with"]
    assert code == -signal.SIGKILL
    assert "AFTER FIT" not in out
    assert (folder / "report.json").read_text() == '{"old": "report"}'

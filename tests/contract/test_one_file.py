"""A cause and its fault are one file each.

From a package of their own they reach ranking, report, table and benchmark.
"""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from other_package import CAUSE

ROOT = Path(__file__).parents[2]

FAULT = """
    from lightning_spike.testing import ExtremeValues

    class MoonRays(ExtremeValues):
        cause = "full_moon"
"""
SCRIPT = """
    import runpy, sys
    from pathlib import Path

    import torch
    from rich.console import Console

    from lightning_spike.records import RunStatus
    from lightning_spike.report.model import build_report
    from lightning_spike.report.terminal import TerminalReport
    from lightning_spike.testing import faults_for

    root, folder = map(Path, sys.argv[1:])
    torch.set_num_threads(1)
    table = runpy.run_path(str(root / "docs" / "make_tables.py"))["cause_table"]()
    assert "| environment | `full_moon` | the moon shines on the loss |" in table.splitlines()
    assert [kind.__name__ for kind in faults_for("full_moon")] == ["MoonRays"]

    sys.path.insert(0, str(root / "benchmarks"))
    from labelled_runs import fitting, judging, runs

    assert "full_moon" in fitting.CAUSES
    cells = [cell for cell in runs.all_cells([1], ["table"]) if cell.causes == ("full_moon",)]
    assert [(cell.name, cell.strength) for cell in cells] == [("MoonRays", "mild"), ("MoonRays", "strong")]
    assert runs.run(cells[1], folder) is None
    found = runs.recorded(folder, cells[1])
    judged = judging.judge(found, None)
    assert (judged.named, judged.first_fix) == ("full_moon", "Wait 14 days."), judged.ranked
    assert fitting.example(found) is not None

    report = build_report(found.store, status=RunStatus.FINISHED, seconds=1.0)
    Console(width=120).print(TerminalReport(report=report))
"""


@pytest.mark.slow
def test_a_cause_and_its_fault_from_another_package_need_no_other_edit(tmp_path):
    (tmp_path / "moon_cause.py").write_text(textwrap.dedent(CAUSE))
    (tmp_path / "moon_fault.py").write_text(textwrap.dedent(FAULT))
    info = tmp_path / "moon-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: moon\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[lightning_spike.causes]\nmoon = moon_cause\n[lightning_spike.faults]\nmoon = moon_fault\n"
    )
    (tmp_path / "script.py").write_text(textwrap.dedent(SCRIPT))
    paths = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(  # noqa: S603 - the script above
        [sys.executable, "-W", "ignore", str(tmp_path / "script.py"), str(ROOT), str(tmp_path)],
        env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for words in ("full_moon", "It was the moon.", "The moon was full.", "→ Wait 14 days."):
        assert words in done.stdout

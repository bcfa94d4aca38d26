import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_spike.files import whole_file, whole_folder, write_whole


class TroubleError(Exception):
    pass


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_text_and_bytes_arrive_as_they_are_in_a_folder_that_is_made(tmp_path):
    write_whole(tmp_path / "a" / "b" / "text", "ä\r\n")
    write_whole(tmp_path / "a" / "b" / "bytes", b"\x00\xff")
    assert (tmp_path / "a" / "b" / "text").read_bytes() == "ä\r\n".encode()
    assert (tmp_path / "a" / "b" / "bytes").read_bytes() == b"\x00\xff"
    assert names(tmp_path / "a" / "b") == ["bytes", "text"]


def test_a_file_is_not_there_before_its_end_and_whole_after_it(tmp_path):
    path = tmp_path / "report"
    write_whole(path, "old")
    with whole_file(path) as handle:
        handle.write(b"new, half")
        handle.flush()
        assert path.read_text() == "old"
    assert path.read_text() == "new, half"


@pytest.mark.parametrize("trouble", [TroubleError, KeyboardInterrupt, SystemExit])
def test_what_raises_half_way_leaves_what_was_there(tmp_path, trouble):
    path = tmp_path / "report"
    write_whole(path, "old")
    with pytest.raises(trouble), whole_file(path) as handle:  # noqa: PT012 - the block is what is tested
        handle.write(b"half")
        raise trouble
    assert path.read_text() == "old"
    assert names(tmp_path) == ["report"]


def test_a_folder_in_the_way_raises_and_leaves_nothing_behind(tmp_path):
    (tmp_path / "report" / "inside").mkdir(parents=True)
    with pytest.raises(OSError, match="report"):
        write_whole(tmp_path / "report", "new")
    assert names(tmp_path) == ["report"]


def test_a_file_where_the_folder_should_be_raises(tmp_path):
    write_whole(tmp_path / "spike", "a file")
    with pytest.raises(OSError, match="spike"):
        write_whole(tmp_path / "spike" / "report.json", "{}")
    assert (tmp_path / "spike").read_text() == "a file"


def test_a_new_file_has_the_permissions_that_the_umask_gives(tmp_path):
    before = os.umask(0o027)
    try:
        write_whole(tmp_path / "report", "x")
    finally:
        os.umask(before)
    assert (tmp_path / "report").stat().st_mode & 0o777 == 0o640


def test_a_folder_replaces_the_old_one_as_a_whole(tmp_path):
    path = tmp_path / "signals"
    for content in ("first", "second"):
        with whole_folder(path) as folder:
            (folder / content).write_text(content)
            assert not (path / content).exists()
    assert names(path) == ["second"]
    assert names(tmp_path) == ["signals"]


def test_a_folder_that_raises_half_way_leaves_the_old_one(tmp_path):
    path = tmp_path / "signals"
    with whole_folder(path) as folder:
        (folder / "old").write_text("old")
    with pytest.raises(TroubleError), whole_folder(path) as folder:  # noqa: PT012 - the block is what is tested
        (folder / "new").write_text("new")
        raise TroubleError
    assert names(path) == ["old"]
    assert names(tmp_path) == ["signals"]


def test_a_plain_file_is_never_replaced_by_a_folder(tmp_path):
    write_whole(tmp_path / "signals", "mine")
    with pytest.raises(OSError, match="signals"), whole_folder(tmp_path / "signals"):
        pass
    assert names(tmp_path) == ["signals"]
    assert (tmp_path / "signals").read_text() == "mine"


def test_a_process_killed_in_the_middle_leaves_the_old_file_whole(tmp_path):
    path = tmp_path / "report"
    write_whole(path, "old")
    code = f"""
import os, signal
from pathlib import Path
from lightning_spike.files import whole_file
with whole_file(Path({str(path)!r})) as handle:
    handle.write(b"half")
    handle.flush()
    os.kill(os.getpid(), signal.SIGKILL)
"""
    # The module is loaded without its package, which would load torch and Lightning first.
    killed = subprocess.run([sys.executable, "-c", _without_package(code)], check=False, timeout=60)  # noqa: S603
    assert killed.returncode == -signal.SIGKILL
    assert path.read_text() == "old"
    assert [n for n in names(tmp_path) if not n.startswith(".")] == ["report"]


def test_no_random_number_is_drawn(tmp_path):
    before = random.getstate()
    write_whole(tmp_path / "report", "x")
    assert random.getstate() == before


def _without_package(code: str) -> str:
    source = Path(__file__).parent.parent / "lightning_spike" / "files.py"
    load = f"""
import importlib.util, sys
spec = importlib.util.spec_from_file_location("lightning_spike.files", {str(source)!r})
module = importlib.util.module_from_spec(spec)
sys.modules["lightning_spike.files"] = module
spec.loader.exec_module(module)
"""
    return load + code.replace("from lightning_spike.files import whole_file", "whole_file = module.whole_file")

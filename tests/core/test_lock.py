"""One process at a time writes to a folder; the lock is free again however its holder ends."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from qlora_core.errors import RunError
from qlora_core.lock import check_free, locked

HOLD = """
import sys
from pathlib import Path
from qlora_core.lock import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def holder(folder: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_a_second_process_is_refused_and_told_who_holds_the_folder(tmp_path: Path) -> None:
    process = holder(tmp_path)
    message = rf"{tmp_path} is being written to by process {process.pid} on .*; wait until it is done, or name another folder"
    with pytest.raises(RunError, match=message), locked(tmp_path):
        pass
    with pytest.raises(RunError, match=message):
        check_free(tmp_path)
    process.communicate("")
    with locked(tmp_path):
        assert (tmp_path / ".lock").is_file()
    assert list(tmp_path.iterdir()) == []


def test_a_killed_process_leaves_no_lock_behind_that_holds(tmp_path: Path) -> None:
    process = holder(tmp_path)
    process.kill()
    process.wait()
    left = (tmp_path / ".lock").read_bytes()
    check_free(tmp_path)
    assert (tmp_path / ".lock").read_bytes() == left
    with locked(tmp_path):
        pass


def test_a_lock_is_given_back_after_an_error_and_when_the_folder_is_gone(tmp_path: Path) -> None:
    inner = tmp_path / "run"
    inner.mkdir()
    with pytest.raises(ZeroDivisionError), locked(inner):
        raise ZeroDivisionError
    with locked(inner):
        (inner / ".lock").unlink()
        inner.rmdir()
    check_free(inner)

"""The run directory: whole files or none, checkpoints in order, and what a full disk becomes."""

from __future__ import annotations

import errno
import json
import os
import signal
from pathlib import Path

import pytest

from qlora_core.config import RunConfig
from qlora_core.errors import RunError
from qlora_core.run import Run


@pytest.fixture
def run(tmp_path: Path) -> Run:
    config = RunConfig.parse({"model": "some/model", "dataset": "text", "output": str(tmp_path / "run")})
    return Run(tmp_path / "run", config)


@pytest.fixture
def created(run: Run) -> Run:
    run.create()
    return run


def contents(folder: Path) -> dict[str, bytes]:
    """Return what is in *folder*, the seals of checkpoints aside."""
    paths = [path for path in sorted(folder.rglob("*")) if path.name != "manifest.json"]
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else b"" for p in paths}


def save_checkpoint(run: Run, step: int) -> Path:
    with run.writing_checkpoint(step) as folder:
        (folder / "state").write_text(str(step))
    return run.checkpoint(step)


def save_half(run: Run, step: int, error: BaseException) -> None:
    with run.writing_checkpoint(step) as folder:
        (folder / "state").write_text("half")
        raise error


# The folder


def test_creating_a_run_makes_the_folder_and_its_parents(run: Run) -> None:
    deep = Run(run.folder / "a" / "b", run.config)
    deep.create()
    assert contents(deep.folder) == {"checkpoints": b""}


def test_creating_a_run_removes_what_an_earlier_run_left_and_nothing_else(created: Run) -> None:
    for name in ("config.yaml", "provenance.json", "metrics.jsonl", "crash.txt", "notes.txt"):
        (created.folder / name).write_text(name)
    created.write_adapter(lambda folder: (folder / "weights").write_text("w"))
    save_checkpoint(created, 3)
    created.create()
    assert contents(created.folder) == {"checkpoints": b"", "notes.txt": b"notes.txt"}


def test_a_new_or_an_empty_folder_is_accepted(run: Run) -> None:
    run.check_folder(overwrite=False, resume=False)
    assert not run.folder.exists()
    run.folder.mkdir()
    run.check_folder(overwrite=False, resume=False)
    assert contents(run.folder) == {}


@pytest.mark.parametrize("name", ["config.yaml", "provenance.json", "metrics.jsonl", "adapter/", "checkpoints/"])
def test_a_folder_that_holds_anything_of_a_run_is_refused_with_both_remedies(run: Run, name: str) -> None:
    run.folder.mkdir()
    path = run.folder / name
    path.mkdir() if name.endswith("/") else path.write_text("precious")
    before = contents(run.folder)
    with pytest.raises(RunError) as caught:
        run.check_folder(overwrite=False, resume=False)
    assert str(caught.value) == (
        f"output: {run.folder} already holds a run; continue it with --resume, replace it with --overwrite, "
        "or name another folder"
    )
    assert contents(run.folder) == before
    run.check_folder(overwrite=True, resume=False)


def test_a_folder_without_a_run_can_not_be_resumed(run: Run) -> None:
    with pytest.raises(RunError) as caught:
        run.check_folder(overwrite=False, resume=True)
    assert str(caught.value) == f"output: {run.folder} holds no run to resume; leave out --resume"


def test_a_file_in_place_of_the_folder_or_above_it_is_refused(tmp_path: Path, run: Run) -> None:
    file = tmp_path / "file"
    file.write_text("precious")
    for folder in (file, file / "below"):
        with pytest.raises(RunError) as caught:
            Run(folder, run.config).check_folder(overwrite=True, resume=False)
        assert str(caught.value) == f"output: {file} is a file; name a folder"
    assert file.read_text() == "precious"


@pytest.mark.skipif(os.getuid() == 0, reason="root may write anywhere")
def test_a_folder_that_can_not_be_written_to_is_refused(tmp_path: Path, run: Run) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(RunError) as caught:
            run.check_folder(overwrite=False, resume=False)
    finally:
        tmp_path.chmod(0o700)
    assert str(caught.value) == f"output: {tmp_path} is not writable; name another folder"


def test_opening_a_finished_run_reads_its_configuration(created: Run) -> None:
    created.write("config.yaml", created.config.to_yaml())
    created.write_adapter(lambda folder: (folder / "weights").write_text("w"))
    opened = Run.open(created.folder)
    assert (opened.folder, opened.config) == (created.folder, created.config)


def test_opening_what_is_no_run_says_what_is_missing(created: Run) -> None:
    with pytest.raises(RunError) as caught:
        Run.open(created.folder)
    assert str(caught.value) == (f"{created.folder}: no run, config.yaml is missing; name a folder that `qlora train` wrote")


def test_opening_an_unfinished_run_says_how_to_finish_it(created: Run) -> None:
    created.write("config.yaml", created.config.to_yaml())
    with pytest.raises(RunError) as caught:
        Run.open(created.folder)
    assert str(caught.value) == (
        f"{created.folder}: the run is not finished, adapter/ is missing; finish it with `qlora train --resume`"
    )


# Whole or not at all


def test_a_file_is_written_whole_and_leaves_nothing_beside_it(created: Run) -> None:
    created.write("config.yaml", "model: é\n")
    created.write("config.yaml", "model: ü\n")
    assert contents(created.folder) == {"checkpoints": b"", "config.yaml": "model: ü\n".encode()}


def test_a_file_that_can_not_be_written_leaves_the_old_one(created: Run) -> None:
    created.write("config.yaml", "old")
    with pytest.raises(UnicodeEncodeError):
        created.write("config.yaml", "new \ud800")
    assert (created.folder / "config.yaml").read_text() == "old"


def test_a_checkpoint_counts_only_once_it_is_complete(created: Run) -> None:
    with created.writing_checkpoint(5) as folder:
        (folder / "state").write_text("half")
        assert created.checkpoints() == []
    assert created.checkpoints() == [created.checkpoint(5)]
    assert contents(created.checkpoint(5)) == {"state": b"half"}


@pytest.mark.parametrize("error", [RuntimeError("no luck"), KeyboardInterrupt()])
def test_a_checkpoint_that_fails_half_way_leaves_nothing(created: Run, error: BaseException) -> None:
    with pytest.raises(type(error)):
        save_half(created, 5, error)
    assert contents(created.folder) == {"checkpoints": b""}


def test_a_checkpoint_that_fails_leaves_the_old_one_of_that_step(created: Run) -> None:
    save_checkpoint(created, 5)
    with pytest.raises(RuntimeError):
        save_half(created, 5, RuntimeError())
    assert contents(created.checkpoint(5)) == {"state": b"5"}


def test_what_a_killed_process_left_is_no_checkpoint_and_is_cleared_away(created: Run) -> None:
    left = created.folder / "checkpoints" / ".step-5.partial"
    left.mkdir()
    (left / "junk").write_text("junk")
    assert created.checkpoints() == []
    save_checkpoint(created, 5)
    assert contents(created.folder / "checkpoints") == {"step-5": b"", "step-5/state": b"5"}


def test_the_adapter_is_replaced_whole(created: Run) -> None:
    created.write_adapter(lambda folder: (folder / "old").write_text("old"))
    created.write_adapter(lambda folder: (folder / "new").write_text("new"))
    assert contents(created.adapter) == {"new": b"new"}

    def fail(folder: Path) -> None:
        (folder / "half").write_text("half")
        raise RuntimeError("no luck")

    with pytest.raises(RuntimeError, match="no luck"):
        created.write_adapter(fail)
    assert contents(created.adapter) == {"new": b"new"}


# Checkpoints


def test_checkpoints_come_in_the_order_of_their_steps_not_of_their_letters(created: Run) -> None:
    for step in (100, 9, 20):
        save_checkpoint(created, step)
    (created.folder / "checkpoints" / "step-x").mkdir()
    (created.folder / "checkpoints" / "step-7-old").mkdir()
    assert [path.name for path in created.checkpoints()] == ["step-9", "step-20", "step-100"]


@pytest.mark.parametrize(
    ("steps", "limit", "best", "left"),
    [
        ([1, 2, 3, 4], None, None, [1, 2, 3, 4]),
        ([1, 2, 3, 4], 2, None, [3, 4]),
        ([1, 2, 3, 4], 1, None, [4]),
        ([1, 2, 3, 4], 9, None, [1, 2, 3, 4]),
        ([1, 2, 3, 4], 2, 1, [1, 4]),
        ([1, 2, 3, 4], 3, 1, [1, 3, 4]),
        ([1, 2, 3, 4], 2, 4, [3, 4]),
        ([1, 2, 3, 4], 1, 2, [2, 4]),
        ([1, 2, 3, 4], 1, 4, [4]),
        ([9, 10, 100], 2, None, [10, 100]),
        ([4], 1, 4, [4]),
        ([], 1, None, []),
        ([4, 6], 2, 5, [4, 6]),
        ([2, 4, 6], 2, 5, [4, 6]),
    ],
)
def test_rotation_deletes_the_oldest_but_never_the_newest_nor_the_best(
    created: Run, steps: list[int], limit: int | None, best: int | None, left: list[int]
) -> None:
    for step in steps:
        save_checkpoint(created, step)
    created.rotate_checkpoints(limit, keep=best)
    assert created.checkpoints() == [created.checkpoint(step) for step in left]


# Metrics


def test_metrics_are_one_json_object_a_line_known_keys_first(created: Run) -> None:
    created.append_metrics({"extra": 1, "grad_norm": 0.5, "loss": 2.0, "step": 1})
    created.append_metrics({"eval_loss": 1.5, "step": 1})
    assert created.metrics.read_text() == (
        '{"step": 1, "loss": 2.0, "grad_norm": 0.5, "extra": 1}\n{"step": 1, "eval_loss": 1.5}\n'
    )
    assert created.read_metrics() == [
        {"step": 1, "loss": 2.0, "grad_norm": 0.5, "extra": 1},
        {"step": 1, "eval_loss": 1.5},
    ]


def test_a_run_without_metrics_has_none(created: Run) -> None:
    assert created.read_metrics() == []


def test_truncating_drops_the_lines_after_a_step_and_keeps_those_of_it(created: Run) -> None:
    for step in (1, 2, 2, 3, 10):
        created.append_metrics({"step": step})
    created.truncate_metrics(2)
    assert created.metrics.read_text() == '{"step": 1}\n{"step": 2}\n{"step": 2}\n'


def test_a_last_line_that_a_full_disk_cut_short_does_not_stop_a_resumed_run(created: Run) -> None:
    created.append_metrics({"step": 1, "loss": 2.0})
    with created.metrics.open("a") as file:
        file.write('{"step": 2, "lo')
    created.truncate_metrics(1)
    assert created.metrics.read_text() == '{"step": 1, "loss": 2.0}\n'


# Faults of the disk


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_says_what_was_saved_and_how_to_go_on(created: Run, code: int) -> None:
    reason = os.strerror(code).lower()
    with pytest.raises(RunError) as caught, created.storing():
        raise OSError(code, os.strerror(code))
    assert str(caught.value) == (
        f"output: {created.folder} can't be written: {reason}; nothing was saved yet; free some space and resume with --resume"
    )
    last = save_checkpoint(created, 7)
    with pytest.raises(RunError) as caught, created.storing():
        raise OSError(code, os.strerror(code))
    assert f"; the last checkpoint is {last}; " in str(caught.value)
    assert isinstance(caught.value.__cause__, OSError)


@pytest.mark.parametrize("code", [errno.EACCES, errno.EPERM, errno.EROFS])
def test_a_missing_permission_says_so(created: Run, code: int) -> None:
    with pytest.raises(RunError) as caught, created.storing():
        raise OSError(code, os.strerror(code))
    assert os.strerror(code).lower() in str(caught.value)
    assert str(caught.value).endswith("; mend the permissions, or name another folder")


def test_a_full_disk_that_safetensors_reports_is_understood(created: Run) -> None:
    with pytest.raises(RunError) as caught, created.storing():
        raise RuntimeError(f"Error while serializing: I/O error: No space left on device (os error {errno.ENOSPC})")
    assert "no space left on device" in str(caught.value)


@pytest.mark.parametrize("error", [OSError(errno.EIO, "input/output error"), ValueError("other"), RuntimeError("os error 2")])
def test_any_other_error_stays_what_it_is(created: Run, error: Exception) -> None:
    with pytest.raises(type(error)) as caught, created.storing():
        raise error
    assert caught.value is error


def test_a_disk_that_fills_up_within_a_checkpoint_leaves_the_earlier_one(created: Run) -> None:
    save_checkpoint(created, 1)
    with pytest.raises(RunError) as caught:
        save_half(created, 2, OSError(errno.ENOSPC, "No space left on device"))
    assert f"the last checkpoint is {created.checkpoint(1)}" in str(caught.value)
    assert contents(created.folder / "checkpoints") == {"step-1": b"", "step-1/state": b"1"}


def test_a_limit_on_the_size_of_a_file_is_met_like_a_full_disk(created: Run) -> None:
    resource = pytest.importorskip("resource")
    created.append_metrics({"step": 1})
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, before[1]))
    try:
        with pytest.raises(RunError) as caught:
            created.write("config.yaml", "x" * 1000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert "can't be written: file too large" in str(caught.value)
    assert not (created.folder / "config.yaml").exists()
    assert [json.loads(line) for line in created.metrics.read_text().splitlines()] == [{"step": 1}]

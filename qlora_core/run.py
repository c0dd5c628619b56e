"""The run directory: what a run writes, where, and how it is found again. Imports no torch."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import date, datetime
from pathlib import Path
from typing import Any

from qlora_core.config import RunConfig
from qlora_core.errors import RunError
from qlora_core.lock import check_free, locked
from qlora_core.seal import fault, flush, seal

__all__ = ["Run"]

logger = logging.getLogger("qlora_core")

# The order of the keys in a line of metrics.jsonl; further ones follow.
KEYS = ("step", "epoch", "loss", "learning_rate", "grad_norm", "tokens", "tokens_per_second", "peak_memory_bytes")
FILES, FOLDERS = ("config.yaml", "provenance.json", "metrics.jsonl"), ("adapter", "checkpoints", "exports")  # what a run writes
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@dataclass(frozen=True)
class Run:
    """One run and its folder: config.yaml, provenance.json, metrics.jsonl, adapter/, checkpoints/step-N/."""

    folder: Path
    config: RunConfig
    quiet: bool = False
    """Set where nobody wants to see progress."""

    @classmethod
    def open(cls, folder: str | Path) -> Run:
        """Return the finished run in *folder*; raise RunError where there is none."""
        folder = Path(folder)
        if not (folder / "config.yaml").is_file():
            raise RunError(f"{folder}: no run, config.yaml is missing; name a folder that `qlora train` wrote")
        if not (folder / "adapter").is_dir():
            raise RunError(f"{folder}: the run is not finished, adapter/ is missing; finish it with `qlora train --resume`")
        return cls(folder, RunConfig.read(folder / "config.yaml"))

    @staticmethod
    def holds_a_run(folder: Path) -> bool:
        """Return whether *folder* holds anything that a run writes, and that a new one would replace."""
        return any((folder / name).is_file() for name in FILES) or any((folder / name).is_dir() for name in FOLDERS)

    @property
    def adapter(self) -> Path:
        """The folder of the final adapter, tokenizer and chat template."""
        return self.folder / "adapter"

    @property
    def metrics(self) -> Path:
        """The file with a JSON object per logged step."""
        return self.folder / "metrics.jsonl"

    def check_folder(self, *, overwrite: bool, resume: bool) -> None:
        """Raise RunError unless the folder can be written to as asked. Touches nothing."""
        parent = next(p for p in (self.folder, *self.folder.parents) if os.path.exists(p))
        if not parent.is_dir():
            raise RunError(f"output: {parent} is a file; name a folder")
        if not os.access(parent, os.W_OK | os.X_OK):
            raise RunError(f"output: {parent} is not writable; name another folder")
        if self.holds_a_run(self.folder) and not (overwrite or resume):
            raise RunError(
                f"output: {self.folder} already holds a run; continue it with --resume, replace it with --overwrite, "
                "or name another folder"
            )
        if resume and overwrite:
            raise RunError("--resume goes on with a run and --overwrite replaces it; leave one of them out")
        if resume and not self.holds_a_run(self.folder):
            raise RunError(f"output: {self.folder} holds no run to resume; leave out --resume")
        check_free(self.folder)

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Make the folder and let no other process write to it while the block runs; raise RunError where one does."""
        with contextlib.ExitStack() as stack:
            with self.storing():
                self.folder.mkdir(parents=True, exist_ok=True)
                stack.enter_context(locked(self.folder))
                for partial in (*self.folder.glob(".*.partial"), *self.folder.glob("checkpoints/.*.partial")):
                    if partial.is_dir():  # of a process that was killed while it wrote
                        shutil.rmtree(partial)
                    else:
                        partial.unlink()
            yield

    def create(self) -> None:
        """Make the folder, without what an earlier run left in it."""
        with self.storing():
            for name in (*FILES, "crash.txt"):
                (self.folder / name).unlink(missing_ok=True)
            for name in FOLDERS:
                shutil.rmtree(self.folder / name, ignore_errors=True)
            (self.folder / "checkpoints").mkdir(parents=True)

    def write(self, name: str, text: str) -> None:
        """Write *text* to the file *name*, whole or not at all."""
        with self.storing():
            partial = self.folder / f".{name}.partial"
            try:
                partial.write_text(text, encoding="utf-8")
                partial.replace(self.folder / name)
            finally:
                partial.unlink(missing_ok=True)

    def write_adapter(self, save: Any) -> None:
        """Let *save*, a function of a folder, write adapter/, whole or not at all."""
        with self._whole(self.adapter) as folder:
            save(folder)

    def export(self, name: str, save: Any, folder: Path | None = None) -> Path:
        """Let *save*, a function of a folder, write *folder*, by default exports/*name*, whole or not at all; return it."""
        folder = self.folder / "exports" / name if folder is None else folder
        with self._whole(folder) as partial:
            save(partial)
        return folder

    # Metrics

    def append_metrics(self, line: dict[str, Any]) -> None:
        """Add *line* to metrics.jsonl, known keys first. JSON has no NaN and no infinity; they become null."""
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in line.items()}
        ordered = {key: finite[key] for key in (*KEYS, *line) if key in line}
        with self.storing(), self.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(ordered) + "\n")

    def read_metrics(self) -> list[dict[str, Any]]:
        """Return the lines of metrics.jsonl."""
        if not self.metrics.is_file():
            return []
        lines = self.metrics.read_text(encoding="utf-8").splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.endswith("\n")]  # a full disk may have cut the last one short

    def day(self) -> date | None:
        """Return the day on which the run began, here; None where that is not recorded."""
        started = self.record().get("started")
        return datetime.fromisoformat(started).astimezone().date() if started else None

    def record(self) -> dict[str, Any]:
        """Return what provenance.json holds, nothing where it is missing."""
        path = self.folder / "provenance.json"
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        return record

    def go_back(self, step: int) -> None:
        """Drop what came after *step*, metrics and checkpoints: a resumed run writes them again."""
        for path in self.checkpoints():
            if int(path.name.removeprefix("step-")) > step:
                shutil.rmtree(path)
        self.truncate_metrics(step)

    def truncate_metrics(self, step: int) -> None:
        """Drop the lines after *step*."""
        self._keep_metrics(lambda line: line["step"] <= step)

    def drop_evaluation(self, step: int) -> None:
        """Drop the lines of an evaluation after *step*."""
        self._keep_metrics(lambda line: line["step"] != step or "eval_loss" not in line)

    def _keep_metrics(self, wanted: Callable[[dict[str, Any]], bool]) -> None:
        self.write("metrics.jsonl", "".join(json.dumps(line) + "\n" for line in self.read_metrics() if wanted(line)))

    # Checkpoints

    def checkpoint(self, step: int) -> Path:
        """Return the folder of the checkpoint after *step*."""
        return self.folder / "checkpoints" / f"step-{step}"

    def checkpoints(self) -> list[Path]:
        """Return the folders of all complete checkpoints, oldest first."""
        found = (self.folder / "checkpoints").glob("step-*")
        numbered = [(int(m[1]), path) for path in found if (m := re.fullmatch(r"step-(\d+)", path.name))]
        return [path for _, path in sorted(numbered)]

    def saved(self) -> str:
        """Return in words what there is to go on from."""
        saved = self.checkpoints()
        return f"the last checkpoint is {saved[-1]}" if saved else "nothing was saved yet"

    @contextlib.contextmanager
    def writing_checkpoint(self, step: int) -> Iterator[Path]:
        """Give a folder to write the checkpoint after *step* in; it counts only once the block has ended well.

        By then it is sealed and flushed: see `seal`.
        """
        with self.storing():
            (self.folder / "checkpoints").mkdir(exist_ok=True)  # not the folder above it, which may have been moved
        with self._whole(self.checkpoint(step)) as folder:
            yield folder
            seal(folder)
        flush(self.checkpoint(step).parent)

    def rotate_checkpoints(self, limit: int | None, *, keep: int | None) -> None:
        """Delete the oldest checkpoints beyond *limit*; never the newest, nor the one after step *keep*.

        Nothing is deleted where the newest is damaged: then an older one may be the last that is good.
        """
        saved = self.checkpoints()
        if limit is None or len(saved) <= limit:
            return
        if (what := fault(saved[-1])) is not None:
            logger.warning("%s is damaged (%s); older checkpoints are kept", saved[-1], what)
            return
        others = [path for path in saved[:-1] if keep is None or path != self.checkpoint(keep)]
        for path in others[: max(0, len(saved) - limit)]:
            shutil.rmtree(path)

    # Faults of the disk

    @contextlib.contextmanager
    def storing(self) -> Iterator[None]:
        """Turn a full disk or a missing permission into a RunError that says what is still there."""
        try:
            yield
        except OSError as error:
            if not self.folder.is_dir():
                raise RunError(
                    f"output: {self.folder} is gone, removed or moved while the run wrote to it; move it back and resume, "
                    "or start anew"
                ) from error
            if error.errno not in FULL | {errno.EACCES, errno.EPERM, errno.EROFS}:
                raise
            raise RunError(self._storage_message(str(error.strerror or error).lower(), error.errno in FULL)) from error
        except Exception as error:
            code = re.search(r"os error (\d+)", str(error))  # how safetensors reports what the system said
            if code is None or int(code[1]) not in FULL:
                raise
            raise RunError(self._storage_message(os.strerror(int(code[1])).lower(), True)) from error

    def _storage_message(self, what: str, full: bool) -> str:
        remedy = "free some space and resume with --resume" if full else "mend the permissions, or name another folder"
        return f"output: {self.folder} can't be written: {what}; {self.saved()}; {remedy}"

    @contextlib.contextmanager
    def _whole(self, target: Path) -> Iterator[Path]:
        """Give a temporary folder that becomes *target* in one step once the block has ended well."""
        partial = target.with_name(f".{target.name}.partial")
        with self.storing():
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            try:
                yield partial
            except BaseException:
                shutil.rmtree(partial, ignore_errors=True)
                raise
            if target.exists():
                shutil.rmtree(target)
            partial.replace(target)

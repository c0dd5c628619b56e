"""What every exporter must keep."""

from __future__ import annotations

import functools
import hashlib
import tempfile
from pathlib import Path

from qlora_core.parts import Parts
from qlora_core.pipeline import finetune
from qlora_core.saved import SavedRun
from qlora_core.testing.conformance import Conformance, check_no_pickle
from qlora_core.testing.tiny import LowRank, Plain, Words, tiny_config

__all__ = ["ExporterConformance"]


class ExporterConformance(Conformance):
    """The checks of an exporter, on a finished run of three steps."""

    kind = "exporter"

    def test_it_writes_a_finished_run(self) -> None:
        """it writes at least one file, none of them a pickle, and leaves the run as it was"""
        exporter, saved = self.usable(), _finished_run()
        exporter.check(saved.run.config, Parts(saved.quantizer, saved.adapter, (), exporters=(exporter,)))
        before = _digests(saved.run.folder)
        with tempfile.TemporaryDirectory() as folder:
            exporter.export(saved, Path(folder))
            assert any(path.is_file() for path in Path(folder).rglob("*")), "it wrote no file"
            check_no_pickle(Path(folder))
        assert _digests(saved.run.folder) == before, "it changed the run's own files"

    def test_it_writes_the_same_again(self) -> None:
        """exported twice, the same run gives the same files"""
        exporter, saved, written = self.usable(), _finished_run(), []
        for _ in range(2):
            with tempfile.TemporaryDirectory() as folder:
                exporter.export(saved, Path(folder))
                written.append(_digests(Path(folder)))
        differ = sorted(name for name in written[0].keys() | written[1].keys() if written[0].get(name) != written[1].get(name))
        assert not differ, f"{differ[0]} differs between two exports"


@functools.cache
def _finished_run() -> SavedRun:
    holder = tempfile.TemporaryDirectory(prefix="qlora-finished-")
    finished = finetune(
        tiny_config(),
        Plain(),
        LowRank(),
        Words(),
        output=Path(holder.name) / "run",
        data={"sequence_length": 16},
        training={"max_steps": 3, "logging_steps": 1, "learning_rate": 0.01},
    )
    _HOLDERS.append(holder)
    return SavedRun(finished.run, Plain(), LowRank())


_HOLDERS: list[tempfile.TemporaryDirectory[str]] = []  # deleted with the process


def _digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}

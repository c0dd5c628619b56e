"""Which configuration may go on with a run, told field by field, and from which checkpoint."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from qlora_core.config import RunConfig
from qlora_core.errors import RunError
from qlora_core.resume import check_made_of, check_same_run, checkpoint_to_resume
from qlora_core.run import Run

BEGAN: dict[str, Any] = {
    "model": {"path": "a/b"},
    "quantizer": {"name": "bitsandbytes:nf4", "double_quant": True},
    "adapter": {"name": "peft:lora", "r": 8, "target_modules": ["q_proj"]},
    "dataset": {"name": "text:text", "path": "corpus.txt"},
    "training": {"seed": 1, "max_steps": 10},
}


def run_with(tmp_path: Path, *overrides: str) -> Run:
    began = RunConfig.parse({**BEGAN, "output": str(tmp_path)})
    (tmp_path / "config.yaml").write_text(began.to_yaml())
    return Run(tmp_path, RunConfig.parse({**BEGAN, "output": str(tmp_path)}, overrides))


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("model.path=c/d", "model.path: was 'a/b', is 'c/d'"),
        ("model.revision=abc", "model.revision: was not set, is 'abc'"),
        ("model.dtype=float32", "model.dtype: was 'auto', is 'float32'"),
        ("quantizer.double_quant=false", "quantizer.double_quant: was True, is False"),
        ("quantizer=bitsandbytes:fp4", "quantizer.name: was 'bitsandbytes:nf4', is 'bitsandbytes:fp4'"),
        ("adapter.r=16", "adapter.r: was 8, is 16"),
        ("adapter.target_modules=[q_proj, v_proj]", "adapter.target_modules: was ['q_proj'], is ['q_proj', 'v_proj']"),
        ("dataset.path=other.txt", "dataset.path: was 'corpus.txt', is 'other.txt'"),
        ("data.template=chatml", "data.template: was not set, is 'chatml'"),
        ("data.packing=false", "data.packing: was True, is False"),
        ("tokens.add=[<x>]", "tokens.add: was [], is ['<x>']"),
        ("training.seed=2", "training.seed: was 1, is 2"),
        ("training.learning_rate=1e-3", "training.learning_rate: was 0.0002, is 0.001"),
        ("training.batch_size=4", "training.batch_size: was 2, is 4"),
        ("training.extra.adam_beta1=0.5", "training.extra.adam_beta1: was not set, is 0.5"),
    ],
)
def test_a_field_that_makes_another_run_is_named_with_both_values(tmp_path: Path, override: str, line: str) -> None:
    run = run_with(tmp_path, override)
    with pytest.raises(RunError) as caught:
        check_same_run(run)
    first, *lines, last = str(caught.value).splitlines()
    assert first == f"output: the run in {tmp_path} began with another configuration:"
    assert lines == [f"  {line}"]
    assert last.startswith(f"resume it with its own, qlora train {tmp_path / 'config.yaml'} --resume, or start anew")


def test_all_fields_are_named_up_to_a_number(tmp_path: Path) -> None:
    run = run_with(tmp_path, "training.seed=2", "adapter.r=4")
    with pytest.raises(RunError, match=r"(?s)adapter.r: was 8, is 4\n.*training.seed: was 1, is 2"):
        check_same_run(run)
    many = ["learning_rate=1", "weight_decay=1", "warmup=1", "batch_size=1", "seed=3", "max_grad_norm=2", "scheduler=cosine"]
    many += ["optimizer=x", "gradient_accumulation=2", "mixed_precision=none"]
    with pytest.raises(RunError, match="and 2 more"):
        check_same_run(run_with(tmp_path, *(f"training.{one}" for one in many)))


@pytest.mark.parametrize(
    "override",
    [
        *("training.max_steps=20", "training.epochs=9", "training.logging_steps=1", "training.save_steps=3"),
        *("training.eval_steps=2", "training.save_total_limit=null", "training.gradient_checkpointing=full"),
        *("training.keep=best", "training.eval_at_start=true", "training.eval_batch_size=9", "callbacks=[]"),
        *("kernels=reference", "model.cache=false", "data.on_problem=skip", "exports=[merged]", "output=elsewhere"),
        *("plugins=[os]", "disable_plugins=[x]", "training.extra.dataloader_num_workers=2"),
    ],
)
def test_what_leaves_the_run_the_same_may_change(tmp_path: Path, override: str) -> None:
    check_same_run(run_with(tmp_path, override))


def test_an_option_that_an_older_version_did_not_know_is_no_difference(tmp_path: Path) -> None:
    check_same_run(run_with(tmp_path, "adapter.invented_later=1"))


RECORD = {
    "model": {"fingerprint": "m", "revision": None},
    "data": {"fingerprint": "d"},
    "packages": {"torch": "2", "numba": "1"},
    "platform": {"device": "cpu", "bf16": True},
}


@pytest.mark.parametrize(
    ("section", "key", "words"),
    [
        ("model", "fingerprint", "model: the files of the model are not those that the run in .* began with"),
        ("data", "fingerprint", "data: the data are not those that the run in .* began with; bring those of then back"),
        ("model", "revision", "model: the model is another revision that the run in .* began with"),
    ],
)
def test_another_content_under_the_same_name_is_refused(tmp_path: Path, section: str, key: str, words: str) -> None:
    run = run_with(tmp_path)
    began = {**RECORD, section: {**RECORD[section], key: "then"}}
    (tmp_path / "provenance.json").write_text(json.dumps(began))
    with pytest.raises(RunError, match=words):
        check_made_of(run, {**RECORD, section: {**RECORD[section], key: "now"}})
    check_made_of(run, began)


def test_other_software_is_a_warning_that_says_which(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = run_with(tmp_path)
    (tmp_path / "provenance.json").write_text(json.dumps(RECORD))
    check_made_of(run, RECORD)
    assert not caplog.records
    with caplog.at_level(logging.WARNING, logger="qlora_core"):
        check_made_of(run, {**RECORD, "packages": {"torch": "3"}, "platform": {"device": "cpu", "bf16": False}})
    said = "numba (was 1, is absent), torch (was 2, is 3), bf16 (was True, is absent)"
    assert caplog.records[-1].getMessage().endswith(said)


def test_a_folder_without_checkpoints_says_so(tmp_path: Path) -> None:
    run = run_with(tmp_path)
    assert checkpoint_to_resume(run, False) is None
    with pytest.raises(RunError, match="has no checkpoint to resume from; start anew with --overwrite"):
        checkpoint_to_resume(run, True)
    with pytest.raises(RunError, match=r"step-4 is no checkpoint; .* has none"):
        checkpoint_to_resume(run, "step-4")


def test_the_newest_good_checkpoint_is_taken_and_damaged_ones_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = run_with(tmp_path)
    for step in (2, 4, 10):
        with run.writing_checkpoint(step) as folder:
            (folder / "state.json").write_text(str(step))
    assert checkpoint_to_resume(run, True) == run.checkpoint(10)
    (run.checkpoint(10) / "state.json").write_text("x")
    assert checkpoint_to_resume(run, True) == run.checkpoint(4)
    assert f"{run.checkpoint(10)}: state.json is not what was written" in caplog.text
    with pytest.raises(RunError, match=r"step-10: no complete checkpoint, state.json is not .* has step-2, step-4, step-10"):
        checkpoint_to_resume(run, "step-10")
    for step in (2, 4):
        (run.checkpoint(step) / "manifest.json").unlink()
    with pytest.raises(RunError, match=r"every checkpoint is damaged \(.*step-10: .*step-4: manifest.json is missing"):
        checkpoint_to_resume(run, True)


def test_no_checkpoint_is_deleted_while_the_newest_is_damaged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = run_with(tmp_path)
    for step in (1, 2, 3):
        with run.writing_checkpoint(step) as folder:
            (folder / "state.json").write_text(str(step))
    (run.checkpoint(3) / "state.json").write_text("x")
    run.rotate_checkpoints(1, keep=None)
    assert [path.name for path in run.checkpoints()] == ["step-1", "step-2", "step-3"]
    assert "step-3 is damaged (state.json is not what was written); older checkpoints are kept" in caplog.text
    (run.checkpoint(3) / "state.json").write_text("3")
    run.rotate_checkpoints(1, keep=None)
    assert [path.name for path in run.checkpoints()] == ["step-3"]

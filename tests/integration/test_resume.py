"""A run that goes on from a checkpoint ends like one that was never stopped; what can't be resumed is refused."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from qlora_bitsandbytes import NF4
from qlora_core import Finished, RunError, finetune
from qlora_core.pipeline import Interrupted
from qlora_peft import LoRA
from qlora_text import TextFile

CLOCK = ("tokens_per_second", "peak_memory_bytes", "eval_runtime", "eval_samples_per_second", "eval_steps_per_second")


class StopAt(transformers.TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


class StopAfterSaving(StopAt):
    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        pass

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


def timeless(finished: Finished) -> list[dict[str, Any]]:
    return [{k: v for k, v in line.items() if k not in CLOCK} for line in finished.run.read_metrics()]


@pytest.mark.parametrize(
    "training",
    [
        {"max_steps": 8, "save_steps": 3, "logging_steps": 2},
        {"max_steps": None, "epochs": 2, "save_steps": 5, "logging_steps": 3, "gradient_accumulation": 3, "batch_size": 8},
        {"max_steps": 8, "save_steps": 3, "logging_steps": 2, "gradient_checkpointing": True, "optimizer": "adamw_8bit"},
    ],
    ids=["plain", "epochs-and-accumulation", "checkpointing-and-8bit"],
)
def test_resuming_ends_in_the_same_bits(run: Callable[..., Finished], tmp_path: Path, training: dict[str, Any]) -> None:
    adapter = LoRA(r=4, dropout=0.1)
    training = {**training, "save_total_limit": None}
    whole = run(adapter=adapter, output=tmp_path / "whole", training=training)
    with pytest.raises(KeyboardInterrupt):
        run(adapter=adapter, output=tmp_path / "parts", training=training, callbacks=[StopAt(7)])
    assert not (tmp_path / "parts" / "adapter").exists()
    parts = run(adapter=adapter, output=tmp_path / "parts", training=training, resume=True)
    ours, theirs = (load_file(f.run.adapter / "adapter_model.safetensors") for f in (whole, parts))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert timeless(whole) == timeless(parts)


def test_resuming_from_a_named_checkpoint_goes_back_to_it(run: Callable[..., Finished], tmp_path: Path) -> None:
    training = {"max_steps": 6, "save_steps": 2, "save_total_limit": None}
    first = run(training=training)
    lines = timeless(first)
    again = run(training=training, resume=first.run.checkpoint(2))
    assert timeless(again) == lines
    assert [p.name for p in again.run.checkpoints()] == ["step-2", "step-4", "step-6"]
    by_name = run(training=training, resume="step-4")
    assert timeless(by_name) == lines


@pytest.mark.parametrize(
    ("data", "training"),
    [
        ({}, {"max_steps": 3}),
        ({}, {"max_steps": None, "epochs": 0.3, "batch_size": 16}),
        ({}, {"max_steps": None, "epochs": 1.0, "batch_size": 64}),
        ({"streaming": True, "eval_fraction": 0.0}, {"max_steps": 3}),
    ],
    ids=["steps", "a-part-of-an-epoch", "an-epoch", "stream"],
)
def test_resuming_a_run_that_came_to_its_end_trains_nothing_and_writes_the_same_adapter(
    run: Callable[..., Finished], data: dict[str, Any], training: dict[str, Any]
) -> None:
    """As where it was killed between its last checkpoint and its adapter."""
    finished = run(data=data, training=training)
    end, lines = finished.run.checkpoints()[-1], timeless(finished)
    adapter = (finished.run.adapter / "adapter_model.safetensors").read_bytes()
    shutil.rmtree(finished.run.adapter)
    again = run(data=data, training=training, resume=True)
    assert [path.name for path in again.run.checkpoints()] == [end.name]
    assert timeless(again) == lines
    assert (again.run.adapter / "adapter_model.safetensors").read_bytes() == adapter


@pytest.mark.parametrize("keep", ["last", "best"])
@pytest.mark.parametrize("save_steps", [1, None])
def test_no_evaluation_is_lost_or_done_twice(
    run: Callable[..., Finished], tmp_path: Path, keep: str, save_steps: int | None
) -> None:
    """Stopped right after the checkpoint of an epoch's last step was written."""
    training = {"max_steps": None, "epochs": 2, "batch_size": 64, "save_steps": save_steps, "save_total_limit": None}
    training |= {"keep": keep, "eval_at_start": True}
    whole = run(output=tmp_path / "whole", training=training)
    lines = timeless(whole)
    evaluated = [line["step"] for line in lines if "eval_loss" in line]
    assert len(evaluated) == len(set(evaluated)) == 3
    for step in evaluated[1:]:
        with pytest.raises(KeyboardInterrupt):
            run(output=tmp_path / "parts", training=training, callbacks=[StopAfterSaving(step)], overwrite=True)
        parts = run(output=tmp_path / "parts", training=training, resume=True)
        assert timeless(parts) == lines
        ours, theirs = ((one.run.adapter / "adapter_model.safetensors").read_bytes() for one in (parts, whole))
        assert ours == theirs


@pytest.mark.parametrize(
    ("first", "second", "ends"),
    [({"max_steps": 3}, {"max_steps": 2}, 2), ({"epochs": 2, "max_steps": None}, {"epochs": 1, "max_steps": None}, None)],
)
def test_resuming_with_fewer_steps_than_were_trained_says_that_none_is_left(
    run: Callable[..., Finished],
    caplog: pytest.LogCaptureFixture,
    first: dict[str, Any],
    second: dict[str, Any],
    ends: int | None,
) -> None:
    lines = timeless(run(training={**first, "batch_size": 64}))
    with caplog.at_level("WARNING", "qlora_core"):
        again = run(training={**second, "batch_size": 64}, resume=True)
    at = lines[-1]["step"]
    assert (
        f"nothing is left to train: the checkpoint is of step {at}, and the run ends at step {ends or at // 2}" in caplog.text
    )
    assert timeless(again) == lines


def test_a_folder_that_holds_a_run_is_refused_and_left_untouched(run: Callable[..., Finished], tmp_path: Path) -> None:
    finished = run()
    before = {p: p.stat().st_mtime_ns for p in sorted(finished.run.folder.rglob("*"))}
    with pytest.raises(RunError, match=r"already holds a run; continue it with --resume, replace it with --overwrite"):
        run()
    assert before == {p: p.stat().st_mtime_ns for p in sorted(finished.run.folder.rglob("*"))}
    run(overwrite=True)


def test_nothing_to_resume_from_is_said(run: Callable[..., Finished], tmp_path: Path) -> None:
    with pytest.raises(RunError, match="holds no run to resume; leave out --resume"):
        run(resume=True)
    finished = run(training={"save_steps": 2})
    with pytest.raises(RunError, match=r"step-9 is no checkpoint; .* has step-2, step-3"):
        run(resume="step-9")
    before = finished.run.metrics.read_bytes()
    with pytest.raises(RunError, match=r"began with another configuration:\n  adapter.r: was 4, is 8\nresume it with its own"):
        run(resume=True, adapter=LoRA(r=8))
    with pytest.raises(RunError, match=r"leave one of them out"):
        run(resume=True, overwrite=True)
    assert finished.run.metrics.read_bytes() == before
    assert finished.run.adapter.is_dir()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_run_after_a_checkpoint_from_which_it_resumes(
    qlora: Callable[..., Any], tiny_model: Path, text_file: Path, tmp_path: Path, number: int
) -> None:
    words = ["train", "--model", str(tiny_model), "--data", str(text_file), "--output", str(tmp_path / "run")]
    words += ["--set", "data.sequence_length=32", "--set", "training.logging_steps=1"]
    command = [sys.executable, "-m", "qlora_core", *words, "--set", "training.max_steps=3000"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (metrics.is_file() and metrics.read_text().count("\n") > 2):
        time.sleep(0.2)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number, errors
    assert "stopped at step" in errors
    assert "continue with --resume" in errors
    assert "Traceback" not in errors
    (checkpoint,) = (tmp_path / "run" / "checkpoints").iterdir()
    step = int(checkpoint.name.removeprefix("step-"))
    assert json.loads((checkpoint / "trainer_state.json").read_text())["global_step"] == step
    resumed = qlora(*words, "--set", f"training.max_steps={step + 2}", "--resume")
    assert resumed.code == 0, resumed.err
    steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines() if '"loss"' in line]
    assert steps == list(range(1, step + 3))


class SignalAt(StopAt):
    """Sends this process a signal in a step."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step - 1:
            os.kill(os.getpid(), signal.SIGTERM)

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        pass


@pytest.mark.parametrize("keep", ["last", "best"])
@pytest.mark.parametrize(
    ("training", "step"),
    [
        ({"max_steps": 6, "eval_steps": 2, "gradient_accumulation": 2}, 4),
        ({"max_steps": 6, "eval_steps": 2}, 6),
        ({"epochs": 2, "batch_size": 64}, 0),
        ({"epochs": 2, "batch_size": 64}, -1),
    ],
    ids=["in-an-epoch", "the-last-step", "end-of-an-epoch", "end-of-the-last-epoch"],
)
def test_an_evaluation_that_a_signal_left_out_is_made_up_for_and_changes_no_bit(
    run: Callable[..., Finished], tmp_path: Path, keep: str, training: dict[str, Any], step: int
) -> None:
    """Also where the run is killed before its next checkpoint, and resumed once more."""
    training = {"max_steps": None, "save_steps": 100, "save_total_limit": None, "keep": keep, **training}
    adapter = LoRA(r=4, dropout=0.1)  # which draws numbers, as an evaluation does
    whole = run(adapter=adapter, output=tmp_path / "whole", training=training)
    evaluated = [line["step"] for line in timeless(whole) if "eval_loss" in line]
    step = evaluated[step] if step in (0, -1) else step
    assert step in evaluated
    with pytest.raises(Interrupted):
        run(adapter=adapter, output=tmp_path / "parts", training=training, callbacks=[SignalAt(step)])
    lines = [json.loads(line) for line in (tmp_path / "parts" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "eval_loss" in line] == [one for one in evaluated if one < step]
    for _ in range(2):
        parts = run(adapter=adapter, output=tmp_path / "parts", training=training, resume=f"step-{step}")
        assert timeless(parts) == timeless(whole)
        ours, theirs = (load_file(f.run.adapter / "adapter_model.safetensors") for f in (whole, parts))
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_an_evaluation_that_is_made_up_for_leaves_a_stream_where_it_was(
    run: Callable[..., Finished], tmp_path: Path, text_file: Path
) -> None:
    training = {"max_steps": 6, "eval_steps": 2, "save_steps": 100, "save_total_limit": None}
    settings: dict[str, Any] = {"adapter": LoRA(r=4, dropout=0.1), "data": {"streaming": True, "eval_fraction": 0.0}}
    settings |= {"dataset": TextFile(path=str(text_file), eval_path=str(text_file)), "training": training}
    whole = run(output=tmp_path / "whole", **settings)
    assert [line["step"] for line in timeless(whole) if "eval_loss" in line] == [2, 4, 6]
    with pytest.raises(Interrupted):
        run(output=tmp_path / "parts", callbacks=[SignalAt(4)], **settings)
    parts = run(output=tmp_path / "parts", resume=True, **settings)
    assert timeless(parts) == timeless(whole)
    ours, theirs = (load_file(f.run.adapter / "adapter_model.safetensors") for f in (whole, parts))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_an_evaluation_that_is_made_up_for_may_end_the_run_as_it_would_have(
    run: Callable[..., Finished], tmp_path: Path
) -> None:
    training = {"max_steps": 6, "eval_steps": 2, "learning_rate": 1e-12, "save_total_limit": None}

    class Enough(transformers.TrainerCallback):
        def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop = state.global_step == 4

    whole = run(output=tmp_path / "whole", training=training, callbacks=[Enough()])
    with pytest.raises(Interrupted):
        run(output=tmp_path / "parts", training=training, callbacks=[Enough(), SignalAt(4)])
    parts = run(output=tmp_path / "parts", training=training, callbacks=[Enough()], resume=True)
    assert [line["step"] for line in timeless(whole) if "eval_loss" in line] == [2, 4]
    assert timeless(parts) == timeless(whole)


def test_a_full_disk_is_one_clear_error_and_loses_nothing_saved(tiny_model: Path, text_file: Path, tmp_path: Path) -> None:
    """The system refuses files over a limit, as it refuses them on a full disk, from the second checkpoint on."""
    code = f"""
import resource, signal, transformers
from qlora_core.cli.main import main
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
class Fill(transformers.TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 3:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
from qlora_core import pipeline
execute = pipeline.execute
pipeline.execute = lambda *a, **k: execute(*a, **{{**k, "plain_callbacks": [Fill()]}})
main(["train", "--model", {str(tiny_model)!r}, "--data", {str(text_file)!r}, "--output", {str(tmp_path / "run")!r},
      "--set", "data.sequence_length=32", "--set", "training.max_steps=8", "--set", "training.save_steps=2"])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=dict(os.environ))
    assert done.returncode == 2, done.stderr
    error = done.stderr.splitlines()[-1]
    assert "can't be written: file too large; the last checkpoint is " in error
    assert error.endswith("free some space and resume with --resume")
    assert "Traceback" not in done.stderr
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-2"]


def test_a_run_whose_template_writes_the_date_is_resumed_on_another_day(
    tiny_model: Path, tmp_path: Path, own_cache: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datetime

    from transformers.utils import chat_template_utils

    from qlora_core.data import encode
    from qlora_records import Records

    class Later(datetime.datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Later:
            return cls.fromtimestamp(datetime.datetime.now(tz).timestamp() + 3 * 86_400)

    class LaterDay(datetime.date):
        @classmethod
        def today(cls) -> datetime.date:
            return datetime.date.today() + datetime.timedelta(days=3)

    template = tmp_path / "dated.jinja"
    turns = "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
    template.write_text("{{ strftime_now('%d %b %Y') }} " + turns + "{% if add_generation_prompt %}assistant: {% endif %}")
    rows = [{"prompt": f"Number {n}?", "completion": f"{n}."} for n in range(40)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    def go(steps: int, resume: bool) -> Finished:
        return finetune(
            str(tiny_model),
            NF4(),
            LoRA(r=4),
            Records(path=str(tmp_path / "rows.jsonl")),
            output=tmp_path / "run",
            data={"sequence_length": 64, "template": str(template)},
            training={"max_steps": steps, "save_steps": 2},
            resume=resume,
        )

    began = go(2, False).run.record()["data"]["fingerprint"]
    monkeypatch.setattr(chat_template_utils, "datetime", Later)
    monkeypatch.setattr(encode, "date", LaterDay)
    resumed = go(4, True)
    assert resumed.metrics["step"] == 4
    assert resumed.run.record()["data"]["fingerprint"] == began

"""What goes wrong while a run goes on: one clear error, nothing saved is lost, and the run can be resumed."""

from __future__ import annotations

import json
import multiprocessing
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

from qlora_core import Finished, RunError
from qlora_core.attention import base_of

SAVING = {"max_steps": 6, "save_steps": 2, "logging_steps": 1, "save_total_limit": None}


class At(transformers.TrainerCallback):
    """Does something after a step."""

    def __init__(self, step: int, do: Callable[[], object]) -> None:
        self.step, self.do = step, do

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            self.do()


def adapter_of(finished: Finished) -> dict[str, torch.Tensor]:
    return load_file(finished.run.adapter / "adapter_model.safetensors")


def same(one: Finished, other: Finished) -> bool:
    ours, theirs = adapter_of(one), adapter_of(other)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def checkpoints(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


# Numbers


def test_a_loss_that_is_no_number_names_step_layer_and_sample_and_keeps_what_was_saved(
    run: Callable[..., Finished], tmp_path: Path
) -> None:
    """A layer gives infinity for one row of one batch."""

    class Break(transformers.TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, model: Any, **kwargs: Any) -> None:
            if state.global_step == 4:
                base = base_of(model)
                seen: list[torch.Tensor] = []
                base.model.embed_tokens.register_forward_hook(lambda module, ids, output: seen.append(ids[0]))

                def spoil(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
                    bad = (seen[-1] == 40).any(1)  # a token that not every row has
                    return output.masked_fill(bad[:, None, None], float("inf"))

                base.model.layers[1].mlp.register_forward_hook(spoil)

    with pytest.raises(RunError) as caught:
        run(training={**SAVING, "max_steps": 60, "batch_size": 4}, callbacks=[Break()])
    message = str(caught.value)
    assert "training: the loss is nan at step " in message
    assert "first in model.layers.1.mlp, for row " in message
    assert " of its batch, which begins '" in message
    folder = tmp_path / "run"
    step = int(message.split("at step ")[1].split(",")[0])
    last = (step - 1) // 2 * 2
    assert f"the last checkpoint is {folder / 'checkpoints' / f'step-{last}'}; start again with a lower" in message
    assert checkpoints(folder)[-1] <= f"step-{last}"
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, step))
    assert all(line["loss"] is not None for line in lines)
    assert run(training={**SAVING, "max_steps": 60, "batch_size": 4}, resume=True).metrics["step"] == 60


def test_a_learning_rate_that_makes_weights_explode_ends_at_once(run: Callable[..., Finished], tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"training: the loss is (nan|inf) at step 2, first in .*step-1; start again"):
        run(training={**SAVING, "save_steps": 1, "learning_rate": 1e30, "warmup": 0})
    assert checkpoints(tmp_path / "run") == ["step-1"]


def test_a_gradient_that_is_no_number_is_named(run: Callable[..., Finished]) -> None:
    class Break(transformers.TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, model: Any, **kwargs: Any) -> None:
            if state.global_step == 2:
                weight = next(p for n, p in model.named_parameters() if "layers.1.self_attn.o_proj.lora_B" in n)
                weight.register_hook(lambda grad: grad * float("nan"))

    with pytest.raises(RunError, match=r"the gradient is nan at step 3, first in the gradient of model.layers.1.self"):
        run(training=SAVING, callbacks=[Break()])


def test_an_evaluation_that_gives_no_number_ends_the_run(run: Callable[..., Finished]) -> None:
    class Break(transformers.TrainerCallback):
        def on_evaluate(self, *args: Any, **kwargs: Any) -> None:
            raise AssertionError("it was logged")

        def on_step_end(self, args: Any, state: Any, control: Any, model: Any, **kwargs: Any) -> None:
            if state.global_step == 3:
                base_of(model).model.norm.register_forward_hook(lambda module, args, output: output * float("nan"))

    with pytest.raises(RunError, match=r"evaluation: the loss after step 3 is nan; the last checkpoint is .*step-2"):
        run(training={**SAVING, "eval_steps": 3}, callbacks=[Break()])


# Memory


def test_memory_that_runs_out_is_told_with_sizes_and_what_takes_less(tiny_model: Path, text_file: Path, tmp_path: Path) -> None:
    """The system refuses the process more than it has at the second step."""
    code = f"""
import resource, transformers
from qlora_core.cli.main import main
class Limit(transformers.TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 1:
            held = next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("VmData")) * 1024
            resource.setrlimit(resource.RLIMIT_DATA, (held + 2**20, resource.RLIM_INFINITY))
            self.big = __import__("torch").empty(2**19, dtype=__import__("torch").uint8)
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 1:
            import torch
            torch.empty(2**30, dtype=torch.uint8).fill_(1)
from qlora_core import pipeline
execute = pipeline.execute
pipeline.execute = lambda *a, **k: execute(*a, **{{**k, "plain_callbacks": [Limit()]}})
main(["train", "--model", {str(tiny_model)!r}, "--data", {str(text_file)!r}, "--output", {str(tmp_path / "run")!r},
      "--set", "data.sequence_length=256", "--set", "training.max_steps=8", "--set", "training.save_steps=1",
      "--set", "training.batch_size=4", "--set", "training.gradient_checkpointing=none"])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=dict(os.environ))
    assert done.returncode == 2, done.stderr
    error = done.stderr.splitlines()[-1]
    assert error.startswith("error: memory ran out in training: ")
    assert " GB were in use at most, 1.07 GB more were asked for, " in error
    assert "it held 4 x 256 tokens per forward pass; set training.gradient_checkpointing: full, or " in error
    assert "training.batch_size: 2 with training.gradient_accumulation: 2, or data.sequence_length: 128" in error
    assert "; the last checkpoint is " in error
    assert "Traceback" not in done.stderr
    assert checkpoints(tmp_path / "run") == ["step-1"]


def test_a_process_that_reads_data_and_is_killed_ends_the_run_with_a_remedy(
    run: Callable[..., Finished], tmp_path: Path
) -> None:
    def kill() -> None:
        for child in multiprocessing.active_children():
            assert child.pid is not None
            os.kill(child.pid, signal.SIGKILL)
            child.join()
        time.sleep(0.2)

    extra = {"dataloader_num_workers": 1, "dataloader_prefetch_factor": 1}
    training = {**SAVING, "max_steps": 12, "extra": extra}
    with pytest.raises(RunError, match=r"reads data (ended|was killed) .*in training, .*; the last checkpoint is .*2;"):
        run(training=training, callbacks=[At(3, kill)])
    resumed = run(training=training, resume=True)
    whole = run(training=training, output=tmp_path / "whole")
    assert same(resumed, whole)


# The disk


def test_a_folder_that_is_moved_under_a_run_ends_it(run: Callable[..., Finished], tmp_path: Path) -> None:
    def move() -> None:
        (tmp_path / "run").rename(tmp_path / "moved")

    with pytest.raises(RunError, match=r"run is gone, removed or moved while the run wrote to it; move it back and resume"):
        run(training=SAVING, callbacks=[At(3, move)])
    assert not (tmp_path / "run").exists()
    (tmp_path / "moved").rename(tmp_path / "run")
    assert run(training=SAVING, resume=True).metrics["step"] == 6


def test_checkpoints_that_are_removed_under_a_run_do_not_end_it(run: Callable[..., Finished], tmp_path: Path) -> None:
    finished = run(training=SAVING, callbacks=[At(3, lambda: shutil.rmtree(tmp_path / "run" / "checkpoints"))])
    assert checkpoints(finished.run.folder) == ["step-4", "step-6"]


def test_an_output_that_is_read_only_is_refused_at_once(
    qlora: Callable[..., Any], tiny_model: Path, text_file: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "shut"
    folder.mkdir(mode=0o555)
    output = Path("/sys/run") if os.access(folder, os.W_OK) else folder / "run"  # root may write anywhere but there
    started = time.monotonic()
    done = qlora("train", "--model", tiny_model, "--data", text_file, "--output", output)
    assert done.code == 2
    assert "output: " in done.err
    assert "Traceback" not in done.err
    assert time.monotonic() - started < 60


def test_data_that_change_while_a_run_goes_on_do_not_change_it_and_are_refused_when_it_is_resumed(
    run: Callable[..., Finished], tmp_path: Path, text_file: Path
) -> None:
    text = text_file.read_text(encoding="utf-8")
    whole = run(training=SAVING)
    changed = run(training=SAVING, callbacks=[At(2, lambda: text_file.write_text("x" + text))], output=tmp_path / "changed")
    assert same(whole, changed)
    with pytest.raises(RunError, match=r"data: the data are not those that the run in .*changed began with"):
        run(training={**SAVING, "max_steps": 8}, output=tmp_path / "changed", resume=True)
    text_file.write_text(text, encoding="utf-8")
    assert run(training={**SAVING, "max_steps": 8}, output=tmp_path / "changed", resume=True).metrics["step"] == 8


def test_a_checkpoint_that_is_cut_short_is_passed_over_and_the_run_ends_in_the_same_bits(
    run: Callable[..., Finished], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    constant = {**SAVING, "scheduler": "constant", "warmup": 0}
    whole = run(training=constant)
    damaged = run(training={**constant, "max_steps": 4}, output=tmp_path / "damaged")
    weights = damaged.run.checkpoint(4) / "adapter.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    resumed = run(training=constant, output=tmp_path / "damaged", resume=True)
    assert f"{damaged.run.checkpoint(4)}: adapter.safetensors is not what was written" in caplog.text
    assert same(whole, resumed)
    assert checkpoints(resumed.run.folder) == ["step-2", "step-4", "step-6"]


# Others


def test_a_callback_of_a_plugin_that_raises_leaves_a_run_that_can_be_resumed(
    qlora: Callable[..., Any], tiny_model: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "raising.py").write_text(
        """
import transformers
from qlora_core import CallbackFactory, hookimpl
class Raise(transformers.TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 3:
            raise ValueError("three")
class Raising(CallbackFactory):
    name = "raising"
    def build(self, run):
        return Raise()
@hookimpl
def qlora_callbacks():
    return [Raising]
"""
    )
    monkeypatch.chdir(tmp_path)
    words = [
        "train",
        "--model",
        tiny_model,
        "--data",
        text_file,
        "--output",
        tmp_path / "run",
        "--set",
        "training.save_steps=2",
    ]
    words += ["--set", "training.max_steps=6", "--set", "data.sequence_length=32", "--quiet"]
    done = qlora(*words, "-p", "raising", "--set", "callbacks=[raising]")
    assert done.code == 2
    print(done.err)
    assert "failed in on_step_end: ValueError: three" in done.err
    assert "Traceback" in (tmp_path / "run" / "crash.txt").read_text()
    assert checkpoints(tmp_path / "run") == ["step-2"]
    assert qlora(*words, "--resume").code == 0


def test_two_runs_in_one_folder_the_second_is_refused(
    qlora: Callable[..., Any], tiny_model: Path, text_file: Path, tmp_path: Path
) -> None:
    words = ["train", "--model", str(tiny_model), "--data", str(text_file), "--output", str(tmp_path / "run")]
    words += ["--set", "data.sequence_length=32", "--set", "training.logging_steps=1", "--set", "training.save_steps=1"]
    first = subprocess.Popen(
        [sys.executable, "-m", "qlora_core", *words, "--set", "training.max_steps=100000"], stderr=subprocess.PIPE
    )
    try:
        deadline = time.monotonic() + 120
        while not list((tmp_path / "run" / "checkpoints").glob("step-*")) and time.monotonic() < deadline:
            time.sleep(0.1)
        before = (tmp_path / "run" / "config.yaml").read_bytes()
        for option in ("--resume", "--overwrite"):
            second = qlora(*words, option)
            assert second.code == 2
            assert f"is being written to by process {first.pid} on " in second.err
        assert (tmp_path / "run" / "config.yaml").read_bytes() == before
        assert first.poll() is None
    finally:
        first.send_signal(signal.SIGTERM)
        first.communicate(timeout=60)
    assert first.returncode == 128 + signal.SIGTERM
    assert qlora(*words, "--resume", "--set", "training.max_steps=1").code == 0


def test_a_second_signal_stops_at_once_and_leaves_a_run_that_can_be_resumed(
    qlora: Callable[..., Any], tiny_model: Path, text_file: Path, tmp_path: Path
) -> None:
    """The first waits for the end of a step that takes a minute."""
    code = """
import sys, time
from qlora_core.training.trainer import QLoRATrainer
step, count = QLoRATrainer.training_step, 0
def slow(self, *arguments):
    global count
    count += 1
    if count == 4:
        print("slow", flush=True)
        for _ in range(600):
            time.sleep(0.1)
    return step(self, *arguments)
QLoRATrainer.training_step = slow
from qlora_core.cli.main import main
main(sys.argv[1:])
"""
    words = ["train", "--model", str(tiny_model), "--data", str(text_file), "--output", str(tmp_path / "run"), "--quiet"]
    words += ["--set", "data.sequence_length=32", "--set", "training.save_steps=1", "--set", "training.max_steps=6"]
    process = subprocess.Popen([sys.executable, "-c", code, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "slow\n"
    started = time.monotonic()
    process.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=30)
    assert time.monotonic() - started < 20
    assert process.returncode == 128 + signal.SIGTERM, errors
    assert "Traceback" not in errors
    assert f"stopped at once; the last checkpoint is {tmp_path / 'run' / 'checkpoints' / 'step-3'}" in errors
    assert checkpoints(tmp_path / "run")[-1] == "step-3"
    assert qlora(*words, "--resume").code == 0


def test_a_clock_that_goes_backwards_changes_nothing(
    run: Callable[..., Finished], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(training=SAVING)
    now = iter(range(10**9, 0, -3600))
    monkeypatch.setattr(time, "time", lambda: float(next(now)))
    backwards = run(training=SAVING, output=tmp_path / "backwards")
    assert same(whole, backwards)
    lines = [line for line in backwards.run.read_metrics() if "loss" in line]
    assert [line["step"] for line in lines] == list(range(1, 7))
    assert all(line["tokens_per_second"] > 0 for line in lines)
    assert run(training={**SAVING, "max_steps": 8}, output=tmp_path / "backwards", resume=True).metrics["step"] == 8

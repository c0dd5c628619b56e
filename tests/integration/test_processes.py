"""Two processes on one machine, started by torchrun with gloo: one writer, and the adapter of one process."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file


@pytest.mark.slow
def test_two_processes_train_the_adapter_of_one(tiny_model: Path, text_file: Path, tmp_path: Path) -> None:
    """Two processes with batches of 2 see the same blocks per step as one with batches of 4."""

    def train(name: str, batch: int, *launcher: str) -> Path:
        settings = (
            "data.sequence_length=32",
            "training.max_steps=4",
            "training.logging_steps=1",
            "training.learning_rate=1e-2",
        )
        sets = [word for setting in (*settings, f"training.batch_size={batch}") for word in ("--set", setting)]
        sets += ["--set", "model.dtype=float32", "--set", "training.mixed_precision=none"]
        command = ["-m", "qlora_core", "train", "--model", str(tiny_model), "--data", str(text_file)]
        done = subprocess.run(
            [sys.executable, *launcher, *command, "--output", str(tmp_path / name), *sets],
            capture_output=True,
            text=True,
            timeout=180,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("Done:") == 1  # one speaks
        return tmp_path / name

    two = train("two", 2, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29617")
    one = train("one", 4)
    lines = [[json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in (one, two)]
    assert [line["step"] for line in lines[1]] == [line["step"] for line in lines[0]]  # one writes
    for mine, theirs in zip(*lines, strict=True):
        assert mine.get("tokens") == theirs.get("tokens")
        assert mine.get("eval_tokens") == theirs.get("eval_tokens")
        for key in ("loss", "eval_loss"):
            if key in mine:
                assert mine[key] == pytest.approx(theirs[key], rel=1e-4)
    ours, theirs = (load_file(run / "adapter" / "adapter_model.safetensors") for run in (one, two))
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-2, atol=1e-4)
    assert sorted(p.name for p in two.iterdir()) == sorted(p.name for p in one.iterdir())

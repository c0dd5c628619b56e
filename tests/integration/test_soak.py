"""A run that is killed at any moment and resumed ends in the same bits: at random moments, and at those that matter most."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SOAK = Path(__file__).parent.parent / "soak.py"


def soaked(model: Path, text: Path, *arguments: str) -> dict[str, object]:
    command = [sys.executable, str(SOAK), "--model", str(model), "--text", str(text), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    report: dict[str, object] = json.loads(done.stdout)
    return report


@pytest.mark.parametrize(
    "changes",
    [
        ("data.packing=true", "training.gradient_checkpointing=none"),
        ("data.packing=false", "training.gradient_checkpointing=full", "training.eval_steps=null"),
        ("data.streaming=true", "data.eval_fraction=0", "training.max_steps=17", "kernels=reference"),
    ],
    ids=["packed", "padded-and-checkpointing", "stream"],
)
def test_a_run_killed_at_random_moments_ends_in_the_same_bits(
    tiny_model: Path, text_file: Path, changes: tuple[str, ...]
) -> None:
    text = text_file.read_text(encoding="utf-8")[:3_000]
    text_file.write_text(text, encoding="utf-8")
    report = soaked(tiny_model, text_file, "--kills", "3", *(word for change in changes for word in ("--set", change)))
    assert report["kills"] == 3
    assert report["differences"] == []
    compared = report["compared"]
    assert isinstance(compared, list)
    assert "adapter/adapter_model.safetensors" in compared
    assert sum(name.endswith("state.safetensors") for name in compared) == 2


def test_a_run_killed_at_chosen_moments_ends_in_the_same_bits_and_leaves_nothing_behind(
    tiny_model: Path, text_file: Path
) -> None:
    text_file.write_text(text_file.read_text(encoding="utf-8")[:3_000], encoding="utf-8")
    report = soaked(
        tiny_model, text_file, "--kills", "0", "--moments", "--set", "training.save_steps=3", "--set", "training.epochs=0.8"
    )
    assert report["differences"] == []
    moments = report["moments"]
    assert isinstance(moments, list)
    assert len(moments) == 7

"""Runs on a stream: gated before, stored nowhere, resumed to the same bits without reading again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from qlora_bitsandbytes import NF4
from qlora_core import ConfigError, DataError, Run, RunConfig, RunError, finetune
from qlora_core.parts import resolve
from qlora_core.registry import Registry
from qlora_core.training.trainer import QLoRATrainer
from qlora_peft import LoRA
from qlora_records import Records


@pytest.fixture
def chats(tmp_path: Path) -> Path:
    path = tmp_path / "chats.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for number in range(400):
            words = " ".join(f"word{(number * k) % 17}" for k in range(1 + number % 5))
            file.write(json.dumps({"prompt": f"Number {number}?", "completion": words}) + "\n")
    return path


def train(model: Path, chats: Path, output: Path, steps: int, *, resume: bool = False, **data: Any) -> dict[str, Any]:
    settings = {"sequence_length": 96, "eval_fraction": 0, "streaming": True, "buffer": 24, "gate_rows": 50, "template": "none"}
    finetune(
        str(model),
        NF4(),
        LoRA(r=4, dropout=0.1),
        Records(path=str(chats)),
        output=output,
        data={**settings, **data},
        training={
            "max_steps": steps,
            "batch_size": 2,
            "gradient_accumulation": 2,
            "save_steps": 3,
            "logging_steps": 2,
            "scheduler": "constant",
        },
        resume=resume,
    )
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    timed = ("tokens_per_second", "peak_memory_bytes", "train_runtime")
    return {
        "adapter": load_file(output / "adapter" / "adapter_model.safetensors"),
        "metrics": [{key: value for key, value in line.items() if key not in timed} for line in lines],
    }


@pytest.mark.parametrize("packing", [True, False])
def test_a_resumed_stream_ends_in_the_same_bits_and_seeks(
    tiny_model: Path, chats: Path, tmp_path: Path, packing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train(tiny_model, chats, tmp_path / "whole", 12, packing=packing)
    train(tiny_model, chats, tmp_path / "parts", 6, packing=packing)
    positions: list[Any] = []
    stream = Records.stream
    monkeypatch.setattr(Records, "stream", lambda self, at=None: positions.append(at) or stream(self, at))
    resumed = train(tiny_model, chats, tmp_path / "parts", 12, resume=True, packing=packing)
    assert resumed["adapter"].keys() == whole["adapter"].keys()
    assert all((resumed["adapter"][name] == tensor).all() for name, tensor in whole["adapter"].items())
    assert positions[-1] is not None  # training went on where it had read to; what came before is the gate
    losses = [line["loss"] for line in whole["metrics"] if "loss" in line]
    assert [line["loss"] for line in resumed["metrics"] if "loss" in line][-3:] == losses[-3:]


def test_a_row_that_stops_a_stream_loses_no_step_and_can_be_left_out(tiny_model: Path, chats: Path, tmp_path: Path) -> None:
    lines = chats.read_text().splitlines()
    lines[120] = json.dumps({"prompt": "Number 120?", "completion": ""})
    chats.write_text("\n".join(lines) + "\n")
    with pytest.raises(DataError, match=r"chats\.jsonl:121: empty: .* go on with --resume"):
        train(tiny_model, chats, tmp_path / "run", 60, packing=False)
    saved = Run(tmp_path / "run", RunConfig.read(tmp_path / "run" / "config.yaml")).checkpoints()
    assert int(saved[-1].name.removeprefix("step-")) > 15
    finished = train(tiny_model, chats, tmp_path / "run", 60, packing=False, resume=True, on_problem="skip")
    assert finished["metrics"][-1]["step"] == 60


@pytest.mark.parametrize("part", ["begun", "not yet begun"])
def test_a_file_that_changes_while_it_is_streamed_ends_the_run_which_goes_on_once_it_is_back(
    tiny_model: Path, chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    lines = chats.read_text().splitlines(keepends=True)
    folder = tmp_path / "parts"
    folder.mkdir()
    (folder / "a.jsonl").write_text("".join(lines[:200]))
    (folder / "b.jsonl").write_text("".join(lines[200:]))
    whole = train(tiny_model, folder, tmp_path / "whole", 24)
    file = folder / ("a.jsonl" if part == "begun" else "b.jsonl")
    text = file.read_text()
    with monkeypatch.context() as patch:
        step = QLoRATrainer.training_step

        def change(trainer: Any, *arguments: Any) -> Any:
            if trainer.state.global_step == 1:
                file.write_text(text.replace("word", "wort"))
            return step(trainer, *arguments)

        patch.setattr(QLoRATrainer, "training_step", change)
        with pytest.raises(DataError, match=rf"{file}: the file has changed while the run streams it; put it back"):
            train(tiny_model, folder, tmp_path / "run", 24)
    file.write_text(text)
    again = train(tiny_model, folder, tmp_path / "run", 24, resume=True)
    assert again["metrics"] == whole["metrics"]
    assert all(torch.equal(again["adapter"][name], tensor) for name, tensor in whole["adapter"].items())


def test_a_run_is_not_resumed_on_other_data(tiny_model: Path, chats: Path, tmp_path: Path) -> None:
    train(tiny_model, chats, tmp_path / "run", 3)
    chats.write_text("\n".join(reversed(chats.read_text().splitlines())) + "\n")
    with pytest.raises(RunError, match=r"data: the data are not those that the run in .* began with"):
        train(tiny_model, chats, tmp_path / "run", 6, resume=True)


def test_nothing_of_a_stream_is_stored(tiny_model: Path, chats: Path, tmp_path: Path, own_cache: None) -> None:
    import datasets

    train(tiny_model, chats, tmp_path / "run", 2)
    assert list(Path(datasets.config.HF_DATASETS_CACHE).rglob("*.arrow")) == []


def test_a_stream_needs_a_number_of_steps_and_one_process(
    tiny_model: Path, chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    raw = {"model": str(tiny_model), "dataset": {"name": "records", "path": str(chats)}, "data": {"streaming": True}}
    config, parts = resolve(RunConfig.parse({**raw, "output": str(tmp_path / "run")}), Registry())
    with pytest.raises(ConfigError) as caught:
        parts.check(config)
    assert [problem.where for problem in caught.value.problems] == [("training", "max_steps"), ("data", "streaming")]

"""The example scripts and the example configuration run on a tiny model."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_example_is_run_here() -> None:
    scripts = {path.name for path in EXAMPLES.iterdir() if path.suffix in (".py", ".yaml")}
    assert scripts == {"minimal_forward.py", "finetune_shakespeare.py", "compose_stages.py", "shakespeare.yaml"}


def test_minimal_forward_gives_logits_over_the_vocabulary(docs_model: Path) -> None:
    vocabulary = json.loads((docs_model / "config.json").read_text())["vocab_size"]
    batch, tokens, width = load("minimal_forward").main(str(docs_model))
    assert (batch, width) == (1, vocabulary)
    assert tokens > 3


def test_finetuning_lowers_the_loss_and_the_held_out_perplexity(
    docs_model: Path, workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    module = load("finetune_shakespeare")
    finished = module.main(str(docs_model), "corpus.txt", steps=40, sequence_length=128, learning_rate=3e-3)
    lines = finished.run.read_metrics()
    losses = [line["loss"] for line in lines if "loss" in line]
    held_out = [line["eval_loss"] for line in lines if "eval_loss" in line]
    assert sum(losses[-5:]) / 5 < sum(losses[:5]) / 5 - 0.1
    assert held_out[-1] < held_out[0] - 0.1
    assert (finished.run.adapter / "adapter_model.safetensors").is_file()
    assert "To be, or not to be" in capsys.readouterr().out


def test_the_text_written_without_one_is_long_enough(workplace: Path) -> None:
    path = load("finetune_shakespeare").some_text(workplace)
    assert len(path.read_text(encoding="utf-8")) > 200_000


def test_composing_the_stages_lowers_the_perplexity(docs_model: Path, workplace: Path) -> None:
    perplexity = load("compose_stages").main(str(docs_model), "corpus.txt", steps=10, output="composed")
    assert perplexity["after"] < perplexity["before"]
    assert (workplace / "composed" / "adapter" / "adapter_config.json").is_file()
    assert len((workplace / "composed" / "metrics.jsonl").read_text().splitlines()) >= 2


def test_the_configuration_says_what_the_script_does(workplace: Path) -> None:
    from qlora_core import Registry, RunConfig, resolve

    (workplace / "tiny_shakespeare.txt").write_text("To be, or not to be", encoding="utf-8")
    config, parts = resolve(RunConfig.read(EXAMPLES / "shakespeare.yaml"), Registry())
    parts.check(config)
    assert (config.quantizer.name, config.adapter.name) == ("bitsandbytes:nf4", "peft:lora")
    source = (EXAMPLES / "finetune_shakespeare.py").read_text(encoding="utf-8")
    assert f'"warmup": {config.training.warmup}' in source
    assert f'"batch_size": {config.training.batch_size}' in source
    assert f'"logging_steps": {config.training.logging_steps}' in source
    assert f"steps: int = {config.training.max_steps}" in source
    assert f"sequence_length: int = {config.data.sequence_length}" in source
    assert config.training.learning_rate == 1e-3
    assert "learning_rate: float = 1e-3" in source

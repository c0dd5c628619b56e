"""The training section, the run directory and the callbacks, on real runs."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml

from qlora_bitsandbytes import NF4
from qlora_console import EarlyStopping, Integration, Progress
from qlora_core import ConfigError, DataError, Finished, RunConfig, evaluate, inject_adapter, load_model
from qlora_core.data.encode import encode
from qlora_core.testing.tiny import tiny_config
from qlora_core.training.arguments import training_arguments
from qlora_core.training.trainer import QLoRATrainer
from qlora_peft import LoRA
from qlora_text import TextFile


def test_the_run_directory_holds_what_the_contract_says(run: Callable[..., Finished], tiny_model: Path) -> None:
    folder = run(training={"max_steps": 4, "save_steps": 2, "eval_steps": 2}).run.folder
    assert sorted(p.name for p in folder.iterdir()) == [
        "adapter",
        "checkpoints",
        "config.yaml",
        "metrics.jsonl",
        "provenance.json",
    ]
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == ["step-2", "step-4"]
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"} <= {
        p.name for p in (folder / "adapter").iterdir()
    }
    assert not [p for p in folder.rglob("*") if p.suffix in (".bin", ".pt", ".pth", ".pkl")]
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config["quantizer"]["name"] == "bitsandbytes:nf4"
    assert config["training"]["learning_rate"] == 0.01
    assert RunConfig.read(folder / "config.yaml").to_yaml() == (folder / "config.yaml").read_text()
    record = json.loads((folder / "provenance.json").read_text())
    assert record["providers"]["adapter"] == {
        "provider": "peft:lora",
        "distribution": "qlora-core",
        "version": record["packages"]["qlora-core"],
        "class": "qlora_peft.LoRA",
    }
    assert record["providers"]["quantizer"]["provider"] == "bitsandbytes:nf4"
    assert record["packages"]["torch"] == torch.__version__ or torch.__version__.startswith(record["packages"]["torch"])
    assert len(record["model"]["fingerprint"]) == len(record["data"]["fingerprint"]) == 64


def test_metrics_carry_their_keys_in_order_and_in_their_units(run: Callable[..., Finished]) -> None:
    lines = run(training={"max_steps": 4, "eval_steps": 2}).run.read_metrics()
    logged = [line for line in lines if "loss" in line]
    evaluated = [line for line in lines if "eval_loss" in line]
    assert [line["step"] for line in logged] == [1, 2, 3, 4]
    assert [line["step"] for line in evaluated] == [2, 4]
    keys = ["step", "epoch", "loss", "learning_rate", "grad_norm", "tokens", "tokens_per_second", "peak_memory_bytes"]
    assert list(logged[0]) == keys
    assert [line["tokens"] for line in logged] == [64, 128, 192, 256]
    assert logged[0]["loss"] == pytest.approx(math.log(416), rel=0.05)  # nats, of a random model over 416 rows
    assert all(line["perplexity"] == pytest.approx(math.exp(line["eval_loss"])) for line in evaluated)
    assert logged[0]["peak_memory_bytes"] > 100e6


def test_evaluation_while_training_equals_evaluate_afterwards(
    run: Callable[..., Finished], text_file: Path, tiny_model: Path
) -> None:
    finished = run()
    encoded = encode(TextFile(path=str(text_file)), finished.tokenizer, finished.run.config.data)
    score = evaluate(finished.model, encoded.eval)
    assert finished.metrics["eval_loss"] == pytest.approx(score.loss, rel=1e-6)
    assert finished.metrics["eval_tokens"] == score.tokens == encoded.eval.supervised


def test_same_seed_gives_the_same_bits(run: Callable[..., Finished], tmp_path: Path) -> None:
    def adapter(name: str, seed: int) -> bytes:
        finished = run(adapter=LoRA(r=4, dropout=0.1), output=tmp_path / name, training={"seed": seed})
        return (finished.run.adapter / "adapter_model.safetensors").read_bytes()

    assert adapter("a", 1) == adapter("b", 1)
    assert adapter("a2", 1) != adapter("c", 2)


def test_gradient_checkpointing_changes_no_loss(run: Callable[..., Finished], tmp_path: Path) -> None:
    losses = []
    for enabled in (False, True):
        finished = run(output=tmp_path / str(enabled), training={"gradient_checkpointing": enabled})
        losses.append([line["loss"] for line in finished.run.read_metrics() if "loss" in line])
    assert losses[0] == losses[1]


def test_keep_best_ends_with_the_weights_of_the_lowest_evaluation_loss(
    run: Callable[..., Finished], text_file: Path, tmp_path: Path
) -> None:
    class Spoil(transformers.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, model: Any, **kwargs: Any) -> None:
            if state.global_step == 7:
                for parameter in model.parameters():
                    if parameter.requires_grad:
                        parameter.data *= -9

    finished = run(training={"max_steps": 12, "eval_steps": 2, "keep": "best"}, callbacks=[Spoil()])
    evaluated = {line["step"]: line["eval_loss"] for line in finished.run.read_metrics() if "eval_loss" in line}
    best = min(evaluated, key=evaluated.get)
    assert best != max(evaluated)
    encoded = encode(TextFile(path=str(text_file)), finished.tokenizer, finished.run.config.data)
    assert evaluate(finished.model, encoded.eval).loss == pytest.approx(evaluated[best], rel=1e-6)
    assert (finished.run.folder / "checkpoints" / f"step-{best}").is_dir()


def test_early_stopping_ends_a_run_that_gets_worse(run: Callable[..., Finished]) -> None:
    training = {"max_steps": 40, "learning_rate": 5.0, "eval_steps": 1, "warmup": 0}
    finished = run(callbacks=[EarlyStopping(patience=2)], training=training)
    assert finished.metrics["step"] < 40


def test_what_needs_evaluation_data_is_refused_without_any(run: Callable[..., Finished], tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data.eval_fraction: nothing is held out, and callback 'early_stopping' needs"):
        run(callbacks=[EarlyStopping()], data={"eval_fraction": 0})
    with pytest.raises(DataError, match=r"nothing is held out, and training.keep: best needs"):
        run(training={"keep": "best"}, data={"eval_fraction": 0})
    assert not (tmp_path / "run").exists()


def test_any_trainer_callback_works_as_it_is(run: Callable[..., Finished]) -> None:
    class Count(transformers.TrainerCallback):
        steps = 0

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            self.steps += 1

    count = Count()
    run(callbacks=[count, Progress()])
    assert count.steps == 3


def test_operations_are_counted_as_the_library_counts_them() -> None:
    trainer: Any = object.__new__(QLoRATrainer)
    trainer.model, trainer._flops_per_token = inject_adapter(load_model(tiny_config(), NF4()), LoRA(r=4)), None
    for rows, tokens in ((2, 7), (1, 32), (3, 5)):
        batch = {"input_ids": torch.zeros(rows, tokens, dtype=torch.int64)}
        assert trainer.floating_point_ops(batch) == transformers.Trainer.floating_point_ops(trainer, batch) > 0


def test_the_bridge_builds_a_callback_by_module_and_class(run: Callable[..., Finished], capsys: Any) -> None:
    run(callbacks=[Integration(integration="transformers:PrinterCallback")])
    assert "'loss'" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("integration", "message"),
    [
        ("tensorbord", "did you mean 'tensorboard'?"),
        ("no.such.module:Class", "No module named 'no'"),
        ("transformers:Trainer", "it is no transformers.TrainerCallback"),
    ],
)
def test_the_bridge_refuses_what_is_no_integration(run: Callable[..., Finished], integration: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        run(callbacks=[Integration(integration=integration)])
    assert str(caught.value).startswith(f"callbacks[0].integration: {integration!r} can't be used")
    assert message in str(caught.value)


def test_progress_writes_plain_lines_where_there_is_no_terminal(run: Callable[..., Finished], capsys: Any) -> None:
    run(callbacks=[Progress()])
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("step")]
    assert [line.split(" · ")[0] for line in lines][:3] == ["step 1/3", "step 2/3", "step 3/3"]
    assert "tokens/s" in lines[0]
    assert "\x1b" not in "".join(lines)


@pytest.mark.parametrize(
    ("training", "message"),
    [
        ({"scheduler": "liner"}, "training.scheduler: unknown scheduler 'liner'; did you mean 'linear'?"),
        ({"optimizer": "adamw_torhc"}, "training.optimizer: unknown optimizer 'adamw_torhc'; did you mean 'adamw_torch'?"),
        ({"extra": {"adam_beta": 0.9}}, "training.extra.adam_beta: unknown option; no field of transformers.TrainingArguments"),
        ({"extra": {"adam_beta2": "high"}}, "training.extra.adam_beta2: must be float (got 'high')"),
        ({"extra": {"learning_rate": 1}}, "training.extra.learning_rate: has its own place; set training.learning_rate"),
        ({"extra": {"remove_unused_columns": True}}, "training.extra.remove_unused_columns: is fixed to False"),
        ({"extra": {"fsdp": "full_shard"}}, "training.extra.fsdp: not supported"),
    ],
)
def test_training_options_are_checked_before_a_model_is_loaded(
    run: Callable[..., Finished], tmp_path: Path, training: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        run(model="/no/such/model", training=training)
    assert str(caught.value).startswith(message)


def test_extra_arguments_reach_the_trainer() -> None:
    config = RunConfig.parse({"model": "m", "dataset": "text", "training": {"extra": {"adam_beta2": 0.95}}})
    arguments = training_arguments(config.training, output=Path("runs/x"), evaluates=True)
    assert arguments.adam_beta2 == 0.95
    assert arguments.logging_nan_inf_filter is False


def test_optimizers_and_schedulers_go_by_the_trainers_names(run: Callable[..., Finished]) -> None:
    finished = run(training={"optimizer": "adamw_8bit", "scheduler": "cosine", "max_steps": 6, "warmup": 2})
    rates = [line["learning_rate"] for line in finished.run.read_metrics() if "loss" in line]
    assert rates[:3] == [0.0, 0.005, 0.01]
    assert rates[3] == pytest.approx(0.01 * 0.5 * (1 + math.cos(math.pi / 4)))


def test_what_is_quantised_and_adapted_is_said_and_gaps_are_named(run: Callable[..., Finished], caplog: Any) -> None:
    caplog.set_level("INFO", logger="qlora_core")
    run(quantizer=NF4(skip_modules=("down_proj",)), adapter=LoRA(r=4, target_modules=("q_proj",)))
    text = caplog.text
    assert "nf4 stores " in text
    assert "lora adapts 11.1 % of the linear weights" in text
    assert "not quantised: " in text
    assert "model.layers.0.mlp.down_proj.weight" in text
    assert "without an adapter: model.layers.0.mlp.down_proj.weight (11.1 %)" in text

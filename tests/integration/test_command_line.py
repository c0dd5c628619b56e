"""The command line end to end on a small model: train, eval, generate; what a user sees."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from qlora_core.cli.main import main


def qlora(*arguments: object) -> int:
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in arguments])
    return int(caught.value.code or 0)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, text: str) -> Path:
    """The folder of a run that `qlora train` made without a configuration file."""
    folder = tmp_path_factory.mktemp("cli")
    (folder / "corpus.txt").write_text(text[:20_000], encoding="utf-8")
    sets = ("data.sequence_length=64", "training.max_steps=20", "training.learning_rate=1e-2")
    overrides = [word for setting in sets for word in ("--set", setting)]
    code = qlora("train", "--model", tiny_model, "--data", folder / "corpus.txt", "--output", folder / "run", *overrides)
    assert code == 0
    return folder


def test_eval_shows_base_and_adapted_side_by_side(trained: Path, capsys: Any) -> None:
    assert qlora("eval", trained / "run", "--data", trained / "corpus.txt", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    base, adapted = report["base"], report["adapted"]
    assert base["tokens"] == adapted["tokens"] > 5000
    assert base["perplexity"] == pytest.approx(math.exp(base["loss"]))
    assert adapted["perplexity"] < 0.9 * base["perplexity"]
    assert qlora("eval", trained / "run", "--data", trained / "corpus.txt") == 0
    table = capsys.readouterr().out
    assert f"{base['perplexity']:.3f}" in table
    assert f"{adapted['tokens']:,}" in table


def test_eval_agrees_with_a_loss_computed_by_hand(trained: Path, capsys: Any) -> None:
    import torch

    from qlora_bitsandbytes import NF4
    from qlora_core import load_model, load_tokenizer

    assert qlora("eval", trained / "run", "--data", trained / "corpus.txt", "--json", "--batch-size", 1) == 0
    report = json.loads(capsys.readouterr().out)
    config = (trained / "run" / "config.yaml").read_text()
    folder = next(line.split()[1] for line in config.splitlines() if line.startswith("  path:"))
    tokenizer, model = load_tokenizer(folder), load_model(folder, NF4())
    ids = [*tokenizer((trained / "corpus.txt").read_text())["input_ids"], tokenizer.eos_token_id]
    nats, tokens = 0.0, 0
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        for start in range(0, len(ids), 64):
            block = torch.tensor([ids[start : start + 64]])
            logits = model(block).logits[0, :-1].double()
            nats -= float(logits.log_softmax(-1).gather(1, block[0, 1:, None]).sum())
            tokens += block.shape[1] - 1
    assert report["base"]["tokens"] == tokens
    assert report["base"]["loss"] == pytest.approx(nats / tokens, rel=1e-4)


def test_generate_is_greedy_by_default_and_streams(trained: Path, capsys: Any) -> None:
    texts = []
    for _ in range(2):
        assert qlora("generate", trained / "run", "The import", "--max-new-tokens", 12, "--json") == 0
        texts.append(json.loads(capsys.readouterr().out)["text"])
    assert texts[0] == texts[1]
    assert qlora("generate", trained / "run", "The import", "--max-new-tokens", 12) == 0
    assert capsys.readouterr().out == f"The import{texts[0]}\n"


def test_generate_samples_by_seed(trained: Path, capsys: Any) -> None:
    def sample(seed: int) -> str:
        options = ("--temperature", 1.5, "--top-p", 0.95, "--seed", seed, "--max-new-tokens", 12, "--json")
        assert qlora("generate", trained / "run", "The import", *options) == 0
        return str(json.loads(capsys.readouterr().out)["text"])

    assert sample(1) == sample(1)
    assert sample(1) != sample(2)


def test_generate_writes_with_the_kernels_of_the_run_and_without_them_where_they_are_gone(
    trained: Path, tmp_path: Path, capsys: Any
) -> None:
    shutil.copytree(trained / "run", tmp_path / "run")
    path = tmp_path / "run" / "config.yaml"
    config = yaml.safe_load(path.read_text(encoding="utf-8"))
    for kernels, said in (("fused", "kernels fused: 14 LoRA layers"), ("gone", "writing without the run's kernels: ")):
        path.write_text(yaml.safe_dump({**config, "kernels": kernels}), encoding="utf-8")
        assert qlora("generate", tmp_path / "run", "The import", "--max-new-tokens", 4, "--verbose") == 0
        out, err = capsys.readouterr()
        assert out.startswith("The import")
        assert said in err
    assert "'gone'" in err


def test_generate_takes_a_plain_model_too(tiny_model: Path, capsys: Any) -> None:
    assert qlora("generate", tiny_model, "The import", "--max-new-tokens", 4, "--json") == 0
    assert json.loads(capsys.readouterr().out)["prompt"] == "The import"


def test_training_again_from_the_resolved_configuration_repeats_the_run(trained: Path, capsys: Any) -> None:
    again = trained / "again"
    assert qlora("train", trained / "run" / "config.yaml", "--output", again) == 0
    one, two = (p / "adapter" / "adapter_model.safetensors" for p in (trained / "run", again))
    assert one.read_bytes() == two.read_bytes()


def test_quiet_says_nothing_but_json_says_the_result(trained: Path, capsys: Any) -> None:
    config = trained / "run" / "config.yaml"
    arguments = ("train", config, "--output", trained / "quiet", "--set", "training.max_steps=2", "--quiet")
    assert qlora(*arguments, "--set", "quantizer.skip_modules=[]") == 0
    captured = capsys.readouterr()
    assert captured.out == ""
    assert [line for line in captured.err.splitlines() if not line.startswith("warning: not quantised")] == []
    assert qlora(*arguments, "--overwrite", "--json") == 0
    assert json.loads(capsys.readouterr().out)["metrics"]["step"] == 2


def test_a_run_that_is_not_finished_is_named_as_such(tmp_path: Path, capsys: Any) -> None:
    assert qlora("eval", tmp_path, "--data", __file__) == 2
    assert "no run, config.yaml is missing; name a folder that `qlora train` wrote" in capsys.readouterr().err
    (tmp_path / "config.yaml").write_text("model: x\n")
    assert qlora("generate", tmp_path, "Hello") == 2
    assert "the run is not finished, adapter/ is missing" in capsys.readouterr().err

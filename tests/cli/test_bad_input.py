"""Bad input: exit code 2, one clear message that names the remedy, no traceback, and nothing on disk has changed."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

Refuse = Callable[..., str]


@pytest.fixture
def refuse(qlora: Callable[..., Any], here: Path, snapshot: Callable[[Path], dict[str, bytes]]) -> Refuse:
    """Return a function that runs a command which must be refused, and returns its message without "error: "."""

    def run(*arguments: object) -> str:
        before = snapshot(here)
        result = qlora(*arguments)
        assert result.code == 2, (result.code, result.err)
        assert result.out == ""
        assert "Traceback" not in result.err
        assert "\x1b" not in result.err
        assert result.err.count("error: ") == 1
        assert snapshot(here) == before
        return str(result.err.partition("error: ")[2].rstrip("\n"))

    return run


@pytest.fixture
def copy_model(tiny_model: Path, here: Path) -> Path:
    """A copy of the model, to be broken."""
    return Path(shutil.copytree(tiny_model, here / "model"))


# The configuration


def test_a_missing_configuration(refuse: Refuse) -> None:
    assert refuse("train", "none.yaml") == "none.yaml: no such file or directory; name an existing YAML file"


def test_neither_a_configuration_nor_model_and_data(refuse: Refuse) -> None:
    message = "name a configuration file, or both --model and --data; `qlora config init` writes a file to start from"
    assert refuse("train") == message
    assert refuse("train", "--model", "owner/name") == message


def test_an_unreadable_configuration_names_line_and_column(refuse: Refuse, here: Path) -> None:
    (here / "run.yaml").write_text("model: m\n  data: x\n")
    assert refuse("train", "run.yaml") == "run.yaml:2:7: not valid YAML: mapping values are not allowed here"


def test_a_duplicate_key_names_both_places(refuse: Refuse, here: Path) -> None:
    (here / "run.yaml").write_text("model: m\ndataset: text\nmodel: n\n")
    assert refuse("train", "run.yaml") == "run.yaml:3:1: duplicate key 'model', first on line 1; remove one of them"


def test_every_wrong_key_is_reported_with_its_line(refuse: Refuse, here: Path) -> None:
    (here / "run.yaml").write_text("model: m\ndataset: text\ntraining:\n  lr: 1\ndata:\n  packing: perhaps\n")
    lines = sorted(refuse("train", "run.yaml").splitlines())
    assert lines[0].startswith("run.yaml:4: training.lr: unknown option; training accepts epochs, ")
    assert lines[0].endswith("; did you mean 'learning_rate'?")
    assert lines[1].startswith("run.yaml:6: data.packing: must be true or false (got 'perhaps')")


def test_a_wrong_option_of_a_provider_is_reported_with_its_line(refuse: Refuse, here: Path) -> None:
    (here / "run.yaml").write_text("model: m\ndataset:\n  name: text\n  pth: x\nadapter:\n  name: lora\n  rank: 8\n")
    lines = sorted(refuse("train", "run.yaml").splitlines())
    assert [line.partition(": ")[0] for line in lines] == ["run.yaml:2", "run.yaml:4", "run.yaml:7"]
    assert "dataset.path: required" in lines[0]
    assert "dataset.pth: unknown option; text accepts path, " in lines[1]
    assert "adapter.rank: unknown option; lora accepts r, " in lines[2]


def test_an_unknown_key_in_an_override(refuse: Refuse, write_config: Callable[..., Path]) -> None:
    message = refuse("train", write_config(), "--set", "training.lerning_rate=1e-4")
    assert "training.lerning_rate: unknown option; training accepts epochs, " in message
    assert message.endswith("; did you mean 'learning_rate'?")
    assert "adapter.rnk: unknown option" in refuse("train", write_config(), "--set", "adapter.rnk=8")


def test_a_malformed_override(refuse: Refuse, write_config: Callable[..., Path]) -> None:
    assert refuse("train", write_config(), "--set", "seed") == (
        "--set seed: write key=value, such as training.learning_rate=1e-4"
    )


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "model.dtype=bf16",
            "model.dtype: must be 'auto', 'bfloat16', 'float16' or 'float32' (got 'bf16'); did you mean 'bfloat16'?",
        ),
        ("quantizer.compute_dtype=bf16", "quantizer.compute_dtype: must be 'auto', 'bfloat16', "),
        ("adapter.r=0", "adapter.r: must be at least 1 (got 0); rank, typically 8 to 64"),
        ("adapter.r=33", "adapter.r: 33 is larger than the layer "),
        (
            "adapter.target_modules=[query]",
            "adapter.target_modules: ('query',) matches nothing; the model's linear layers are ",
        ),
        (
            "adapter.target_modules=[q_proj, query]",
            "adapter.target_modules: 'query' matches nothing; the model's linear layers are ",
        ),
        ("adapter.target_modules=.*query", "adapter.target_modules: '.*query' matches nothing; the model's linear layers are "),
        ("adapter.modules_to_save=[head]", "adapter.modules_to_save: 'head' matches nothing; the model has "),
        ("quantizer=nf5", "quantizer: unknown quantizer 'nf5'; did you mean 'nf4'?; installed: ao_int8, fp4, int8, nf4, none"),
        ("adapter=none", "adapter: the adapter 'none' leaves nothing to train; choose another, such as lora"),
        (
            "adapter.init=pissa",
            "adapter.init: pissa subtracts B A from the base weights, and nf4 has packed them; use quantizer: none",
        ),
        ("training.optimizer=adam", "training.optimizer: unknown optimizer 'adam'"),
        ("training.scheduler=cosin", "training.scheduler: unknown scheduler 'cosin'; did you mean 'cosine'?"),
        ("training.extra.seed=3", "training.extra.seed: has its own place; set training.seed instead"),
        (
            "training.extra.adam_beta3=3",
            "training.extra.adam_beta3: unknown option; no field of transformers.TrainingArguments; did you mean 'adam_beta",
        ),
        ("training.extra.adam_beta1=x", "training.extra.adam_beta1: must be float (got 'x')"),
        ("callbacks=[{name: transformers, integration: tensorbord}]", "callbacks[0].integration: 'tensorbord' can't be used: "),
        ("tokens.add=[<eos>]", "tokens.add: '<eos>' is in the vocabulary already; leave it out"),
        ("training.epochs=.inf", "training.epochs: "),
    ],
)
def test_a_wrong_value_names_key_and_remedy(
    refuse: Refuse, write_config: Callable[..., Path], override: str, message: str
) -> None:
    assert message in refuse("train", write_config(), "--set", override)


def test_target_modules_that_match_nothing_name_those_that_exist(refuse: Refuse, write_config: Callable[..., Path]) -> None:
    message = refuse("train", write_config(adapter={"target_modules": ["query"]}))
    for name in ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"):
        assert name in message


def test_a_callback_that_needs_evaluation_without_evaluation_data(refuse: Refuse, write_config: Callable[..., Path]) -> None:
    wanting = {"data": {"eval_fraction": 0.0}}
    message = "data.eval_fraction: nothing is held out, and {} needs evaluation data; set it above 0"
    config = write_config(callbacks=["early_stopping"], **wanting)
    assert refuse("train", config) == message.format("callback 'early_stopping'")
    assert refuse("train", write_config(training={"keep": "best"}, **wanting)) == message.format("training.keep: best")


def test_a_plugin_module_that_does_not_exist(refuse: Refuse, write_config: Callable[..., Path]) -> None:
    assert refuse("train", write_config(), "-p", "no_such_module").endswith(
        "plugins[0]: 'no_such_module' can't be used: ModuleNotFoundError: No module named 'no_such_module'"
    )


# The data


def test_a_missing_text_names_the_working_directory(refuse: Refuse, write_config: Callable[..., Path], here: Path) -> None:
    message = refuse("train", write_config(dataset={"path": "none.txt"}))
    assert message.endswith(
        f"dataset.path: no file {str(here / 'none.txt')!r}; paths are relative to the working directory {here}"
    )


def test_a_missing_evaluation_text(refuse: Refuse, write_config: Callable[..., Path], here: Path) -> None:
    message = refuse("train", write_config(dataset={"eval_path": "none.txt"}))
    assert f"dataset.eval_path: no file {str(here / 'none.txt')!r}; " in message


def test_a_folder_without_texts(refuse: Refuse, write_config: Callable[..., Path], here: Path) -> None:
    (here / "texts").mkdir()
    message = refuse("train", write_config(dataset={"path": str(here / "texts")}))
    assert "holds no .txt or .md file; name the files, or a glob" in message


@pytest.mark.parametrize("content", ["", "\ufeff"])
def test_an_empty_text(refuse: Refuse, write_config: Callable[..., Path], here: Path, content: str) -> None:
    (here / "empty.txt").write_text(content, encoding="utf-8")
    message = refuse("train", write_config(dataset={"path": str(here / "empty.txt")}))
    assert message == "dataset: 'text' gives no tokens in the train data; it is empty"


def test_a_text_shorter_than_a_block(refuse: Refuse, write_config: Callable[..., Path], here: Path) -> None:
    (here / "short.txt").write_text("few")
    message = refuse("train", write_config(dataset={"path": str(here / "short.txt")}))
    assert message == (
        "data.eval_fraction: 'text' gives 1 sample of at most 32 tokens, too few to hold any out; set data.eval_fraction=0, "
        "a smaller data.sequence_length, or add data"
    )


def test_a_text_in_another_encoding(refuse: Refuse, write_config: Callable[..., Path], here: Path) -> None:
    (here / "latin.txt").write_bytes("für alle".encode("latin-1"))
    message = refuse("train", write_config(dataset={"path": str(here / "latin.txt")}))
    assert message.startswith(f"{here / 'latin.txt'}: not utf-8: ")
    assert message.endswith(" at byte 1; set dataset.encoding to the file's own, latin-1 for example")


# The model


@pytest.mark.parametrize("path", ["./none", "/none/at/all", "~/none", "a/b/c"])
def test_a_missing_model_folder(refuse: Refuse, write_config: Callable[..., Path], path: str) -> None:
    assert refuse("train", write_config(model=path)) == (
        f"model.path: no folder {path!r}; name a model folder or a hub id such as owner/name"
    )


def test_a_model_that_the_hub_does_not_give(refuse: Refuse, write_config: Callable[..., Path]) -> None:
    message = refuse("train", write_config(model="nobody/has-this-model"))
    assert message.startswith("model.path: 'nobody/has-this-model' is no model folder, and not to be had from the hub: ")


def test_a_file_in_place_of_a_model(refuse: Refuse, write_config: Callable[..., Path], here: Path) -> None:
    (here / "model.gguf").write_bytes(b"GGUF")
    assert refuse("train", write_config(model=str(here / "model.gguf"))) == (
        f"model.path: {str(here / 'model.gguf')!r} is a file; name the folder that holds config.json"
    )


def test_a_folder_that_is_no_model(refuse: Refuse, write_config: Callable[..., Path], here: Path) -> None:
    (here / "model").mkdir()
    message = refuse("train", write_config(model=str(here / "model")))
    assert message.startswith(f"model.path: {str(here / 'model')!r} is no model: it has no config.json")


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"model_type": "unheard_of"}', '{"model_type": "vit"}'])
def test_a_folder_whose_configuration_is_none_of_a_language_model(
    refuse: Refuse, write_config: Callable[..., Path], copy_model: Path, content: str
) -> None:
    (copy_model / "config.json").write_text(content)
    assert refuse("train", write_config(model=str(copy_model))).startswith(f"model.path: {str(copy_model)!r} ")


def test_a_model_without_weights(refuse: Refuse, write_config: Callable[..., Path], copy_model: Path) -> None:
    (copy_model / "model.safetensors").unlink()
    message = refuse("train", write_config(model=str(copy_model)))
    assert message.startswith(f"model.path: {str(copy_model)!r} can't be loaded with nf4: ")


@pytest.mark.parametrize("quantizer", ["nf4", "none"])
def test_a_model_whose_weights_are_cut_short(
    refuse: Refuse, write_config: Callable[..., Path], copy_model: Path, quantizer: str
) -> None:
    weights = copy_model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    message = refuse("train", write_config(model=str(copy_model), quantizer=quantizer))
    assert message.startswith(f"model.path: {str(copy_model)!r} can't be loaded with {quantizer}: ")


def test_a_model_that_lacks_a_weight(refuse: Refuse, write_config: Callable[..., Path], copy_model: Path) -> None:
    weights = load_file(copy_model / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, copy_model / "model.safetensors", metadata={"format": "pt"})
    message = refuse("train", write_config(model=str(copy_model)))
    assert message.startswith(f"model.path: {str(copy_model)!r} lacks weights (model.norm.weight")
    assert message.endswith("Get it again")


def test_a_model_with_a_weight_of_another_shape(refuse: Refuse, write_config: Callable[..., Path], copy_model: Path) -> None:
    weights = load_file(copy_model / "model.safetensors")
    weights["model.norm.weight"] = torch.ones(3)
    save_file(weights, copy_model / "model.safetensors", metadata={"format": "pt"})
    assert refuse("train", write_config(model=str(copy_model))).startswith(f"model.path: {str(copy_model)!r} ")


def test_a_model_with_fewer_embeddings_than_its_tokenizer_has_tokens(
    refuse: Refuse, write_config: Callable[..., Path], copy_model: Path
) -> None:
    path = copy_model / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "vocab_size": 100}))
    assert refuse("train", write_config(model=str(copy_model))) == (
        "model.path: the tokenizer has 384 tokens and the model only 100 embeddings; use the model's own tokenizer"
    )


def test_a_model_without_a_tokenizer(refuse: Refuse, write_config: Callable[..., Path], copy_model: Path) -> None:
    for path in copy_model.glob("*token*"):
        path.unlink()
    message = refuse("train", write_config(model=str(copy_model)))
    assert message.startswith(f"model.path: {str(copy_model)!r} has no tokenizer that transformers can load: ")


# The output


def test_an_output_folder_with_another_run(
    qlora: Callable[..., Any], refuse: Refuse, write_config: Callable[..., Path], here: Path
) -> None:
    config = write_config(training={"max_steps": 1})
    assert qlora("train", config, "-q").code == 0
    assert refuse("train", config) == (
        f"output: {here / 'out'} already holds a run; continue it with --resume, replace it with --overwrite, "
        "or name another folder"
    )
    assert refuse("train", config, "--resume", "step-9") == f"step-9 is no checkpoint; {here / 'out'} has step-1"


@pytest.mark.parametrize("override", ["adapter.r=99", "model=./none", "dataset.path=none.txt", "training.optimizer=x"])
def test_an_error_after_overwrite_leaves_the_old_run_untouched(
    qlora: Callable[..., Any], refuse: Refuse, write_config: Callable[..., Path], override: str
) -> None:
    config = write_config(training={"max_steps": 1})
    assert qlora("train", config, "-q").code == 0
    refuse("train", config, "--overwrite", "--set", override)


def test_a_text_that_turns_out_empty_leaves_the_old_run_untouched(
    qlora: Callable[..., Any], refuse: Refuse, write_config: Callable[..., Path], here: Path
) -> None:
    config = write_config(training={"max_steps": 1})
    assert qlora("train", config, "-q").code == 0
    (here / "empty.txt").write_text("")
    refuse("train", config, "--overwrite", "--data", here / "empty.txt")


def test_a_file_in_place_of_the_output_folder(refuse: Refuse, write_config: Callable[..., Path], here: Path) -> None:
    (here / "out").write_text("precious")
    assert refuse("train", write_config(), "--overwrite") == f"output: {here / 'out'} is a file; name a folder"


@pytest.mark.skipif(os.getuid() == 0, reason="root may write anywhere")
def test_an_output_folder_that_can_not_be_written(refuse: Refuse, write_config: Callable[..., Path], here: Path) -> None:
    (here / "locked").mkdir(mode=0o500)
    message = refuse("train", write_config(output=str(here / "locked" / "out")))
    assert message == f"output: {here / 'locked'} is not writable; name another folder"


def test_nothing_to_resume(refuse: Refuse, write_config: Callable[..., Path], here: Path) -> None:
    assert refuse("train", write_config(), "--resume") == f"output: {here / 'out'} holds no run to resume; leave out --resume"


# The other commands


def test_generating_from_nothing(refuse: Refuse, here: Path, tiny_model: Path) -> None:
    assert refuse("generate", "./none", "x") == (
        "model.path: no folder './none'; name a model folder or a hub id such as owner/name"
    )
    assert refuse("generate", tiny_model, "") == "the prompt is empty; write some text to go on from"
    assert refuse("generate", tiny_model, "x", "--quantizer", "nf5").startswith(
        "--quantizer: unknown quantizer 'nf5'; did you mean 'nf4'?"
    )
    (here / "unfinished").mkdir()
    (here / "unfinished" / "config.yaml").write_text("model: m\ndataset: text\n")
    assert refuse("generate", here / "unfinished", "x") == (
        f"{here / 'unfinished'}: the run is not finished, adapter/ is missing; finish it with `qlora train --resume`"
    )


def test_scoring_what_is_no_run_or_no_text(
    qlora: Callable[..., Any], refuse: Refuse, write_config: Callable[..., Path], here: Path, text_file: Path
) -> None:
    assert refuse("eval", here / "none", "--data", text_file) == (
        f"{here / 'none'}: no run, config.yaml is missing; name a folder that `qlora train` wrote"
    )
    assert qlora("train", write_config(training={"max_steps": 1}), "-q").code == 0
    assert "no file" in refuse("eval", here / "out", "--data", "none.txt")
    (here / "empty.txt").write_text("")
    assert (
        refuse("eval", here / "out", "--data", "empty.txt") == "dataset: 'text' gives no tokens in the train data; it is empty"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], "No such command 'trian'"),
        (["train", "--lr", "1"], "No such option: --lr"),
        (["train", "a.yaml", "b.yaml"], "unexpected extra argument"),
        (["generate", "x"], "Missing argument"),
        (["generate", "x", "y", "--max-new-tokens", "0"], "Invalid value for '--max-new-tokens'"),
        (["demo", "--steps", "many"], "Invalid value for '--steps'"),
    ],
)
def test_a_command_line_that_does_not_parse(qlora: Callable[..., Any], arguments: list[str], message: str) -> None:
    result = qlora(*arguments)
    assert (result.code, result.out) == (2, "")
    assert message in " ".join(result.err.replace("│", " ").split())
    assert "Traceback" not in result.err
    assert "\x1b" not in result.err

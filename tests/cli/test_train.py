"""`qlora train`: a run from a file or from options, what it says, and what it leaves."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

WRITTEN = {"config.yaml", "provenance.json", "metrics.jsonl", "adapter", "checkpoints"}


def test_a_run_leaves_the_files_of_a_run_directory_and_says_where(
    qlora: Callable[..., Any], write_config: Callable[..., Path], here: Path
) -> None:
    result = qlora("train", write_config())
    assert result.code == 0, result.err
    assert result.out == f'Done: {here / "out"}\nTry it with: qlora generate {here / "out"} "..."\n'
    assert {path.name for path in (here / "out").iterdir()} == WRITTEN
    lines = [json.loads(line) for line in (here / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2]
    assert (here / "out" / "adapter" / "adapter_model.safetensors").is_file()
    assert "\x1b" not in result.out + result.err
    assert "data: " in result.err
    assert "lora adapts 100.0 % of the linear weights" in result.err


def test_as_json_only_one_object_goes_to_standard_output(
    qlora: Callable[..., Any], write_config: Callable[..., Path], here: Path
) -> None:
    result = qlora("train", write_config(callbacks=["progress"]), "--json")
    report = json.loads(result.out)
    assert (result.code, report["run"]) == (0, str(here / "out"))
    assert report["metrics"]["step"] == 2
    assert report["metrics"]["loss"] > 0
    assert report["metrics"]["perplexity"] > 1
    assert "\x1b" not in result.err


def test_a_quiet_run_says_nothing(qlora: Callable[..., Any], write_config: Callable[..., Path]) -> None:
    result = qlora("train", write_config(quantizer="none", callbacks=["progress"]), "--quiet")
    assert (result.code, result.out, result.err) == (0, "", "")


def test_a_quiet_run_still_warns_and_a_verbose_one_says_more(
    qlora: Callable[..., Any], write_config: Callable[..., Path], here: Path
) -> None:
    config = write_config(adapter={"target_modules": ["q_proj"]})
    quiet = qlora("train", config, "--quiet")
    assert (quiet.code, quiet.out) == (0, "")
    assert quiet.err.startswith("warning: ")
    assert "without an adapter: " in quiet.err
    verbose = qlora("train", config, "--verbose", "--overwrite")
    assert verbose.code == 0
    assert len(verbose.err) > len(quiet.err)


def test_progress_is_plain_lines_where_there_is_no_terminal(
    qlora: Callable[..., Any], write_config: Callable[..., Path]
) -> None:
    result = qlora("train", write_config(callbacks=["progress"]))
    lines = [line for line in result.err.splitlines() if line.startswith("step ")]
    assert lines[0].startswith("step 1/2 · loss ")
    assert " tokens/s · peak " in lines[0]
    assert any(" · eval loss " in line for line in lines)
    assert "\x1b" not in result.err


def test_without_a_file_a_model_and_a_text_are_enough(
    qlora: Callable[..., Any], here: Path, tiny_model: Path, text_file: Path
) -> None:
    arguments = ["--set", "training.max_steps=1", "--set", "data.sequence_length=32", "--set", "adapter.r=2", "--quiet"]
    result = qlora("train", "--model", tiny_model, "--data", text_file, *arguments)
    assert result.code == 0, result.err
    config = yaml.safe_load((here / "runs" / "corpus" / "config.yaml").read_text())
    assert config["model"]["path"] == str(tiny_model)
    assert config["dataset"]["path"] == str(text_file)
    assert (config["quantizer"]["name"], config["adapter"]["r"]) == ("bitsandbytes:nf4", 2)


def test_options_win_over_the_file(
    qlora: Callable[..., Any], write_config: Callable[..., Path], here: Path, tiny_model: Path, text_file: Path
) -> None:
    other = here / "other [text].txt"
    other.write_text(text_file.read_text()[:4000])
    config = write_config(model="nobody/nothing", dataset={"path": "missing.txt"})
    arguments = ["--model", tiny_model, "--data", other, "--output", here / "second [run]", "--set", "training.max_steps=1"]
    result = qlora("train", config, *arguments)
    assert result.code == 0, result.err
    assert f"Done: {here / 'second [run]'}\n" in result.out
    resolved = yaml.safe_load((here / "second [run]" / "config.yaml").read_text())
    assert resolved["dataset"]["path"] == str(other)
    assert resolved["training"]["max_steps"] == 1


def test_the_resolved_configuration_of_a_run_repeats_it(
    qlora: Callable[..., Any], write_config: Callable[..., Path], here: Path, tmp_path: Path
) -> None:
    assert qlora("train", write_config(), "-q").code == 0
    again = tmp_path / "again"
    assert qlora("train", here / "out" / "config.yaml", "--output", again, "-q").code == 0
    losses = [
        [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines() if '"loss"' in line]
        for folder in (here / "out", again)
    ]
    assert losses[0] == losses[1]
    weights = "adapter/adapter_model.safetensors"
    assert (again / weights).read_bytes() == (here / "out" / weights).read_bytes()


def test_overwriting_replaces_the_run(qlora: Callable[..., Any], write_config: Callable[..., Path], here: Path) -> None:
    config = write_config(training={"save_steps": 1, "max_steps": 2})
    assert qlora("train", config, "-q").code == 0
    (here / "out" / "crash.txt").write_text("old")
    assert qlora("train", config, "-q", "--overwrite", "--set", "training.max_steps=1").code == 0
    assert {path.name for path in (here / "out").iterdir()} == WRITTEN
    assert [path.name for path in (here / "out" / "checkpoints").iterdir()] == ["step-1"]


@pytest.mark.parametrize("arguments", [["--resume"], ["--resume", "step-1"], ["--resume=step-1"]])
def test_a_run_goes_on_from_a_checkpoint_by_any_form_of_the_option(
    qlora: Callable[..., Any], write_config: Callable[..., Path], here: Path, arguments: list[str]
) -> None:
    config = write_config(training={"max_steps": 1})
    assert qlora("train", config, "-q").code == 0
    result = qlora("train", config, *arguments, "--set", "training.max_steps=3")
    assert result.code == 0, result.err
    assert f"resuming from {here / 'out' / 'checkpoints' / 'step-1'}" in result.err
    lines = [json.loads(line) for line in (here / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3]
    assert {path.name for path in (here / "out").iterdir()} == WRITTEN


def test_a_run_generates_and_is_scored(
    qlora: Callable[..., Any], write_config: Callable[..., Path], here: Path, text_file: Path
) -> None:
    assert qlora("train", write_config(), "-q").code == 0
    generated = qlora("generate", here / "out", "The import", "--max-new-tokens", "4", "--json")
    report = json.loads(generated.out)
    assert (generated.code, report["prompt"]) == (0, "The import")
    streamed = qlora("generate", here / "out", "The import", "--max-new-tokens", "4")
    assert (streamed.code, streamed.out) == (0, f"The import{report['text']}\n")
    assert qlora("generate", here / "out", "The import", "--max-new-tokens", "4", "--quiet").out == f"{report['text']}\n"
    scored = qlora("eval", here / "out", "--data", text_file, "--json")
    result = json.loads(scored.out)
    assert (scored.code, result["data"]) == (0, str(text_file))
    assert result["base"]["tokens"] == result["adapted"]["tokens"] > 1000
    assert result["base"]["loss"] != result["adapted"]["loss"]
    table = qlora("eval", here / "out", "--data", text_file)
    assert f"{result['adapted']['perplexity']:.3f}" in table.out
    assert "\x1b" not in table.out

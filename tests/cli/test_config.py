"""`qlora config`: a file to start from, a configuration resolved, and its JSON Schema."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from qlora_core.config import RunConfig


@pytest.fixture
def minimal(here: Path) -> Path:
    (here / "corpus.txt").write_text("some text")
    (here / "run.yaml").write_text("model: some/model\ndataset: {name: text, path: corpus.txt}\n")
    return here / "run.yaml"


# init


def test_init_writes_a_file_that_shows_and_says_how_to_run_it(qlora: Callable[..., Any], here: Path) -> None:
    (here / "corpus.txt").write_text("some text")
    result = qlora("config", "init")
    assert (result.code, result.err) == (0, "")
    assert result.out == "Wrote qlora.yaml. Run it with: qlora train qlora.yaml\n"
    config = RunConfig.read(here / "qlora.yaml")
    assert config.model.path == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert config.output == str(here / "runs" / "qlora")
    assert qlora("config", "show", "qlora.yaml").code == 0


def test_init_takes_file_model_and_data(qlora: Callable[..., Any], here: Path) -> None:
    result = qlora("config", "init", "my [first] run.yaml", "--model", "owner/name", "--data", "a b.txt")
    assert result.out.startswith("Wrote my [first] run.yaml. ")
    config = RunConfig.read(here / "my [first] run.yaml")
    assert (config.model.path, config.dataset.provider_options["path"]) == ("owner/name", "a b.txt")
    assert config.output == str(here / "runs" / "my [first] run")


def test_init_replaces_a_file_only_when_told_to(qlora: Callable[..., Any], here: Path) -> None:
    (here / "qlora.yaml").write_text("precious")
    result = qlora("config", "init")
    assert (result.code, result.out) == (2, "")
    assert result.err == "error: qlora.yaml exists already; name another file, or replace it with --force\n"
    assert (here / "qlora.yaml").read_text() == "precious"
    assert qlora("config", "init", "--force").code == 0
    assert (here / "qlora.yaml").read_text() != "precious"


def test_init_into_a_folder_that_does_not_exist_is_refused(qlora: Callable[..., Any], here: Path) -> None:
    result = qlora("config", "init", "none/run.yaml")
    assert (result.code, result.err) == (2, "error: none is no folder; make it first\n")
    assert list(here.iterdir()) == []


def test_init_onto_a_folder_is_refused_even_with_force(qlora: Callable[..., Any], here: Path) -> None:
    (here / "folder").mkdir()
    result = qlora("config", "init", "folder", "--force")
    assert (result.code, result.err) == (2, "error: folder is a folder; name a file in it\n")


# show


def test_show_fills_in_every_default_and_names_plugins(qlora: Callable[..., Any], minimal: Path, here: Path) -> None:
    result = qlora("config", "show", minimal)
    assert (result.code, result.err) == (0, "")
    shown = yaml.safe_load(result.out)
    assert shown["quantizer"] == {
        "name": "bitsandbytes:nf4",
        "double_quant": True,
        "compute_dtype": "auto",
        "storage_dtype": "uint8",
        "skip_modules": [],
    }
    assert shown["dataset"]["path"] == str(here / "corpus.txt")
    assert shown["output"] == str(here / "runs" / "run")
    assert "\x1b" not in result.out


def test_what_show_prints_shows_as_itself(qlora: Callable[..., Any], minimal: Path, here: Path) -> None:
    first = qlora("config", "show", minimal).out
    (here / "resolved.yaml").write_text(first)
    assert qlora("config", "show", "resolved.yaml").out == first


def test_show_as_json_has_the_same(qlora: Callable[..., Any], minimal: Path) -> None:
    result = qlora("config", "show", minimal, "--json")
    assert json.loads(result.out) == yaml.safe_load(qlora("config", "show", minimal).out)
    assert result.out.count("\n") == 1


def test_show_applies_overrides_in_order(qlora: Callable[..., Any], minimal: Path) -> None:
    arguments = ["--set", "training.learning_rate=1e-4", "--set", "adapter.r=8", "--set", "adapter.r=4"]
    shown = yaml.safe_load(qlora("config", "show", minimal, *arguments).out)
    assert (shown["training"]["learning_rate"], shown["adapter"]["r"]) == (1e-4, 4)


def test_show_uses_modules_of_the_command_line_and_of_the_file(
    qlora: Callable[..., Any], minimal: Path, write_module: Callable[[str, str], str]
) -> None:
    source = """
        import qlora_core

        class Bell(qlora_core.CallbackFactory):
            name = "{name}"
            def build(self, run): return None

        @qlora_core.hookimpl
        def qlora_callbacks(): return [Bell]
    """
    first, second = (write_module(f"{name}_for_show", source.format(name=name)) for name in ("bell", "gong"))
    minimal.write_text(minimal.read_text() + f"plugins: [{first}]\ncallbacks: [bell, gong]\n")
    shown = yaml.safe_load(qlora("config", "show", minimal, "-p", second).out)
    assert [callback["name"] for callback in shown["callbacks"]] == [f"{first}:bell", f"{second}:gong"]
    assert shown["plugins"] == [first, second]


@pytest.mark.parametrize("value", ["my_module", "3", "{a: 1}"])
def test_plugins_that_are_no_list_are_refused_beside_the_option_too(
    qlora: Callable[..., Any], minimal: Path, value: str
) -> None:
    minimal.write_text(minimal.read_text() + f"plugins: {value}\n")
    result = qlora("config", "show", minimal, "-p", "json")
    assert result.code == 2
    assert result.err.startswith(f"error: {minimal}:3: plugins: must be a list (got ")


def test_show_refuses_what_does_not_go_together(qlora: Callable[..., Any], minimal: Path) -> None:
    result = qlora("config", "show", minimal, "--set", "adapter=none")
    assert (result.code, result.out) == (2, "")
    assert "adapter: the adapter 'none' leaves nothing to train; choose another, such as lora" in result.err


def test_show_of_a_disabled_plugins_provider_says_that_it_is_disabled(qlora: Callable[..., Any], minimal: Path) -> None:
    result = qlora("config", "show", minimal, "--disable-plugin", "peft")
    assert result.code == 2
    assert "adapter: unknown adapter 'lora'" in result.err
    assert "plugin 'peft' is disabled" in result.err


# schema


def test_the_schema_is_json_with_the_options_of_installed_plugins(qlora: Callable[..., Any]) -> None:
    result = qlora("config", "schema")
    assert (result.code, result.err) == (0, "")
    schema = json.loads(result.out)
    assert schema["required"] == ["model", "dataset"]
    assert "double_quant" in result.out
    assert "double_quant" not in qlora("config", "schema", "--disable-plugin", "bitsandbytes").out

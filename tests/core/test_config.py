"""The configuration: short forms, defaults, refusals with key and remedy, overrides, and picking the parts."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qlora_core.config import RunConfig
from qlora_core.errors import ConfigError
from qlora_core.parts import Parts, resolve
from qlora_core.registry import Registry

MINIMAL: dict[str, Any] = {"model": "some/model", "dataset": {"name": "text", "path": "corpus.txt"}}


@pytest.fixture(scope="module")
def registry() -> Registry:
    return Registry()


def parse(*overrides: str, **sections: Any) -> RunConfig:
    return RunConfig.parse({**MINIMAL, **sections}, overrides)


def refusal(*overrides: str, **sections: Any) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        parse(*overrides, **sections)
    return str(caught.value).splitlines()


def resolve_refusal(registry: Registry, **sections: Any) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        resolve(parse(**sections), registry)
    return str(caught.value).splitlines()


# Forms and defaults


def test_short_forms_equal_long_forms() -> None:
    short = parse(quantizer="int8", adapter="lora", kernels="reference", callbacks=["progress"])
    long = parse(
        model={"path": "some/model"},
        quantizer={"name": "int8"},
        adapter={"name": "lora"},
        kernels={"name": "reference"},
        callbacks=[{"name": "progress"}],
    )
    assert short == long
    assert parse(dataset="text").dataset.name == "text"


def test_only_the_model_and_the_data_are_required() -> None:
    with pytest.raises(ConfigError) as caught:
        RunConfig.parse({})
    assert str(caught.value) == (
        "model: required; the base model\n"
        "dataset: required; where examples come from; a list mixes several, each with a weight (1 by default)"
    )


def test_defaults_are_those_of_the_documentation() -> None:
    config = parse()
    assert (config.quantizer.name, config.adapter.name, config.kernels.name) == ("nf4", "lora", "auto")
    assert [callback.name for callback in config.callbacks] == ["progress"]
    assert (config.model.dtype, config.model.upcast, config.model.trust_remote_code) == ("auto", False, False)
    assert (config.data.sequence_length, config.data.packing, config.data.eval_fraction) == (512, True, 0.1)
    training = config.training
    assert (training.epochs, training.max_steps, training.batch_size, training.gradient_accumulation) == (1.0, None, 2, 1)
    assert (training.learning_rate, training.scheduler, training.warmup) == (2e-4, "linear", 0.03)
    assert (training.weight_decay, training.max_grad_norm, training.optimizer) == (0.0, 1.0, "adamw_torch_fused")
    assert (training.seed, training.keep, training.save_total_limit, training.extra) == (0, "last", 2, {})
    assert (config.tokens.add, config.plugins, config.disable_plugins) == ((), (), ())


def test_a_model_folder_becomes_absolute_and_a_hub_id_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path)
    assert parse(model="model").model.path == str(tmp_path / "model")
    assert parse(model="owner/name").model.path == "owner/name"


def test_the_output_is_absolute_so_that_the_resolved_file_runs_from_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert parse(output="runs/a").output == str(tmp_path / "runs" / "a")
    assert parse(output="~/runs").output == str(tmp_path / "home" / "runs")
    assert parse().output == str(tmp_path / "runs" / "run")


def test_a_configuration_can_not_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        parse().training.seed = 3  # type: ignore[misc]


# Refusals


@pytest.mark.parametrize(
    ("sections", "key", "owner", "guess"),
    [
        ({"modle": "x"}, "modle", "the configuration accepts model, quantizer, adapter,", "'model'"),
        ({"model": {"path": "x", "dtyp": 1}}, "model.dtyp", "model accepts path, revision, dtype,", "'dtype'"),
        (
            {"data": {"sequence_lenght": 8}},
            "data.sequence_lenght",
            "data accepts sequence_length, packing,",
            "'sequence_length'",
        ),
        ({"data": {"max_length": 8}}, "data.max_length", "data accepts sequence_length,", "'sequence_length'"),
        ({"tokens": {"ad": []}}, "tokens.ad", "tokens accepts add", "'add'"),
        ({"training": {"learningrate": 1}}, "training.learningrate", "training accepts epochs, max_steps,", "'learning_rate'"),
        ({"training": {"lr": 1}}, "training.lr", "training accepts epochs,", "'learning_rate'"),
        ({"training": {"num_train_epochs": 1}}, "training.num_train_epochs", "training accepts epochs,", "'epochs'"),
        ({"training": {"warmup_ratio": 1}}, "training.warmup_ratio", "training accepts epochs,", "'warmup'"),
    ],
)
def test_an_unknown_key_is_refused_at_every_level_with_what_is_accepted(
    sections: dict[str, Any], key: str, owner: str, guess: str
) -> None:
    (line,) = refusal(**sections)
    assert line.startswith(f"{key}: unknown option; {owner}")
    assert line.endswith(f"; did you mean {guess}?")


@pytest.mark.parametrize(
    ("sections", "key", "owner", "guess"),
    [
        (
            {"quantizer": {"name": "nf4", "double_quantt": 1}},
            "quantizer.double_quantt",
            "nf4 accepts double_quant,",
            "'double_quant'",
        ),
        ({"adapter": {"name": "lora", "rank": 8}}, "adapter.rank", "lora accepts r, alpha, dropout,", "'r'"),
        ({"adapter": {"name": "lora", "lora_alpha": 8}}, "adapter.lora_alpha", "lora accepts r, alpha,", "'alpha'"),
        ({"dataset": {"name": "text", "path": "x", "encodng": 1}}, "dataset.encodng", "text accepts path,", "'encoding'"),
        (
            {"callbacks": ["progress", {"name": "early_stopping", "patienc": 1}]},
            "callbacks[1].patienc",
            "early_stopping accepts patience, min_delta",
            "'patience'",
        ),
    ],
)
def test_an_unknown_option_of_a_provider_is_refused_at_its_full_path(
    registry: Registry, sections: dict[str, Any], key: str, owner: str, guess: str
) -> None:
    (line,) = resolve_refusal(registry, **sections)
    assert line.startswith(f"{key}: unknown option; {owner}")
    assert line.endswith(f"; did you mean {guess}?")


def test_an_option_of_a_provider_that_has_none_is_refused(registry: Registry) -> None:
    assert resolve_refusal(registry, callbacks=[{"name": "progress", "color": "red"}]) == [
        "callbacks[0].color: unknown option; progress accepts no options"
    ]
    assert resolve_refusal(registry, quantizer={"name": "none", "bits": 4}) == [
        "quantizer.bits: unknown option; none accepts no options"
    ]


def test_an_option_beside_kernels_auto_is_refused(registry: Registry) -> None:
    (line,) = resolve_refusal(registry, kernels={"name": "auto", "fused": True})
    assert line.startswith("kernels.fused: ")


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"model": 3}, "model: must be a mapping of options (got 3)"),
        ({"model": {"path": ""}}, "model.path: "),
        ({"quantizer": ["nf4"]}, "quantizer: must be a mapping of options (got ['nf4'])"),
        ({"quantizer": {"double_quant": True}}, "quantizer.name: required; the provider's name, or plugin:name"),
        ({"callbacks": "progress"}, "callbacks: must be a list (got 'progress')"),
        ({"callbacks": [3]}, "callbacks[0]: must be a mapping of options (got 3)"),
        ({"plugins": "my_module"}, "plugins: must be a list (got 'my_module')"),
        ({"data": {"packing": "maybe"}}, "data.packing: must be true or false (got 'maybe')"),
        ({"data": {"sequence_length": "long"}}, "data.sequence_length: must be a whole number (got 'long')"),
        ({"data": {"sequence_length": 1}}, "data.sequence_length: must be at least 2 (got 1)"),
        ({"data": {"eval_fraction": 1}}, "data.eval_fraction: must be less than 1.0 (got 1)"),
        ({"data": {"eval_fraction": -0.1}}, "data.eval_fraction: must be at least 0.0 (got -0.1)"),
        ({"training": {"learning_rate": 0}}, "training.learning_rate: must be more than 0.0 (got 0)"),
        ({"training": {"learning_rate": "fast"}}, "training.learning_rate: must be a number (got 'fast')"),
        ({"training": {"epochs": 0}}, "training.epochs: must be more than 0.0 (got 0)"),
        ({"training": {"max_steps": 1.5}}, "training.max_steps: must be a whole number (got 1.5)"),
        ({"training": {"batch_size": 0}}, "training.batch_size: must be at least 1 (got 0)"),
        ({"training": {"seed": -1}}, "training.seed: must be at least 0 (got -1)"),
        ({"training": {"extra": []}}, "training.extra: must be a mapping of options (got [])"),
        ({"training": {"extra": {"adam_beta1": 1}}}, "training.extra: adam_beta1 must be at least 0 and less than 1 (got 1)"),
        ({"training": {"extra": {"adam_beta2": -0.1}}}, "training.extra: adam_beta2 must be at least 0 and less than 1"),
        ({"training": {"extra": {"adam_epsilon": -1}}}, "training.extra: adam_epsilon must be at least 0 and less than inf"),
        ({"training": {"keep": "all"}}, "training.keep: must be 'last' or 'best' (got 'all')"),
        ({"tokens": {"add": "<new>"}}, "tokens.add: must be a list (got '<new>')"),
        ({"tokens": {"add": ["<a>", "<a>"]}}, "tokens.add: the same token stands twice"),
        ({"tokens": {"add": ["<a>", " "]}}, "tokens.add: a token can't be empty or only spaces"),
        ({"output": None}, "output: must be text (got None)"),
        ({"output": "/a\0b"}, "output: '/a\\x00b' can be no path (embedded null byte); name another one"),
        ({"output": "/" + "a" * 300}, f"output: '/{'a' * 78}... can be no path (it is too long); name another one"),
        ({"model": "/a\0b"}, "model.path: '/a\\x00b' can be no path (embedded null byte); name another one"),
        ({"model": "/" + "a" * 300}, f"model.path: '/{'a' * 78}... can be no path (it is too long); name another one"),
        ({"model": "~no-such-user/x"}, "model.path: there is no home folder '~no-such-user'; name a model folder or a hub id"),
        ({"dataset": [{"name": "text", "weight": 1e9}]}, "dataset[0].weight: must be at most 1000.0 (got 1000000000.0)"),
    ],
)
def test_a_wrong_value_names_its_key_what_is_wanted_and_what_was_given(sections: dict[str, Any], message: str) -> None:
    (line,) = refusal(**sections)
    assert line.startswith(message)


@pytest.mark.skipif(os.getuid() == 0, reason="root may read anything")
def test_an_output_in_a_folder_of_somebody_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0)
    (line,) = refusal(output=str(tmp_path / "locked" / "out"))
    assert line.endswith("is in a folder that is not yours to read; name another one")


@pytest.mark.parametrize("key", ["epochs", "learning_rate", "warmup", "weight_decay"])
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_number_that_is_not_finite_is_refused(key: str, value: float) -> None:
    (line,) = refusal(training={key: value})
    assert line.startswith(f"training.{key}: ")
    assert f"(got {value})" in line


@pytest.mark.parametrize(
    ("name", "guess"), [("bf16", "; did you mean 'bfloat16'?"), ("Float32", "; did you mean 'float32'?"), ("int4", "")]
)
def test_a_wrong_dtype_name_lists_those_that_exist(name: str, guess: str) -> None:
    accepted = "'auto', 'bfloat16', 'float16' or 'float32'"
    assert refusal(model={"path": "x", "dtype": name}) == [f"model.dtype: must be {accepted} (got {name!r}){guess}"]


def test_problems_of_all_sections_are_reported_together() -> None:
    lines = refusal(data={"packin": 1}, training={"seed": -1, "lr": 1}, colour="red")
    assert {line.partition(":")[0] for line in lines} == {"data.packin", "training.seed", "training.lr", "colour"}


def test_problems_of_all_providers_are_reported_together(registry: Registry) -> None:
    lines = resolve_refusal(
        registry,
        quantizer="nf5",
        adapter={"name": "lora", "r": 0, "alpha": "x"},
        dataset={"name": "text"},
        kernels="turbo",
        callbacks=[{"name": "early_stopping", "patience": 0}],
        disable_plugins=["txet"],
    )
    keys = {line.partition(":")[0] for line in lines}
    expected = {"quantizer", "adapter.r", "adapter.alpha", "dataset.path", "kernels", "callbacks[0].patience"}
    assert keys == {*expected, "disable_plugins[0]"}


# Files


def test_each_problem_of_a_file_names_its_line(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(
        "model: some/model\ndataset: text\ntraining:\n  seed: 1\n  batch_size: 0\ncallbacks:\n  - progress\n  - 3\n"
    )
    with pytest.raises(ConfigError) as caught:
        RunConfig.read(path)
    lines = sorted(str(caught.value).splitlines())
    assert lines[0].startswith(f"{path}:5: training.batch_size: must be at least 1 (got 0)")
    assert lines[1].startswith(f"{path}:8: callbacks[1]: must be a mapping of options (got 3)")


def test_a_missing_key_of_a_section_names_the_line_of_the_section(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("dataset: text\n\nmodel:\n  dtype: auto\n")
    with pytest.raises(ConfigError) as caught:
        RunConfig.read(path)
    assert str(caught.value).startswith(f"{path}:3: model.path: required; ")


def test_a_learning_rate_without_a_point_is_a_number(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("model: m\ndataset: text\ntraining: {learning_rate: 2e-4}\n")
    assert RunConfig.read(path).training.learning_rate == 2e-4


def test_a_configuration_written_as_yaml_reads_back_the_same(tmp_path: Path) -> None:
    config = parse(
        model={"path": "owner/näme: #1", "revision": "2e4", "dtype": "float32", "upcast": True},
        quantizer={"name": "nf4", "double_quant": False},
        adapter={"name": "lora", "target_modules": ["q_proj", "v_proj"], "alpha": 1e-5},
        dataset={"name": "text", "path": ["a b.txt", "yes"], "separator": "\n\n"},
        data={"eval_fraction": 0.0},
        tokens={"add": ["<a>", "1e5", "yes", "null", "~", "1_000", "2020-01-01", " x", "é", "'"]},
        callbacks=[],
        training={"learning_rate": 1e-5, "epochs": 1e20, "extra": {"adam_beta2": 0.95, "x": {"y": [1, None]}}},
        output="runs/on",
        plugins=["a.b"],
    )
    path = tmp_path / "config.yaml"
    path.write_text(config.to_yaml(), encoding="utf-8")
    assert RunConfig.read(path) == config


def test_a_resolved_configuration_resolves_to_itself(tmp_path: Path, registry: Registry) -> None:
    resolved, parts = resolve(parse(adapter={"name": "lora", "target_modules": ["q_proj"]}), registry)
    path = tmp_path / "config.yaml"
    path.write_text(resolved.to_yaml(), encoding="utf-8")
    again, same_parts = resolve(RunConfig.read(path), registry)
    assert again == resolved
    assert again.to_yaml() == resolved.to_yaml()
    assert [provider.options for _, provider in same_parts.located()] == [provider.options for _, provider in parts.located()]


def test_a_resolved_configuration_names_plugins_and_fills_in_every_default(registry: Registry) -> None:
    resolved, parts = resolve(parse(), registry)
    assert resolved.quantizer.name == "bitsandbytes:nf4"
    assert resolved.quantizer.provider_options == {
        "double_quant": True,
        "compute_dtype": "auto",
        "storage_dtype": "uint8",
        "skip_modules": [],
    }
    assert (resolved.adapter.name, resolved.dataset.name) == ("peft:lora", "text:text")
    assert [callback.name for callback in resolved.callbacks] == ["console:progress"]
    assert resolved.dataset.provider_options["path"] == os.path.abspath("corpus.txt")
    assert (parts.quantizer.name, parts.adapter.name, parts.datasets[0].source.name) == ("nf4", "lora", "text")
    assert [kernels.name for kernels in parts.kernels] == ["fused", "reference"]


# Overrides


@pytest.mark.parametrize(
    ("override", "where", "value"),
    [
        ("training.learning_rate=1e-4", ("training", "learning_rate"), 1e-4),
        ("training.extra.adam_beta2=0.9", ("training", "extra", "adam_beta2"), 0.9),
        ("data.packing=false", ("data", "packing"), False),
        ("model.dtype=float32", ("model", "dtype"), "float32"),
        ("model=other/model", ("model", "path"), "other/model"),
        ("model.path=a=b", ("model", "path"), "a=b"),
        ("quantizer=int8", ("quantizer", "name"), "int8"),
        ("quantizer.double_quant=false", ("quantizer", "double_quant"), False),
        ("adapter.target_modules=[q_proj, v_proj]", ("adapter", "target_modules"), ["q_proj", "v_proj"]),
        ("dataset.path=other.txt", ("dataset", "path"), "other.txt"),
        ("callbacks=[early_stopping]", ("callbacks", 0, "name"), "early_stopping"),
        ("callbacks.0=early_stopping", ("callbacks", 0, "name"), "early_stopping"),
        ("callbacks.0.name=early_stopping", ("callbacks", 0, "name"), "early_stopping"),
        (" training.seed =3", ("training", "seed"), 3),
    ],
)
def test_an_override_reaches_any_key_and_makes_short_forms_long(override: str, where: tuple[str, ...], value: Any) -> None:
    found: Any = parse(override).model_dump()
    for part in where:
        found = found[part]
    assert found == value


def test_an_override_keeps_what_stands_beside_it() -> None:
    config = parse("quantizer.double_quant=false", quantizer="fp4")
    assert (config.quantizer.name, config.quantizer.provider_options) == ("fp4", {"double_quant": False})
    config = parse("model.dtype=float16")
    assert (config.model.path, config.model.dtype) == ("some/model", "float16")
    config = parse("callbacks.1.patience=5", callbacks=["progress", "early_stopping"])
    assert [callback.name for callback in config.callbacks] == ["progress", "early_stopping"]
    assert config.callbacks[1].provider_options == {"patience": 5}


def test_a_later_override_wins_and_the_given_data_stays_as_it_was() -> None:
    data = {**MINIMAL, "training": {"seed": 1}}
    config = RunConfig.parse(data, ["training.seed=2", "training.seed=3", "training.epochs=2"])
    assert (config.training.seed, config.training.epochs) == (3, 2.0)
    assert data["training"] == {"seed": 1}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.learning_rate", "--set training.learning_rate: write key=value, such as training.learning_rate=1e-4"),
        ("=3", "--set =3: write key=value, such as training.learning_rate=1e-4"),
        ("", "--set : write key=value, such as training.learning_rate=1e-4"),
        (".=3", "--set .=3: write key=value, such as training.learning_rate=1e-4"),
        ("training.=3", "--set training.=3: write key=value, such as training.learning_rate=1e-4"),
        ("training..seed=3", "--set training..seed=3: write key=value, such as training.learning_rate=1e-4"),
        ("training.lerning_rate=1", "training.lerning_rate: unknown option; training accepts epochs,"),
        ("trainin.seed=1", "trainin: unknown option; the configuration accepts model,"),
        ("callbacks.2.x=1", "--set callbacks.2.x=1: callbacks is a list of 1; write its index, from 0"),
        ("callbacks.first=progress", "--set callbacks.first=progress: callbacks is a list of 1; write its index, from 0"),
        ("callbacks.²=progress", "--set callbacks.²=progress: callbacks is a list of 1; write its index, from 0"),
        ("callbacks.-1=progress", "--set callbacks.-1=progress: callbacks is a list of 1; write its index, from 0"),
        ("training.seed.x=1", "--set training.seed.x=1: training.seed is a value, not a section"),
        ("training.seed=two", "training.seed: must be a whole number (got 'two')"),
        ("model=", "model: must be a mapping of options (got None)"),
    ],
)
def test_an_override_that_does_not_fit_says_why(override: str, message: str) -> None:
    (line,) = refusal(override, callbacks=["progress"], training={"seed": 0})
    assert line.startswith(message)


@pytest.mark.parametrize("text", ["2020-13-45", "a: [", "!!bool x"])
def test_an_override_whose_value_is_no_yaml_is_text_not_a_crash(text: str) -> None:
    assert parse(f"output={text}").output == os.path.abspath(text)


# What does not go together


def check_refusal(registry: Registry, **sections: Any) -> list[str]:
    resolved, parts = resolve(parse(**sections), registry)
    with pytest.raises(ConfigError) as caught:
        parts.check(resolved)
    return str(caught.value).splitlines()


@pytest.fixture
def dataset(tmp_path: Path) -> dict[str, str]:
    (tmp_path / "corpus.txt").write_text("some text")
    return {"name": "text", "path": str(tmp_path / "corpus.txt")}


def test_pissa_on_a_quantised_model_is_refused_with_the_reason(registry: Registry, dataset: dict[str, str]) -> None:
    assert check_refusal(registry, dataset=dataset, adapter={"name": "lora", "init": "pissa"}) == [
        "adapter.init: pissa subtracts B A from the base weights, and nf4 has packed them; use quantizer: none"
    ]


def test_an_adapter_that_trains_nothing_is_refused(registry: Registry, dataset: dict[str, str]) -> None:
    assert check_refusal(registry, dataset=dataset, adapter="none") == [
        "adapter: the adapter 'none' leaves nothing to train; choose another, such as lora"
    ]


def test_new_tokens_with_an_adapter_that_can_not_train_them_are_refused(registry: Registry, dataset: dict[str, str]) -> None:
    assert check_refusal(registry, dataset=dataset, adapter="none", tokens={"add": ["<new>"]}) == [
        "tokens.add: the adapter 'none' can't train new tokens; use lora",
        "adapter: the adapter 'none' leaves nothing to train; choose another, such as lora",
    ]


def test_refusals_of_several_providers_are_reported_together(registry: Registry, tmp_path: Path) -> None:
    missing = tmp_path / "missing.txt"
    lines = check_refusal(registry, dataset={"name": "text", "path": str(missing)}, adapter={"name": "lora", "init": "pissa"})
    assert lines[0].startswith("adapter.init: pissa ")
    assert lines[1].startswith(f"dataset.path: no file {str(missing)!r}; ")


def test_what_goes_together_passes_the_check(registry: Registry, dataset: dict[str, str]) -> None:
    resolved, parts = resolve(parse(dataset=dataset, quantizer="none", adapter={"name": "lora", "init": "pissa"}), registry)
    parts.check(resolved)
    assert isinstance(parts, Parts)
    assert [where for where, _ in parts.located()] == [
        ("quantizer",),
        ("adapter",),
        ("dataset",),
        ("callbacks", 0),
    ]
    assert parts.auto_kernels


def test_a_plugin_module_that_fails_is_named_at_its_place(write_module: Callable[[str, str], str]) -> None:
    name = write_module("broken_for_config", "raise RuntimeError('no luck')")
    lines = resolve_refusal(Registry(modules=[name]), plugins=[name])
    assert lines == ["plugins[0]: 'broken_for_config' can't be used: RuntimeError: no luck"]


def test_disabling_a_plugin_that_is_not_installed_is_refused_with_a_guess(registry: Registry) -> None:
    assert resolve_refusal(registry, disable_plugins=["bitsandbites"]) == [
        "disable_plugins[0]: no plugin 'bitsandbites'; did you mean 'bitsandbytes'?"
    ]


def test_an_exporter_named_twice_is_refused(registry: Registry, dataset: dict[str, str]) -> None:
    exports = ["merged", {"name": "merged:merged", "dtype": "float32"}]
    resolved, parts = resolve(parse(dataset=dataset, exports=exports), registry)
    with pytest.raises(ConfigError) as caught:
        parts.check(resolved)
    assert str(caught.value) == "exports[1]: 'merged' stands there twice and both would write exports/merged; leave one out"

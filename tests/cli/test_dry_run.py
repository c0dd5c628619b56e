"""`qlora train --dry-run`: every stage in little, what fails at the end fails at once, and nothing is left behind."""

from __future__ import annotations

import json
import re
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

STAGES = [
    *("check", "model", "encode", "load and quantise", "inject"),
    *("step", "evaluate", "checkpoint", "save", "resume", "generate"),
]
PLUGIN = """
    import qlora_core

    class Late(qlora_core.Exporter):
        name = "late"

        def export(self, saved, folder):
            (folder / "half").write_text("half")
            {export}

    class Odd(qlora_core.CallbackFactory):
        name = "odd"

        def build(self, run):
            import os, signal
            import transformers

            class Callback(transformers.TrainerCallback):
                def {event}(self, args, state, control, **kwargs):
                    {callback}

            return Callback()

    @qlora_core.hookimpl
    def qlora_exporters(): return [Late]

    @qlora_core.hookimpl
    def qlora_callbacks(): return [Odd]
"""


@pytest.fixture(autouse=True)
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where temporary files go: empty after each dry run."""
    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


@pytest.fixture
def plugin(write_module: Callable[[str, str], str], request: Any) -> Callable[..., str]:
    """Return a function that writes a module with an exporter and a callback that do something odd."""

    def write(*, export: str = "pass", event: str = "on_train_end", callback: str = "pass") -> str:
        name = f"late_{abs(hash(request.node.name))}"
        return write_module(name, PLUGIN.format(export=export, event=event, callback=callback))

    return write


@pytest.fixture
def write_rows(here: Path) -> Callable[..., Path]:
    def write(rows: list[Any], name: str = "rows.jsonl") -> Path:
        path = here / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path

    return write


def chat(number: int) -> dict[str, Any]:
    turns = [{"role": "user", "content": f"And {number}?"}, {"role": "assistant", "content": f"It is {number + 1}."}]
    return {"messages": turns}


def names(out: str) -> list[str]:
    return [stage["stage"] for stage in json.loads(out)["stages"]]


def failed(err: str) -> str:
    """Return the stage that a dry run failed in."""
    found = re.search(r"^(\S.*?) +failed after \d+\.\d s$", err, re.MULTILINE)
    assert found is not None, err
    return found[1]


def said(err: str) -> str:
    """Return the message of an error, without where a traceback was kept."""
    return re.sub(r"the traceback is in \S+", "", err[err.index("error: ") :])


def test_every_stage_is_gone_through_and_nothing_is_left(
    qlora: Callable[..., Any], write_config: Callable[..., Path], snapshot: Callable[[Path], dict[str, bytes]], tmp_path: Path
) -> None:
    config = write_config()
    before = snapshot(tmp_path)
    result = qlora("train", "--dry-run", config, "--json")
    assert result.code == 0, result.err
    report = json.loads(result.out)
    assert names(result.out) == STAGES
    seconds = [stage["seconds"] for stage in report["stages"]]
    assert min(seconds) >= 0
    assert report["seconds"] == pytest.approx(sum(seconds), abs=0.01)
    assert snapshot(tmp_path) == before


def test_each_stage_is_told_with_its_seconds(qlora: Callable[..., Any], write_config: Callable[..., Path], here: Path) -> None:
    result = qlora("train", write_config(callbacks=["progress"]), "--dry-run")
    assert result.code == 0, result.err
    told = [line.rsplit(maxsplit=2)[0] for line in result.err.splitlines() if re.fullmatch(r"\S.* +\d+\.\d s", line)]
    assert told == STAGES
    assert "step 4/4 · loss " in result.err  # the callbacks run, this one too
    assert re.fullmatch(rf"Passed: 11 stages in \d+\.\d s, and nothing was written to {here / 'out'}\n", result.out)
    assert "\x1b" not in result.err + result.out


def test_a_quiet_one_says_nothing_and_none_tells_the_size_of_the_tiny_model(
    qlora: Callable[..., Any], write_config: Callable[..., Path]
) -> None:
    config = write_config(callbacks=["progress"], adapter={"target_modules": ["q_proj"]})
    quiet = qlora("train", config, "--dry-run", "--quiet")
    assert (quiet.code, quiet.out, quiet.err) == (0, "", "")


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt", "gpt_neox", "qwen3", "gemma", "phi"])
def test_architectures_pass(
    qlora: Callable[..., Any], write_config: Callable[..., Path], make_model: Callable[..., Path], architecture: str
) -> None:
    layers = "n_layer" if architecture == "gpt2" else "num_hidden_layers"
    result = qlora("train", "--dry-run", write_config(model=str(make_model(architecture, **{layers: 5}))), "--json")
    assert result.code == 0, result.err
    assert names(result.out) == STAGES


@pytest.mark.parametrize(
    "changes",
    [
        {"quantizer": "none", "training": {"keep": "best", "save_total_limit": 1, "eval_at_start": True}},
        {"quantizer": "int8", "training": {"gradient_accumulation": 16, "batch_size": 64}},
        {"data": {"eval_fraction": 0.0, "streaming": True}, "training": {"max_steps": 1000}},
        {"tokens": {"add": ["<new>"]}, "training": {"epochs": 3.0, "max_steps": None, "eval_steps": 500}},
        {"adapter": "ia3"},
        {"exports": ["merged"]},
    ],
    ids=["best", "large", "streaming", "tokens", "ia3", "merged"],
)
def test_what_a_configuration_asks_for_is_gone_through(
    qlora: Callable[..., Any], write_config: Callable[..., Path], changes: dict[str, Any], here: Path
) -> None:
    config = write_config(**{} if changes.get("adapter") == "ia3" else changes)
    if changes.get("adapter") == "ia3":
        config.write_text(config.read_text().replace("name: lora\n  r: 2", "name: peft\n  method: ia3"))
    result = qlora("train", "--dry-run", config, "--json")
    assert result.code == 0, result.err
    expected = [stage for stage in STAGES if stage != "evaluate" or "data" not in changes]
    if "exports" in changes:
        expected.insert(expected.index("resume"), "export merged")
    assert [name for name in expected if name not in names(result.out)] == []
    assert sorted(names(result.out)) == sorted(expected)
    assert not (here / "out").exists()


def test_chats_and_several_datasets_pass_unpacked(
    qlora: Callable[..., Any], write_config: Callable[..., Path], write_rows: Callable[..., Path], text_file: Path
) -> None:
    rows = write_rows([chat(number) for number in range(600)])
    held_out = write_rows([chat(number) for number in range(900, 940)], "held-out.jsonl")
    datasets = [
        {"name": "records", "path": str(rows), "eval_path": str(held_out), "weight": 0.5},
        {"name": "text", "path": str(text_file)},
    ]
    data = {"sequence_length": 64, "packing": False, "template": "plain"}
    result = qlora("train", "--dry-run", write_config(dataset=datasets, data=data), "--json")
    assert result.code == 0, result.err
    assert names(result.out) == STAGES


# What would fail at the end


@pytest.mark.parametrize(
    ("raises", "code"), [("raise qlora_core.ModelError('no such format')", 2), ("raise ZeroDivisionError('no luck')", 2)]
)
def test_an_export_that_fails_at_the_end_fails_at_once(
    qlora: Callable[..., Any], write_config: Callable[..., Path], plugin: Callable[..., str], here: Path, raises: str, code: int
) -> None:
    config = write_config(exports=["late"], training={"max_steps": 100_000})
    result = qlora("train", "--dry-run", config, "-p", plugin(export=raises))
    assert (result.code, result.out) == (code, "")
    assert failed(result.err) == "export late"
    assert ("no such format" in said(result.err)) or ("failed in export: ZeroDivisionError: no luck" in said(result.err))
    assert "Traceback" not in result.err
    assert not (here / "out").exists()


def test_a_callback_that_raises_at_the_end_of_training_raises_at_once(
    qlora: Callable[..., Any], write_config: Callable[..., Path], plugin: Callable[..., str], here: Path, scratch: Path
) -> None:
    arguments = [write_config(callbacks=["odd"]), "-q", "-p", plugin(callback="raise ZeroDivisionError('no luck')")]
    result = qlora("train", "--dry-run", *arguments)
    assert (result.code, result.out) == (2, "")
    assert failed(result.err) == "save"
    assert not (here / "out").exists()
    (crash,) = scratch.iterdir()  # the traceback, and nothing else
    assert str(crash) in result.err
    assert "ZeroDivisionError: no luck" in crash.read_text()
    real = qlora("train", *arguments)
    assert (real.code, said(real.err)) == (2, said(result.err))


def test_a_defect_of_our_own_is_1(
    qlora: Callable[..., Any], write_config: Callable[..., Path], here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import qlora_core.generation

    def fail(*arguments: Any, **options: Any) -> None:
        raise ZeroDivisionError("no luck")

    monkeypatch.setattr(qlora_core.generation, "generate", fail)
    result = qlora("train", "--dry-run", write_config())
    assert (result.code, result.out, failed(result.err)) == (1, "", "generate")
    assert "error: ZeroDivisionError: no luck\nThis is a defect of qlora-core or of a plugin" in result.err
    assert not (here / "out").exists()


def test_a_callback_that_ends_training_at_once_leaves_a_road_to_go(
    qlora: Callable[..., Any], write_config: Callable[..., Path], plugin: Callable[..., str]
) -> None:
    module = plugin(event="on_step_end", callback="control.should_training_stop = True")
    result = qlora("train", "--dry-run", write_config(callbacks=["odd"]), "--json", "-p", module)
    assert result.code == 0, result.err
    assert {"step", "save", "generate"} <= set(names(result.out))


def test_sigterm_between_two_runs_leaves_nothing(
    qlora: Callable[..., Any], write_config: Callable[..., Path], plugin: Callable[..., str], scratch: Path
) -> None:
    module = plugin(export="__import__('os').kill(__import__('os').getpid(), __import__('signal').SIGTERM)")
    result = qlora("train", "--dry-run", write_config(exports=["late"]), "-p", module)
    assert result.code == 128 + signal.SIGTERM
    assert result.err.endswith("\nstopped\n")
    assert list(scratch.iterdir()) == []


def test_a_signal_stops_it(
    qlora: Callable[..., Any], write_config: Callable[..., Path], plugin: Callable[..., str], scratch: Path
) -> None:
    module = plugin(event="on_step_end", callback="os.kill(os.getpid(), signal.SIGTERM)")
    result = qlora("train", "--dry-run", write_config(callbacks=["odd"]), "-p", module)
    assert result.code == 128 + signal.SIGTERM
    assert result.err.endswith("error: stopped; nothing is left of the dry run\n")
    assert list(scratch.iterdir()) == []


# Data


def test_bad_first_rows_are_told_as_the_run_tells_them(
    qlora: Callable[..., Any], write_config: Callable[..., Path], write_rows: Callable[..., Path]
) -> None:
    rows = [chat(number) for number in range(40)]
    rows[2]["messages"][1]["content"] = ""
    dataset, data = {"name": "records", "path": str(write_rows(rows))}, {"template": "plain", "sequence_length": 64}
    config = write_config(dataset=dataset, data=data)
    result, real = qlora("train", "--dry-run", config), qlora("train", config)
    assert (result.code, failed(result.err)) == (real.code, "encode") == (2, "encode")
    assert said(result.err) == said(real.err)
    assert "rows.jsonl:3" in said(result.err)
    skipped = qlora("train", "--dry-run", config, "--set", "data.on_problem=skip", "--quiet")
    assert (skipped.code, skipped.out) == (0, "")
    assert skipped.err.startswith("warning: train data: ")
    assert skipped.err.count("rows.jsonl:3") == 1  # although the data are read twice


def test_rows_further_down_are_not_read(
    qlora: Callable[..., Any], write_config: Callable[..., Path], write_rows: Callable[..., Path]
) -> None:
    rows = write_rows([{"text": f"Row {number} of a text."} for number in range(2000)])
    with rows.open("a") as file:
        file.write("{broken\n")
    config = write_config(dataset={"name": "records", "path": str(rows)})
    assert qlora("train", "--dry-run", config, "-q").code == 0
    assert qlora("train", config, "-q").code == 2


# What is refused before anything starts, as it is without --dry-run


@pytest.mark.parametrize(
    ("changes", "stage"),
    [
        ({"training": {"extra": {"no_such_argument": 1}}}, "encode"),
        ({"training": {"optimizer": "adamw_torch_fuse"}}, "encode"),
        ({"adapter": {"r": 4096}}, "model"),
        ({"adapter": {"target_modules": ["q_prj"]}}, "model"),
        ({"model": "./nowhere"}, "model"),
        ({"data": {"template": "none", "train_on": "assistant"}}, "encode"),
        ({"data": {"streaming": True}, "training": {"max_steps": None}}, "check"),
        ({"callbacks": [{"name": "transformers", "integration": "wandbb"}]}, "check"),
        ({"callbacks": ["early_stopping"], "data": {"eval_fraction": 0.0}}, "encode"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_the_run_refuses_is_refused_with_the_same_words(
    qlora: Callable[..., Any], write_config: Callable[..., Path], here: Path, changes: dict[str, Any], stage: str
) -> None:
    config = write_config(**changes)
    result, real = qlora("train", "--dry-run", config), qlora("train", config)
    assert (result.code, result.out, real.code) == (2, "", 2)
    assert said(result.err) == said(real.err)
    assert failed(result.err) == stage
    assert not (here / "out").exists()


def test_a_misspelt_key_is_told_with_its_line(qlora: Callable[..., Any], write_config: Callable[..., Path]) -> None:
    config = write_config(training={"learnin_rate": 1})
    result, real = qlora("train", "--dry-run", config), qlora("train", config)
    assert (result.code, result.err) == (2, real.err)


def test_an_output_that_holds_a_run_is_refused_and_with_overwrite_or_resume_left_alone(
    qlora: Callable[..., Any], write_config: Callable[..., Path], here: Path, snapshot: Callable[[Path], dict[str, bytes]]
) -> None:
    config = write_config(training={"save_steps": 1})
    assert qlora("train", "--dry-run", "--resume", config, "-q").err.endswith(
        f"error: output: {here / 'out'} holds no run to resume; leave out --resume\n"
    )
    assert qlora("train", config, "-q").code == 0
    before = snapshot(here)
    refused = qlora("train", "--dry-run", config)
    assert (refused.code, failed(refused.err)) == (2, "check")
    assert said(refused.err) == said(qlora("train", config).err)
    for options in (["--overwrite"], ["--resume"], ["--resume", "step-1"]):
        result = qlora("train", config, "--dry-run", *options, "--json")
        assert (result.code, names(result.out)) == (0, STAGES), result.err
    for options in (["--resume", "--overwrite"], ["--resume", "step-9"], ["--resume", "--set", "adapter.r=4"]):
        result, real = qlora("train", config, "--dry-run", *options), qlora("train", config, *options)
        assert (result.code, failed(result.err), said(result.err)) == (2, "check", said(real.err))
    assert snapshot(here) == before


def test_several_processes_are_refused(
    qlora: Callable[..., Any], write_config: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    result = qlora("train", "--dry-run", write_config())
    assert (result.code, said(result.err)) == (2, "error: --dry-run takes one process; start it without torchrun\n")


@pytest.mark.parametrize(
    "adapter", [{"r": 200}, {"target_modules": r".*layers\.5\..*q_proj"}, {"r": 100, "init": "pissa"}], ids=str
)
def test_what_fits_the_real_model_fits_the_tiny_one(
    qlora: Callable[..., Any], write_config: Callable[..., Path], make_model: Callable[..., Path], adapter: dict[str, Any]
) -> None:
    model = make_model("llama", hidden_size=512, intermediate_size=512, num_key_value_heads=4, num_hidden_layers=6)
    quantizer = "none" if "init" in adapter else "nf4"
    result = qlora("train", "--dry-run", write_config(model=str(model), adapter=adapter, quantizer=quantizer), "--json")
    assert result.code == 0, result.err
    assert names(result.out) == STAGES


def test_a_model_that_is_stored_quantised_passes_with_its_quantizer_only(
    qlora: Callable[..., Any], write_config: Callable[..., Path], tiny_model: Path, here: Path
) -> None:
    assert qlora("quantize", tiny_model, here / "packed", "--quantizer", "nf4").code == 0
    config = write_config(model=str(here / "packed"))
    result = qlora("train", "--dry-run", config, "--json")
    assert (result.code, names(result.out)) == (0, STAGES), result.err
    other = ["--set", "quantizer=int8"]
    refused, real = qlora("train", "--dry-run", config, *other), qlora("train", config, *other)
    assert (refused.code, failed(refused.err)) == (2, "load and quantise")
    assert said(refused.err) == said(real.err)


@pytest.mark.slow
@pytest.mark.demo_model
def test_the_real_model_passes_in_less_than_30_seconds(
    qlora: Callable[..., Any], write_config: Callable[..., Path], demo_folder: Path, write_rows: Callable[..., Path]
) -> None:
    rows = write_rows([chat(number) for number in range(5000)])
    config = write_config(
        model=str(demo_folder),
        dataset={"name": "records", "path": str(rows)},
        adapter={"r": 16},
        data={"sequence_length": 512},
        callbacks=["progress"],
        training={"max_steps": 5000, "batch_size": 8, "gradient_accumulation": 4},
        exports=["merged"],
    )
    started = time.perf_counter()
    result = qlora("train", "--dry-run", config, "--json")
    assert result.code == 0, result.err
    assert set(STAGES) < set(names(result.out))
    assert time.perf_counter() - started < 30

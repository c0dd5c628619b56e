"""Files from strangers are data: nothing in a run's folder, a checkpoint, an adapter or a model is executed."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qlora_bitsandbytes import NF4
from qlora_core import Finished, ModelError, Registry, RunError, SavedRun, load_model
from qlora_core.cli.main import main
from qlora_peft import LoRA


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    return tmp_path / "executed"


def plant(path: Path, mark: Path) -> None:
    path.write_bytes(pickle.dumps(Payload(mark)))


def test_the_payload_would_run(tmp_path: Path, mark: Path) -> None:
    plant(tmp_path / "x.pt", mark)
    pickle.loads((tmp_path / "x.pt").read_bytes())
    assert mark.is_dir()


@pytest.mark.parametrize("name", ["training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth", "adapter_model.bin"])
def test_a_pickle_in_a_checkpoint_is_refused_and_not_read(
    run: Callable[..., Finished], mark: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    training = {"max_steps": 4, "save_steps": 2}
    finished = run(training=training)
    plant(finished.run.checkpoint(4) / name, mark)
    with pytest.raises(RunError, match=f"step-4: no complete checkpoint, {name} does not belong to it"):
        run(training=training, resume="step-4")
    run(training=training, resume=True)
    assert f"passing over a damaged checkpoint, {finished.run.checkpoint(4)}: {name} does not belong to it" in caplog.text
    assert not mark.exists()


def test_no_file_of_a_run_is_a_pickle(run: Callable[..., Finished]) -> None:
    finished = run(training={"max_steps": 4, "save_steps": 2})
    files = [path for path in finished.run.folder.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} <= {".json", ".jsonl", ".safetensors", ".yaml", ".jinja", ".md", ".txt"}
    for path in files:
        with pytest.raises((pickle.UnpicklingError, EOFError, KeyError, ValueError, UnicodeDecodeError, IndexError)):
            pickle.loads(path.read_bytes())
        assert not path.read_bytes().startswith(b"PK")


def test_an_adapter_in_pickle_is_refused(run: Callable[..., Finished], mark: Path) -> None:
    finished = run()
    (finished.run.adapter / "adapter_model.safetensors").unlink()
    plant(finished.run.adapter / "adapter_model.bin", mark)
    saved = SavedRun.open(finished.run.folder, Registry())
    with pytest.raises(
        ModelError, match=r"adapter_model.safetensors is missing; weights in another format, such as pickle, are not read"
    ):
        saved.add_adapter(saved.load_base())
    assert not mark.exists()


def test_an_adapter_for_which_code_would_be_imported_is_refused(run: Callable[..., Finished]) -> None:
    finished = run()
    path = finished.run.adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "megatron_config": {}, "megatron_core": "antigravity"}))
    saved = SavedRun.open(finished.run.folder, Registry())
    with pytest.raises(ModelError, match="sets megatron_config, for which code would be imported"):
        saved.add_adapter(saved.load_base())


def test_a_model_in_pickle_is_refused(tiny_model: Path, tmp_path: Path, mark: Path) -> None:
    model = shutil.copytree(tiny_model, tmp_path / "model")
    (model / "model.safetensors").unlink()
    plant(model / "pytorch_model.bin", mark)
    with pytest.raises(ModelError, match=r"holds its weights as pickle \(pytorch_model.bin\), which can execute code"):
        load_model(str(model), NF4())
    assert not mark.exists()


CODE = "import os\nos.mkdir({mark!r})\n"


def changed(folder: Path, **changes: Any) -> None:
    """Set keys of a run's config.yaml."""
    from qlora_core import yaml_file

    raw, _ = yaml_file.read(folder / "config.yaml")
    for key, value in changes.items():
        section, _, name = key.partition("__")
        raw[section] = {**raw[section], name: value} if name else value
    (folder / "config.yaml").write_text(yaml_file.dump(raw), encoding="utf-8")


def run_command(*arguments: object) -> int:
    with pytest.raises(SystemExit) as exit_:
        main([str(argument) for argument in arguments])
    return int(str(exit_.value.code))


@pytest.mark.parametrize("command", [("eval", "--data"), ("generate", "word"), ("export", "--to")])
def test_a_plugin_in_a_copied_run_is_not_imported(
    run: Callable[..., Finished],
    tmp_path: Path,
    text_file: Path,
    mark: Path,
    command: tuple[str, str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = shutil.copytree(run().run.folder, tmp_path / "copied")
    (folder / "stranger_plugin.py").write_text(CODE.format(mark=str(mark)))
    changed(folder, plugins=["stranger_plugin"])
    monkeypatch.chdir(folder)
    words = (
        ("eval", folder, "--data", text_file)
        if command[0] == "eval"
        else (*command[:1], folder, *command[1:], *(["merged"] if command[0] == "export" else []))
    )
    assert run_command(*words) == 2
    said = capsys.readouterr().err
    assert "names the plugin 'stranger_plugin', which lies in the run's own folder" in said
    assert "name it yourself: -p stranger_plugin" in said
    assert not mark.exists()


def test_code_that_comes_with_a_model_runs_only_if_the_user_says_so(
    run: Callable[..., Finished], tiny_model: Path, tmp_path: Path, mark: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(run().run.folder, tmp_path / "copied")
    model = shutil.copytree(tiny_model, folder / "model")
    settings = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**settings, "auto_map": {"AutoConfig": "evil.Evil"}, "model_type": "evil"}))
    (model / "evil.py").write_text(CODE.format(mark=str(mark)) + "class Evil: pass\n")
    changed(folder, model__path=str(model), model__trust_remote_code=True)
    assert run_command("generate", folder, "word") == 2
    said = capsys.readouterr().err
    assert "asks to run Python code that comes with the model" in said
    assert "say so with --trust-remote-code" in said
    assert not mark.exists()
    run_command("generate", folder, "word", "--trust-remote-code")
    assert mark.is_dir()  # (so the code was there to be run)


def test_a_template_from_a_stranger_is_rendered_in_a_sandbox(
    run: Callable[..., Finished], tmp_path: Path, mark: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(run(adapter=LoRA(r=4)).run.folder, tmp_path / "copied")
    reach = "{{ ''.__class__.__mro__[1].__subclasses__() }}{{ cycler.__init__.__globals__.os.mkdir('" + str(mark) + "') }}"
    (folder / "adapter" / "chat_template.jinja").write_text(reach)
    assert run_command("generate", folder, "word", "--chat") in (1, 2)
    assert not mark.exists()

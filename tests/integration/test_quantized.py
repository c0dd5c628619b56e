"""A quantised model that is found on disk is the one that was quantised, bit for bit; what is damaged is made anew."""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import qlora_core.quantized as quantized
from qlora_bitsandbytes import FP4, NF4, Int8
from qlora_core import Finished, ModelConfig, Quantizer, SavedRun, build_skeleton, load_model
from qlora_core.testing.tiny import Plain
from qlora_plain import NoQuantizer
from qlora_torchao import AOInt8

QUANTIZERS = {
    "nf4": NF4(),
    "nf4-single": NF4(double_quant=False),
    "nf4-storage": NF4(storage_dtype="bfloat16", compute_dtype="float16", skip_modules=("down_proj",)),
    "fp4": FP4(),
    "int8": Int8(),
    "ao_int8": AOInt8(),
}
IDS = torch.arange(2, 42).view(2, 20)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of its own, in which small models are kept too."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(quantized, "WORTHWHILE", 0)
    return tmp_path / "cache" / "qlora-core" / "quantized"


@pytest.fixture
def model(tiny_model: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model that a test may change."""
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


def entries(home: Path) -> list[Path]:
    return sorted(home.iterdir()) if home.is_dir() else []


def pieces(model: Any, quantizer: Quantizer) -> dict[str, torch.Tensor]:
    """Return every tensor of *model*, those inside of packed weights too, as bytes."""

    def parts(name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        if hasattr(tensor, "__tensor_flatten__") and type(tensor) not in (torch.Tensor, torch.nn.Parameter):
            inner, _ = tensor.__tensor_flatten__()
            return {k: v for key in inner for k, v in parts(f"{name}.{key}", getattr(tensor, key)).items()}
        return {name: tensor.detach().contiguous().view(-1).view(torch.uint8)}

    found: dict[str, torch.Tensor] = {}
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        found |= parts(name, tensor)
    for name, module in model.named_modules():
        if quantizer.is_quantized(module):
            for index, constant in enumerate(quantizer.constants(module)):
                found |= parts(f"{name} constant {index}", constant)
    return found


def alike(one: Any, other: Any, quantizer: Quantizer) -> None:
    left, right = pieces(one, quantizer), pieces(other, quantizer)
    assert list(left) == list(right)
    assert [name for name in left if not torch.equal(left[name], right[name])] == []
    assert {n: p.dtype for n, p in one.named_parameters()} == {n: p.dtype for n, p in other.named_parameters()}
    assert [type(m) for m in one.modules()] == [type(m) for m in other.modules()]
    with torch.no_grad():
        assert torch.equal(one(IDS).logits, other(IDS).logits)


@pytest.mark.parametrize("name", QUANTIZERS)
def test_the_second_load_gives_the_same_bits(model: Path, home: Path, name: str, caplog: pytest.LogCaptureFixture) -> None:
    quantizer = QUANTIZERS[name]
    plain = load_model(ModelConfig(path=str(model), cache=False), quantizer)
    assert entries(home) == []
    first = load_model(str(model), quantizer)
    (entry,) = entries(home)
    assert not list(entry.glob("*.bin"))
    with caplog.at_level(logging.INFO, "qlora_core"):
        second = load_model(str(model), quantizer)
    assert f"quantised before: loaded from {entry}" in caplog.messages
    for loaded in (first, second):
        alike(plain, loaded, quantizer)
        assert not any(p.requires_grad for p in loaded.parameters())
        assert not any(m.training for m in loaded.modules())
        assert loaded.config.to_dict() == plain.config.to_dict()
        assert loaded.generation_config.to_dict() == plain.generation_config.to_dict()
        assert (loaded.name_or_path, loaded.config._name_or_path) == (str(model), str(model))
        assert loaded.dtype == plain.dtype
        assert not getattr(loaded.model.layers[0].mlp.up_proj, "support_avx512bf16_for_cpu", False)


@pytest.mark.parametrize("architecture", ["opt", "gpt_neox", "gpt2", "qwen3", "gemma", "mixtral", "phi"])
def test_every_architecture_comes_back(make_model: Callable[..., Path], home: Path, architecture: str) -> None:
    folder, quantizer = make_model(architecture), NF4()
    plain = load_model(ModelConfig(path=str(folder), cache=False), quantizer)
    load_model(str(folder), quantizer)
    assert len(entries(home)) == 1
    alike(plain, load_model(str(folder), quantizer), quantizer)
    assert len(entries(home)) == 1


def test_a_float32_and_an_upcast_model_come_back(model: Path, home: Path) -> None:
    for changes in ({"dtype": "float32"}, {"dtype": "bfloat16", "upcast": True}, {"dtype": "float16"}):
        plain = load_model(ModelConfig(path=str(model), cache=False, **changes), NF4())
        load_model(ModelConfig(path=str(model), **changes), NF4())
        alike(plain, load_model(ModelConfig(path=str(model), **changes), NF4()), NF4())
    assert len(entries(home)) == 3


def test_each_option_dtype_and_model_has_its_own_entry(model: Path, home: Path) -> None:
    def load(quantizer: Quantizer, **changes: Any) -> int:
        load_model(ModelConfig(path=str(model), **changes), quantizer)
        return len(entries(home))

    assert load(NF4()) == 1
    assert load(NF4()) == 1
    assert load(NF4(), upcast=True) == 1  # cast afterwards
    assert load(NF4(double_quant=False)) == 2
    assert load(FP4()) == 3
    assert load(NF4(), dtype="float16") == 4  # auto is never that
    assert load(NF4(), trust_remote_code=True) == 5
    weights = model / "model.safetensors"
    os.utime(weights, ns=(1, 1))  # another date is another file
    assert load(NF4()) == 6
    content = bytearray(weights.read_bytes())
    content[-2] ^= 1
    weights.write_bytes(content)
    os.utime(weights, ns=(1, 1))  # of the same date and size, too
    assert load(NF4()) == 7
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-3}))
    assert load(NF4()) == 8


def test_another_version_of_a_library_finds_nothing(model: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load_model(str(model), NF4())
    monkeypatch.setattr(quantized, "version", lambda name: "99")
    load_model(str(model), NF4())
    assert len(entries(home)) == 2
    record = [json.loads((entry / "entry.json").read_text())["made_of"]["packages"] for entry in entries(home)]
    assert {"torch": "99", "transformers": "99", "bitsandbytes": "99"} in record


def cut(entry: Path) -> str:
    path = entry / "model.safetensors"
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-3])
    return f"model.safetensors has {size - 3} bytes, not {size}"


def remove(entry: Path) -> str:
    (entry / "model.safetensors").unlink()
    return "model.safetensors is missing"


def forget(entry: Path) -> str:
    (entry / "entry.json").write_text("{")
    return "entry.json can't be read (JSONDecodeError)"


def scribble(entry: Path) -> str:
    path = entry / "model.safetensors"
    path.write_bytes(b"\xff" * path.stat().st_size)
    return "SafetensorError"


def swap(entry: Path) -> str:
    record = json.loads((entry / "entry.json").read_text())
    record["tensors"]["lm_head.weight"] = ["torch.float32", [1, 1], "cpu"]
    (entry / "entry.json").write_text(json.dumps(record))
    return "its tensors are not those that were stored"


@pytest.mark.parametrize("damage", [cut, remove, forget, scribble, swap])
def test_a_damaged_entry_is_named_and_made_anew(
    model: Path, home: Path, damage: Callable[[Path], str], caplog: pytest.LogCaptureFixture
) -> None:
    plain = load_model(str(model), NF4())
    (entry,) = entries(home)
    what = damage(entry)
    again = load_model(str(model), NF4())
    (message,) = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert message.startswith(f"the quantised model in {entry} can't be used: ")
    assert what in message
    assert message.endswith("; it is made anew")
    alike(plain, again, NF4())
    caplog.clear()
    alike(plain, load_model(str(model), NF4()), NF4())
    assert not [r for r in caplog.records if r.levelno == logging.WARNING]
    assert entries(home) == [entry]


def test_a_full_disk_and_a_cache_that_can_not_be_written_are_only_logged(
    model: Path, home: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with monkeypatch.context() as full:
        full.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1, 1, 1000))
        plain = load_model(str(model), NF4())
    assert "can't be kept" in caplog.text
    assert "MB are free" in caplog.text
    assert entries(home) == []
    home.rmdir()
    home.write_text("a file where the folder should be")
    caplog.clear()
    alike(plain, load_model(str(model), NF4()), NF4())
    assert "model.cache=false stops trying" in caplog.text


def test_what_breaks_while_it_is_written_leaves_nothing(
    model: Path, home: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def save(self: Any, base: Any, folder: Path) -> None:
        (folder / "half.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(NF4, "save", save)
    load_model(str(model), NF4())
    assert "No space left on device" in caplog.text
    assert entries(home) == []


def test_of_two_processes_at_once_one_keeps_its_model(
    model: Path, home: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The other one has written its entry between our look and our renaming."""
    plain = load_model(str(model), NF4())
    (entry,) = entries(home)
    monkeypatch.setattr(quantized.Entry, "load", lambda self, quantizer: None)
    before = (entry / "model.safetensors").stat().st_ino
    alike(plain, load_model(str(model), NF4()), NF4())
    assert entries(home) == [entry]
    assert (entry / "model.safetensors").stat().st_ino == before
    assert not [r for r in caplog.records if r.levelno == logging.WARNING]


def test_what_a_process_that_died_left_is_deleted_after_a_day(model: Path, home: Path) -> None:
    home.mkdir(parents=True)
    for name, age in ((".old-x", 2 * 86400), (".new-x", 60)):
        (home / name).mkdir()
        os.utime(home / name, (time.time() - age,) * 2)
    load_model(str(model), NF4())
    assert not (home / ".old-x").exists()
    assert (home / ".new-x").exists()
    assert [folder for folder, _ in quantized.kept_entries()] == [e for e in entries(home) if not e.name.startswith(".")]


def test_what_needs_no_cache_is_not_kept(model: Path, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load_model(str(model), NoQuantizer())
    load_model(str(model), None)
    load_model(str(model), Plain())
    load_model(ModelConfig(path=str(model), cache=False), NF4())
    base = load_model(ModelConfig(path=str(model), cache=False), NF4())
    NF4().save(base, tmp_path / "packed")
    alike(base, load_model(str(tmp_path / "packed"), NF4()), NF4())  # stored quantised
    monkeypatch.setattr(quantized, "WORTHWHILE", 2**20)
    load_model(str(model), NF4())
    assert entries(home) == []


def test_a_model_of_the_hub_is_known_by_its_commit(model: Path, home: Path) -> None:
    skeleton, quantizer, config = build_skeleton(str(model)), NF4(), ModelConfig(path="owner/name")
    assert quantized.find_entry(config, quantizer, skeleton, {}) is None  # no commit, so the weights are not known
    folders = set()
    for commit in ("aaa", "bbb", "aaa"):
        skeleton.config._commit_hash = commit
        entry = quantized.find_entry(config, quantizer, skeleton, quantizer.load_kwargs(skeleton))
        assert entry is not None
        assert entry.facts["model"] == {"name": "owner/name", "commit": commit}
        folders.add(entry.folder)
    assert len(folders) == 2


def test_arguments_that_can_not_be_compared_are_not_kept(model: Path) -> None:
    skeleton = build_skeleton(str(model))
    assert quantized.find_entry(ModelConfig(path=str(model)), NF4(), skeleton, {"hook": object()}) is None


class Rewriting(Plain):
    """Has no `load` of its own: what it saves it would quantise again."""

    name = "rewriting"
    quantizes = True


def test_a_quantizer_without_its_own_load_is_not_kept(model: Path, home: Path) -> None:
    load_model(str(model), Rewriting())
    assert entries(home) == []


def test_missing_weights_are_refused_and_nothing_is_kept(model: Path, home: Path) -> None:
    from qlora_core import ModelError

    load_model(str(model), NF4())
    (model / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="can't be loaded with nf4"):
        load_model(str(model), NF4())
    assert len(entries(home)) == 1


def test_a_run_from_the_cache_is_the_run_without_it(run: Callable[..., Finished], model: Path, tmp_path: Path) -> None:
    """New tokens are added after the cache; metrics, adapter and the name of the base are the same."""
    from qlora_core import Registry

    adapters, losses = [], []
    for index, cache in enumerate((False, True, True)):
        output = tmp_path / f"run{index}"
        tokens = {"add": ["<new>"]}
        finished = run(model=ModelConfig(path=str(model), cache=cache), tokens=tokens, output=output)
        losses.append([line.get("loss") for line in finished.run.read_metrics()])
        adapters.append((finished.run.adapter / "adapter_model.safetensors").read_bytes())
        config = json.loads((finished.run.adapter / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == str(model)
    assert losses[0] == losses[1] == losses[2]
    assert adapters[0] == adapters[1] == adapters[2]
    saved = SavedRun.open(output, Registry())
    with torch.no_grad():
        assert torch.equal(saved.add_adapter(saved.load_base())(IDS).logits, finished.model.eval()(IDS).logits)


@pytest.mark.slow
@pytest.mark.demo_model
def test_a_real_model_is_loaded_again_in_two_seconds(demo_folder: Path, home: Path) -> None:
    load_model(str(demo_folder), NF4())
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        load_model(str(demo_folder), NF4())
        seconds.append(time.perf_counter() - started)
    assert min(seconds) < 2

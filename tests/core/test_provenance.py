"""What a run was made of, as provenance.json records it."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest

from qlora_bitsandbytes import NF4
from qlora_console import Progress
from qlora_core import provenance as module
from qlora_core.config import ModelConfig
from qlora_core.parts import Parts, Weighted
from qlora_core.provenance import describe_provider, fingerprint_model, package_versions, plugin_of, provenance
from qlora_core.registry import Registry
from qlora_peft import LoRA
from qlora_plain import Reference
from qlora_text import TextFile

SOURCE = """
    import qlora_core

    class Bell(qlora_core.CallbackFactory):
        name = "bell"
        def build(self, run): return None

    @qlora_core.hookimpl
    def qlora_callbacks(): return [Bell]
"""


def test_a_provider_is_recorded_with_plugin_name_version_and_class() -> None:
    assert describe_provider(NF4()) == {
        "provider": "bitsandbytes:nf4",
        "distribution": "qlora-core",
        "version": version("qlora-core"),
        "class": "qlora_bitsandbytes.NF4",
    }


def test_a_provider_of_another_distribution_is_recorded_as_its_own(install: Callable[..., None]) -> None:
    install("bell-plugin", "bell", "bell_for_provenance", SOURCE, version="3.1")
    provider = Registry().find("callback", "bell").provider()
    assert describe_provider(provider) == {
        "provider": "bell:bell",
        "distribution": "bell-plugin",
        "version": "3.1",
        "class": "bell_for_provenance.Bell",
    }


def test_a_class_that_no_plugin_lists_is_named_with_its_module(write_module: Callable[[str, str], str]) -> None:
    name = write_module("qlora_text_of_mine", SOURCE)  # begins like the module of a plugin, and is none
    provider = Registry(modules=[name]).find("callback", "bell").provider
    assert plugin_of(provider) == ("", "", "")
    assert describe_provider(provider())["provider"] == "qlora_text_of_mine:bell"


def test_an_installed_plugin_whose_entry_point_names_no_module_is_passed_over(install: Callable[..., None]) -> None:
    install("odd-plugin", "a-odd", "not-a-module")
    assert plugin_of(LoRA) == ("peft", "qlora-core", version("qlora-core"))


def test_versions_of_packages_are_the_installed_ones_and_none_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PACKAGES", ("torch", "a-package-nobody-has"))
    monkeypatch.setattr(module, "OPTIONAL", ("another-package-nobody-has", "torch"))
    assert package_versions() == {"torch": version("torch"), "a-package-nobody-has": None}


def model_folder(folder: Path, weights: bytes = b"weights") -> Path:
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(weights)
    (folder / "README.md").write_text("not part of the model")
    return folder


def test_the_fingerprint_of_a_model_depends_on_contents_and_not_on_the_place(tmp_path: Path) -> None:
    first, second = model_folder(tmp_path / "a"), model_folder(tmp_path / "b")
    mark = fingerprint_model(str(first))
    assert mark is not None
    assert len(mark) == 64
    assert fingerprint_model(str(second)) == mark
    (second / "README.md").write_text("changed")
    assert fingerprint_model(str(second)) == mark
    (second / "model.safetensors").write_bytes(b"weightz")
    assert fingerprint_model(str(second)) != mark
    (first / "config.json").rename(first / "generation_config.json")
    assert fingerprint_model(str(first)) != mark


def test_a_large_file_is_sampled_at_both_ends_and_by_its_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WHOLE", 100)
    monkeypatch.setattr(module, "SAMPLE", 10)
    monkeypatch.setattr(module, "SAMPLES", 4)
    content = bytes(range(200))
    marks = [
        fingerprint_model(str(model_folder(tmp_path / str(index), changed)))
        for index, changed in enumerate([content, b"x" + content[1:], content[:-1] + b"x", content + b"x"])
    ]
    assert len(set(marks)) == 4


def test_a_model_on_the_hub_has_no_fingerprint_of_files() -> None:
    assert fingerprint_model("owner/name") is None


def test_the_record_names_providers_packages_model_data_and_machine(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model")
    parts = Parts(NF4(), LoRA(), (Weighted(TextFile(path="x.txt")),), (Reference(),), (Progress(),))
    model = ModelConfig(path=str(folder), revision="v1")
    record = provenance(parts, model, kernels=parts.kernels[0], data_fingerprint="abc", commit=None)
    assert json.loads(json.dumps(record)) == record
    assert {kind: p["provider"] for kind, p in record["providers"].items() if isinstance(p, dict)} == {
        "quantizer": "bitsandbytes:nf4",
        "adapter": "peft:lora",
        "kernels": "plain:reference",
    }
    assert [source["provider"] for source in record["providers"]["datasets"]] == ["text:text"]
    assert [callback["provider"] for callback in record["providers"]["callbacks"]] == ["console:progress"]
    assert record["packages"]["torch"] == version("torch")
    assert record["model"] == {
        "path": str(folder),
        "revision": "v1",
        "fingerprint": fingerprint_model(str(folder)),
        "trust_remote_code": False,
    }
    assert record["data"] == {"fingerprint": "abc"}
    assert record["platform"]["python"] == platform.python_version()


def test_the_commit_that_was_loaded_is_recorded_rather_than_the_branch_that_was_asked_for() -> None:
    parts = Parts(NF4(), LoRA(), (Weighted(TextFile(path="x.txt")),))
    model = ModelConfig(path="owner/name", revision="main")
    record = provenance(parts, model, kernels=None, data_fingerprint="abc", commit="0123abc")
    assert record["model"]["revision"] == "0123abc"
    assert record["providers"]["kernels"] is None

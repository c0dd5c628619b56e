"""The example distribution's parts and ours, in every combination: trained, saved, resumed to the same bits."""

from __future__ import annotations

import importlib
import json
import sys
import textwrap
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

import pytest
import torch
import yaml

from qlora_bitsandbytes import NF4
from qlora_core import Finished, Footprint, load_model
from qlora_core.cli.main import main
from qlora_peft import LoRA

EXAMPLE = Path(__file__).parents[2] / "examples" / "third_party_plugin"
IDS = torch.arange(2, 42).view(2, 20)


@pytest.fixture(scope="module")
def theirs() -> Iterator[ModuleType]:
    """The example's package, from its source folder."""
    sys.path.insert(0, str(EXAMPLE))
    yield importlib.import_module("qlora_example_parts")
    sys.path.remove(str(EXAMPLE))


@pytest.mark.parametrize("adapter", ["lora", "tiny_lora"])
@pytest.mark.parametrize("quantizer", ["nf4", "nf_blocks"])
def test_every_combination_trains_saves_and_resumes(
    run: Callable[..., Finished], theirs: ModuleType, tiny_model: Path, quantizer: str, adapter: str
) -> None:
    stored = {"nf4": NF4, "nf_blocks": theirs.NFBlocks}[quantizer]()
    added = {"lora": LoRA, "tiny_lora": theirs.TinyLoRA}[adapter](r=4)
    training = {"max_steps": 4, "save_steps": 2, "logging_steps": 1}
    finished = run(quantizer=stored, adapter=added, training=training)
    before = {name: p.detach().clone() for name, p in finished.model.named_parameters() if p.requires_grad}
    losses = [line["loss"] for line in finished.run.read_metrics() if "loss" in line]
    assert len(losses) == 4
    again = run(quantizer=stored, adapter=added, training=training, resume=finished.run.checkpoint(2))
    after = {name: p for name, p in again.model.named_parameters() if p.requires_grad}
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert [line["loss"] for line in again.run.read_metrics() if "loss" in line] == losses
    reloaded = added.load(load_model(str(tiny_model), stored), again.run.adapter)
    with torch.no_grad():
        ours, theirs_ = again.model.eval()(input_ids=IDS).logits, reloaded.eval()(input_ids=IDS).logits
    assert torch.equal(ours, theirs_)


def test_footprint_counts_their_packed_weights_to_the_byte(theirs: ModuleType, tiny_model: Path) -> None:
    quantizer = theirs.NFBlocks(bits=4)
    model = load_model(str(tiny_model), quantizer)
    layers = [module for module in model.modules() if quantizer.is_quantized(module)]
    size = Footprint.of(model, quantizer)
    assert size.quantized_bytes == sum(quantizer.stored_bytes((m.out_features, m.in_features)) for m in layers)


SWAP = """
    from qlora_core import hookimpl
    from qlora_example_parts import NFBlocks

    class NF4(NFBlocks):
        "NF4 in plain PyTorch."
        name = "nf4"

    @hookimpl
    def qlora_quantizers(): return [NF4]
"""


@pytest.fixture
def swapped(theirs: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A module that provides another `nf4`."""
    (tmp_path / "their_nf4.py").write_text(textwrap.dedent(SWAP), encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield "their_nf4"
    sys.modules.pop("their_nf4", None)


def command(*arguments: object) -> int:
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    return int(ended.value.code or 0)


@pytest.mark.parametrize("way", ["by its full name", "by disabling ours"])
def test_a_third_party_nf4_replaces_ours(
    swapped: str, tiny_model: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], way: str
) -> None:
    config = tmp_path / "run.yaml"
    sections = {
        "model": str(tiny_model),
        "dataset": {"name": "text", "path": str(text_file)},
        "data": {"sequence_length": 32},
        "callbacks": [],
        "training": {"max_steps": 1},
        "output": str(tmp_path / "out"),
        "plugins": [swapped],
        "quantizer": "nf4",
    }
    config.write_text(yaml.safe_dump(sections), encoding="utf-8")
    assert command("train", config, "-q") == 2
    assert capsys.readouterr().err.strip() == (
        f"error: {config}:11: quantizer: quantizer 'nf4' is provided by more than one plugin; write 'bitsandbytes:nf4' "
        f"(from qlora-core {version('qlora-core')}) or 'their_nf4:nf4' (from module their_nf4), or disable one of them"
    )
    assert command("plugins", "list", "-p", swapped, "--json") == 0
    listed = {p["name"]: p["provides"] for p in json.loads(capsys.readouterr().out)["plugins"]}
    for plugin in ("bitsandbytes", "their_nf4"):
        (entry,) = [provided for provided in listed[plugin] if provided["name"] == "nf4"]
        assert entry == {"kind": "quantizer", "name": "nf4", "qualified": f"{plugin}:nf4", "ambiguous": True}
    choice = ("--set", "quantizer=their_nf4:nf4") if way == "by its full name" else ("--disable-plugin", "bitsandbytes")
    assert command("train", config, *choice, "-q") == 0
    record = json.loads((tmp_path / "out" / "provenance.json").read_text())["providers"]["quantizer"]
    assert (record["provider"], record["class"]) == ("their_nf4:nf4", "their_nf4.NF4")
    assert yaml.safe_load((tmp_path / "out" / "config.yaml").read_text())["quantizer"]["name"] == "their_nf4:nf4"

"""Finished runs in other formats: the merged model computes what base and adapter do, and what can't be merged is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from qlora_bitsandbytes import NF4, Int8
from qlora_core import ConfigError, Finished, ModelError, Registry, RunError, SavedRun, load_model
from qlora_core.cli.main import main
from qlora_merged import Merged
from qlora_peft import LoRA
from qlora_plain import NoQuantizer
from qlora_torchao import AOInt8

IDS = torch.arange(2, 42).view(2, 20)


class Unmergeable(NF4):
    """A quantizer whose weights can't be told from outside."""

    mergeable = False


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS, use_cache=False).logits.float()


def error(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).norm() / other.norm())


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt"])
@pytest.mark.parametrize("quantizer", [NF4(), NoQuantizer(), AOInt8()], ids=["nf4", "none", "ao_int8"])
def test_the_merged_model_computes_what_base_and_adapter_do(
    run: Callable[..., Finished], make_model: Callable[..., Path], architecture: str, quantizer: Any
) -> None:
    if architecture == "gpt2" and quantizer.name == "ao_int8":
        pytest.skip("torchao leaves GPT-2's Conv1D layers alone, and has nothing to quantise")
    folder = make_model(architecture)
    finished = run(
        model=str(folder), quantizer=quantizer, adapter=LoRA(r=4, alpha=32), exports=[Merged(dtype="float32")],
        training={"learning_rate": 0.05},
    )  # fmt: skip
    exported = finished.run.folder / "exports" / "merged"
    merged = logits(transformers.AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32))
    saved = SavedRun(finished.run, quantizer, LoRA(r=4, alpha=32))
    adapted = logits(saved.add_adapter(saved.load_base()))
    base = logits(load_model(str(folder), quantizer))
    assert error(adapted, base) > 0.1  # there is something to merge
    assert error(merged, adapted) < 0.02  # bfloat16 against float32
    assert transformers.AutoTokenizer.from_pretrained(exported)("a")["input_ids"]
    assert not (exported / "adapter_config.json").exists()
    assert "quantization_config" not in json.loads((exported / "config.json").read_text())


def test_the_quantised_weights_are_merged_and_not_the_originals(run: Callable[..., Finished], tiny_model: Path) -> None:
    finished = run()
    merged = SavedRun(finished.run, NF4(), LoRA(r=4)).merge()
    base, quantizer = load_model(str(tiny_model), NF4()), NF4()
    adapted = dict(finished.model.base_model.model.named_modules())
    for name, module in base.named_modules():
        if quantizer.is_quantized(module):
            layer = adapted[name]
            delta = layer.get_delta_weight("default").detach()
            wanted = quantizer.dequantize(module).float() + delta.float()
            got = merged.get_submodule(name).weight.float()
            assert float((got - wanted).abs().max()) <= 2**-8 * float(wanted.abs().max())


def test_a_saved_run_is_opened_with_the_providers_that_it_names(run: Callable[..., Finished]) -> None:
    finished = run(quantizer=NF4(double_quant=False))
    saved = SavedRun.open(finished.run.folder, Registry())
    assert (type(saved.quantizer), type(saved.adapter)) == (NF4, LoRA)
    assert saved.quantizer.options == NF4(double_quant=False).options
    assert torch.equal(logits(saved.add_adapter(saved.load_base())), logits(finished.model))


def test_what_can_not_be_merged_is_refused_before_anything_is_loaded(run: Callable[..., Finished], tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        run(quantizer=Unmergeable(), exports=[Merged()])
    assert str(caught.value) == (
        "exports[0]: 'nf4' can't be merged into plain weights; choose another, or leave this export out"
    )
    assert not (tmp_path / "run").exists()
    finished = run()
    with pytest.raises(ModelError, match="what is stored by the quantizer 'nf4' can't be merged into plain weights; keep"):
        SavedRun(finished.run, Unmergeable(), LoRA()).merge()


def cli(*arguments: object) -> int:
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    return int(ended.value.code or 0)


def test_the_command_exports_a_finished_run(
    run: Callable[..., Finished], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    finished = run(quantizer=Int8())
    target = tmp_path / "model"
    assert cli("export", finished.run.folder, "--to", "merged", "--output", target, "--set", "dtype=float16", "--json") == 0
    assert json.loads(capsys.readouterr().out) == {
        "run": str(finished.run.folder),
        "exporter": "merged",
        "folder": str(target),
    }
    assert json.loads((target / "config.json").read_text())["dtype"] == "float16"
    before = {p.name: p.read_bytes() for p in target.iterdir()}
    for arguments, message in (
        (("--output", target), f"error: {target} exists already; name another folder with --output, or replace it"),
        (("--set", "dtype=float8"), "error: --set.dtype: must be 'auto', 'bfloat16', 'float16' or 'float32' (got 'float8')"),
        (("--set", "dtype"), "error: --set dtype: write option=value"),
    ):
        assert cli("export", finished.run.folder, "--to", "merged", *arguments) == 2
        assert capsys.readouterr().err.startswith(message)
    assert cli("export", finished.run.folder, "--to", "gguf") == 2
    assert capsys.readouterr().err.startswith("error: --to: unknown exporter 'gguf'; installed: merged")
    assert {p.name: p.read_bytes() for p in target.iterdir()} == before


def test_a_full_disk_while_exporting_leaves_no_half_export(run: Callable[..., Finished]) -> None:
    class Full(Merged):
        def export(self, saved: SavedRun, folder: Path) -> None:
            (folder / "half").write_text("half")
            raise OSError(28, "No space left on device")

    with pytest.raises(RunError, match="no space left on device"):
        run(exports=[Full()])


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_the_size_of_files_and_the_dtype_are_options(run: Callable[..., Finished], dtype: str) -> None:
    finished = run(exports=[Merged(dtype=dtype, max_shard_size="100KB")])
    files = list((finished.run.folder / "exports" / "merged").glob("model-*.safetensors"))
    assert len(files) > 1
    assert max(path.stat().st_size for path in files) < 110_000

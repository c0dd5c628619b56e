"""`qlora quantize`: the folder it writes, the errors it reports, and what it refuses."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

TABLE = "model.layers.0.self_attn.q_proj"


def report(result: Any) -> dict[str, Any]:
    assert result.code == 0, result.err
    answer: dict[str, Any] = json.loads(result.out)
    return answer


@pytest.mark.parametrize("name", ["nf4", "fp4", "int8"])
def test_transformers_loads_the_folder_and_the_errors_are_those_of_its_layers(
    qlora: Callable[..., Any], tiny_model: Path, here: Path, name: str
) -> None:
    """Against the norms in float64 of what bitsandbytes, loaded by transformers, dequantises."""
    import torch
    import transformers
    from bitsandbytes.functional import dequantize_4bit, int8_vectorwise_dequant
    from safetensors.torch import load_file

    answer = report(qlora("quantize", tiny_model, "out", "--quantizer", name, "--json"))
    assert answer["quantizer"] == name
    assert answer["folder"] == "out"
    assert {path.name for path in (here / "out").iterdir()} >= {"config.json", "model.safetensors", "tokenizer.json"}
    model = transformers.AutoModelForCausalLM.from_pretrained(here / "out")
    transformers.AutoTokenizer.from_pretrained(here / "out")
    weights = load_file(tiny_model / "model.safetensors")
    assert len(answer["layers"]) == 14
    for layer in answer["layers"]:
        packed, w = model.get_submodule(layer["name"]).weight, weights[f"{layer['name']}.weight"].double()
        if name == "int8":
            q = int8_vectorwise_dequant(packed.data, packed.SCB).double()
            assert layer["bits"] == round(8 + 32 / w.shape[1], 4)
        else:
            q = dequantize_4bit(packed.data, packed.quant_state).double()
            assert 4 < layer["bits"] < 9  # the tables of levels weigh much in layers so small
        assert layer["shape"] == list(w.shape)
        assert layer["error"] == pytest.approx(float((q - w).norm() / w.norm()), rel=1e-5)
    assert answer["bytes_after"] < answer["bytes_before"]
    assert answer["peak_memory_bytes"] > 0
    assert answer["seconds"] > 0
    with torch.no_grad():
        assert model(torch.arange(2, 22)[None]).logits.isfinite().all()


def test_a_run_trains_on_the_folder_as_on_the_model(
    qlora: Callable[..., Any], write_config: Callable[..., Path], tiny_model: Path, here: Path
) -> None:
    assert qlora("quantize", tiny_model, "packed", "--quiet").code == 0
    losses = []
    for name in (str(tiny_model), str(here / "packed")):
        config = write_config(model=name, output=str(here / Path(name).name))
        losses.append(report(qlora("train", config, "--json", "--quiet"))["metrics"]["loss"])
    assert losses[0] == losses[1]


def test_options_go_to_the_quantizer_and_the_model(qlora: Callable[..., Any], tiny_model: Path, here: Path) -> None:
    arguments = ("--set", "quantizer.double_quant=false", "--set", "quantizer.skip_modules=[down_proj]", "--dtype", "float32")
    answer = report(qlora("quantize", tiny_model, "out", *arguments, "--set", "model.revision=main", "--json"))
    stored = json.loads((here / "out" / "config.json").read_text())
    assert stored["dtype"] == "float32"
    assert stored["quantization_config"]["bnb_4bit_use_double_quant"] is False
    assert not [layer for layer in answer["layers"] if "down_proj" in layer["name"]]


def test_the_table_has_a_line_per_layer_or_per_kind(
    qlora: Callable[..., Any], tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import qlora_core.cli.quantize as command

    result = qlora("quantize", tiny_model, "out")
    assert TABLE in result.out
    assert "64 x 64" in result.out
    assert "Wrote out" in result.out
    monkeypatch.setattr(command, "MANY", 3)
    short = qlora("quantize", tiny_model, "out", "--overwrite")
    assert TABLE not in short.out
    assert all(word in short.out for word in ("q_proj", "up_proj", "least", "mean", "most"))
    assert TABLE in qlora("quantize", tiny_model, "out", "--overwrite", "--verbose").out
    assert qlora("quantize", tiny_model, "out", "--overwrite", "--quiet").out == ""


def test_gpt2_whose_weights_are_transposed_is_measured(qlora: Callable[..., Any], make_model: Callable[..., Path]) -> None:
    answer = report(qlora("quantize", make_model("gpt2"), "out", "--json"))
    assert answer["layers"]
    assert all(0.05 < layer["error"] < 0.15 for layer in answer["layers"])


def test_weights_in_pickle_are_refused(qlora: Callable[..., Any], tiny_model: Path, here: Path) -> None:
    shutil.copytree(tiny_model, here / "old")
    (here / "old" / "model.safetensors").rename(here / "old" / "pytorch_model.bin")
    result = qlora("quantize", "old", "out")
    assert result.code == 2
    assert "holds its weights as pickle (pytorch_model.bin)" in result.err
    assert not (here / "out").exists()


def test_a_model_without_a_tokenizer_is_written_with_a_warning(qlora: Callable[..., Any], tiny_model: Path, here: Path) -> None:
    (here / "bare").mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(tiny_model / name, here / "bare" / name)
    result = qlora("quantize", "bare", "out")
    assert result.code == 0
    assert "has no tokenizer" in result.err
    assert "out gets none" in result.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("missing-folder/x/y", "out"), "error: model.path: no folder 'missing-folder/x/y'"),
        (("MODEL", "out", "--quantizer", "nf5"), "error: quantizer: unknown quantizer 'nf5'; did you mean 'nf4'?"),
        (("MODEL", "out", "--quantizer", "none"), "error: quantizer: 'none' leaves weights as they are"),
        (("MODEL", "out", "--set", "quantizer.bits=3"), "error: quantizer.bits: unknown option; nf4 accepts double_quant"),
        (("MODEL", "out", "--set", "double_quant=false"), "error: --set double_quant=false: write quantizer.OPTION=value"),
        (("MODEL", "out", "--set", "quantizer"), "error: --set quantizer: write quantizer.OPTION=value"),
        (("MODEL", "out", "--set", "model.dtipe=x"), "error: model.dtipe: unknown option"),
        (("MODEL", "out", "--dtype", "int4"), "error: model.dtype: must be 'auto', 'bfloat16', 'float16' or 'float32'"),
        (("MODEL", "there"), "error: there exists already; name another folder, or replace the model in it with --overwrite"),
        (("MODEL", "there", "--overwrite"), "error: there holds something else than a model"),
        (("MODEL", "file"), "is a file; name another folder"),
        (("MODEL", "file/out"), "is a file; name another folder"),
        (("MODEL", "MODEL", "--overwrite"), "is where the model itself lies; name another folder"),
    ],
)
def test_what_can_not_work_is_refused_and_leaves_nothing(
    qlora: Callable[..., Any],
    tiny_model: Path,
    here: Path,
    snapshot: Callable[[Path], dict[str, bytes]],
    arguments: tuple[str, ...],
    message: str,
) -> None:
    (here / "there").mkdir()
    (here / "there" / "letter.txt").write_text("keep me")
    (here / "file").write_text("keep me")
    before = snapshot(here), snapshot(tiny_model)
    result = qlora("quantize", *(str(tiny_model) if word == "MODEL" else word for word in arguments))
    assert result.code == 2
    assert message in result.err
    assert result.out == ""
    assert (snapshot(here), snapshot(tiny_model)) == before


def test_what_is_quantised_is_not_quantised_again(qlora: Callable[..., Any], tiny_model: Path) -> None:
    assert qlora("quantize", tiny_model, "once", "--quiet").code == 0
    result = qlora("quantize", "once", "twice")
    assert result.code == 2
    assert "is stored quantised already; use the original" in result.err


def test_a_quantizer_that_transformers_can_not_load_is_refused(
    qlora: Callable[..., Any], tiny_model: Path, here: Path, write_module: Callable[[str, str], str]
) -> None:
    module = write_module(
        "rewriting",
        """
        from qlora_core import hookimpl
        from qlora_core.testing.tiny import Plain


        class Rewriting(Plain):
            name = "rewriting"
            quantizes = True


        @hookimpl
        def qlora_quantizers():
            return [Rewriting]
        """,
    )
    result = qlora("quantize", tiny_model, "out", "--quantizer", "rewriting", "-p", module)
    assert result.code == 2
    assert "error: quantizer: 'rewriting' packs weights in a way that transformers can't load by itself" in result.err
    assert not (here / "out").exists()


def test_a_full_disk_leaves_nothing_and_the_old_model_stays(
    qlora: Callable[..., Any], tiny_model: Path, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qlora_bitsandbytes import NF4

    assert qlora("quantize", tiny_model, "out", "--quiet").code == 0
    before = sorted(path.name for path in here.iterdir()), (here / "out" / "model.safetensors").read_bytes()

    def save(self: Any, base: Any, folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(NF4, "save", save)
    result = qlora("quantize", tiny_model, "out", "--overwrite")
    assert result.code == 2
    assert result.err.strip().endswith("out can't be written: no space left on device; free some space, or name another folder")
    assert (sorted(path.name for path in here.iterdir()), (here / "out" / "model.safetensors").read_bytes()) == before

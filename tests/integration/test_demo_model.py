"""The demo's model is the real SmolLM2, and the demo makes it better at Python's documentation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import qlora_core.demo_model
from qlora_core.cli.main import main
from qlora_core.demo_model import WHEEL_SHA256, demo_model, demo_text


def test_the_packaged_model_is_an_ordinary_folder_that_names_its_origin(demo_folder: Path) -> None:
    import transformers

    names = {path.name for path in demo_folder.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "origin.json"} <= names
    assert json.loads((demo_folder / "origin.json").read_text())["sha256"] == WHEEL_SHA256
    model = transformers.AutoModelForCausalLM.from_pretrained(demo_folder)
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    assert model.dtype == torch.bfloat16
    assert "stored in 4 bits (Q4_1) before" in demo_model().origin


def test_the_text_is_pythons_own_documentation() -> None:
    text = demo_text().read_text(encoding="utf-8")
    assert len(text) > 300_000
    assert 'The "import" statement' in text


@pytest.mark.slow
def test_the_demo_lowers_the_held_out_perplexity(
    demo_folder: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    part = tmp_path / "part.txt"  # scoring a tenth of all takes longer than the training
    part.write_text(demo_text().read_text(encoding="utf-8")[:80_000], encoding="utf-8")
    monkeypatch.setattr(qlora_core.demo_model, "demo_text", lambda: part)
    with pytest.raises(SystemExit) as caught:
        main(["demo", "--output", str(tmp_path / "demo"), "--steps", "4", "--json"])
    assert caught.value.code == 0
    report = json.loads(capsys.readouterr().out)
    assert report["perplexity"]["before"] == pytest.approx(14.6, abs=0.6)
    assert report["perplexity"]["after"] < 0.95 * report["perplexity"]["before"]
    assert report["sample"]["before"] != report["sample"]["after"]

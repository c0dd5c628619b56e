"""The demo's model is the real SmolLM2, and the demo makes it better at Python's documentation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

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
def test_the_demo_lowers_the_held_out_perplexity(demo_folder: Path, tmp_path: Path, capsys: Any) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["demo", "--output", str(tmp_path / "demo"), "--steps", "6", "--json"])
    assert caught.value.code == 0
    report = json.loads(capsys.readouterr().out)
    assert report["perplexity"]["before"] == pytest.approx(12.7, abs=0.6)
    assert report["perplexity"]["after"] < 0.95 * report["perplexity"]["before"]
    assert report["sample"]["before"] != report["sample"]["after"]

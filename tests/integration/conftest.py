"""Short runs of the whole road on small models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qlora_bitsandbytes import NF4
from qlora_core import Finished, finetune
from qlora_peft import LoRA
from qlora_text import TextFile


@pytest.fixture
def run(tiny_model: Path, text_file: Path, tmp_path: Path) -> Callable[..., Finished]:
    """Return a function that runs `finetune` on the tiny Llama, three steps unless told otherwise."""

    def go(**changes: Any) -> Finished:
        training = {"max_steps": 3, "learning_rate": 1e-2, "logging_steps": 1, **changes.pop("training", {})}
        data = {"sequence_length": 32, **changes.pop("data", {})}
        arguments: dict[str, Any] = {
            "model": str(tiny_model),
            "quantizer": NF4(),
            "adapter": LoRA(r=4),
            "dataset": TextFile(path=str(text_file)),
            "output": tmp_path / "run",
        }
        return finetune(**{**arguments, **changes}, data=data, training=training)

    return go

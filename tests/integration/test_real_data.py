"""Real chats and instructions train from a configuration of a few lines, masked as they should be: GSM8K the real SmolLM2,
the others a small model with its tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers

from qlora_core import RunConfig, execute, resolve
from qlora_core.data.mask import IGNORED
from qlora_core.pipeline import prepare
from qlora_core.registry import Registry

SHARED = Path(__file__).parents[2].parent / "shared" / "data"
LINES = """
model: {model}
dataset: {{name: records, path: {path}}}
data: {{sequence_length: 640, on_problem: skip, eval_fraction: 0.003}}
training: {{max_steps: 1, batch_size: 1}}
callbacks: []
output: {output}
"""


def gsm8k(path: Path) -> list[str]:
    return [row["answer"] for row in map(json.loads, path.read_text(encoding="utf-8").splitlines())]


def self_instruct(path: Path) -> list[str]:
    rows = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return [one["output"] for row in rows for one in row["instances"]]


def openassistant(path: Path) -> list[str]:
    rows = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return [turn["content"] for row in rows for turn in row["messages"] if turn["role"] == "assistant"]


def sharegpt(path: Path) -> list[str]:
    chats = json.loads(path.read_text(encoding="utf-8"))
    return [turn["value"] for chat in chats for turn in chat["conversations"] if turn["from"] == "gpt"]


FILES = {
    "instruct/gsm8k_test.jsonl": gsm8k,
    "instruct/self_instruct_seed_tasks.jsonl": self_instruct,
    "chat/openassistant_messages.jsonl": openassistant,
    "chat/sharegpt_dummy.json": sharegpt,
}


@pytest.fixture(scope="module")
def small_model(demo_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model of two layers with the tokenizer and the template of SmolLM2."""
    folder = tmp_path_factory.mktemp("small")
    config = transformers.AutoConfig.from_pretrained(
        demo_folder, hidden_size=64, intermediate_size=128, num_attention_heads=2, num_key_value_heads=1, num_hidden_layers=2
    )
    config.layer_types = None
    transformers.AutoTokenizer.from_pretrained(demo_folder).save_pretrained(folder)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.mark.slow
@pytest.mark.demo_model
@pytest.mark.parametrize("name", FILES)
def test_a_real_file_trains_and_exactly_its_answers_are_supervised(
    name: str, demo_folder: Path, small_model: Path, tmp_path: Path
) -> None:
    if not (SHARED / name).is_file():
        pytest.skip(f"{name} is not there")
    real = "gsm8k" in name
    text = LINES.format(model=demo_folder if real else small_model, path=SHARED / name, output=tmp_path / "run").strip()
    assert len(text.splitlines()) <= 10
    (tmp_path / "run.yaml").write_text(text, encoding="utf-8")
    config, parts = resolve(RunConfig.read(tmp_path / "run.yaml"), Registry())
    prepared = prepare(config, parts)
    said = supervised(prepared)
    answers = {answer.strip() for answer in FILES[name](SHARED / name)}
    assert said <= answers
    assert len(said) > 0.7 * len(answers)  # the others are in chats that are too long
    finished = execute(config, parts)
    assert 0 < finished.metrics["eval_loss"] < (5 if real else 12)  # a random model: ln(49,152) is 10.8
    assert (finished.run.adapter / "chat_template.jinja").is_file()


def supervised(prepared: Any) -> set[str]:
    """Return what is supervised, each stretch up to its end of turn as text, trimmed; every stretch has an end."""
    found: set[str] = set()
    for blocks in (prepared.encoded.train, prepared.encoded.eval):
        for block in blocks:
            stretch: list[int] = []
            for token, label in zip(block["input_ids"].tolist(), block["labels"].tolist(), strict=True):
                if label == IGNORED:
                    assert not stretch, "a stretch without an end of turn"
                    continue
                assert label == token
                stretch.append(token)
                if token == prepared.tokenizer.eos_token_id:
                    found.add(prepared.tokenizer.decode(stretch[:-1]).strip())
                    stretch = []
            assert not stretch
    return found

"""What the pages and examples run on: a tiny random Llama with a real tokenizer, and a short real text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

PRETRAINING = 60  # steps
TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture(scope="session")
def docs_text() -> str:
    """About 40 kB of English about Python, from the standard library."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))[:40_000]


@pytest.fixture(scope="session")
def docs_model(tmp_path_factory: pytest.TempPathFactory, docs_text: str) -> Path:
    """A folder with a Llama of 2 layers, trained so briefly on the text that an adapter finds much left to learn."""
    from qlora_core.libraries import import_libraries

    import_libraries()
    import torch
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=512, initial_alphabet=alphabet, special_tokens=["<|end|>"], show_progress=False)
    bpe.train_from_iterator([docs_text, docs_text.title()], trainer)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|end|>")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    transformers.set_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=1024,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        tie_word_embeddings=True,
    )
    model = transformers.LlamaForCausalLM(config)
    ids = torch.tensor(tokenizer(docs_text.title())["input_ids"])  # Not Quite The Same Language
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(PRETRAINING):
        starts = torch.arange(8) * 128 + step * 512
        batch = torch.stack([ids[start : start + 128] for start in starts % (len(ids) - 128)])
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.to(torch.bfloat16).save_pretrained(folder)
    assert json.loads((folder / "config.json").read_text())["model_type"] == "llama"
    return folder


@pytest.fixture
def workplace(tmp_path: Path, docs_text: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with corpus.txt, held-out.txt and stories.jsonl in it, and nothing else."""
    (tmp_path / "corpus.txt").write_text(docs_text[:30_000], encoding="utf-8")
    (tmp_path / "held-out.txt").write_text(docs_text[30_000:], encoding="utf-8")
    stories = [json.dumps({"text": part}) for part in docs_text[:30_000].split("\n\n")]
    (tmp_path / "stories.jsonl").write_text("\n".join(stories), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path

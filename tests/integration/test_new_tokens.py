"""`tokens.add` enlarges the embeddings and trains only the new rows, which are saved with the adapter."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qlora_bitsandbytes import NF4
from qlora_core import Finished, ModelError, load_model, load_tokenizer
from qlora_peft import LoRA
from qlora_text import TextFile


@pytest.mark.parametrize("tied", [True, False])
def test_only_the_new_rows_are_trained_and_they_come_back(
    make_model: Callable[..., Path], run: Callable[..., Finished], tmp_path: Path, text: str, tied: bool
) -> None:
    folder = make_model("llama", tie_word_embeddings=tied, vocab_size=384)
    corpus = tmp_path / "marked.txt"
    corpus.write_text(text[:20_000].replace(" the ", " <the> "), encoding="utf-8")
    finished = run(
        model=str(folder),
        dataset=TextFile(path=str(corpus)),
        tokens={"add": ["<the>", "<unused>"]},
        training={"max_steps": 6},
    )
    new = finished.tokenizer.convert_tokens_to_ids(["<the>", "<unused>"])
    assert new == [384, 385]
    trained = {n: tuple(p.shape) for n, p in finished.model.named_parameters() if p.requires_grad and "lora" not in n}
    assert set(trained.values()) == {(2, 64)}
    assert len(trained) == (1 if tied else 2)
    stored = load_file(finished.run.adapter / "adapter_model.safetensors")
    assert max(tensor.numel() for name, tensor in stored.items() if "lora" not in name) == 2 * 64

    tokenizer = load_tokenizer(str(finished.run.adapter))
    assert tokenizer.convert_tokens_to_ids(["<the>", "<unused>"]) == new
    base = load_model(str(folder), NF4(), tokenizer=tokenizer)
    old = base.get_input_embeddings().weight[:384].clone()
    reloaded = LoRA().load(base, finished.run.adapter)
    ids = torch.tensor([[5, 384, 7, 385, 9]])
    with torch.no_grad():
        ours, theirs = finished.model.eval()(ids).logits, reloaded.eval()(ids).logits
    assert ours.shape == (1, 5, 386)
    assert torch.equal(ours, theirs)
    embeddings = finished.model.get_input_embeddings()
    weight = embeddings.base_layer.weight if hasattr(embeddings, "base_layer") else embeddings.weight
    assert torch.equal(weight[:384], old)  # the old rows are as they were


def test_a_token_that_exists_already_is_refused(run: Callable[..., Finished]) -> None:
    with pytest.raises(ModelError, match=r"tokens\.add: '<eos>' is in the vocabulary already; leave it out"):
        run(tokens={"add": ["<eos>"]})

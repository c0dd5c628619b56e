"""A model that does not fit what is asked of it: stored quantised already, too few positions, no chat template."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import transformers

from qlora_bitsandbytes import FP4, NF4, Int8
from qlora_core import ConfigError, Finished, ModelError, generate, load_model
from qlora_peft import LoRA
from qlora_plain import NoQuantizer


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """The tiny model, saved in NF4 with double quantisation."""
    folder = tmp_path_factory.mktemp("stored")
    load_model(str(tiny_model), NF4()).save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("quantizer", [FP4(), Int8(), NF4(double_quant=False), NoQuantizer()])
def test_a_model_stored_in_another_format_is_refused(stored: Path, quantizer: Any) -> None:
    with pytest.raises(ModelError, match="is stored quantised already; name its quantizer, or use the original"):
        load_model(str(stored), quantizer)


def test_a_model_stored_in_the_same_format_trains_with_the_trap_disarmed(run: Callable[..., Finished], stored: Path) -> None:
    finished = run(model=str(stored))
    layers = [module for module in finished.model.modules() if isinstance(module, bitsandbytes.nn.Linear4bit)]
    assert len(layers) == 14
    assert not any(layer.support_avx512bf16_for_cpu for layer in layers)
    assert all(layer.weight.quant_state.nested for layer in layers)


@pytest.mark.parametrize("architecture", ["gpt2", "opt"])
def test_blocks_beyond_the_learned_positions_are_refused(
    make_model: Callable[..., Path], run: Callable[..., Finished], tmp_path: Path, architecture: str
) -> None:
    with pytest.raises(ConfigError, match=r"data.sequence_length: the model was made for 256 positions \(got 300\)"):
        run(model=str(make_model(architecture)), data={"sequence_length": 300})
    assert not (tmp_path / "run").exists()


def test_blocks_beyond_the_trained_length_of_computed_positions_are_warned_of(
    run: Callable[..., Finished], caplog: pytest.LogCaptureFixture
) -> None:
    run(data={"sequence_length": 300}, training={"max_steps": 1})
    assert "data.sequence_length: the model was made for 256 positions" in caplog.text


def test_a_chat_without_a_template_is_refused(tiny_model: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_model)
    with pytest.raises(ModelError, match="the model has no chat template; leave out --chat"):
        generate(load_model(str(tiny_model), NF4()), tokenizer, "Hello", chat=True)


def test_generated_text_keeps_the_space_after_the_prompt_and_streams_the_same(tiny_model: Path) -> None:
    """A tokenizer of the sentencepiece family drops the space of a text's first token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    words = {"<unk>": 0, "\u2581Once": 1, "\u2581upon": 2, "\u2581time": 3}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", pad_token="<unk>")
    model = load_model(str(tiny_model), NF4())
    model.generation_config.eos_token_id = None
    model.generation_config.suppress_tokens = [0, *range(4, 416)]
    pieces: list[str] = []
    text = generate(model, tokenizer, "Once upon", max_new_tokens=4, on_text=pieces.append)
    assert text.startswith(" ")
    assert len(text.split()) == 4
    assert "".join(pieces) == text


def test_what_is_no_provider_is_refused_by_name(run: Callable[..., Finished]) -> None:
    with pytest.raises(ConfigError, match=r"quantizer: must be an instance of a Quantizer, options in brackets \(got 'nf4'\)"):
        run(quantizer="nf4")


def test_what_the_adapters_library_refuses_is_one_clear_error(run: Callable[..., Finished], tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="adapter 'lora' can't be added to this model: "):
        run(adapter=LoRA(r=4, modules_to_save=("q_proj",)))
    assert not (tmp_path / "run").exists()

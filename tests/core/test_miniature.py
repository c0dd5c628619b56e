"""What a tiny model keeps of the real one's configuration, and what shrinks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from qlora_core.miniature import shrunk

LLAMA = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128_256,
    "max_position_embeddings": 131_072,
    "eos_token_id": [128_001, 128_008, 128_009],
}


def test_widths_heads_and_layers_shrink_and_the_rest_stays() -> None:
    made = shrunk(LLAMA, 64, few=True)
    assert made == LLAMA | {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 8,
    }
    assert shrunk(LLAMA, 256, few=False)["num_hidden_layers"] == 32
    assert shrunk(made, 64, few=True) == made


@pytest.mark.parametrize(
    ("heads", "groups", "made"),
    [(32, 32, (4, 4)), (32, 8, (8, 2)), (9, 3, (4, 2)), (14, 2, (8, 2)), (8, 1, (4, 1)), (2, 1, (2, 1)), (2, 2, (2, 2))],
)
def test_heads_that_share_keys_go_on_sharing_them(heads: int, groups: int, made: tuple[int, int]) -> None:
    content = {"hidden_size": heads * 64, "num_attention_heads": heads, "num_key_value_heads": groups}
    few = shrunk(content, 64, few=True)
    assert (few["num_attention_heads"], few["num_key_value_heads"]) == made
    assert few["hidden_size"] % few["num_attention_heads"] == 0


@pytest.mark.parametrize(
    ("changes", "layers"),
    [
        ({"layer_types": ["sliding"] * 5 + ["full"] + ["sliding"] * 6}, {"layer_types": ["sliding", "full"]}),
        ({"layer_types": ["full"] * 12}, {"layer_types": ["full"] * 2}),
        (
            {"layer_types": ["a", "a", "b"] * 4, "no_rope_layers": [1, 1, 0] * 2 + [0, 1, 0] * 2},
            {"layer_types": ["a", "b", "a"], "no_rope_layers": [1, 0, 0]},
        ),
        ({"attn_layer_period": 8}, {}),
        ({"first_k_dense_replace": 3}, {}),
    ],
)
def test_there_are_as_many_layers_as_there_are_kinds(changes: dict[str, Any], layers: dict[str, Any]) -> None:
    made = shrunk({"hidden_size": 64, "num_hidden_layers": 12, **changes}, 64, few=True)
    period = changes.get("attn_layer_period") or changes.get("first_k_dense_replace")
    assert made["num_hidden_layers"] == (period + 1 if period else len(layers["layer_types"]))
    assert {name: made[name] for name in layers} == layers


REAL: dict[str, dict[str, Any]] = {
    "llama": {**LLAMA, "vocab_size": 1000, "tie_word_embeddings": False},
    "gpt2": {"n_embd": 768, "n_head": 12, "n_layer": 12, "vocab_size": 1000},
    "opt": {"hidden_size": 1024, "word_embed_proj_dim": 512, "ffn_dim": 4096, "num_attention_heads": 16, "vocab_size": 1000},
    "gpt_neox": {"hidden_size": 2560, "intermediate_size": 10240, "num_attention_heads": 32, "vocab_size": 1000},
    "gptj": {"n_embd": 4096, "n_head": 16, "n_layer": 28, "rotary_dim": 64, "vocab_size": 1000},
    "bloom": {"hidden_size": 1024, "n_head": 16, "n_layer": 24, "vocab_size": 1000},
    "falcon": {"hidden_size": 4544, "num_attention_heads": 71, "num_hidden_layers": 32, "vocab_size": 1000},
    "mistral": {"hidden_size": 4096, "sliding_window": 4096, "vocab_size": 1000},
    "mixtral": {"hidden_size": 4096, "vocab_size": 1000},
    "qwen2": {"hidden_size": 896, "num_attention_heads": 14, "num_key_value_heads": 2, "vocab_size": 1000},
    "qwen3": {"hidden_size": 1024, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 1000},
    "qwen3_moe": {"hidden_size": 2048, "vocab_size": 1000},
    "gemma": {"hidden_size": 2048, "num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 256, "vocab_size": 1000},
    "gemma2": {"hidden_size": 2304, "vocab_size": 1000},
    "gemma3_text": {"hidden_size": 1152, "num_hidden_layers": 26, "vocab_size": 1000},
    "phi": {"hidden_size": 2560, "num_attention_heads": 32, "partial_rotary_factor": 0.4, "vocab_size": 1000},
    "phi3": {"hidden_size": 3072, "vocab_size": 1000, "pad_token_id": 0},
    "smollm3": {"hidden_size": 2048, "num_hidden_layers": 36, "vocab_size": 1000, "pad_token_id": 0},
    "olmo2": {"hidden_size": 4096, "vocab_size": 1000},
    "stablelm": {"hidden_size": 2560, "vocab_size": 1000},
    "starcoder2": {"hidden_size": 3072, "vocab_size": 1000},
    "cohere": {"hidden_size": 8192, "vocab_size": 1000, "pad_token_id": 0},
    "deepseek_v3": {"hidden_size": 7168, "num_hidden_layers": 61, "n_routed_experts": 16, "n_group": 4, "vocab_size": 1000},
}


@pytest.mark.parametrize("architecture", REAL)
def test_the_tiny_model_is_of_the_same_class_and_computes(architecture: str) -> None:
    config = transformers.AutoConfig.for_model(architecture, **REAL[architecture])
    made = type(config).from_dict(shrunk(config.to_dict(), 64, few=True))
    with torch.device("meta"):
        real = transformers.AutoModelForCausalLM.from_config(config)
    model = transformers.AutoModelForCausalLM.from_config(made)
    assert type(model) is type(real)
    assert sum(p.numel() for p in model.parameters()) < 20_000_000 < sum(p.numel() for p in real.parameters())
    assert model.get_input_embeddings().num_embeddings == real.get_input_embeddings().num_embeddings == 1000
    tied = [m.config.tie_word_embeddings for m in (model, real)]
    assert tied[0] == tied[1]
    kinds = [{type(module) for module in m.modules()} for m in (model, real)]
    assert kinds[0] == kinds[1]
    with torch.no_grad():
        assert model.eval()(torch.arange(12)[None]).logits.shape == (1, 12, 1000)


def test_long_rotary_factors_are_cut_to_the_smaller_heads() -> None:
    rope = {"rope_type": "longrope", "short_factor": [1.0] * 48, "long_factor": [2.0] * 48, "rope_theta": 1e4}
    config = transformers.Phi3Config(
        vocab_size=1000, rope_parameters=rope, original_max_position_embeddings=64, max_position_embeddings=256, pad_token_id=0
    )
    made = transformers.Phi3Config.from_dict(shrunk(config.to_dict(), 64, few=True))
    assert len(made.rope_parameters["long_factor"]) == 64 // 4 // 2
    with torch.no_grad():
        logits = transformers.Phi3ForCausalLM(made).eval()(torch.arange(100)[None]).logits
    assert logits.shape == (1, 100, 1000)

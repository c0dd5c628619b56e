"""A tiny random model of the same architecture as a real one, with its own tokenizer, in a folder: for a dry run.

What decides whether parts fit together stays as it is: class, vocabulary, special tokens, positions, kinds of layers and of
attention, tied embeddings. Widths, heads and the number of layers shrink.
"""

from __future__ import annotations

import copy
import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_core.calls import calling
from qlora_core.config import ModelConfig
from qlora_core.errors import ModelError
from qlora_core.model import load_model
from qlora_core.parts import Parts
from qlora_core.providers import Quantizer

if TYPE_CHECKING:
    import transformers

__all__ = ["shrunk", "write_miniature"]

SIZES: tuple[tuple[int, bool], ...] = ((64, True), (256, True), (64, False), (256, False))
"""Widths to try, each with few layers or all of them: a rank may need wide layers, and a name may mean a late one."""

HIDDEN = ("hidden_size", "n_embd", "d_model")
HEADS = ("num_attention_heads", "n_head", "num_heads", "n_heads")
GROUPS = ("num_key_value_heads", "num_kv_heads")
LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
WIDTHS = (
    *("intermediate_size", "ffn_dim", "n_inner", "d_ff", "ffn_hidden_size", "word_embed_proj_dim", "embedding_size"),
    *("moe_intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size"),
)
PERIOD = re.compile(r"period|pattern|interval|sparse_step|first_k_dense_replace")  # after so many layers comes another kind


def write_miniature(
    config: ModelConfig,
    parts: Parts,
    skeleton: transformers.PreTrainedModel,
    tokenizer: transformers.PreTrainedTokenizerBase,
    folder: Path,
) -> ModelConfig:
    """Write a tiny model like *skeleton*, with *tokenizer*, into *folder* and return the configuration that loads it.

    The smallest that quantizer and adapter of *parts* accept, as they accept the real one; a model that is stored quantised
    becomes one that is. Raises ModelError where none can be made.
    """
    model = _smallest(config, parts, skeleton)
    small = ModelConfig(path=str(folder), **config.model_dump(exclude={"path", "revision", "cache"}), cache=False)
    stored = skeleton.config.to_dict().get("quantization_config")
    model.save_pretrained(folder if stored is None else folder / "plain")
    if stored is not None:
        _store_quantized(small, parts.quantizer, stored, folder)
    if (code := Path(config.path)).is_dir():
        for file in code.glob("*.py"):  # of a model that brings its own
            shutil.copy(file, folder)
    tokenizer.save_pretrained(folder)
    _copy_generation(config, folder)
    return small


def _store_quantized(config: ModelConfig, quantizer: Quantizer, stored: Any, folder: Path) -> None:
    """Quantise the model in plain/ of *folder* into it, with what the real one says of itself: *stored* fits, or does not."""
    base = load_model(config.model_copy(update={"path": str(folder / "plain")}), quantizer)
    with calling(quantizer, "save"):
        quantizer.save(base, folder)
    file = folder / "config.json"
    written = {**json.loads(file.read_text(encoding="utf-8")), "quantization_config": stored}
    file.write_text(json.dumps(written, default=str), encoding="utf-8")


def shrunk(content: Mapping[str, Any], width: int, *, few: bool) -> dict[str, Any]:
    """Return *content*, what config.json holds, with layers at most *width* wide, and a *few* layers or all.

    Each kind of layer that a list names stays, and as many layers as a period needs; heads that share keys and values go
    on sharing them.
    """
    made: dict[str, Any] = {
        name: shrunk(value, width, few=few) if isinstance(value, Mapping) and _name(value, HIDDEN) else value
        for name, value in content.items()
        if name != "quantization_config"
    }
    if few and _name(made, LAYERS):
        made |= _few_layers(made)
    hidden = _name(made, HIDDEN)
    if not hidden or made[hidden] <= width:
        return made
    old = made[hidden]
    made |= {name: width if made[name] == old else min(made[name], 2 * width) for name in WIDTHS if made.get(name)}
    heads = _name(made, HEADS)
    made[hidden] = width
    return made | _few_heads(made, heads, old) if heads else made


def _few_layers(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return what changes with two layers, or as many as show every kind that there is."""
    name = _name(content, LAYERS)
    count = content[name]
    lists = {
        key: value
        for key, value in content.items()
        if isinstance(value, list) and len(value) == count and not key.endswith("token_id")
    }
    kinds = [repr([value[index] for value in lists.values()]) for index in range(count)]
    periods = [value for key, value in content.items() if PERIOD.search(key) and type(value) is int]
    wanted = 2 if lists else max([1, *periods]) + 1
    chosen = {kinds.index(kind) for kind in kinds}
    chosen |= set([index for index in range(count) if index not in chosen][: max(0, wanted - len(chosen))])
    return {name: len(chosen)} | {key: [value[index] for index in sorted(chosen)] for key, value in lists.items()}


def _few_heads(content: Mapping[str, Any], heads: str, hidden: int) -> dict[str, Any]:
    """Return what changes with at most eight heads; *hidden* is the width that there was."""
    width, count = content[_name(content, HIDDEN)], content[heads]
    groups = _name(content, GROUPS)
    shared = content[groups] if groups else count
    kept = min(shared, 2)
    made = min(count, 4) if shared == count else kept * (4 if count >= 4 * shared else 2)
    size = width // made  # of a head
    changes = {heads: made} | ({groups: made if shared == count else kept} if groups else {})
    old = content.get("head_dim")
    if old and "qk_rope_head_dim" not in content:  # where that stands, it says how large a head is
        size = size if old * count == hidden else min(2 * size, old)
        changes["head_dim"] = size
    if content.get("rotary_dim"):
        changes["rotary_dim"] = min(content["rotary_dim"], size)
    for name in ("rope_parameters", "rope_scaling"):
        rope = content.get(name)
        if isinstance(rope, Mapping) and "long_factor" in rope:
            half = int(size * rope.get("partial_rotary_factor", content.get("partial_rotary_factor") or 1)) // 2
            changes[name] = {**rope, **{key: rope[key][:half] for key in ("short_factor", "long_factor")}}
    return changes


def _smallest(config: ModelConfig, parts: Parts, skeleton: transformers.PreTrainedModel) -> transformers.PreTrainedModel:
    """Return the first model of SIZES that can be made, fits *parts* and computes."""
    import torch
    import transformers

    def made(content: dict[str, Any]) -> transformers.PreTrainedModel:
        small = type(skeleton.config).from_dict(copy.deepcopy(content))
        small.name_or_path = skeleton.config.name_or_path  # where its code is, if it brings its own
        trust = config.trust_remote_code
        return transformers.AutoModelForCausalLM.from_config(small, dtype=skeleton.dtype, trust_remote_code=trust)

    for width, few in SIZES:
        content = shrunk(skeleton.config.to_dict(), width, few=few)
        try:
            with torch.device("meta"):
                parts.check_model(made(content))
            with torch.random.fork_rng(), torch.no_grad():
                torch.manual_seed(0)
                model = made(content).eval()
                model(input_ids=torch.arange(8)[None] % model.get_input_embeddings().num_embeddings)
            return model
        except Exception as error:  # of any code that a model may have
            problem = error
    raise ModelError(
        f"model.path: no small model like {config.path!r} ({skeleton.config.model_type}) can be made for a dry run: {problem}; "
        "the run itself may work all the same, start it without --dry-run"
    ) from problem


def _copy_generation(config: ModelConfig, folder: Path) -> None:
    """Write the generation settings of the real model, which may be refused where a model is saved or generates."""
    import transformers

    try:
        settings = transformers.GenerationConfig.from_pretrained(config.path, revision=config.revision or "main")
    except (OSError, ValueError):
        return  # it has none
    settings.to_json_file(folder / "generation_config.json")


def _name(content: Mapping[str, Any], names: tuple[str, ...]) -> str:
    """Return the first of *names* that stands in *content* with a number, or an empty text."""
    return next((name for name in names if type(content.get(name)) is int), "")

"""Load a base model with a quantizer, and add an adapter to it: the first two stages of a run."""

from __future__ import annotations

import copy
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_core.calls import answered, calling
from qlora_core.config import ModelConfig
from qlora_core.errors import ModelError
from qlora_core.libraries import import_libraries

if TYPE_CHECKING:
    import torch
    import transformers

    from qlora_core.providers import Adapter, Quantizer

__all__ = [
    "add_tokens",
    "build_skeleton",
    "inject_adapter",
    "load_model",
    "load_quantized",
    "load_tokenizer",
    "save_quantized",
]

NOWHERE = "is no model folder, and not to be had from the hub"


def load_tokenizer(model: ModelConfig | str) -> transformers.PreTrainedTokenizerBase:
    """Return the tokenizer of *model*; raise ModelError where there is none."""
    config = _as_config(model)
    import_libraries()
    import transformers

    _check_folder(config.path, "config.json", "tokenizer_config.json")
    try:
        return transformers.AutoTokenizer.from_pretrained(config.path, **_source(config))
    except Exception as error:
        where = "has no tokenizer that transformers can load" if Path(config.path).is_dir() else NOWHERE
        raise ModelError(f"model.path: {config.path!r} {where}: {_first(error)}") from error


def build_skeleton(model: ModelConfig | str) -> transformers.PreTrainedModel:
    """Return *model* on the meta device: every module and shape, no weights, in a second even for a large one.

    Raises ModelError where *model* can't be found or is no causal language model.
    """
    config = _as_config(model)
    import_libraries()
    import torch
    import transformers

    from qlora_core.device import pick_device, pick_dtype

    _check_folder(config.path, "config.json")
    try:
        model_config = transformers.AutoConfig.from_pretrained(config.path, **_source(config))
    except Exception as error:
        where = "is no model" if Path(config.path).is_dir() else NOWHERE
        raise ModelError(f"model.path: {config.path!r} {where}: {_first(error)}") from error
    try:
        with torch.device("meta"):
            return transformers.AutoModelForCausalLM.from_config(
                copy.deepcopy(model_config),
                dtype=pick_dtype(config.dtype, pick_device()),
                trust_remote_code=config.trust_remote_code,
            )
    except Exception as error:
        raise ModelError(
            f"model.path: {config.path!r} ({model_config.model_type}) is no causal language model: {_first(error)}"
        ) from error


def load_model(
    model: ModelConfig | str,
    quantizer: Quantizer | None,
    *,
    skeleton: transformers.PreTrainedModel | None = None,
    tokenizer: transformers.PreTrainedTokenizerBase | None = None,
) -> transformers.PreTrainedModel:
    """Return the frozen base model as *quantizer* stores it (None: as it is), on this machine's device.

    Parameters that are not quantised stay in the load dtype; `upcast` casts them to float32, as peft's
    `prepare_model_for_kbit_training` does. A *tokenizer* with more tokens than the model has embeddings makes the
    embeddings grow; each new row is the mean of the old ones.

    Weights are read and quantised one by one. With `cache` the result is kept on disk, and loaded from there next time.
    """
    config = _as_config(model)
    import_libraries()

    from qlora_core.packed import guard
    from qlora_core.quantized import find_entry

    skeleton = build_skeleton(config) if skeleton is None else skeleton
    arguments: dict[str, Any] = {}
    if quantizer is not None:
        with calling(quantizer, "load_kwargs"):
            arguments = answered(quantizer, "load_kwargs", quantizer.load_kwargs(skeleton), dict, "a dict")
    if not _stored_alike(skeleton, arguments):
        raise ModelError(f"model.path: {config.path!r} is stored quantised already; name its quantizer, or use the original")
    entry = find_entry(config, quantizer, skeleton, arguments) if quantizer is not None and config.cache else None
    base = entry.load(quantizer) if entry is not None and quantizer is not None else None
    if base is None:
        base = _quantize(config, quantizer, skeleton, arguments)
        if entry is not None and quantizer is not None:
            entry.store(quantizer, base)
    if tokenizer is not None and len(tokenizer) > base.get_input_embeddings().weight.shape[0]:
        _grow_embeddings(base, len(tokenizer))
    if config.upcast:
        _upcast(base, quantizer)
    guard(base)
    return base.eval()


def inject_adapter(
    model: transformers.PreTrainedModel, adapter: Adapter, *, new_token_ids: Sequence[int] = ()
) -> torch.nn.Module:
    """Return *model* with *adapter* added; raise ModelError unless it trains something, and nothing of the base.

    The initial values of the adapter come from torch's global generator: seed it before (`transformers.set_seed`).
    """
    import torch

    base = {id(parameter): name for name, parameter in model.named_parameters()}
    model.requires_grad_(False)
    with calling(adapter, "inject"):
        adapted: torch.nn.Module = answered(
            adapter, "inject", adapter.inject(model, new_token_ids), torch.nn.Module, "the adapted model"
        )
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    if not trained:
        raise ModelError(f"adapter {adapter.name!r} leaves nothing to train; choose another, such as lora")
    wrong = [base[id(p)] for p in trained if id(p) in base and not adapter.may_train(base[id(p)])]
    if wrong:
        raise ModelError(
            f"adapter {adapter.name!r} would train parameters of the base model: {', '.join(wrong[:3])}"
            f"{', ...' if len(wrong) > 3 else ''}; an adapter adds parameters of its own and leaves the base frozen"
        )
    return adapted


def save_quantized(model: transformers.PreTrainedModel, folder: Path) -> None:
    """Write config.json and the state dict of *model*, in safetensors, into *folder*."""
    from safetensors.torch import save_model

    folder.mkdir(parents=True, exist_ok=True)
    model.config.save_pretrained(folder)
    save_model(model, str(folder / "model.safetensors"), metadata={"format": "pt"})


def load_quantized(quantizer: Quantizer, folder: Path) -> transformers.PreTrainedModel:
    """Return the model that `save_quantized` wrote into *folder*: made anew, passed to `prepare`, then filled."""
    import transformers
    from safetensors.torch import load_model as fill

    config = transformers.AutoConfig.from_pretrained(folder)
    made = transformers.AutoModelForCausalLM.from_config(config, dtype=config.dtype).requires_grad_(False)
    model = quantizer.prepare(made)
    fill(model, str(folder / "model.safetensors"))
    return model.eval()


def add_tokens(
    tokenizer: transformers.PreTrainedTokenizerBase, tokens: Sequence[str], *, special: Collection[str] = ()
) -> list[int]:
    """Add *tokens* to *tokenizer* and return their ids; raise ModelError for one that it has already.

    Those in *special*, such as the end of a turn, are no text: generation does not show them.
    """
    import transformers

    known = [token for token in tokens if token in tokenizer.get_vocab()]
    if known:
        raise ModelError(f"tokens.add: {known[0]!r} is in the vocabulary already; leave it out")
    tokenizer.add_tokens([transformers.AddedToken(t, special=t in special, normalized=False) for t in tokens])
    ids = tokenizer.convert_tokens_to_ids(list(tokens))
    assert isinstance(ids, list)
    return ids


def _quantize(
    config: ModelConfig, quantizer: Quantizer | None, skeleton: transformers.PreTrainedModel, arguments: dict[str, Any]
) -> transformers.PreTrainedModel:
    """Return the model that *config* names, quantised weight by weight while it is read, and prepared."""
    import torch
    import transformers
    from safetensors import SafetensorError

    from qlora_core.device import pick_device

    device = pick_device()
    loaded: tuple[Any, dict[str, Any]]
    try:
        loaded = transformers.AutoModelForCausalLM.from_pretrained(
            config.path,
            dtype=skeleton.dtype,
            output_loading_info=True,
            use_safetensors=True,  # the other format is pickle, which may execute anything when it is read
            **({"device_map": {"": device}} if device.type != "cpu" else {}),
            **_source(config),
            **arguments,
        )
    except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:  # cut short, another shape, ...
        stored = f" with {quantizer.name}" if quantizer is not None else ""
        raise ModelError(f"model.path: {config.path!r} can't be loaded{stored}: {_first(error)}") from error
    base, report = loaded
    if report["missing_keys"]:
        names = ", ".join(sorted(report["missing_keys"])[:3])
        raise ModelError(f"model.path: {config.path!r} lacks weights ({names}, ...); they would be random. Get it again")
    base.requires_grad_(False)
    if quantizer is not None:
        with calling(quantizer, "prepare"):
            base = answered(quantizer, "prepare", quantizer.prepare(base), torch.nn.Module, "the model")
    return base


def _upcast(base: transformers.PreTrainedModel, quantizer: Quantizer | None) -> None:
    """Cast every parameter of 16 bits to float32, the packed weights excepted."""
    import torch

    for module in base.modules():
        for name, parameter in module.named_parameters(recurse=False):
            half = parameter.dtype in (torch.float16, torch.bfloat16)
            packed = quantizer is not None and name == "weight" and quantizer.is_quantized(module)
            if half and not packed:
                parameter.data = parameter.data.float()


def _stored_alike(skeleton: transformers.PreTrainedModel, arguments: dict[str, Any]) -> bool:
    """Return whether the model is stored plain, or quantised exactly as *arguments* ask: a stored format always wins."""

    def form(config: Any) -> list[str]:
        content = config if isinstance(config, dict) else config.to_dict() if config is not None else {}
        keys = ("quant_method", "load_in_4bit", "load_in_8bit", "bnb_4bit_quant_type", "bnb_4bit_use_double_quant")
        return [str(getattr(content.get(key), "value", content.get(key))) for key in keys]

    stored = getattr(skeleton.config, "quantization_config", None)
    return stored is None or form(stored) == form(arguments.get("quantization_config"))


def _grow_embeddings(model: transformers.PreTrainedModel, size: int) -> None:
    """Resize to *size* tokens; deterministic, unlike the library's draw around the mean."""
    import torch

    old = model.get_input_embeddings().weight.shape[0]
    model.resize_token_embeddings(size, mean_resizing=False)
    with torch.no_grad():
        for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
            if layer is not None:
                layer.weight[old:] = layer.weight[:old].float().mean(dim=0).to(layer.weight.dtype)
    model.requires_grad_(False)


def _as_config(model: ModelConfig | str) -> ModelConfig:
    return model if isinstance(model, ModelConfig) else ModelConfig(path=str(model))


def _source(config: ModelConfig) -> dict[str, Any]:
    return {"revision": config.revision or "main", "trust_remote_code": config.trust_remote_code}


def _check_folder(path: str, *files: str) -> None:
    """Raise ModelError early where *path* is plainly meant as a folder and is none that holds one of *files*."""
    folder = Path(path).expanduser()
    if folder.is_file():
        raise ModelError(f"model.path: {path!r} is a file; name the folder that holds config.json")
    if folder.is_dir():
        if not any((folder / name).is_file() for name in files):
            raise ModelError(f"model.path: {path!r} is no model: it has no {files[0]}; name one that save_pretrained wrote")
        pickled = sorted(path.name for path in folder.glob("pytorch_model*.bin"))
        if pickled and not any(folder.glob("*.safetensors")):
            raise ModelError(
                f"model.path: {path!r} holds its weights as pickle ({pickled[0]}), which can execute code when it is read; "
                "if you trust it, load it with transformers and write it again with save_pretrained, which makes safetensors"
            )
    elif path.startswith(("/", ".", "~")) or path.count("/") > 1:
        raise ModelError(f"model.path: no folder {path!r}; name a model folder or a hub id such as owner/name")


def _first(error: BaseException) -> str:
    """Return the first line of a library's message, which is often a page long."""
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__

"""A tiny random Llama with a real tokenizer, and the plainest parts of each kind, to check others with."""

from __future__ import annotations

import functools
import math
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from qlora_core.config import ModelConfig
from qlora_core.libraries import import_libraries
from qlora_core.providers import Adapter, DatasetSource, Quantizer

__all__ = ["LowRank", "PackedLinear", "Plain", "Words", "loss_of", "tiny_config", "tiny_ids", "tiny_model"]

import_libraries()

import datasets  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

WORDS = [f"{a}{b}" for a in ("ba", "do", "ki", "lu", "me", "ra", "so", "ti") for b in ("n", "r", "s", "t", "le", "mo")]


@functools.cache
def tiny_model() -> Path:
    """Return the folder of a Llama with 2 layers of width 64, float32, and a tokenizer of words; made once per process."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = Path(tempfile.mkdtemp(prefix="qlora-tiny-"))
    _Leftover(folder)
    vocabulary = {token: index for index, token in enumerate(["<eos>", "<pad>", "<unk>", *WORDS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<eos>", pad_token="<pad>", unk_token="<unk>"
    )
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        attention_bias=True,
        eos_token_id=0,
        bos_token_id=None,
        pad_token_id=1,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(config)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(
                    parameter, std=0.1
                )  # real models have them, and 0 would hide a layer that forgets its own
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def tiny_config() -> ModelConfig:
    """Return the configuration of the tiny model, in float32, so that differences are not those of rounding."""
    return ModelConfig(path=str(tiny_model()), dtype="float32")


def tiny_ids(model: torch.nn.Module) -> torch.Tensor:
    """Return token ids, (2, 24) int64, where *model* is."""
    return torch.arange(48, device=next(model.parameters()).device).view(2, 24) + 3


def loss_of(model: Any) -> torch.Tensor:
    """Return the loss of *model* on `tiny_ids`, nats per token."""
    ids = tiny_ids(model)
    loss: torch.Tensor = model(input_ids=ids, labels=ids, use_cache=False).loss
    return loss


class _Leftover:
    """Deletes a folder at the end of the process."""

    def __init__(self, folder: Path) -> None:
        import atexit

        atexit.register(shutil.rmtree, folder, ignore_errors=True)


class Plain(Quantizer):
    """Weights as they are."""

    name = "plain"
    quantizes = False

    def load_kwargs(self, skeleton: transformers.PreTrainedModel) -> dict[str, Any]:
        """Return nothing to add."""
        return {}

    def is_quantized(self, module: torch.nn.Module) -> bool:
        """Return False."""
        return False

    def dequantize(self, module: torch.nn.Module) -> torch.Tensor:
        """Return the weight itself."""
        return module.weight  # type: ignore[return-value]

    def stored_bytes(self, shape: tuple[int, int]) -> int:
        """Return four bytes per weight."""
        return 4 * shape[0] * shape[1]


class PackedLinear(torch.nn.Linear):
    """A linear layer whose weight has neither the shape nor the dtype of its matrix: (out, in) int8 as one row of bytes."""

    scale: torch.Tensor

    def __init__(self, linear: torch.nn.Linear) -> None:
        torch.nn.Module.__init__(self)
        self.in_features, self.out_features, self.bias = linear.in_features, linear.out_features, linear.bias
        weight = linear.weight.detach().float()
        self.register_buffer("scale", weight.abs().amax(dim=1, keepdim=True) / 127)
        rows = (weight / self.scale).round().to(torch.int8)
        self.weight = torch.nn.Parameter(rows.view(1, -1).view(torch.uint8), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return x Q(W)^T + b, in the dtype of *x*."""
        rows = self.weight.view(torch.int8).view(self.out_features, self.in_features)
        return torch.nn.functional.linear(x, (rows * self.scale).to(x.dtype), self.bias)


class _Wrapped(torch.nn.Module):
    def __init__(self, layer: torch.nn.Linear, rank: int = 4) -> None:
        super().__init__()
        self.layer = layer
        device = next(layer.parameters()).device
        self.a = torch.nn.Parameter(torch.empty(rank, layer.in_features, device=device))
        self.b = torch.nn.Parameter(torch.zeros(layer.out_features, rank, device=device))
        torch.nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.layer(x)
        return y + (x @ self.a.T.to(x.dtype) @ self.b.T.to(x.dtype)).to(y.dtype)


class LowRank(Adapter):
    """LoRA of rank 4 on every linear layer but the head, as plain as can be."""

    name = "low_rank"
    mergeable = True

    def inject(self, model: transformers.PreTrainedModel, new_token_ids: Sequence[int] = ()) -> torch.nn.Module:
        """Return *model*, its linear layers wrapped."""
        head = model.get_output_embeddings()
        linear = [(n, m) for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and m is not head]
        for name, module in linear:
            model.set_submodule(name, _Wrapped(module))
        adapted: torch.nn.Module = model
        return adapted

    def save(self, model: torch.nn.Module, folder: Path) -> None:
        """Write A and B."""
        save_file(_matrices(model), folder / "low_rank.safetensors")

    def load(self, model: transformers.PreTrainedModel, folder: Path) -> torch.nn.Module:
        """Return *model* with A and B as stored."""
        adapted = self.inject(model)
        adapted.load_state_dict(load_file(folder / "low_rank.safetensors"), strict=False)
        frozen: torch.nn.Module = adapted.requires_grad_(False)
        return frozen

    def merge(self, model: Any) -> transformers.PreTrainedModel:
        """Return the plain model with W + B A."""
        with torch.no_grad():
            for name, module in [(n, m) for n, m in model.named_modules() if isinstance(m, _Wrapped)]:
                module.layer.weight += module.b @ module.a
                model.set_submodule(name, module.layer)
        plain: transformers.PreTrainedModel = model
        return plain


class Words(DatasetSource):
    """Eight texts of 60 words each."""

    name = "words"

    def examples(self, split: Literal["train", "eval"]) -> datasets.Dataset | None:
        """Return the texts; there is no evaluation split."""
        if split == "eval":
            return None
        texts = [" ".join(WORDS[(7 * row + 5 * word) % len(WORDS)] for word in range(60)) for row in range(8)]
        return datasets.Dataset.from_dict({"text": texts})


def _matrices(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    names = {f"{name}.{matrix}" for name, module in model.named_modules() if isinstance(module, _Wrapped) for matrix in "ab"}
    return {name: p.detach().cpu().contiguous() for name, p in model.named_parameters() if name in names}

"""The kernels `fused` in whole models: in float32 the same results, in bfloat16 errors no larger than the usual wiring's."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from peft.tuners.lora import LoraLayer

from qlora_bitsandbytes import NF4
from qlora_core import ModelConfig, inject_adapter, load_model, load_tokenizer
from qlora_core.attention import PER_DOCUMENT, base_of
from qlora_core.data.collate import IGNORED
from qlora_core.packed import prepare_packed
from qlora_core.training.head import Head
from qlora_core.training.loss import causal_lm_loss
from qlora_fused import Fused
from qlora_fused.blockwise import BLOCKWISE
from qlora_peft import LoRA

pytestmark = pytest.mark.filterwarnings("ignore")

# of two layers: LoRA layers, gated MLPs, norms, rotary embeddings
PARTS = {
    "llama": (14, 2, 5, 2),
    "mistral": (14, 2, 5, 2),
    "mixtral": (8, 0, 5, 2),
    "opt": (12, 0, 5, 0),
    "gpt_neox": (8, 0, 5, 2),
    "gpt2": (8, 0, 5, 0),
    "qwen2": (14, 2, 5, 2),
    "qwen3": (14, 2, 9, 2),
    "gemma": (14, 2, 5, 2),
    "phi": (12, 0, 3, 2),
}
WEIGHTS = {"initializer_range": 0.08}  # larger than usual, so that attention matters
CHANGES: dict[str, dict[str, Any]] = {"mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2}}


@pytest.fixture(scope="session")
def folder_of(make_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function that makes a small random model of an architecture; Mistral's with a window of eight tokens."""

    def make(architecture: str) -> Path:
        if architecture != "mistral":
            return make_model(architecture, **WEIGHTS, **CHANGES.get(architecture, {}))
        sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
        return saved(
            tmp_path_factory.mktemp("mistral"), "mistral", num_hidden_layers=2, vocab_size=416, sliding_window=8, **sizes
        )

    return make


def saved(folder: Path, architecture: str, **sizes: Any) -> Path:
    config = transformers.AutoConfig.for_model(architecture, **WEIGHTS, **sizes)
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    return folder


def build(
    folder: Path, *, fused: bool, dtype: str = "float32", dropout: float = 0.0, compute: Any = "auto", upcast: bool = False
) -> Any:
    """Return the model with NF4 and LoRA; biases, norms and adapters random, so that none of them can be forgotten."""
    base = load_model(ModelConfig(path=str(folder), dtype=dtype, upcast=upcast), NF4(compute_dtype=compute))
    generator = torch.Generator().manual_seed(2)
    for parameter in base.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
    layers = ("q_proj", "k_proj", "v_proj", "o_proj") if base.config.model_type == "mixtral" else "all-linear"
    adapted: Any = inject_adapter(base, LoRA(r=4, alpha=8, dropout=dropout, target_modules=layers))
    randomise(adapted, b=0.2)
    return Fused(keep_pages=False).apply(adapted) if fused else adapted


def randomise(model: torch.nn.Module, b: float) -> None:
    """Give A and B, in the order of their names, the same random values in every model; B with a deviation of *b*."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in sorted(model.named_parameters()):
        if "lora_" in name:
            scale = b if "lora_B" in name else parameter.shape[1] ** -0.5
            parameter.data = (torch.randn(parameter.shape, generator=generator) * scale).to(parameter.dtype)


def batch_of(kind: str) -> dict[str, torch.Tensor]:
    """Return two rows of 48 tokens: one document each, several each, or one each of which one is padded."""
    ids = torch.randint(2, 380, (2, 48), generator=torch.Generator().manual_seed(3))
    labels = ids.clone()
    if kind == "plain":
        return {"input_ids": ids, "labels": labels}
    if kind == "padded":
        mask = torch.ones_like(ids)
        mask[1, 31:] = 0
        return {"input_ids": ids, "attention_mask": mask, "labels": labels.masked_fill(mask == 0, IGNORED)}
    sizes = [[20, 28], [10, 7, 31]]
    positions = torch.stack([torch.cat([torch.arange(size) for size in row]) for row in sizes])
    return {"input_ids": ids, "position_ids": positions, "labels": labels.masked_fill(positions == 0, IGNORED)}


def results(model: Any, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return logits, loss and the gradient of every trained parameter."""
    model.zero_grad()
    torch.manual_seed(7)  # some models drop out values of their own
    output = model(**{name: value for name, value in batch.items() if name != "labels"}, use_cache=False)
    loss = causal_lm_loss(output, batch["labels"])
    loss.backward()
    trained = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    return {"logits": output.logits.detach(), "loss": loss.detach(), **trained}


def assert_alike(got: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], what: str) -> None:
    assert got.keys() == wanted.keys()
    assert sum("lora_B" in name for name in wanted) >= 8
    for name, value in wanted.items():
        assert float(value.norm()) > 0, name
        off = float((got[name] - value).norm() / value.norm())
        assert off < 1e-4, f"{what}: {name} is {off:.2g} apart"


@pytest.mark.parametrize("architecture", PARTS)
def test_every_part_is_replaced_that_the_architecture_has(folder_of: Callable[[str], Path], architecture: str) -> None:
    model = build(folder_of(architecture), fused=True)
    own = [module for module in model.modules() if "forward" in vars(module)]
    lora = [module for module in own if isinstance(module, LoraLayer)]
    mlps = [module for module in own if hasattr(module, "down_proj")]
    norms = [module for module in own if module._parameters.get("weight") is not None]
    rest = [module for module in own if module not in [*lora, *mlps, *norms]]
    assert all("ttention" in type(module).__name__ for module in rest)
    assert (len(lora), len(mlps), len(norms), len(rest)) == PARTS[architecture]
    assert len(lora) == sum(isinstance(module, LoraLayer) for module in model.modules())
    assert all(isinstance(module.get_base_layer(), Linear4bit) for module in lora)
    assert base_of(model).config._attn_implementation == BLOCKWISE


@pytest.mark.parametrize("kind", ["plain", "packed", "padded"])
@pytest.mark.parametrize("architecture", PARTS)
def test_logits_loss_and_gradients_are_those_without_kernels(
    folder_of: Callable[[str], Path], architecture: str, kind: str
) -> None:
    folder, batch = folder_of(architecture), batch_of(kind)
    plain, fused = (build(folder, fused=fused) for fused in (False, True))
    if kind == "packed":
        for model in (plain, fused):
            prepare_packed(model)
        assert base_of(fused).config._attn_implementation == BLOCKWISE + (PER_DOCUMENT if architecture != "opt" else "")
    for train in (True, False):
        wanted, got = (results(model.train(train), batch) for model in (plain, fused))
        assert_alike(got, wanted, "train" if train else "eval")


def test_checkpointing_gives_the_same_bits_dropout_included(folder_of: Callable[[str], Path]) -> None:
    model = build(folder_of("llama"), fused=True, dtype="auto", dropout=0.2).train()
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found.append({name: value.clone() for name, value in results(model, batch_of("plain")).items()})
    assert all(torch.equal(found[1][name], value) for name, value in found[0].items())


def test_dropout_of_the_adapter_draws_what_it_draws_without_kernels(folder_of: Callable[[str], Path]) -> None:
    plain, fused = (build(folder_of("llama"), fused=fused, dropout=0.3).train() for fused in (False, True))
    wanted = results(plain, batch_of("plain"))
    assert_alike(results(fused, batch_of("plain")), wanted, "dropout")
    still = results(plain.eval(), batch_of("plain"))["logits"]
    assert float((wanted["logits"] - still).norm() / still.norm()) > 0.01


@pytest.mark.parametrize("architecture", PARTS)
def test_greedy_generation_with_a_cache_gives_the_same_tokens(folder_of: Callable[[str], Path], architecture: str) -> None:
    prompts = torch.randint(2, 380, (2, 12), generator=torch.Generator().manual_seed(5))
    prompts[0, :4] = 1  # padded on the left
    mask = (torch.arange(12) >= torch.tensor([[4], [0]])).long()
    settings = {"max_new_tokens": 16, "do_sample": False, "pad_token_id": 1, "eos_token_id": None}
    settings |= {"return_dict_in_generate": True, "output_logits": True}
    wanted, got = [], []
    for found in (wanted, got):
        model = build(folder_of(architecture), fused=found is got).eval()
        found.append(model.generate(input_ids=prompts, attention_mask=mask, **settings))
        found.append(model.generate(input_ids=prompts[1:], attention_mask=mask[1:], **settings))
    for one, other in zip(got, wanted, strict=True):
        assert other.sequences.shape[1] == 28
        assert torch.equal(one.sequences, other.sequences)
        ours, theirs = torch.stack(one.logits), torch.stack(other.logits)
        assert float((ours - theirs).norm() / theirs.norm()) < 1e-4


@pytest.mark.parametrize(
    ("dtype", "upcast", "compute"),
    [("bfloat16", True, "auto"), ("bfloat16", False, "float32"), ("float32", False, "bfloat16"), ("bfloat16", False, "auto")],
)
@pytest.mark.parametrize("autocast", [True, False])
def test_dtypes_of_weights_and_products_may_differ(
    folder_of: Callable[[str], Path], dtype: str, upcast: bool, compute: Any, autocast: bool
) -> None:
    """Without autocast, too, layers that are not replaced, such as the head, get what they can take."""
    ids = batch_of("plain")["input_ids"]
    with torch.no_grad():
        exact = build(folder_of("llama"), fused=False)(ids, use_cache=False).logits
        logits = []
        for fused in (False, True):
            model = build(folder_of("llama"), fused=fused, dtype=dtype, compute=compute, upcast=upcast)
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
                logits.append(model(ids, use_cache=False).logits)
    wide = not autocast and (upcast or dtype == "float32")
    assert logits[0].dtype == logits[1].dtype == (torch.float32 if wide else torch.bfloat16)
    plain, ours = (float((found.float() - exact).norm() / exact.norm()) for found in logits)
    assert ours < 1.2 * plain < 0.2


# In bfloat16


def by_hand(folder: Path, b: float) -> Any:
    """Return the model as tutorials wire it, with peft alone."""
    base = prepare_model_for_kbit_training(load_model(str(folder), NF4()), use_gradient_checkpointing=False)
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"))
    randomise(model, b)
    return model.train()


def with_kernels(folder: Path, b: float) -> Any:
    model: Any = inject_adapter(load_model(str(folder), NF4()), LoRA(r=8, alpha=16))
    randomise(model, b)
    return Fused(keep_pages=False).apply(model).train()


def exact(folder: Path, b: float) -> Any:
    """Return the model wired by hand in float64, with the very weights that NF4 stores."""
    model = by_hand(folder, b)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, Linear4bit):
                linear = torch.nn.Linear(child.in_features, child.out_features, bias=False, device="meta")
                weight = dequantize_4bit(child.weight.data, child.weight.quant_state).double()
                linear.weight = torch.nn.Parameter(weight, requires_grad=False)
                setattr(module, name, linear)
    return model.double()


def gradient(model: Any, ids: torch.Tensor, *, autocast: bool = True, head: Head | None = None) -> torch.Tensor:
    """Return the gradients of A and B, in the order of their names, as one vector."""
    model.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        if head is not None:
            with head.computing(ids) as computed:
                model(input_ids=ids, use_cache=False)
            loss = computed.loss
        else:
            logits = model(input_ids=ids, use_cache=False).logits[:, :-1].flatten(0, 1)
            wide = logits if logits.dtype == torch.float64 else logits.float()
            loss = torch.nn.functional.cross_entropy(wide, ids[:, 1:].flatten())
    loss.backward()
    trained = sorted((name, p) for name, p in model.named_parameters() if p.requires_grad)
    return torch.cat([parameter.grad.double().flatten() for _, parameter in trained])


def errors(folder: Path, batches: Sequence[torch.Tensor], b: float) -> dict[str, float]:
    """Return the median distance from the gradients in float64, relative to them, with each way to wire the model."""
    model = exact(folder, b)
    wanted = [gradient(model, ids, autocast=False) for ids in batches]
    assert wanted[0].dtype == torch.float64
    del model
    found = {}
    for name, make in (("by hand", by_hand), ("fused", with_kernels)):
        model = make(folder, b)
        heads = {name: None, f"{name}, loss by the head": Head.of(model)} if name == "fused" else {name: None}
        for what, head in heads.items():
            got = [gradient(model, ids, head=head) for ids in batches]
            found[what] = statistics.median(
                float((one - right).norm() / right.norm()) for one, right in zip(got, wanted, strict=True)
            )
    return found


def assert_no_worse(found: dict[str, float]) -> None:
    usual = found.pop("by hand")
    assert 1e-3 < usual < 0.2
    assert len(found) == 2
    ratios = {name: round(value / usual, 3) for name, value in found.items()}
    assert max(ratios.values()) <= 1.05, ratios


def test_in_bfloat16_gradients_are_as_near_to_float64_as_those_of_the_usual_wiring(tmp_path: Path, text: str) -> None:
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4}
    folder = saved(tmp_path / "llama", "llama", vocab_size=256, num_key_value_heads=2, **sizes)
    batches = torch.tensor(list(text.encode()[: 12 * 2 * 160])).view(12, 2, 160)
    assert_no_worse(errors(folder, list(batches), b=0.02))


@pytest.mark.slow
def test_so_they_are_on_a_real_model_and_real_text(demo_folder: Path, text: str) -> None:
    ids = load_tokenizer(str(demo_folder))(text[:9000])["input_ids"]
    batches = torch.tensor(ids[: 8 * 96]).view(8, 1, 96)
    assert_no_worse(errors(demo_folder, list(batches), b=0.02))

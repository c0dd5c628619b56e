"""The proof of packing: a sample in a packed batch gives the logits, loss and gradients that it gives alone."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pytest
import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode

from qlora_bitsandbytes import NF4, Int8
from qlora_core import DataError, ModelError, evaluate, inject_adapter, load_model
from qlora_core.attention import PER_DOCUMENT, attend_per_document
from qlora_core.config import RunConfig
from qlora_core.data.blocks import Blocks
from qlora_core.data.collate import IGNORED, Collator
from qlora_core.data.pack import pack
from qlora_core.packed import check_packing, guard, prepare_packed
from qlora_core.run import Run
from qlora_core.training.arguments import training_arguments
from qlora_core.training.loss import causal_lm_loss
from qlora_core.training.trainer import QLoRATrainer
from qlora_peft import LoRA

pytestmark = pytest.mark.filterwarnings("ignore")

CHATS = Path(__file__).parents[3] / "shared" / "data" / "chat" / "openassistant_messages.jsonl"
CAPACITY = 100
WINDOWED = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
SDPA = "sdpa" + PER_DOCUMENT
PER_DOCUMENT_KINDS = ["llama", "gpt_neox", "gpt2", "qwen2", "qwen3", "gemma", "phi", "mixtral", "mistral", "gemma3_text"]
Sample = dict[str, torch.Tensor]


def model_of(kind: str, attention: str = "sdpa", **changes: Any) -> transformers.PreTrainedModel:
    """Return a small random float32 model; Mistral and Gemma 3 with a window that is shorter than most documents."""
    sizes: dict[str, Any] = {"vocab_size": 416, "num_hidden_layers": 2, "max_position_embeddings": 256, "pad_token_id": 1}
    if kind == "gpt2":
        sizes |= {"n_embd": 64, "n_head": 4, "n_layer": 2, "n_positions": 256, "bos_token_id": 0, "eos_token_id": 0}
        sizes |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    elif kind == "opt":
        sizes |= {"hidden_size": 64, "ffn_dim": 128, "num_attention_heads": 4, "word_embed_proj_dim": 64, "dropout": 0.0}
    else:
        sizes |= WINDOWED | ({"head_dim": 16} if "gemma" in kind or kind == "qwen3" else {})
        sizes |= {"sliding_window": 8} if kind in ("mistral", "gemma3_text") else {}
        sizes |= {"layer_types": ["sliding_attention", "full_attention"]} if kind == "gemma3_text" else {}
    config = transformers.AutoConfig.for_model(kind, **{**sizes, **changes})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=attention)
    with torch.no_grad():
        for parameter in model.parameters():  # larger than usual, so that attention matters
            parameter.mul_(2)
    return model.eval()


def random_samples(n: int = 14, longest: int = 60) -> list[Sample]:
    random = np.random.default_rng(3)
    samples = []
    for size in [1, 2, *random.integers(3, longest, n - 2)]:
        ids = random.integers(2, 380, size)
        labels = np.where(random.random(size) < 0.3, IGNORED, ids)
        samples.append({"input_ids": torch.tensor(ids), "labels": torch.tensor(labels)})
    return samples


def chat_samples(folder: Path, n: int = 12, longest: int = 90) -> list[Sample]:
    """Return real chats in a plain form, what the assistant says supervised."""
    if not CHATS.is_file():
        pytest.skip("the chats are not here")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    samples = []
    for line in CHATS.read_text(encoding="utf-8").splitlines()[:n]:
        ids, labels = [], []
        for message in json.loads(line)["messages"]:
            told = tokenizer(f"{message['role']}: {message['content']}\n", add_special_tokens=False)["input_ids"]
            ids += told
            labels += told if message["role"] == "assistant" else [IGNORED] * len(told)
        start = max(0, labels.index(next(label for label in labels if label != IGNORED)) - 20)  # some of both
        samples.append({"input_ids": torch.tensor(ids[start:][:longest]), "labels": torch.tensor(labels[start:][:longest])})
    return samples


def blocks_of(samples: Sequence[Sample], packed: bool = True, capacity: int = CAPACITY) -> Blocks:
    lists = datasets.List(datasets.Value("int32"))
    columns = {name: [sample[name].tolist() for sample in samples] for name in ("input_ids", "labels")}
    rows = datasets.Dataset.from_dict(columns, features=datasets.Features({"input_ids": lists, "labels": lists}))
    return Blocks(rows, pack(np.array([len(ids) for ids in columns["input_ids"]]), capacity) if packed else None)


def batch_of(samples: Sequence[Sample], pad: int = 0) -> dict[str, Any]:
    return Collator(pad_token_id=pad, pad_to_multiple_of=8, packed=True)(list(blocks_of(samples)))


def run_alone(model: torch.nn.Module, samples: Sequence[Sample]) -> tuple[list[torch.Tensor], float]:
    """Return the logits of each sample by itself and the summed loss, and leave the gradients of the sum."""
    logits, total = [], 0.0
    for sample in samples:
        out = model(input_ids=sample["input_ids"][None], use_cache=False).logits[0]
        loss = torch.nn.functional.cross_entropy(out[:-1].float(), sample["labels"][1:], ignore_index=IGNORED, reduction="sum")
        if loss.requires_grad:
            loss.backward()
        logits.append(out.detach())
        total += float(loss)
    return logits, total


def run_packed(model: torch.nn.Module, samples: Sequence[Sample], pad: int = 0) -> tuple[list[torch.Tensor], float]:
    """Return the same from one packed batch of all samples."""
    batch = batch_of(samples, pad)
    labels = batch.pop("labels")
    output = model(**batch)
    loss = causal_lm_loss(output, labels, 1)
    if loss.requires_grad:
        loss.backward()
    lengths = [len(sample["input_ids"]) for sample in samples]
    offsets, indices = pack(np.array(lengths), CAPACITY)
    found: dict[int, torch.Tensor] = {}
    for row, (start, stop) in enumerate(pairwise(offsets)):
        at = 0
        for index in indices[start:stop].tolist():
            found[index] = output.logits[row, at : at + lengths[index]].detach()
            at += lengths[index]
    return [found[index] for index in range(len(samples))], float(loss.detach())


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def assert_alike(model: torch.nn.Module, reference: torch.nn.Module, samples: Sequence[Sample]) -> None:
    """Assert that logits, loss and gradients of packed samples in *model* are those of each alone in *reference*."""
    alone, loss = run_alone(reference, samples)
    expected = gradients(reference)
    packed, packed_loss = run_packed(model, samples)
    for ours, theirs in zip(packed, alone, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert packed_loss == pytest.approx(loss, rel=1e-5)
    found = gradients(model)
    assert found.keys() == expected.keys()
    assert found
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-5 * float(1 + gradient.abs().max()), msg=name)


# Logits, loss and gradients


@pytest.mark.parametrize("kind", PER_DOCUMENT_KINDS)
def test_attention_per_document_gives_what_each_sample_gives_alone(kind: str) -> None:
    model = model_of(kind)
    prepare_packed(model)
    assert model.config._attn_implementation == SDPA
    assert_alike(model, model_of(kind, "eager"), random_samples())


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "gpt_neox", "mistral", "gemma3_text"])
def test_so_does_attention_with_the_mask_of_transformers(kind: str, attention: str) -> None:
    assert_alike(model_of(kind, attention), model_of(kind, "eager"), random_samples())


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_opt_whose_own_mask_knows_no_positions_is_given_one(attention: str) -> None:
    with pytest.raises(ModelError, match=r"OPTForCausalLM: documents of a packed batch see each other"):
        check_packing(model_of("opt", attention))
    model = model_of("opt", attention)
    for _ in range(2):
        prepare_packed(model)
        assert_alike(model, model_of("opt", attention), random_samples())


@pytest.mark.parametrize("attention", [SDPA, "sdpa", "eager"])
def test_real_chats_with_an_adapter_give_its_gradients(make_model: Callable[..., Path], attention: str) -> None:
    def adapted(implementation: str) -> Any:
        model = inject_adapter(model_of("llama", implementation), LoRA(r=4))
        generator = torch.Generator().manual_seed(1)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
        return model

    model = adapted("sdpa" if attention == SDPA else attention)
    if attention == SDPA:
        prepare_packed(model)
        assert model.base_model.model.config._attn_implementation == SDPA
    samples = chat_samples(make_model("llama"))
    assert any((sample["labels"] == IGNORED).any() for sample in samples)
    assert_alike(model, adapted("eager"), samples)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("kind", ["llama", "gpt_neox", "mistral"])
def test_checkpointing_recomputes_the_same_documents(kind: str, reentrant: bool) -> None:
    model = model_of(kind)
    prepare_packed(model)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    assert_alike(model.train(), model_of(kind, "eager"), random_samples())


def test_padding_that_is_the_end_token_changes_nothing() -> None:
    samples = [{name: torch.cat([ids, torch.tensor([0])]) for name, ids in s.items()} for s in random_samples()]
    model = model_of("llama")
    prepare_packed(model)
    one, loss = run_packed(model, samples, pad=0)
    other, same = run_packed(model, samples, pad=300)
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert loss == same
    batch = batch_of(samples, pad=0)
    supervised = sum(int((sample["labels"][1:] != IGNORED).sum()) for sample in samples)
    assert int((batch["labels"] != IGNORED).sum()) == supervised == blocks_of(samples).supervised


def test_evaluating_packed_or_not_gives_the_same_score() -> None:
    samples = random_samples(30)
    packed = evaluate(model_of("llama"), blocks_of(samples), batch_size=3, mixed_precision="none")
    alone = evaluate(model_of("llama"), blocks_of(samples, packed=False), batch_size=3, mixed_precision="none")
    assert packed.tokens == alone.tokens == blocks_of(samples).supervised
    assert packed.nats == pytest.approx(alone.nats, rel=1e-6)
    assert alone.nats == pytest.approx(run_alone(model_of("llama").requires_grad_(False), samples)[1], rel=1e-5)


@pytest.mark.demo_model
def test_a_real_model_in_four_bits_keeps_documents_apart_bit_by_bit(demo_folder: Path) -> None:
    model = inject_adapter(load_model(str(demo_folder), NF4()), LoRA(r=4))
    prepare_packed(model)
    samples = chat_samples(demo_folder, n=6)
    others = [{**samples[0], "input_ids": samples[0]["input_ids"].flip(0)}, *samples[1:]]
    with torch.no_grad():
        packed, loss = run_packed(model, samples)
        again, _ = run_packed(model, others)
        alone, expected = run_alone(model, samples)
    assert not torch.equal(packed[0], again[0])
    assert all(torch.equal(a, b) for a, b in zip(packed[1:], again[1:], strict=True))
    assert loss == pytest.approx(expected, rel=1e-2)
    for ours, theirs in zip(packed, alone, strict=True):
        assert float((ours - theirs).float().square().mean().sqrt() / theirs.float().std()) < 0.03


@pytest.mark.demo_model
def test_rounding_by_what_else_is_in_the_batch_is_not_taken_for_a_leak(demo_folder: Path) -> None:
    """LLM.int8 computes the columns with an outlier anywhere in the batch otherwise: noise, packed or not."""
    model = load_model(str(demo_folder), Int8())
    prepare_packed(model)
    assert model.config._attn_implementation == SDPA


# Memory


class Largest(TorchDispatchMode):
    elements = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(out):
            if torch.is_tensor(tensor):
                self.elements = max(self.elements, tensor.untyped_storage().nbytes() // tensor.element_size())
        return out


@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_no_tensor_grows_with_the_square_of_the_block(kind: str) -> None:
    length = 2048
    positions = torch.arange(length).remainder(64)[None]
    ids = torch.arange(length).remainder(380)[None]

    def largest(model: transformers.PreTrainedModel) -> int:
        with Largest() as seen:
            model(input_ids=ids, position_ids=positions, use_cache=False).logits.sum().backward()
        return seen.elements

    model = model_of(kind, max_position_embeddings=length)
    assert largest(model) >= length * length
    assert attend_per_document(model)
    assert largest(model) <= length * 416  # the logits


# What would let documents see each other is refused


@pytest.fixture
def packed() -> dict[str, Any]:
    batch = batch_of(random_samples())
    del batch["labels"]
    return batch


def test_a_cache_lets_documents_see_each_other_and_is_refused(packed: dict[str, Any]) -> None:
    model = model_of("llama").requires_grad_(False)
    right = model(**packed).logits
    wrong = model(**{**packed, "use_cache": True}).logits
    assert float((right - wrong).abs().max()) > 0.1  # silently, in transformers 5
    guard(model)
    guard(model)
    assert torch.equal(model(**packed).logits, right)
    for use_cache in (True, None):  # None: as the model's configuration says
        with pytest.raises(DataError, match=r"a packed batch came with a cache, .*use_cache=False"):
            model(**{**packed, "use_cache": use_cache})
    with pytest.raises(DataError, match="a packed batch came with a cache"):
        model(**packed, past_key_values=transformers.DynamicCache())
    model.config.use_cache = False
    assert torch.equal(model(**{**packed, "use_cache": None}).logits, right)


def test_so_is_an_attention_mask_also_below_an_adapter(packed: dict[str, Any]) -> None:
    model = inject_adapter(model_of("llama"), LoRA(r=4))
    guard(model)
    mask = torch.ones_like(packed["input_ids"])
    with pytest.raises(DataError, match="a packed batch came with an attention_mask, so that its documents would see"):
        model(**packed, attention_mask=mask)
    assert model(**packed, attention_mask=mask[:, None, None].bool()).logits.isfinite().all()  # says itself who sees whom
    assert model(input_ids=packed["input_ids"], attention_mask=mask, use_cache=True).logits.isfinite().all()


@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt", "mistral"])
def test_generation_is_as_before(kind: str) -> None:
    prompts = torch.tensor([[1, 1, 1, 7, 8], [3, 4, 5, 6, 7]])  # the first is padded on the left
    mask = torch.tensor([[0, 0, 0, 1, 1], [1, 1, 1, 1, 1]])
    settings = {"attention_mask": mask, "max_new_tokens": 20, "do_sample": False, "pad_token_id": 1, "eos_token_id": None}
    plain = model_of(kind).generate(prompts, **settings)
    model = model_of(kind)
    prepare_packed(model)
    assert torch.equal(model.generate(prompts, **settings), plain)
    run_packed(model.requires_grad_(False), random_samples())
    assert torch.equal(model.generate(prompts, **settings), plain)
    padded = {"input_ids": prompts, "attention_mask": mask.flip(1), "use_cache": False}
    assert torch.equal(model(**padded).logits, model_of(kind)(**padded).logits)


def leaky(kind: str) -> transformers.PreTrainedModel:
    sizes = {
        "mamba": {"hidden_size": 64, "num_hidden_layers": 2},
        "bloom": {"hidden_size": 64, "n_head": 4, "n_layer": 2},
        "falcon": {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2, "alibi": True},
    }[kind]
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, vocab_size=416, **sizes)
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16 if kind == "bloom" else torch.float32)


@pytest.mark.parametrize("kind", ["mamba", "bloom", "falcon"])
def test_models_whose_documents_see_each_other_are_refused_and_left_as_they_were(kind: str) -> None:
    model = leaky(kind).train()
    implementation = model.config._attn_implementation
    before = model.eval()(torch.arange(9)[None]).logits
    model.train()
    model.get_input_embeddings().eval()
    with pytest.raises(ModelError, match=rf"(?i){kind}ForCausalLM: documents of a packed batch see each other .*packing=false"):
        prepare_packed(model)
    assert model.training
    assert not model.get_input_embeddings().training
    assert model.config._attn_implementation == implementation
    assert torch.equal(model.eval()(torch.arange(9)[None]).logits, before)


def in_single_rows_only(
    module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: None, **kwargs: Any
) -> tuple[torch.Tensor, None]:
    """Attention by the rule of transformers' flash_attention_2: documents are looked for in a batch of one row only."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    seen = torch.ones(query.shape[2], query.shape[2], dtype=torch.bool).tril()
    positions = kwargs["position_ids"]
    if len(query) == 1:
        document = (positions[0].diff(prepend=positions[0, :1]) != 1).cumsum(0)
        seen = seen & (document[:, None] == document[None])
    return torch.nn.functional.scaled_dot_product_attention(query, key, value, seen).transpose(1, 2), None


def test_attention_that_finds_documents_in_single_rows_only_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, flash_attention_mask
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "single_rows", in_single_rows_only)
    monkeypatch.setitem(ALL_MASK_ATTENTION_FUNCTIONS._global_mapping, "single_rows", flash_attention_mask)
    model, reference = model_of("llama"), model_of("llama", "eager")
    model.set_attn_implementation("single_rows")
    first, second = torch.arange(5, 18), torch.arange(30, 49)
    row = {"input_ids": torch.cat([first, second])[None], "position_ids": torch.cat([torch.arange(13), torch.arange(19)])[None]}
    alone = reference(second[None], use_cache=False).logits[0]
    one = model(**row, use_cache=False).logits
    both = model(**{name: tensor.repeat(2, 1) for name, tensor in row.items()}, use_cache=False).logits
    torch.testing.assert_close(one[0, 13:], alone, rtol=1e-4, atol=1e-4)  # a batch of one row does not give it away
    assert all(float((logits[13:] - alone).abs().max()) > 0.1 for logits in both)
    with pytest.raises(ModelError, match=r"LlamaForCausalLM: documents of a packed batch see each other .*packing=false"):
        prepare_packed(model)
    assert model.config._attn_implementation == "single_rows"
    with pytest.raises(ModelError, match="documents of a packed batch see each other"):
        evaluate(model, blocks_of(random_samples()), mixed_precision="none")


def test_attention_that_takes_the_documents_of_the_first_row_for_all_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("llama", "eager")
    forward = model.forward

    def first_row(position_ids: torch.Tensor | None = None, **kwargs: Any) -> Any:
        return forward(position_ids=None if position_ids is None else position_ids[:1].expand_as(position_ids), **kwargs)

    model.forward = first_row
    with pytest.raises(ModelError, match="documents of a packed batch see each other"):
        check_packing(model)


def test_logits_that_are_no_numbers_in_a_packed_batch_only_are_refused() -> None:
    model = model_of("llama")
    forward = model.forward

    def not_numbers(position_ids: torch.Tensor | None = None, **kwargs: Any) -> Any:
        out = forward(position_ids=position_ids, **kwargs)
        out.logits = out.logits if position_ids is None else out.logits * float("nan")
        return out

    model.forward = not_numbers
    with pytest.raises(ModelError, match=r"documents of a packed batch see each other .*data\.packing=false"):
        check_packing(model)


def test_an_adapter_that_drops_the_positions_is_refused() -> None:
    import peft

    model = model_of("llama")
    prompted = peft.get_peft_model(model, peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    with pytest.raises(ModelError, match=r"LlamaForCausalLM.*data\.packing=false"):
        prepare_packed(prompted)


def test_a_model_that_takes_no_positions_is_refused() -> None:
    model = model_of("llama")
    forward = model.forward
    model.forward = lambda input_ids, use_cache: forward(input_ids=input_ids, use_cache=use_cache)
    with pytest.raises(ModelError, match=r"LlamaForCausalLM takes no packed batches: .*position_ids.*data\.packing=false"):
        check_packing(model)


def test_positions_that_do_not_restart_are_noticed() -> None:
    model = model_of("gpt2")
    embedding = model.transformer.wpe
    forward = embedding.forward
    embedding.forward = lambda positions: forward(torch.arange(positions.shape[1])[None])
    with pytest.raises(ModelError, match=r"GPT2LMHeadModel: a packed document differs from one alone"):
        check_packing(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_check_passes_sound_models_and_leaves_no_trace(dtype: torch.dtype) -> None:
    model = inject_adapter(model_of("llama").to(dtype), LoRA(r=4, dropout=0.5))
    model.train()
    generator = torch.random.get_rng_state()
    prepare_packed(model)
    assert torch.equal(torch.random.get_rng_state(), generator)
    assert all(module.training for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        check_packing(model)


def test_a_model_that_keeps_documents_apart_to_the_bit_is_called_five_times() -> None:
    model, calls = model_of("llama"), []
    model.register_forward_hook(lambda *given: calls.append(1))
    prepare_packed(model)
    assert len(calls) == 5


# Training


def trainer(folder: Path, output: Path, train: Blocks, held_out: Blocks | None = None, **training: Any) -> QLoRATrainer:
    settings = {"batch_size": 2, "learning_rate": 1e-3, "logging_steps": 1, "mixed_precision": "none", **training}
    config = RunConfig.parse(
        {
            "model": str(folder),
            "dataset": "text",
            "output": str(output),
            "training": settings,
            "data": {"pad_to_multiple_of": 16},
        }
    )
    run = Run(output, config)
    if not output.exists():
        run.create()
    transformers.set_seed(0)
    model = inject_adapter(load_model(str(folder), None), LoRA(r=4))
    arguments = training_arguments(config.training, output=output, evaluates=held_out is not None)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    encoded: Any = SimpleNamespace(train=train, eval=held_out)
    return QLoRATrainer(model, tokenizer, encoded, arguments, run, [])


@pytest.mark.parametrize("packed", [True, False])
def test_training_counts_the_tokens_that_are_no_padding(tiny_model: Path, tmp_path: Path, packed: bool) -> None:
    samples = random_samples(20)
    samples[5]["input_ids"][:] = 1  # real tokens that look like padding
    blocks = blocks_of(samples, packed)
    one = trainer(tiny_model, tmp_path / "run", blocks, blocks, epochs=2)
    one.train()
    lines = one.run.read_metrics()
    assert max(line["tokens"] for line in lines if "loss" in line) == 2 * blocks.tokens
    evaluated = [line for line in lines if "eval_loss" in line]
    assert [line["eval_tokens"] for line in evaluated] == [blocks.supervised] * 2
    assert evaluated[-1]["eval_loss"] < evaluated[0]["eval_loss"]
    score = evaluate(one.model, blocks, mixed_precision="none")
    assert score.loss == pytest.approx(evaluated[-1]["eval_loss"], rel=1e-5)


@pytest.fixture
def inputs_seen(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[list[list[int]]]]:
    seen: list[list[list[int]]] = []
    original = QLoRATrainer.compute_loss

    def noted(self: QLoRATrainer, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        seen.append(inputs["input_ids"].tolist())
        return original(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(QLoRATrainer, "compute_loss", noted)
    return seen


@pytest.mark.parametrize("packed", [True, False])
def test_a_resumed_run_goes_on_in_the_order_of_its_epoch(
    tiny_model: Path, tmp_path: Path, packed: bool, inputs_seen: list[list[list[int]]]
) -> None:
    blocks = blocks_of(random_samples(30), packed, capacity=60)
    steps = -(-len(blocks) // 2)
    settings = {"epochs": 3, "save_steps": steps + 2, "save_total_limit": None}
    whole = trainer(tiny_model, tmp_path / "run", blocks, **settings)
    whole.train()
    first, seen = list(inputs_seen), [inputs_seen[epoch * steps : (epoch + 1) * steps] for epoch in range(3)]
    rows = [sorted(row for batch in epoch for row in batch) for epoch in seen]
    assert len(first) == 3 * steps
    assert seen[0] != seen[1] != seen[2]
    assert not packed or [len(row) for row in rows] == [len(blocks)] * 3
    inputs_seen.clear()
    resumed = trainer(tiny_model, tmp_path / "run", blocks, **settings)
    resumed.train(resume_from_checkpoint=str(resumed.run.checkpoint(steps + 2)))
    assert inputs_seen == first[steps + 2 :]
    for (name, ours), (_, theirs) in zip(resumed.model.named_parameters(), whole.model.named_parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    assert resumed.state.num_input_tokens_seen == whole.state.num_input_tokens_seen == 3 * blocks.tokens


def test_a_model_that_can_not_keep_samples_apart_is_refused_before_training(tiny_model: Path, tmp_path: Path) -> None:
    blocks = blocks_of(random_samples())
    with pytest.raises(ModelError, match=r"MambaForCausalLM: documents of a packed batch see each other"):
        evaluate(leaky("mamba"), blocks, mixed_precision="none")
    assert evaluate(leaky("mamba"), blocks_of(random_samples(), packed=False), mixed_precision="none").tokens > 0

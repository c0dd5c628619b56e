"""The kernels `fused` in whole models: in float32 the same results, in bfloat16 errors no larger than the usual wiring's."""

from __future__ import annotations

import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file

from qlora_bitsandbytes import NF4
from qlora_core import Finished, ModelConfig, inject_adapter, load_model, load_tokenizer
from qlora_core.attention import PER_DOCUMENT, base_of
from qlora_core.data.collate import IGNORED
from qlora_core.device import supports_bf16
from qlora_core.packed import prepare_packed
from qlora_core.training.head import Head
from qlora_core.training.loss import causal_lm_loss
from qlora_fused import Fused, rewriting
from qlora_fused.blockwise import COMPILED, TILED
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
    "gemma2": (14, 2, 9, 2),
    "gemma3_text": (14, 2, 13, 2),
    "phi": (12, 0, 3, 2),
    "phi3": (8, 0, 5, 2),
}
BLOCKS = TILED if rewriting._tiles() is not None else COMPILED
EAGER = {"gemma2"}  # transformers gives it no other attention, for its scores are capped
WEIGHTS = {"initializer_range": 0.08}  # larger than usual, so that attention matters
CHANGES: dict[str, dict[str, Any]] = {"mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2}}
SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
SIZES |= {"num_hidden_layers": 2, "vocab_size": 416, "pad_token_id": 1}
WINDOW = {"sliding_window": 8}
OTHERS: dict[str, dict[str, Any]] = {
    "mistral": {**SIZES, **WINDOW},
    "gemma2": {**SIZES, **WINDOW, "head_dim": 16, "query_pre_attn_scalar": 24},
    "gemma3_text": {**SIZES, **WINDOW, "head_dim": 16, "layer_types": ["sliding_attention", "full_attention"]},
    "phi3": SIZES,
}
STILL = {"opt": {"dropout": 0.0}, "gpt2": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}}


@pytest.fixture(scope="session")
def folder_of(make_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function that makes a small random model of an architecture, some with a window of eight tokens."""
    made: dict[str, Path] = {}

    def make(architecture: str, **changes: Any) -> Path:
        if architecture not in OTHERS:
            return make_model(architecture, **WEIGHTS, **CHANGES.get(architecture, {}), **changes)
        if architecture not in made:
            made[architecture] = saved(tmp_path_factory.mktemp(architecture), architecture, **OTHERS[architecture])
        return made[architecture]

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
    assert base_of(model).config._attn_implementation == ("eager" if architecture in EAGER else BLOCKS)


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
        implementation = BLOCKS + (PER_DOCUMENT if architecture != "opt" else "")
        assert base_of(fused).config._attn_implementation == ("eager" if architecture in EAGER else implementation)
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


def test_a_new_token_is_multiplied_by_weights_that_stay_packed(
    folder_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    loops = rewriting._loops()
    if loops is None:
        pytest.skip("loops are not compiled here")
    calls: list[tuple[int, int]] = []

    def counted(x: torch.Tensor, layers: Sequence[Any], *rest: Any) -> list[torch.Tensor] | None:
        ys: list[torch.Tensor] | None = gemv(x, layers, *rest)
        if ys is not None:
            calls.append((len(x), len(layers)))
        return ys

    gemv = loops.gemv
    monkeypatch.setattr(loops, "gemv", counted)
    model = build(folder_of("llama"), fused=True).eval()
    depth = base_of(model).config.num_hidden_layers
    calls.clear()
    prompt = torch.randint(2, 380, (1, 12), generator=torch.Generator().manual_seed(5))
    model.generate(
        input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=4, do_sample=False, eos_token_id=None
    )
    queries_to_values, output, gate_and_up, down = (1, 3), (1, 1), (1, 2), (1, 1)
    assert calls == 3 * depth * [queries_to_values, output, gate_and_up, down]  # the first one comes from the prompt


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


def by_hand(folder: Path, b: float, dropout: float = 0.0) -> Any:
    """Return the model as tutorials wire it, with peft alone."""
    base = prepare_model_for_kbit_training(load_model(str(folder), NF4()), use_gradient_checkpointing=False)
    settings = {"r": 8, "lora_alpha": 16, "lora_dropout": dropout, "target_modules": "all-linear"}
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **settings))
    randomise(model, b)
    return model.train()


def with_kernels(folder: Path, b: float, dropout: float = 0.0) -> Any:
    model: Any = inject_adapter(load_model(str(folder), NF4()), LoRA(r=8, alpha=16, dropout=dropout))
    randomise(model, b)
    return Fused(keep_pages=False).apply(model).train()


def exact(folder: Path, b: float, dropout: float = 0.0) -> Any:
    """Return the model wired by hand in float64, with the very weights that NF4 stores."""
    model = by_hand(folder, b, dropout)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, Linear4bit):
                linear = torch.nn.Linear(child.in_features, child.out_features, bias=False, device="meta")
                weight = dequantize_4bit(child.weight.data, child.weight.quant_state).double()
                linear.weight = torch.nn.Parameter(weight, requires_grad=False)
                linear.bias = child.bias
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


def assert_no_worse(found: dict[str, float], most: float = 1.05) -> None:
    usual = found.pop("by hand")
    assert 1e-3 < usual < 0.2
    assert len(found) == 2
    ratios = {name: round(value / usual, 3) for name, value in found.items()}
    assert max(ratios.values()) <= most, ratios


@pytest.mark.parametrize("architecture", [name for name in PARTS if name != "mixtral"])
def test_in_bfloat16_gradients_are_as_near_to_float64_as_those_of_the_usual_wiring(
    folder_of: Callable[[str], Path], text: str, architecture: str
) -> None:
    """Sixteen batches of real text: the median moves by some 2 % from one text to another.

    Phi adds the outputs of attention and MLP to each other before the residual: here in bfloat16, with peft in float32.
    """
    folder = folder_of(architecture, **STILL.get(architecture, {}))
    batches = torch.tensor(list(text.encode()[: 16 * 2 * 96])).view(16, 2, 96)
    assert_no_worse(errors(folder, list(batches), b=0.02), 1.1 if architecture == "phi" else 1.05)


@pytest.mark.skipif(rewriting._tiles() is None, reason="the CPU has no units for tiles of bfloat16")
def test_in_bfloat16_attention_by_tiles_is_as_near_to_float64_as_that_of_the_usual_wiring(
    folder_of: Callable[[str], Path], text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qlora_fused.tiles import attention

    widths: Counter[int] = Counter()

    def attend(q: torch.Tensor, *others: Any) -> Any:
        found = attended(q, *others)
        widths[q.shape[-1]] += found is not None
        return found

    attended = attention.attend
    monkeypatch.setattr(attention, "attend", attend)
    folder = folder_of("llama", hidden_size=128, num_attention_heads=4, num_key_value_heads=2)  # type: ignore[call-arg]
    batches = torch.tensor(list(text.encode()[: 16 * 2 * 96])).view(16, 2, 96)
    assert_no_worse(errors(folder, list(batches), b=0.02), 1.05)
    assert widths == {32: 2 * 16 * 2}  # with and without the loss by the head, batches, layers


# Runs


@pytest.mark.parametrize("training", [{}, {"gradient_checkpointing": True, "gradient_accumulation": 2}])
def test_a_resumed_run_ends_in_the_same_bits(run: Callable[..., Finished], tmp_path: Path, training: dict[str, Any]) -> None:
    training = {**training, "max_steps": 6, "save_steps": 2, "save_total_limit": None}
    shared = {"kernels": Fused(), "adapter": LoRA(r=4, dropout=0.1), "training": training, "output": tmp_path / "run"}
    whole = run(**shared)
    wanted, metrics = weights_of(whole), losses_of(whole)
    again = run(**shared, resume="step-4")
    assert [line["step"] for line in metrics] == [1, 2, 3, 4, 5, 6]
    assert losses_of(again) == metrics
    got = weights_of(again)
    assert wanted.keys() == got.keys()
    assert all(torch.equal(got[name], value) for name, value in wanted.items())


def weights_of(finished: Finished) -> dict[str, torch.Tensor]:
    return load_file(finished.run.adapter / "adapter_model.safetensors")


def losses_of(finished: Finished) -> list[dict[str, float]]:
    names = ("step", "loss", "grad_norm")
    return [{name: line[name] for name in names} for line in finished.run.read_metrics() if "loss" in line]


def test_a_run_with_kernels_follows_one_without_and_its_adapter_is_an_ordinary_one(
    run: Callable[..., Finished], tiny_model: Path, tmp_path: Path
) -> None:
    """The adapter that was saved gives, loaded without kernels and with them, the logits of the model that was trained."""
    training = {"max_steps": 6, "mixed_precision": "none"}
    model = ModelConfig(path=str(tiny_model), dtype="float32")
    plain, fused = (
        run(model=model, training=training, kernels=kernels, output=tmp_path / str(kernels is None))
        for kernels in (None, Fused())
    )
    for one, other in zip(losses_of(fused), losses_of(plain), strict=True):
        assert one == pytest.approx(other, rel=1e-3)
    ids = torch.arange(2, 62).view(2, 30)
    with torch.no_grad():
        wanted = fused.model.eval()(ids, use_cache=False).logits
        loaded = LoRA().load(load_model(model, NF4()), fused.run.adapter).eval()
        without = loaded(ids, use_cache=False).logits
        with_them = Fused().apply(loaded)(ids, use_cache=False).logits
    assert torch.equal(with_them, wanted)
    assert float((without - wanted).norm() / wanted.norm()) < 1e-4


# A real model and real text (its first layers)

# bfloat16, but where a processor only emulates it: there it would take minutes, and runs are in float32
AUTOCAST = supports_bf16(torch.device("cpu"))
USUAL = (1e-3, 0.2) if AUTOCAST else (1e-7, 1e-4)
"""Between which the errors of the usual wiring are."""
BATCHES = 16 if AUTOCAST else 8  # in bfloat16 medians of fewer move by more than 5 % from one text to another
SHORT, DROPPED, LONG = (2, 48), (2, 32), (1, 512)
DOCUMENTS = (32, 20, 12, 8)  # tokens of documents, in rows with padding, and all in one row
ITEMS = 2 * 47 + 2 * (31 + 19 + 11 + 7)  # supervised tokens of the batches whose gradients are accumulated
SUPERVISED = 256  # tokens at the end of a long row
DEPTH = 10 if AUTOCAST else 5  # layers of 30: in float64 all of them would take minutes
CASES = ("short", "padding", "packing", "accumulation", "dropout", "long")

Batch = dict[str, torch.Tensor]


@dataclass
class Wiring:
    """One way to wire the model, and what it gave: gradients of batches for each case, losses of short rows' tokens, logits."""

    model: Any
    head: Head | None = None
    exact: bool = False
    gradients: dict[str, list[torch.Tensor]] = field(default_factory=lambda: defaultdict(list))
    nats: list[torch.Tensor] = field(default_factory=list)
    same_bits: list[bool] = field(default_factory=list)
    """Whether layers that are checkpointed, without dropout and with it, give the gradients that they gave before."""
    logits: torch.Tensor | None = None
    """Of tokens that come one by one, (T, V)."""

    def run(self, tokens: torch.Tensor) -> None:
        for index in range(BATCHES):
            self.run_short(tokens[index * 256 : (index + 1) * 256], seed=index)
        for row in tokens.view(-1, *LONG):
            labels = row.clone()
            labels[:, :-SUPERVISED] = IGNORED
            self.model.zero_grad()
            self.add({"input_ids": row, "labels": labels}, SUPERVISED)
            self.gradients["long"].append(self.gradient())
        self.logits = self.write(tokens[:40])
        self.model = self.head = None

    def write(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the logits after each token (T, V), with a cache, as when text is written."""
        self.model.eval()
        cache, logits = transformers.DynamicCache(), []
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=AUTOCAST and not self.exact):
            for token in tokens:
                output = self.model(input_ids=token.view(1, 1), past_key_values=cache, use_cache=True)
                logits.append(output.logits[0, -1])
        return torch.stack(logits)

    def run_short(self, tokens: torch.Tensor, seed: int) -> None:
        """Run a batch of short rows, the same documents padded and packed, and one with dropout; the first three accumulate."""
        short, dropped, rest = tokens.split([96, 64, 96])
        rows: Batch = {"input_ids": short.view(SHORT), "labels": short.view(SHORT)}
        documents = rest[: sum(DOCUMENTS)].split(DOCUMENTS)
        self.model.zero_grad()
        self.nats.append(self.add(rows, ITEMS))
        sums = [self.gradient()]
        for batch in [padded(documents)] if self.exact else [padded(documents), packed(documents)]:
            self.add(batch, ITEMS)
            sums.append(self.gradient())
        if self.exact:  # padded or packed, the same documents
            sums.append(2 * sums[1] - sums[0])
        parts = [sums[0], sums[1] - sums[0], sums[2] - sums[1], sums[2]]
        for case, gradient in zip(CASES, parts, strict=False):
            self.gradients[case].append(gradient)
        self.gradients["dropout"].append(self.with_dropout(dropped.view(DROPPED), seed))
        if seed == 0 and not self.exact:
            self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            self.model.zero_grad()
            self.add(rows, ITEMS)
            self.same_bits.append(torch.equal(self.gradient(), sums[0]))
            again = self.with_dropout(dropped.view(DROPPED), seed)
            self.same_bits.append(torch.equal(again, self.gradients["dropout"][0]))
            self.model.gradient_checkpointing_disable()

    def with_dropout(self, ids: torch.Tensor, seed: int) -> torch.Tensor:
        """Return the gradient with dropout of the adapter: masks are drawn from the seed alike in every dtype."""
        self.model.zero_grad()
        set_dropout(self.model, 0.1)
        torch.manual_seed(seed)
        self.add({"input_ids": ids, "labels": ids}, ids.numel())
        set_dropout(self.model, 0.0)
        return self.gradient()

    def add(self, batch: Batch, items: int) -> torch.Tensor:
        """Add the gradients of the loss, and return it in nats for each position (B, T - 1)."""
        labels = batch["labels"]
        inputs = {"use_cache": False, **{name: value for name, value in batch.items() if name != "labels"}}
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=AUTOCAST and not self.exact):
            if self.head is not None:
                with self.head.computing(labels, items) as computed:
                    self.model(**inputs)
                assert computed.loss is not None
                computed.loss.backward()
                if labels.shape != SHORT:
                    return computed.loss.detach()
                with torch.no_grad(), self.head.computing(labels) as computed:
                    self.model(**inputs)
                assert computed.nats is not None
                return computed.nats[:, :-1]
            first = int((labels != IGNORED).any(0).nonzero()[0])  # of the tokens that are supervised
            logits = self.model(**inputs, logits_to_keep=labels.shape[1] - max(first - 1, 0)).logits[:, :-1]
        wide = logits if self.exact else logits.float()
        assert wide.dtype == (torch.float64 if self.exact else torch.float32)
        targets = labels[:, -logits.shape[1] :]
        nats = torch.nn.functional.cross_entropy(wide.transpose(1, 2), targets, ignore_index=IGNORED, reduction="none")
        (nats.sum() / items).backward()
        return nats.detach()

    def gradient(self) -> torch.Tensor:
        """Return what is added up, A and B in the order of their names, as one vector."""
        trained = sorted((name, p) for name, p in self.model.named_parameters() if p.requires_grad)
        return torch.cat([parameter.grad.double().flatten() for _, parameter in trained]).float()


def set_dropout(model: torch.nn.Module, rate: float) -> None:
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            layer.lora_dropout["default"].p = rate


def padded(documents: Sequence[torch.Tensor]) -> Batch:
    pad = torch.nn.utils.rnn.pad_sequence
    mask = pad([torch.ones_like(document) for document in documents], batch_first=True)
    ids = pad(list(documents), batch_first=True)
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, IGNORED)}


def packed(documents: Sequence[torch.Tensor]) -> Batch:
    ids = torch.cat(list(documents))[None]
    positions = torch.cat([torch.arange(len(document)) for document in documents])[None]
    return {"input_ids": ids, "position_ids": positions, "labels": ids.masked_fill(positions == 0, IGNORED)}


@pytest.fixture(scope="module")
def wirings(demo_folder: Path) -> dict[str, Wiring]:
    """The model in float64, wired by hand and with kernels, after all batches have gone through each."""
    from pydoc_data.topics import topics

    text = "\n\n".join(topics[name] for name in sorted(topics)[:20])
    tokens = torch.tensor(load_tokenizer(str(demo_folder))(text)["input_ids"][: BATCHES * 256])
    assert len(tokens) == BATCHES * 256
    made = {}
    for name, make in (("exact", exact), ("by hand", by_hand), ("fused", with_kernels)):
        model = make(demo_folder, b=0.02, dropout=0.1)
        base = base_of(model)
        base.model.layers, base.config.num_hidden_layers = base.model.layers[:DEPTH], DEPTH
        set_dropout(model, 0.0)
        if name == "fused":
            prepare_packed(model)
        made[name] = Wiring(model, Head.of(model) if name == "fused" else None, exact=name == "exact")
        assert name != "fused" or made[name].head.module is not None
        made[name].run(tokens)
    return made


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_on_a_real_model_gradients_are_as_near_to_float64_as_those_of_the_usual_wiring(
    wirings: dict[str, Wiring], case: str
) -> None:
    wanted = wirings["exact"].gradients[case]
    assert len(wanted) == (BATCHES // 2 if case == "long" else BATCHES)
    by_hand, fused = (
        [apart(got, right) for got, right in zip(wirings[name].gradients[case], wanted, strict=True)]
        for name in ("by hand", "fused")
    )
    assert USUAL[0] < statistics.median(by_hand) < USUAL[1]
    ratio = statistics.median(error / usual for error, usual in zip(fused, by_hand, strict=True))
    assert ratio <= 1.05, (case, fused, by_hand)


def apart(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((got.double() - wanted.double()).norm() / wanted.double().norm())


@pytest.mark.slow
def test_on_a_real_model_checkpointing_gives_the_same_bits(wirings: dict[str, Wiring]) -> None:
    """So errors with it are those without it."""
    assert wirings["fused"].same_bits == wirings["by hand"].same_bits == [True, True]


@pytest.mark.slow
def test_on_a_real_model_losses_are_as_near_to_float64_as_those_of_the_usual_wiring(wirings: dict[str, Wiring]) -> None:
    """Root mean squares over 1,504 tokens: the errors of single batches' losses are too few, and go through zero."""
    wanted = torch.stack(wirings["exact"].nats)
    errors = {name: (torch.stack(wirings[name].nats).double() - wanted).square().mean().sqrt() for name in ("by hand", "fused")}
    assert USUAL[0] < errors["by hand"] < USUAL[1]
    assert errors["fused"] <= 1.05 * errors["by hand"], errors


@pytest.mark.slow
def test_on_a_real_model_new_tokens_are_as_near_to_float64_as_with_the_usual_wiring(wirings: dict[str, Wiring]) -> None:
    wanted = wirings["exact"].logits
    assert wanted is not None
    by_hand, fused = (
        [apart(got, right) for got, right in zip(wirings[name].logits, wanted, strict=True)]  # type: ignore[arg-type]
        for name in ("by hand", "fused")
    )
    assert USUAL[0] < statistics.median(by_hand) < USUAL[1]
    ratio = statistics.median(error / usual for error, usual in zip(fused, by_hand, strict=True))
    assert ratio <= 1.05, (fused, by_hand)

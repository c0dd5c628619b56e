"""The loss that the head computes is that of whole logits, whatever the model, its head and what is trained of it."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import peft
import pytest
import torch
import transformers

from qlora_core import Finished, ModelConfig
from qlora_core.data.collate import IGNORED, Collator
from qlora_core.training.head import Head
from qlora_core.training.loss import causal_lm_loss, score
from qlora_core.training.trainer import QLoRATrainer
from qlora_peft import LoRA
from qlora_text import TextFile

ARCHITECTURES = ["llama", "opt", "gpt_neox", "gpt2", "qwen2", "qwen3", "gemma", "phi", "mixtral"]
SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
AFTER_THE_HEAD: dict[str, dict[str, Any]] = {
    "gemma2": {"final_logit_softcapping": 3.0},
    "gemma3_text": {"final_logit_softcapping": 2.0},
    "nanochat": {"final_logit_softcapping": 3.0},
    "cohere": {"logit_scale": 0.07},
    "granite": {"logits_scaling": 1.7},
    "recurrent_gemma": {"logits_soft_cap": 3.0},
}


def random_model(kind: str = "llama", dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """Return a small random model whose logits differ by whole nats, so that caps and factors matter."""
    sizes = {"vocab_size": 416, "num_hidden_layers": 2, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 0}
    config = transformers.AutoConfig.for_model(kind, **sizes, **SIZES, **changes)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(10)
    return model


def with_lora(model: Any, **options: Any) -> torch.nn.Module:
    """Return *model* with LoRA whose B is not 0 any more."""
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, **{"target_modules": ["q_proj", "up_proj"], **options})
    adapted = peft.get_peft_model(model, config)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return adapted


def batch(rows: int = 3, length: int = 40, seed: int = 0) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Return a batch whose rows have 40, 31, 22 ... tokens, and labels with holes, none at all in the second row."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, 400, (rows, length), generator=generator)
    labels = ids.clone()
    labels[torch.rand(ids.shape, generator=generator) < 0.3] = IGNORED
    labels[1] = IGNORED
    real = torch.arange(length) < torch.tensor([length - 9 * row for row in range(rows)])[:, None]
    return {"input_ids": ids, "attention_mask": real.long()}, labels.masked_fill(~real, IGNORED)


def losses(
    model: torch.nn.Module, inputs: dict[str, Any], labels: torch.Tensor, head: Head | None, items: int | None = None
) -> Any:
    """Return the loss and the gradients of *model*: of whole logits where *head* is None."""
    model.zero_grad()
    torch.manual_seed(5)
    with (Head() if head is None else head).computing(labels, items) as computed:
        outputs = model(**inputs, use_cache=False)
    if head is None:
        loss = causal_lm_loss(outputs, labels, items)
    else:
        assert computed.loss is not None
        assert outputs.logits.shape == (*inputs["input_ids"].shape, 0)
        loss = computed.loss + outputs.logits.sum()
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(model: torch.nn.Module, *given: Any, head: Head | None = None) -> dict[str, torch.Tensor]:
    """Assert that loss and gradients are those of whole logits; return the gradients."""
    head = Head.of(model) if head is None else head
    assert head.module is not None
    inputs, labels, *items = given or batch()
    wanted, wanted_gradients = losses(model, inputs, labels, None, *items)
    loss, gradients = losses(model, inputs, labels, head, *items)
    torch.testing.assert_close(loss, wanted, rtol=1e-6, atol=1e-6)
    assert gradients.keys() == wanted_gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(
            gradient, wanted_gradients[name], rtol=1e-4, atol=2e-6 * float(gradient.abs().max() + 1), msg=name
        )
    return gradients


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_takes_it_for_training_and_scoring(
    make_model: Callable[..., Path], run: Callable[..., Finished], monkeypatch: pytest.MonkeyPatch, architecture: str
) -> None:
    taken, original = [], Head.computing

    def computing(self: Head, *args: Any) -> Any:
        taken.append(self.module is not None)
        return original(self, *args)

    monkeypatch.setattr(Head, "computing", computing)
    targets = ("q_proj", "k_proj", "v_proj", "o_proj") if architecture == "mixtral" else "all-linear"
    finished = run(model=str(make_model(architecture)), data={"eval_fraction": 0.2}, adapter=LoRA(r=4, target_modules=targets))
    assert len(taken) > 4
    assert all(taken)
    lines = finished.run.read_metrics()
    assert {name for line in lines for name in ("loss", "eval_loss") if name in line} == {"loss", "eval_loss"}


@pytest.mark.parametrize("kind", AFTER_THE_HEAD)
def test_what_a_model_does_to_its_logits_is_done_to_those_of_a_chunk(kind: str) -> None:
    model = random_model(kind, **AFTER_THE_HEAD[kind])
    model.get_output_embeddings().requires_grad_(False)
    assert_same(model)
    without = random_model(kind, **{name: 1e4 if "cap" in name else 1.0 for name in AFTER_THE_HEAD[kind]})
    inputs, _ = batch()
    assert not torch.allclose(
        without(**inputs, use_cache=False).logits, model(**inputs, use_cache=False).logits, rtol=1e-2
    )  # so it does matter


def test_a_model_that_does_something_else_to_its_logits_computes_them_whole(caplog: pytest.LogCaptureFixture) -> None:
    class Odd(transformers.LlamaForCausalLM):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            outputs = super().forward(*args, **kwargs)
            outputs.logits = outputs.logits + 1.5 * outputs.logits.sign()
            return outputs

    model = Odd(random_model().config)
    with caplog.at_level("DEBUG", "qlora_core"):
        assert Head.of(model).module is None
    assert "loss: Odd computes whole logits: what it does to logits after the head is not known" in caplog.text
    inputs, labels = batch()
    nats = causal_lm_loss(model(**inputs), labels, 1).item()
    assert score(model, [{**inputs, "labels": labels}], device=torch.device("cpu")).nats == pytest.approx(nats, rel=1e-6)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_head_with_lora(dropout: float) -> None:
    model = with_lora(random_model(), target_modules=["q_proj", "lm_head"], lora_dropout=dropout).train()
    if dropout:  # that of the layers before is drawn the same, that of the head for each chunk
        inputs, labels = batch()
        loss, gradients = losses(model, inputs, labels, Head.of(model))
        assert loss.isfinite()
        assert any("lm_head" in name for name in gradients)
    else:
        assert any("lm_head.lora_B" in name for name in assert_same(model))


@pytest.mark.parametrize("tied", [False, True])
def test_a_head_that_is_trained_as_a_whole(tied: bool) -> None:
    model = with_lora(random_model(tie_word_embeddings=tied), modules_to_save=["lm_head"])
    assert any("lm_head.modules_to_save" in name for name in assert_same(model))


@pytest.mark.parametrize("tied", [False, True])
def test_a_head_with_rows_of_new_tokens(tied: bool) -> None:
    model = random_model(tie_word_embeddings=tied)
    rows = {"embed_tokens": [7, 11]} if tied else {"embed_tokens": [7, 11], "lm_head": [7, 11]}
    adapted = with_lora(model, trainable_token_indices=rows)
    new = [name for name in assert_same(adapted) if "token" in name and "lora" not in name]
    assert len(new) == (1 if tied else 2)


def test_a_head_that_is_trained_alone() -> None:
    model = random_model().requires_grad_(False)
    model.lm_head.requires_grad_(True)
    assert set(assert_same(model)) == {"lm_head.weight"}


@pytest.mark.parametrize("reentrant", [False, True])
def test_with_gradient_checkpointing(reentrant: bool) -> None:
    model = with_lora(random_model())
    inputs, labels = batch()
    plain, wanted = losses(model, inputs, labels, None)
    model.base_model.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    loss, gradients = losses(model.train(), inputs, labels, Head.of(model))
    torch.testing.assert_close(loss, plain)
    torch.testing.assert_close(gradients, wanted)


def test_a_packed_batch() -> None:
    rows = [{"input_ids": list(range(3, 33)), "lengths": [9, 14, 7]}, {"input_ids": list(range(40, 60)), "lengths": [20]}]
    inputs = Collator(packed=True)(rows)
    labels = inputs.pop("labels")
    del inputs["use_cache"]
    assert_same(with_lora(random_model()), inputs, labels, 57)


def test_under_autocast_in_bfloat16_nothing_is_further_from_double_precision_than_with_whole_logits() -> None:
    model = with_lora(random_model(dtype=torch.bfloat16), target_modules=["q_proj", "v_proj", "up_proj", "down_proj"])
    exact = copy.deepcopy(model).double()
    head, mine, theirs = Head.of(model), [], []
    for seed in range(8):
        inputs, labels = batch(seed=seed)
        true_loss, true = losses(exact, inputs, labels, None)
        for which, found in ((None, theirs), (head, mine)):
            with torch.autocast("cpu", torch.bfloat16):
                loss, gradients = losses(model, inputs, labels, which)
            assert {gradient.dtype for gradient in gradients.values()} == {torch.float32}
            away = sum(float((gradients[name].double() - true[name]).square().sum()) for name in true)
            found.append((abs(float(loss) - float(true_loss)), away**0.5))
    for ours, allowed in zip(zip(*mine, strict=True), zip(*theirs, strict=True), strict=True):
        assert median(ours) <= 1.05 * median(allowed)


def test_four_batches_of_one_row_give_the_gradients_of_one_batch_of_four() -> None:
    model = with_lora(random_model())
    head, (inputs, labels) = Head.of(model), batch(rows=4)
    items = int((labels[:, 1:] != IGNORED).sum())
    loss, whole = losses(model, inputs, labels, head, items)
    parts = [
        losses(model, {k: v[row : row + 1] for k, v in inputs.items()}, labels[row : row + 1], head, items) for row in range(4)
    ]
    torch.testing.assert_close(sum(part for part, _ in parts), loss)
    assert parts[1][0] == 0  # nothing is supervised there
    for name, gradient in whole.items():
        torch.testing.assert_close(sum(part[name] for _, part in parts), gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["llama", "gemma2", "cohere"])
def test_the_score_is_that_of_whole_logits(kind: str) -> None:
    model = random_model(kind, **AFTER_THE_HEAD.get(kind, {})).eval()
    batches = [{**inputs, "labels": labels} for inputs, labels in (batch(seed=seed) for seed in range(3))]
    rows: dict[bool, list[torch.Tensor]] = {True: [], False: []}
    scores = {}
    for whole in (True, False):

        def gather(values: torch.Tensor, whole: bool = whole) -> torch.Tensor:
            rows[whole].append(values)
            return values

        scores[whole] = score(model, batches, device=torch.device("cpu"), gather=gather, head=Head() if whole else None)
    assert scores[True].tokens == scores[False].tokens > 0
    torch.testing.assert_close(rows[False], rows[True], rtol=1e-6, atol=1e-5)


def test_the_model_is_as_before_after_a_pass_and_after_one_that_fails() -> None:
    model = with_lora(random_model(), lora_dropout=0.5).train()
    inputs, labels = batch()
    state = torch.get_rng_state()
    head = Head.of(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    with pytest.raises(IndexError), head.computing(labels):
        model(input_ids=inputs["input_ids"] + 10_000)
    assert "forward" not in vars(head.module)
    assert model(**inputs).logits.shape == (3, 40, 416)


def test_a_forward_of_its_own_that_the_head_has_is_used_and_put_back() -> None:
    """As accelerate gives to the modules of a model that is spread over devices."""
    model = with_lora(random_model())
    module, calls = model.get_output_embeddings(), []
    original = module.forward

    def own(hidden: torch.Tensor) -> Any:
        calls.append(hidden.shape)
        return original(hidden)

    module.forward = own
    assert_same(model)
    assert module.forward is own
    assert calls


def test_prompt_tuning_puts_tokens_before_those_that_are_supervised() -> None:
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)
    model = peft.get_peft_model(random_model(), config)
    inputs, labels = batch()
    with Head.of(model).computing(labels) as computed:
        model(**inputs, use_cache=False)
    outputs = model(**inputs, use_cache=False)
    outputs.logits = outputs.logits[:, 5:]
    torch.testing.assert_close(computed.loss, causal_lm_loss(outputs, labels), rtol=1e-6, atol=1e-6)


def test_a_quantised_model_whose_head_is_quantised_too() -> None:
    import bitsandbytes

    model = random_model(dtype=torch.bfloat16)
    layer = bitsandbytes.nn.Linear4bit(64, 416, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4")
    layer.weight = bitsandbytes.nn.Params4bit(model.lm_head.weight.data, requires_grad=False, quant_type="nf4")
    model.lm_head = layer.to("cpu")
    adapted = with_lora(model).train()
    inputs, labels = batch()
    plain, wanted = losses(adapted, inputs, labels, None)
    loss, gradients = losses(adapted, inputs, labels, Head.of(adapted))
    torch.testing.assert_close(loss, plain, rtol=1e-3, atol=1e-3)
    for name, gradient in gradients.items():
        assert float((gradient - wanted[name]).norm() / wanted[name].norm()) < 2e-2


@pytest.mark.parametrize("add", [[], ["<the>"]])
def test_a_run_learns_the_same_as_with_whole_logits(
    run: Callable[..., Finished], monkeypatch: pytest.MonkeyPatch, tiny_model: Path, tmp_path: Path, text: str, add: list[str]
) -> None:
    corpus = tmp_path / "marked.txt"
    corpus.write_text(text[:20_000].replace(" the ", " <the> "), encoding="utf-8")
    found = []
    for whole in (False, True):
        if whole:
            monkeypatch.setattr(QLoRATrainer, "_head_of", lambda self, model: Head())
        finished = run(
            model=ModelConfig(path=str(tiny_model), dtype="float32"),
            dataset=TextFile(path=str(corpus)),
            tokens={"add": add},
            data={"eval_fraction": 0.2},
            training={"max_steps": 4, "mixed_precision": "none"},
            output=tmp_path / f"whole-{whole}",
        )
        found.append([line.get("loss", line.get("eval_loss")) for line in finished.run.read_metrics()])
    assert len(found[0]) >= 5
    assert found[0] == pytest.approx(found[1], rel=1e-4)


MEMORY = """
    import os, re, time
    import torch, transformers
    from qlora_core.training.head import Head
    from qlora_core.training.loss import causal_lm_loss, score

    def anonymous(process):  # MiB
        status = open(f"/proc/{process}/status").read()  # without a line about memory where it has ended
        return max([int(kilobytes) / 1024 for kilobytes in re.findall(r"RssAnon:\\s+(\\d+)", status)], default=0.0)

    sizes = dict(hidden_size=32, intermediate_size=64, num_attention_heads=2, num_hidden_layers=1, vocab_size=50_000)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).bfloat16().requires_grad_(False)
    model.model.norm.weight.requires_grad_(True)

    def once(way, head, length):
        ids = torch.randint(50_000, (2, length))
        if way == "score":
            score(model, [{"input_ids": ids, "labels": ids}], device=torch.device("cpu"), head=head)
            return
        with head.computing(ids) as computed:
            outputs = model(input_ids=ids, use_cache=False)
        loss = causal_lm_loss(outputs, ids) if computed.loss is None else computed.loss
        loss.backward()

    def peak_of(way, head):
        warm, go = os.pipe(), os.pipe()
        child = os.fork()  # one that has freed nothing yet
        if not child:
            once(way, head, 8)  # libraries and their kernels
            os.write(warm[1], b".")
            os.read(go[0], 1)
            once(way, head, 512)
            os._exit(0)
        os.read(warm[0], 1)
        before, peak, done = anonymous(child), 0.0, (0, 0)
        os.write(go[1], b".")
        while not done[0]:  # from outside: a thread of its own would leave gaps in its memory
            peak = max(peak, anonymous(child))
            time.sleep(0.002)
            done = os.waitpid(child, os.WNOHANG)
        assert done[1] == 0
        return peak - before

    for way in ("train", "score"):
        for name, head in {"whole": Head(), "chunks": Head.of(model)}.items():
            print(way, name, peak_of(way, head), flush=True)
"""


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="memory is read from /proc")
def test_whole_logits_are_never_there() -> None:
    """1,024 rows of 50,000 logits are 98 MiB in bfloat16, 195 MiB in float32; a chunk's are 24 MiB, and become gradients."""
    code = [sys.executable, "-c", textwrap.dedent(MEMORY)]
    least: dict[tuple[str, str], float] = {}
    for _ in range(3):  # once in a dozen processes the allocator finds no room for a chunk where the one before was
        done = subprocess.run(
            code, capture_output=True, text=True, timeout=240, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False
        )
        assert done.returncode == 0, done.stderr
        peaks = {(way, head): float(peak) for way, head, peak in map(str.split, done.stdout.splitlines())}
        assert len(peaks) == 4
        least = {key: min(peak, least.get(key, peak)) for key, peak in peaks.items()}
        if all(peak < 40 for (_, head), peak in least.items() if head == "chunks"):
            break
    for (way, head), peak in least.items():
        assert peak > 250 if head == "whole" else peak < 40, (way, head, peak)

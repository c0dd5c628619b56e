"""What `verify` measures is what float64 and sample after sample give, and what it allows is what rounding does."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qlora_bitsandbytes import NF4
from qlora_core import ModelConfig, Registry, RunConfig, inject_adapter, load_model, resolve
from qlora_core.data.collate import IGNORED, Collator
from qlora_core.data.layouts import Layouts, Sample
from qlora_core.measured import Difference, Measured, Subject, limit_of
from qlora_core.verify import Check, Verified, verify
from qlora_peft import LoRA
from qlora_plain import NoQuantizer

pytestmark = pytest.mark.filterwarnings("ignore")

CHATS = [
    {"messages": [{"role": "user", "content": f"Say {n}."}, {"role": "assistant", "content": f"{n}, said" + " again" * n}]}
    for n in range(8)
]


@pytest.fixture
def check(tiny_model: Path, text_file: Path, tmp_path: Path) -> Callable[..., Verified]:
    """Return a function that verifies a run on the tiny Llama, with the given sections otherwise."""

    def go(rows: int = 4, **changes: Any) -> Verified:
        settings: dict[str, Any] = {
            "model": str(tiny_model),
            "adapter": {"name": "lora", "r": 4},
            "dataset": {"name": "text", "path": str(text_file)},
            "data": {"sequence_length": 32},
            "output": str(tmp_path / "run"),
        }
        config = RunConfig.parse({**settings, **changes})
        return verify(*resolve(config, Registry()), rows=rows)

    return go


def by_name(verified: Verified) -> dict[str, Check]:
    return {check.name: check for check in verified.checks}


def samples() -> tuple[Sample, ...]:
    random = np.random.default_rng(0)
    made = []
    for size in (29, 7, 18, 12, 2):
        ids = random.integers(2, 380, size).astype(np.int32)
        labels = np.where(random.random(size) < 0.3, IGNORED, ids).astype(np.int32)
        labels[1] = ids[1]
        made.append({"input_ids": ids, "labels": labels, "lengths": [size]})
    return tuple(made)


def adapted(folder: Path, quantizer: Any, dtype: str = "float32") -> Any:
    torch.manual_seed(0)
    model = inject_adapter(load_model(ModelConfig(path=str(folder), dtype=dtype), quantizer), LoRA(r=4, dropout=0.3))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def in_float64(model: torch.nn.Module) -> Measured:
    """Return the loss and the gradients of each sample by itself, by the model's own logits in float64."""
    exact: Any = copy.deepcopy(model).double().eval()
    items = sum(int((sample["labels"][1:] != IGNORED).sum()) for sample in samples())
    loss = torch.zeros((), dtype=torch.float64)
    for sample in samples():
        ids, labels = (torch.as_tensor(sample[name], dtype=torch.int64) for name in ("input_ids", "labels"))
        logits = exact(input_ids=ids[None], use_cache=False).logits[0, :-1]
        loss = loss + torch.nn.functional.cross_entropy(logits, labels[1:], ignore_index=IGNORED, reduction="sum") / items
    loss.backward()
    return Measured(float(loss.detach()), {name: p.grad for name, p in exact.named_parameters() if p.requires_grad})


def test_every_layout_is_measured_as_in_float64(tiny_model: Path) -> None:
    model = adapted(tiny_model, NoQuantizer())
    expected = in_float64(model)
    assert len(expected.gradients) == 28
    assert all(float(g.norm()) > 0 for g in expected.gradients.values())
    subject = Subject(model, NoQuantizer(), "none", packed=True)
    layouts = Layouts(samples(), Collator(1, 8))
    for batches in (layouts.padded, layouts.left, layouts.packed, layouts.split(1), layouts.split(2)):
        found = subject.measure(batches)
        far = Difference.between(found, expected)
        assert found.loss == pytest.approx(expected.loss, rel=1e-5)
        assert far.loss < 1e-5
        assert 0 < far.gradients < 1e-5
    assert not any(p.grad is not None for p in model.parameters())


def test_rounding_is_about_as_far_as_layouts_are_apart(tiny_model: Path) -> None:
    """In every dtype, so that three times that neither lets much pass nor refuses what is sound."""
    layouts = Layouts(samples(), Collator(1, 8))
    resolutions = []
    for dtype, precision in (("float32", "none"), ("bfloat16", "none"), ("float32", "bf16")):
        subject = Subject(adapted(tiny_model, NF4(), dtype), NF4(), precision, packed=True)
        assert subject.dtype == (torch.float32 if (dtype, precision) == ("float32", "none") else torch.bfloat16)
        reference = subject.measure(layouts.padded)
        rounding = subject.rounding(layouts.padded, reference)
        apart = [
            Difference.between(subject.measure(one), reference) for one in (layouts.left, layouts.packed, layouts.split(1))
        ]
        assert subject.measure(layouts.padded).loss == reference.loss  # nothing of the noise stays
        assert all(one.gradients < 3 * rounding.gradients for one in apart if one.gradients > 1e-4)
        resolutions.append(subject.resolution)
        assert rounding.gradients < 100 * max(subject.resolution, 1e-7)
    assert resolutions[0] < 1e-6
    assert all(1e-3 < one < 4e-3 for one in resolutions[1:])


def test_differences_are_relative_and_name_the_parameter_that_is_most_to_blame() -> None:
    one = Measured(2.2, {"a": torch.tensor([3.0, 0.0]), "b": torch.tensor([4.0])})
    two = Measured(2.0, {"a": torch.tensor([3.0, 0.1]), "b": torch.tensor([4.5])})
    far = Difference.between(two, one)
    assert far.loss == pytest.approx(0.2 / 2.2)
    assert far.gradients == pytest.approx((0.01 + 0.25) ** 0.5 / 5)
    assert far.where == "b"
    assert Difference.between(one, one) == Difference(0.0, 0.0, "")
    assert Difference.largest(far, Difference(0.5, 0.01, "a")) == Difference(0.5, far.gradients, "b")


def test_what_is_not_a_number_is_beyond_every_limit() -> None:
    nan, wide = float("nan"), Difference(1e9, 1e9)
    for far in (Difference(nan, 0.0), Difference(0.0, nan), Difference(float("inf"), 0.0)):
        assert not Difference.largest(Difference(0.0, 0.0), far, Difference(1.0, 1.0)).within(wide)
    assert Difference.between(Measured(1.0, {"a": torch.ones(1)}), Measured(1.0, {"a": torch.zeros(1)})).gradients == float(
        "inf"
    )


def test_limits_grow_with_what_rounding_does_and_are_never_nothing() -> None:
    assert limit_of(1e-7, Difference(1e-8, 1e-6)) == Difference(1e-5, 1e-4)
    assert limit_of(2e-3, Difference(1e-3, 1e-2), Difference(1e-4, 2e-2)) == Difference(3e-3, pytest.approx(6e-2))
    assert limit_of(2e-3, Difference(1e-4, 1e-2)).loss == 2e-3


@pytest.mark.parametrize("architecture", ["gpt2", "opt", "gpt_neox", "qwen3", "gemma", "phi", "mixtral"])
def test_architectures_pass(check: Callable[..., Verified], make_model: Callable[..., Path], architecture: str) -> None:
    verified = check(model=str(make_model(architecture)))
    assert {name: one.result for name, one in by_name(verified).items()} == dict.fromkeys(by_name(verified), "pass")


@pytest.mark.parametrize("quantizer", ["int8", "none", "fp4"])
def test_quantizers_pass(check: Callable[..., Verified], quantizer: str) -> None:
    verified = check(quantizer=quantizer)
    assert verified.passed, verified
    assert len(verified.checks) == 5


def test_in_bfloat16_more_is_allowed_but_not_much(check: Callable[..., Verified], tiny_model: Path) -> None:
    verified = check(model={"path": str(tiny_model), "dtype": "bfloat16"}, training={"mixed_precision": "bf16"})
    assert verified.dtype == "bfloat16"
    assert verified.passed, verified
    for name, one in by_name(verified).items():
        if name != "save and resume":
            assert one.gradients_limit is not None
            assert 1e-3 < one.gradients_limit < 0.1


def test_a_stream_of_chats_is_verified_with_its_own_lengths(check: Callable[..., Verified], tmp_path: Path) -> None:
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps(chat) + "\n" for chat in CHATS), encoding="utf-8")
    verified = check(
        rows=6,
        dataset={"name": "records", "path": str(path)},
        data={"sequence_length": 128, "streaming": True, "eval_fraction": 0.0, "buffer": 8},
        training={"max_steps": 100, "seed": 3},
    )
    assert verified.passed, verified
    assert len(set(verified.lengths)) > 1
    assert max(verified.lengths) <= 128


def test_evaluation_callbacks_and_the_best_weights_are_left_out(check: Callable[..., Verified], tmp_path: Path) -> None:
    training = {"keep": "best", "eval_at_start": True, "eval_steps": 1, "gradient_accumulation": 5}
    verified = check(training=training, callbacks=["early_stopping", "progress"])
    assert verified.passed, verified
    assert not (tmp_path / "run").exists()

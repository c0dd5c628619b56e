"""Checkpointing, in whole, in part or not at all: the same bits, and memory that lies in between."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qlora_bitsandbytes import NF4
from qlora_core import ConfigError, Finished, ModelError, inject_adapter, load_model
from qlora_core.config import ModelConfig, RunConfig, TrainingConfig
from qlora_core.data.collate import Collator
from qlora_core.packed import prepare_packed
from qlora_core.training import head
from qlora_core.training import recompute as module
from qlora_core.training.activations import measure
from qlora_core.training.loss import causal_lm_loss
from qlora_core.training.recompute import Needs, choose, keep_all, layers_of, plan, recompute, settle, upper_bound
from qlora_fused import Fused
from qlora_peft import LoRA

pytestmark = pytest.mark.filterwarnings("ignore")
ARCHITECTURES = ["llama", "opt", "gpt_neox", "gpt2", "qwen2", "gemma", "phi"]
GB = 10**9


def adapted(folder: Path, dropout: float = 0.1, *, fused: bool = False) -> Any:
    torch.manual_seed(0)
    model: Any = inject_adapter(load_model(ModelConfig(path=str(folder)), NF4()), LoRA(r=4, dropout=dropout))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter.data, std=0.1)
    return (Fused().apply(model) if fused else model).train()


def batch() -> dict[str, torch.Tensor]:
    """Two packed rows of 96 tokens."""
    rows = [{"input_ids": [(7 * i + row) % 380 for i in range(96)], "lengths": [40 + row, 56 - row]} for row in range(2)]
    return {name: value for name, value in Collator(packed=True)(rows).items() if torch.is_tensor(value)}


def forward(model: Any) -> torch.Tensor:
    given = batch()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = model(**{name: value for name, value in given.items() if name != "labels"}, use_cache=False)
        return causal_lm_loss(outputs, given["labels"])


def gradients(model: Any) -> dict[str, torch.Tensor]:
    """Return the loss and all gradients of a step, drawn from one seed, and the random number that comes after it."""
    torch.manual_seed(3)
    model.zero_grad()
    loss = forward(model)
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    return {"loss": loss.detach(), **found, "next": torch.rand(4)}


def saved_bytes(model: Any) -> int:
    """Return what a step really keeps, weights aside: counted independently, while everything is alive."""
    kept: dict[int, tuple[int, torch.Tensor]] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes(), tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = forward(model)
    weights = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    assert loss.requires_grad
    return sum(size for address, (size, _) in kept.items() if address not in weights)


def parts(model: Any) -> list[torch.nn.Module]:
    return [part for layer in layers_of(model) for part in layer.children() if not isinstance(part, torch.nn.ModuleList)]


@pytest.mark.parametrize("fused", [False, True], ids=["reference", "fused"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_loss_gradients_and_generator_are_the_same_bits(
    make_model: Callable[..., Path], architecture: str, fused: bool
) -> None:
    model = adapted(make_model(architecture), fused=fused)
    prepare_packed(model)
    wanted = gradients(model)
    found = {}
    assert settle(model, "selective", lambda *shape: forward(model), 2, 32) == "selective"
    found["selective"] = gradients(model)
    keep_all(model)
    for part in parts(model):  # whatever the clock says is best
        recompute([part])
    found["every part"] = gradients(model)
    keep_all(model)
    model.base_model.model.activation_checkpointing_enable({"use_reentrant": False})
    found["full"] = gradients(model)
    for way, values in found.items():
        assert [name for name in wanted if not torch.equal(wanted[name], values[name])] == [], way


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_selective_keeps_more_than_full_and_less_than_everything(make_model: Callable[..., Path], architecture: str) -> None:
    model = adapted(make_model(architecture, num_hidden_layers=4))
    prepare_packed(model)
    kept = {"none": saved_bytes(model)}
    settle(model, "selective", lambda *shape: forward(model), 2, 32)
    kept["selective"] = saved_bytes(model)
    keep_all(model)
    model.base_model.model.activation_checkpointing_enable({"use_reentrant": False})
    kept["full"] = saved_bytes(model)
    assert kept["full"] < 0.95 * kept["selective"]
    assert kept["selective"] < 0.9 * kept["none"]


@pytest.mark.parametrize("fused", [False, True], ids=["reference", "fused"])
def test_what_is_measured_is_what_is_kept(make_model: Callable[..., Path], fused: bool) -> None:
    model = adapted(make_model("llama", num_hidden_layers=4), fused=fused)
    prepare_packed(model)
    found = measure(layers_of(model), model, lambda: forward(model))
    assert found.kept([]) == pytest.approx(saved_bytes(model), rel=0.01)
    for names in (["self_attn"], ["mlp"], ["self_attn", "mlp"]):
        places = [place for place in found.places if place[1] in names]
        recompute([layers_of(model)[index].get_submodule(name) for index, name in places])
        # what is made again, one part at a time, comes on top
        assert 0 <= found.kept(places) - saved_bytes(model) <= found.kept([]) / 4
        keep_all(model)


def test_measuring_changes_nothing_and_keeps_nothing(tiny_model: Path) -> None:
    model = adapted(tiny_model).eval()
    torch.manual_seed(5)
    before = torch.rand(1)
    torch.manual_seed(5)
    alive: list[int] = []
    measure(layers_of(model), model, lambda: alive.append(forward(model).grad_fn is not None))
    assert torch.equal(torch.rand(1), before)
    assert not any(part.training for part in model.modules())
    assert not any(part._forward_hooks or part._forward_pre_hooks for layer in layers_of(model) for part in layer.children())
    assert alive == [True]


def test_keep_all_brings_every_forward_back(tiny_model: Path) -> None:
    model = adapted(tiny_model, fused=True)
    own = [vars(part).get("forward") for part in parts(model)]
    recompute(parts(model))
    assert [vars(part)["forward"] for part in parts(model)] != own
    keep_all(model)
    assert [vars(part).get("forward") for part in parts(model)] == own


def test_a_part_with_a_cache_and_one_without_gradients_run_once(tiny_model: Path) -> None:
    model = adapted(tiny_model)
    recompute(parts(model))
    ids = torch.arange(2, 20)[None]
    with torch.no_grad():
        texts = [m.eval().generate(input_ids=ids, max_new_tokens=6, do_sample=False) for m in (model, adapted(tiny_model))]
    assert torch.equal(*texts)


def test_without_a_part_that_is_better_every_second_layer_is_computed_again(
    make_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = adapted(make_model("llama", num_hidden_layers=8))
    monkeypatch.setattr(module, "_worth_it", lambda found, whole: [])
    found = plan(model, lambda: forward(model))
    assert found.what == "every second layer"
    assert list(found.modules) == layers_of(model)[::2]
    assert found.needs.full < found.needs.selective < found.needs.none


@pytest.mark.parametrize(
    ("available", "mode"),
    [(10 * GB, "none"), (4 * GB, "none"), (3 * GB, "selective"), (2 * GB, "full"), (GB // 2, "full")],
)
def test_auto_takes_the_first_that_there_is_room_for(available: int, mode: str) -> None:
    assert choose(Needs(none=3 * GB, selective=2 * GB, full=GB), available) == mode


def padded(model: Any, rows: int, tokens: int) -> torch.Tensor:
    ids = torch.arange(rows * tokens).view(rows, tokens) % 380
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return causal_lm_loss(model(input_ids=ids, use_cache=False), ids)


@pytest.mark.parametrize(("attention", "fused"), [("eager", False), ("sdpa", False), ("sdpa", True)])
@pytest.mark.parametrize(("rows", "tokens"), [(3, 400), (1, 1023), (2, 3)])
def test_what_a_step_needs_at_most_is_more_than_it_needs(
    make_model: Callable[..., Path], attention: str, fused: bool, rows: int, tokens: int
) -> None:
    model = adapted(make_model("llama", max_position_embeddings=1024), fused=fused)
    if not fused:
        model.base_model.model.set_attn_implementation(attention)
    most = upper_bound(model, lambda *shape: padded(model, *shape), rows, tokens)
    assert plan(model, lambda: padded(model, rows, tokens)).needs.none < most


@pytest.mark.parametrize(
    ("wanted", "available", "shapes", "mode"),
    [
        ("auto", 10 * GB, [(1, 16)], "none"),
        ("auto", GB // 100, [(1, 16), (2, 64)], "full"),
        ("auto", None, [], "none"),
        ("selective", 10 * GB, [(2, 64)], "selective"),
    ],
)
def test_where_there_is_plenty_of_memory_a_short_row_is_enough(
    tiny_model: Path,
    monkeypatch: pytest.MonkeyPatch,
    wanted: Any,
    available: int | None,
    shapes: list[tuple[int, int]],
    mode: str,
) -> None:
    model, seen = adapted(tiny_model), []

    def forward(rows: int, tokens: int) -> None:
        seen.append((rows, tokens))
        padded(model, rows, tokens)

    monkeypatch.setattr(module, "available_bytes", lambda device: available)
    assert settle(model, wanted, forward, 2, 64) == mode
    assert seen == shapes


@pytest.mark.parametrize(
    ("share", "mode", "why"),
    [
        (10.0, "none", r"a step needs less than 0\.\d\d GB, 10.00 GB available"),
        (0.0, "full", r"a step needs about 0\.\d\d GB with none, .* with full, 0.00 GB available"),
    ],
)
def test_auto_says_what_it_chose_and_why(
    run: Callable[..., Finished],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    share: float,
    mode: str,
    why: str,
) -> None:
    def finish(way: str) -> list[float]:
        arguments = {"output": tmp_path / way, "adapter": LoRA(r=4, dropout=0.1)}
        finished = run(**arguments, training={"gradient_checkpointing": way})
        return [line["loss"] for line in finished.run.read_metrics() if "loss" in line]

    monkeypatch.setattr(module, "available_bytes", lambda device: int(share * GB))
    with caplog.at_level(logging.INFO, logger="qlora_core"):
        losses = finish("auto")
    (line,) = [record.getMessage() for record in caplog.records if "gradient checkpointing" in record.getMessage()]
    assert re.fullmatch(f"gradient checkpointing: {mode}; {why}", line)
    assert losses == finish("none") == finish("selective") == finish("full")


def test_auto_runs_with_what_this_machine_has_and_looks_at_the_head_once(
    run: Callable[..., Finished], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    probed, looks = head._probed, []
    monkeypatch.setattr(head, "_probed", lambda *given: (looks.append(1), probed(*given))[1])
    with caplog.at_level(logging.INFO, logger="qlora_core"):
        finished = run(training={"gradient_checkpointing": "auto"})
    assert len([record for record in caplog.records if "gradient checkpointing: " in record.getMessage()]) == 1
    assert not any(isinstance(vars(part).get("forward"), module._Recomputed) for part in finished.model.modules())
    assert looks == [1]


def test_where_another_process_wants_selective_this_one_plans_it_too(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = adapted(tiny_model)
    monkeypatch.setattr(module, "available_bytes", lambda device: 10 * GB)
    with caplog.at_level(logging.INFO, logger="qlora_core"):
        mode = settle(model, "auto", lambda *shape: padded(model, *shape), 2, 64, lambda mode: max(mode, "selective"))
    assert mode == "selective"
    assert any(isinstance(vars(part).get("forward"), module._Recomputed) for part in model.modules())
    assert "needs less" not in caplog.messages[-1]


def test_auto_is_careful_where_a_pass_can_not_be_measured(tiny_model: Path, caplog: pytest.LogCaptureFixture) -> None:
    def fails(rows: int, tokens: int) -> None:
        raise RuntimeError("not enough memory: you tried to allocate 9 bytes")

    model = adapted(tiny_model)
    with caplog.at_level(logging.INFO, logger="qlora_core"):
        assert settle(model, "auto", fails, 2, 32) == "full"
        assert settle(model, "selective", fails, 2, 32) == "selective"
    first, second = caplog.messages[-2:]
    assert first == "gradient checkpointing: full; not enough memory: you tried to allocate 9 bytes"
    assert second.startswith("gradient checkpointing: selective (every second layer); not enough memory")


def test_a_model_whose_layers_can_not_be_computed_again(tiny_model: Path) -> None:
    model = adapted(tiny_model)
    model.base_model.model.supports_gradient_checkpointing = False
    assert settle(model, "auto", lambda *shape: None, 2, 32) == "none"
    with pytest.raises(ModelError, match=r"training.gradient_checkpointing: LlamaForCausalLM has no layers .* set it to none"):
        settle(model, "selective", lambda *shape: None, 2, 32)


@pytest.mark.parametrize(
    ("written", "read"),
    [(True, "full"), (False, "none"), ("none", "none"), ("selective", "selective"), ("full", "full"), ("auto", "auto")],
)
def test_what_older_runs_say_is_read_and_written_back_in_words(written: object, read: str) -> None:
    config = RunConfig.parse({"model": "m", "dataset": "text", "training": {"gradient_checkpointing": written}})
    assert config.training.gradient_checkpointing == read
    assert f"gradient_checkpointing: {read}" in config.to_yaml().replace("'", "")
    assert TrainingConfig().gradient_checkpointing == "auto"


def test_another_value_is_refused_with_what_is_accepted() -> None:
    with pytest.raises(ConfigError, match=r"training.gradient_checkpointing: .*selective"):
        RunConfig.parse({"model": "m", "dataset": "text", "training": {"gradient_checkpointing": "selectiv"}})

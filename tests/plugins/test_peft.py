"""The adapter `peft`: what it refuses and where, and the tables of qlora_peft.methods against reality."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from qlora_bitsandbytes import FP4, NF4, Int8
from qlora_core import ConfigError, ModelError, RunConfig, finetune
from qlora_core.model import build_skeleton, inject_adapter, load_model
from qlora_core.parts import Parts
from qlora_core.providers import Quantizer
from qlora_peft import AnyPEFT, LoRA
from qlora_peft.anymethod import _words, methods
from qlora_peft.methods import LENGTHENS, NEVER, why_not
from qlora_plain import NoQuantizer
from qlora_text import TextFile


class PackedLinear(torch.nn.Linear):
    """A layer of somebody else's: int8 codes, packed into one column."""

    def __init__(self, layer: torch.nn.Linear) -> None:
        torch.nn.Module.__init__(self)
        self.in_features, self.out_features, self.bias = layer.in_features, layer.out_features, None
        codes = (layer.weight.detach().float() * 1000).round().clamp(-127, 127).to(torch.int8)
        self.weight = torch.nn.Parameter(codes.view(torch.uint8).reshape(-1, 1), requires_grad=False)

    def dequantized(self) -> torch.Tensor:
        return self.weight.data.reshape(self.out_features, self.in_features).view(torch.int8) / 1000

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(x, self.dequantized().to(x.dtype))


class Packed(Quantizer):
    """A quantizer that qlora_peft knows nothing of."""

    name = "packed"

    def load_kwargs(self, skeleton: Any) -> dict[str, Any]:
        return {}

    def prepare(self, model: Any) -> Any:
        for module in list(model.modules()):
            for name, child in list(module.named_children()):
                if type(child) is torch.nn.Linear and name != "lm_head":
                    setattr(module, name, PackedLinear(child))
        return model

    def is_quantized(self, module: torch.nn.Module) -> bool:
        return isinstance(module, PackedLinear)

    def dequantize(self, module: torch.nn.Module) -> torch.Tensor:
        assert isinstance(module, PackedLinear)
        return module.dequantized()

    def stored_bytes(self, shape: tuple[int, int]) -> int:
        return shape[0] * shape[1]


QUANTIZERS: dict[str, type[Quantizer]] = {"none": NoQuantizer, "nf4": NF4, "fp4": FP4, "int8": Int8, "packed": Packed}
SMALL: dict[str, dict[str, Any]] = {  # what fits layers of 64 x 64; all else are PEFT's defaults
    "adaption_prompt": {"adapter_len": 4, "adapter_layers": 2},
    "c3a": {"block_size": 16},
    "cartridge": {"num_virtual_tokens": 4},
    "fourierft": {"n_frequency": 50},
    "frod": {"progressbar": False},
    "p_tuning": {"num_virtual_tokens": 4, "encoder_hidden_size": 16},
    "prefix_tuning": {"num_virtual_tokens": 4},
    "prompt_tuning": {"num_virtual_tokens": 4},
    "pvera": {"r": 8},
    "randlora": {"r": 8},
    "road": {"group_size": 16},
    "shira": {"r": 4},
    "trainable_tokens": {"token_indices": [7, 8]},
    "vblora": {"vector_length": 16, "num_vectors": 32},
    "vera": {"r": 8},
    "waveft": {"n_frequency": 50},
}
STARTS_ELSEWHERE = {"c3a", "cartridge", "fourierft", "frod", "p_tuning", "prefix_tuning", "prompt_tuning", "vblora"}
IDS = torch.arange(2 * 24).reshape(2, 24) % 370 + 5


def logits(model: Any) -> torch.Tensor:
    """Return the logits on IDS, without autocast, as `qlora generate` calls a model."""
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits.float()


def adapter_of(method: str) -> AnyPEFT:
    return AnyPEFT(method=method, config=SMALL.get(method, {}))


def problem_of(adapter: AnyPEFT) -> tuple[tuple[str | int, ...], str]:
    with pytest.raises(ConfigError) as caught:
        adapter.check_libraries()
    (problem,) = caught.value.problems
    return problem.where, problem.what


def run_config(packing: bool = False) -> RunConfig:
    data = {"packing": packing}
    return RunConfig.parse({"model": "x", "dataset": {"name": "text_file", "path": "x"}, "data": data, "output": "x"})


@pytest.mark.parametrize("method", ["prompt_tuning", "p_tuning", "prefix_tuning"])
def test_a_prompt_before_a_block_is_refused_where_samples_are_packed(method: str) -> None:
    adapter = AnyPEFT(method=method, config={"num_virtual_tokens": 4})
    adapter.check(run_config(packing=False), Parts(NF4(), adapter, ()))
    with pytest.raises(ConfigError, match="puts a prompt before a block, which packed samples would share"):
        adapter.check(run_config(packing=True), Parts(NF4(), adapter, ()))


def refusal(adapter: AnyPEFT, quantizer: Quantizer) -> tuple[tuple[str | int, ...], str] | None:
    try:
        adapter.check(run_config(), Parts(quantizer, adapter, ()))
    except ConfigError as error:
        (problem,) = error.problems
        return problem.where, problem.what
    return None


def works(method: str, quantizer: Quantizer, model: Path, folder: Path) -> str:
    """Train *method* for four steps and return the first thing that is not as it should be, or an empty text."""
    adapter = adapter_of(method)
    base = load_model(str(model), quantizer)
    start, before = logits(base), [(p, p.data.clone()) for p in base.parameters()]
    torch.manual_seed(1)
    adapted = inject_adapter(base, adapter)
    first = logits(adapted)
    if first.shape != start.shape:
        return f"gives logits of another shape, {tuple(first.shape)}"
    if method not in STARTS_ELSEWHERE and (first - start).abs().max() > 5e-3:
        return "does not begin as the base model"
    trained = [p for p in adapted.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            found = adapted.train()(input_ids=IDS).logits.float()
        loss = torch.nn.functional.cross_entropy(found[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if not all(p.grad.isfinite().all() for p in trained if p.grad is not None):
            return "has gradients that are not finite"
    if not losses[-1] < losses[0]:
        return "does not learn"
    if not all(torch.equal(p.data, old) for p, old in before):
        return "changes the base"
    after = logits(adapted)
    adapter.save(adapted, folder)
    if {p.suffix for p in folder.iterdir()} - {".safetensors", ".json", ".md"}:
        return "writes something else than safetensors"
    torch.manual_seed(2)
    again = adapter.load(load_model(str(model), quantizer), folder)
    # a prompt's encoder has run under autocast or not: one rounding to bfloat16
    if (logits(again) - after).abs().max() > (0.02 if method in LENGTHENS else 1e-5):
        return "is another model once loaded"
    # the strongest: on plain weights that are what the packed ones stand for, the adapter means the same
    plain = load_model(str(model), None)
    layers = dict(plain.named_modules())
    with torch.no_grad():
        for name, module in load_model(str(model), quantizer).named_modules():
            if quantizer.is_quantized(module):
                layers[name].weight.copy_(quantizer.dequantize(module))
    torch.manual_seed(3)
    moved = float((after - first).abs().max())  # bfloat16 rounds a large update more coarsely
    far = (logits(adapter.load(plain, folder)) - after).abs().amax(-1)  # of each token
    # int8 rounds activations, too: one token in ten may be where that decides much, as randlora has one on some CPUs
    if far.float().quantile(0.9 if quantizer.name == "int8" else 1.0) > max(0.02, 0.15 * moved):
        return "means something else on the dequantised weights"
    return ""


@pytest.mark.slow
@pytest.mark.parametrize("method", sorted(methods()))
def test_the_tables_say_which_methods_work_on_which_quantizers(method: str, tiny_model: Path, tmp_path: Path) -> None:
    if method == "adamss":
        pytest.importorskip("sklearn")
    for name, made in QUANTIZERS.items():
        said = refusal(adapter_of(method), made())
        if method in NEVER:
            assert said is not None
            continue
        try:
            adapter_of(method).check_libraries()
            found = works(method, made(), tiny_model, tmp_path / name)
        except Exception as error:
            found = f"{type(error).__name__}: {error}"
        assert bool(found) == (said is not None), (method, name, found, said)


def test_the_entry_module_stays_light() -> None:
    code = "import sys, qlora_peft; assert not {'torch', 'peft', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("options", "where", "what"),
    [
        ({"method": "ia4"}, ("method",), "unknown method 'ia4'; PEFT has adamss, adaption_prompt, beft, boft, "),
        ({"method": "vera", "config": {"rank": 4}}, ("config", "rank"), "unknown option; vera accepts bias, d_initial, "),
        ({"method": "vera", "config": {"r": "4"}}, ("config", "r"), "must be a whole number (got '4')"),
        ({"method": "vera", "config": {"r": True}}, ("config", "r"), "must be a whole number (got True)"),
        (
            {"method": "vera", "config": {"target_modules": 3}},
            ("config", "target_modules"),
            "must be a list or text or null (got 3)",
        ),
        (
            {"method": "vera", "config": {"task_type": "SEQ_CLS"}},
            ("config", "task_type"),
            "can't be set here: it is CAUSAL_LM; leave it out",
        ),
        (
            {"method": "vera", "config": {"bias": "all"}},
            ("config", "bias"),
            "PEFT does not save the biases that vera trains; use none",
        ),
        (
            {"method": "glora", "config": {"config_C": "x"}},
            ("config", "config_C"),
            "must be 'lora' or 'vector' or 'none' (got 'x')",
        ),
        (
            {"method": "ia3", "config": {"target_modules": ["q_proj"], "feedforward_modules": ["k_proj"]}},
            ("config",),
            "ia3 can't be made from it: `feedforward_modules` should be a subset of `target_modules`",
        ),
        (
            {"method": "prompt_tuning"},
            ("config", "num_virtual_tokens"),
            "required; prompt_tuning does not work without it",
        ),
        (
            {"method": "lora", "config": {"init_lora_weights": "pissa"}},
            ("config", "init_lora_weights"),
            "this initialisation changes the base weights; use true or gaussian",
        ),
    ],
)
def test_what_peft_would_not_take_is_refused_where_it_stands(options: Any, where: Any, what: str) -> None:
    found = problem_of(AnyPEFT(**options))
    assert found[0] == where
    assert found[1].startswith(what)


def test_kinds_are_named_in_one_order_whatever_was_imported_before() -> None:
    for hint in (str | list[str] | None, list[str] | None | str):
        assert _words(hint) == "a list or text or null"


def test_a_misspelt_name_gets_a_guess() -> None:
    assert problem_of(AnyPEFT(method="vara"))[1].endswith("; did you mean 'vera'?")
    assert problem_of(AnyPEFT(method="vera", config={"vera_drop": 0.1}))[1].endswith("; did you mean 'vera_dropout'?")


def test_every_problem_is_listed_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        AnyPEFT(method="vera", config={"r": 1.5, "rank": 4}).check_libraries()
    assert [problem.where for problem in caught.value.problems] == [("config", "r"), ("config", "rank")]


@pytest.mark.parametrize("method", sorted(NEVER))
def test_methods_that_need_more_than_a_text_are_refused_with_a_remedy(method: str) -> None:
    found = refusal(AnyPEFT(method=method), NoQuantizer())
    assert found == (("method",), f"{method} can't be trained here: {NEVER[method]}")
    assert "; use " in NEVER[method]


def test_a_method_that_reads_weights_is_refused_on_packed_ones() -> None:
    what = "hira reads the base weights, and packed has packed them; use quantizer: nf4 or fp4 or int8 or none, or a method"
    found = refusal(AnyPEFT(method="hira"), Packed())
    assert found is not None
    assert found[0] == ("method",)
    assert found[1].startswith(what)
    assert refusal(AnyPEFT(method="hira"), NF4()) is None
    assert refusal(AnyPEFT(method="osf"), NoQuantizer()) is None
    assert why_not("ia3", "anything") == ""


def test_dora_on_int8_is_refused() -> None:
    found = refusal(AnyPEFT(method="lora", config={"use_dora": True}), Int8())
    assert found is not None
    assert found[0] == ("config", "use_dora")
    assert found[1].startswith("PEFT loses the scales of int8 layers")


@pytest.mark.parametrize("field", ["target_modules", "modules_to_save"])
def test_names_that_match_nothing_are_refused_before_any_weight_is_loaded(field: str, tiny_model: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        AnyPEFT(method="vera", config={field: ["q_prj"]}).check_model(build_skeleton(str(tiny_model)))
    (problem,) = caught.value.problems
    assert problem.where == ("config", field)
    assert problem.what.startswith("'q_prj' matches nothing; the model has act_fn, ")


def test_what_peft_refuses_while_injecting_names_the_adapter(tiny_model: Path) -> None:
    base = load_model(str(tiny_model), NoQuantizer())
    with pytest.raises(ModelError, match=r"^adapter 'peft' can't be added to this model: The set rank 32 results in"):
        AnyPEFT(method="shira").inject(base)
    with pytest.raises(ModelError, match=r"^adapter 'lora' can't be added to this model: "):
        LoRA(target_modules=["input_layernorm"]).inject(load_model(str(tiny_model), NoQuantizer()))


@pytest.mark.parametrize("adapter", [LoRA(r=4), AnyPEFT(method="ia3")])
def test_adding_saving_and_loading_an_adapter_warns_of_nothing(
    adapter: Any, tiny_model: Path, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    adapter.save(adapter.inject(load_model(str(tiny_model), NF4())), tmp_path / "adapter")
    adapter.load(load_model(str(tiny_model), NF4()), tmp_path / "adapter")
    assert [
        str(one.message) for one in recwarn if "peft" in str(one.message).lower() or "checkpointing" in str(one.message)
    ] == []


@pytest.mark.parametrize("method", ["ia3", "vera", "oft", "prompt_tuning"])
def test_a_run_trains_a_method_and_peft_itself_loads_it(method: str, tiny_model: Path, text_file: Path, tmp_path: Path) -> None:
    finished = finetune(
        str(tiny_model),
        quantizer=NF4(),
        adapter=adapter_of(method),
        dataset=TextFile(path=str(text_file)),
        output=tmp_path / "run",
        data={"sequence_length": 32, "packing": method != "prompt_tuning"},
        training={"max_steps": 2, "learning_rate": 1e-2, "logging_steps": 1},
    )
    trained = logits(finished.model)
    assert not torch.equal(trained, logits(load_model(str(tiny_model), NF4())))
    loaded = adapter_of(method).load(load_model(str(tiny_model), NF4()), finished.run.adapter)
    assert torch.equal(logits(loaded), trained)
    assert loaded.generate(input_ids=IDS[:, :6], max_new_tokens=3, do_sample=False).shape[1] in (3, 9)
    assert isinstance(PeftModel.from_pretrained(load_model(str(tiny_model), NF4()), str(finished.run.adapter)), PeftModel)


@pytest.mark.parametrize("adapter", [LoRA(r=4), AnyPEFT(method="ia3"), AnyPEFT(method="oft")], ids=["lora", "ia3", "oft"])
def test_the_merged_model_computes_what_the_adapted_one_does(adapter: Any, tiny_model: Path) -> None:
    adapted = inject_adapter(load_model(str(tiny_model), None).float(), adapter)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.01 * torch.randn_like(parameter))
    expected = logits(adapted)
    merged = adapter.merge(adapted)
    assert not isinstance(merged, PeftModel)
    torch.testing.assert_close(logits(merged), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("method", ["prompt_tuning", "lily", "adaption_prompt"])
def test_a_method_that_changes_no_weights_can_not_be_merged(method: str, tiny_model: Path) -> None:
    adapter = adapter_of(method)
    adapted = inject_adapter(load_model(str(tiny_model), None), adapter)
    assert not adapter.mergeable
    with pytest.raises(ModelError, match=f"^what is trained by the adapter 'peft' with {method} can't be merged"):
        adapter.merge(adapted)

"""`qlora verify`: five checks that pass on sound parts, each of which can fail, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

# the same on every machine, whatever its CPU multiplies best
IN_FLOAT32 = ("--set", "model.dtype=float32", "--set", "training.mixed_precision=none")
CHECKS = ["micro-batch split", "packing", "padding side", "kernels", "save and resume"]

FAULTS = """
    import qlora_core


    def body_of(model):
        from qlora_core.attention import base_of

        return base_of(model).get_decoder()


    class Scaled(qlora_core.Kernels):
        '''An MLP is a hundredth too large.'''

        name = "scaled"

        def apply(self, model):
            body_of(model).layers[1].mlp.register_forward_hook(lambda module, given, output: 1.01 * output)
            return model


    class Mixing(qlora_core.Kernels):
        '''The rows of a batch see each other.'''

        name = "mixing"

        def apply(self, model):
            def mix(module, given, output):
                return output - 0.05 * output.mean(dim=0, keepdim=True)

            body_of(model).layers[0].mlp.register_forward_hook(mix)
            return model


    class Leaky(qlora_core.Kernels):
        '''The samples of a packed row see each other, in rows longer than those that training tries a model with.'''

        name = "leaky"

        def apply(self, model):
            def forget(module, args, kwargs):
                if kwargs["input_ids"].shape[1] > 40:
                    return args, {**kwargs, "position_ids": None}

            body_of(model).register_forward_pre_hook(forget, with_kwargs=True)
            return model


    class Anchored(qlora_core.Kernels):
        '''Tokens know how far they are from the left edge of the batch.'''

        name = "anchored"

        def apply(self, model):
            def anchor(module, given, output):
                import torch

                return output + 1e-3 * torch.arange(output.shape[1])[None, :, None]

            body_of(model).embed_tokens.register_forward_hook(anchor)
            return model


    class Forgetful(qlora_core.Kernels):
        '''Something changes while training that no checkpoint holds.'''

        name = "forgetful"

        def apply(self, model):
            calls = []

            def drift(module, given, output):
                if module.training:
                    calls.append(1)
                    return output * (1 + 1e-3 * len(calls))

            body_of(model).layers[1].mlp.register_forward_hook(drift)
            return model


    class Lost(qlora_core.Kernels):
        '''No number comes out.'''

        name = "lost"

        def apply(self, model):
            body_of(model).layers[1].mlp.register_forward_hook(lambda module, given, output: output * float("nan"))
            return model


    @qlora_core.hookimpl
    def qlora_kernels():
        return [Scaled, Mixing, Leaky, Anchored, Forgetful, Lost]
"""


def report(result: Any, code: int = 0) -> dict[str, Any]:
    assert result.code == code, result.err
    answer: dict[str, Any] = json.loads(result.out)
    return answer


def test_sound_parts_pass_all_checks_and_nothing_is_written(
    qlora: Callable[..., Any], write_config: Callable[..., Path], snapshot: Callable[[Path], Any], here: Path
) -> None:
    config = write_config(adapter={"dropout": 0.1})
    before = snapshot(here)
    answer = report(qlora("verify", config, "--json", "--quiet", *IN_FLOAT32))
    assert snapshot(here) == before
    assert answer["passed"] is True
    assert answer["dtype"] == "float32"
    assert answer["lengths"] == [32, 24, 16, 8]
    assert [check["check"] for check in answer["checks"]] == CHECKS
    assert [check["result"] for check in answer["checks"]] == ["pass"] * 5
    *layouts, resumed = answer["checks"]
    for check in layouts:
        assert 0 <= check["loss"] <= 1e-5 <= check["loss_limit"]
        assert 0 <= check["gradients"] <= 1e-4 <= check["gradients_limit"] < 1e-3
    assert [resumed[key] for key in ("loss", "gradients", "loss_limit", "gradients_limit")] == [0, 0, 0, 0]
    notes = {check["check"]: check["note"] for check in answer["checks"]}
    assert notes["micro-batch split"] == "4 batches of 1 and 2 batches of 2 against one of 4"
    assert notes["packing"] == "4 samples in 2 rows against padded ones"
    assert notes["kernels"] == "fused against reference, packed as in training"
    assert notes["save and resume"] == "steps 3 to 4 after a checkpoint; metrics and 28 trained tensors are the same bits"


def test_sound_parts_pass_in_bfloat16(qlora: Callable[..., Any], write_config: Callable[..., Path]) -> None:
    answer = report(qlora("verify", write_config(), "--json", "--quiet", "--set", "training.mixed_precision=bf16"))
    assert (answer["passed"], answer["dtype"]) == (True, "bfloat16")
    assert [check["result"] for check in answer["checks"]] == ["pass"] * 5
    assert max(check["gradients"] for check in answer["checks"]) > 1e-4  # the limits are those of bfloat16


def test_the_table_has_a_line_per_check_and_quiet_leaves_only_it(
    qlora: Callable[..., Any], write_config: Callable[..., Path]
) -> None:
    config = write_config(training={"batch_size": 2, "gradient_accumulation": 8})
    result = qlora("verify", config, "--rows", 2, "--quiet", "--trace", "--set", "data.packing=false", *IN_FLOAT32)
    assert result.code == 0, result.err
    assert all(line.startswith("trace: ") for line in result.err.splitlines())
    assert "2 samples of 32, 16 tokens, in float32" in result.out
    lines = {name: next(line for line in result.out.splitlines() if name in line) for name in CHECKS}
    assert all("pass" in line for line in lines.values())
    assert "2 batches of 1 against one of 2" in lines["micro-batch split"]
    assert "2 samples in 1 row against" in lines["packing"]
    assert "25 % is padding" in lines["padding side"]
    assert "fused against reference, padded as in training" in lines["kernels"]
    assert "0, the same bits" in lines["save and resume"]


@pytest.mark.parametrize(
    ("name", "packing", "failing"),
    [
        ("scaled", True, {"kernels"}),
        ("mixing", False, {"micro-batch split", "packing", "padding side", "kernels"}),
        ("leaky", True, {"packing", "kernels"}),
        ("anchored", False, {"padding side", "kernels"}),
        ("forgetful", True, {"save and resume"}),
    ],
)
def test_each_check_can_fail(
    qlora: Callable[..., Any],
    write_config: Callable[..., Path],
    write_module: Callable[[str, str], str],
    name: str,
    packing: bool,
    failing: set[str],
) -> None:
    module = write_module("faults", FAULTS)
    config = write_config(kernels=name, data={"packing": packing})
    result = qlora("verify", config, "-p", module, "--json", "--quiet", *IN_FLOAT32)
    assert (result.code, result.err) == (1, "")
    answer = report(result, 1)
    assert answer["passed"] is False
    failed = [check for check in answer["checks"] if check["result"] == "FAIL"]
    assert {check["check"] for check in failed} == failing
    for check in failed:
        assert check["gradients"] > 10 * check["gradients_limit"]
        assert "lora_" in check["note"]


def test_what_is_no_number_fails_and_is_null_in_json(
    qlora: Callable[..., Any], write_config: Callable[..., Path], write_module: Callable[[str, str], str]
) -> None:
    config = write_config(kernels="lost", data={"packing": False})
    result = qlora("verify", config, "--plugin", write_module("faults", FAULTS), "--json")
    checks = {check["check"]: check for check in report(result, 1)["checks"]}
    for name in ("micro-batch split", "kernels"):
        assert checks[name]["result"] == "FAIL"
        assert checks[name]["loss"] is checks[name]["gradients"] is None
    assert (checks["save and resume"]["result"], checks["save and resume"]["note"]) == ("skipped", "the loss is nan")
    table = qlora("verify", config, "-p", "faults")
    assert table.code == 1
    assert "FAIL" in table.out
    assert "nan" in table.out
    assert "Traceback" not in table.err


@pytest.mark.parametrize("arguments", [("--set", "kernels=reference"), ("--disable-plugin", "fused")])
def test_a_run_without_kernels_has_none_to_compare(
    qlora: Callable[..., Any], tiny_model: Path, text_file: Path, arguments: tuple[str, ...]
) -> None:
    names = ("--model", tiny_model, "--data", text_file, "--set", "data.sequence_length=32")
    answer = report(qlora("verify", *names, *arguments, "--json"))
    assert [check["result"] for check in answer["checks"]] == ["pass", "pass", "pass", "skipped", "pass"]
    assert answer["checks"][3]["note"] == "the run has none but the reference"
    assert answer["checks"][3]["gradients"] is None


def test_a_model_that_takes_no_packs_is_not_packed(
    qlora: Callable[..., Any], write_config: Callable[..., Path], tiny_model: Path, here: Path
) -> None:
    import shutil

    import torch
    import transformers

    torch.manual_seed(0)
    sizes = {"vocab_size": 416, "hidden_size": 64, "n_layer": 2, "n_head": 4, "pad_token_id": 1}
    config = transformers.AutoConfig.for_model("bloom", **sizes)
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(here / "bloom")
    for path in tiny_model.glob("tokenizer*"):
        shutil.copy(path, here / "bloom")
    unpacked = write_config(model=str(here / "bloom"), data={"packing": False})
    answer = report(qlora("verify", unpacked, "--json"))
    checks = {check["check"]: check for check in answer["checks"]}
    assert checks["packing"]["result"] == "skipped"
    assert "BloomForCausalLM" in checks["packing"]["note"]
    assert {check["result"] for name, check in checks.items() if name != "packing"} <= {"pass", "skipped"}
    refused = qlora("verify", unpacked, "--set", "data.packing=true", "--verbose")
    assert (refused.code, refused.out) == (2, "")
    assert "set data.packing=false" in refused.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("missing.yaml",), "error: missing.yaml: "),
        ((), "error: name a configuration file, or both --model and --data"),
        (("run.yaml", "--set", "adapter.r=0"), "adapter.r: must be at least 1"),
        (("run.yaml", "--set", "kernels=fussed"), "unknown kernels 'fussed'; did you mean 'fused'?"),
        (("run.yaml", "--set", "training.extra={optim: sgd}"), "training.extra.optim: has its own place"),
        (("run.yaml", "--set", "training.optimizer=adamm"), "training.optimizer: unknown optimizer 'adamm'"),
        (("run.yaml", "--set", "data.streaming=true", "--set", "data.eval_fraction=0.1"), "data.eval_fraction"),
        (("run.yaml", "--rows", "1"), "--rows"),
        (("few.yaml",), "error: dataset: gives 1 sample to train on, and batches need two; name more data"),
    ],
)
def test_what_can_not_be_verified_is_refused_in_one_message(
    qlora: Callable[..., Any], write_config: Callable[..., Path], here: Path, arguments: tuple[str, ...], message: str
) -> None:
    (here / "few.txt").write_text("A few words.")
    write_config()
    write_config("few.yaml", dataset={"path": str(here / "few.txt")}, data={"eval_fraction": 0.0})
    result = qlora("verify", *arguments)
    assert (result.code, result.out) == (2, "")
    assert message in result.err
    assert "Traceback" not in result.err


def test_a_defect_keeps_its_traceback_in_a_temporary_file(
    qlora: Callable[..., Any], write_config: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    import qlora_core.pipeline

    def fail(*arguments: Any, **options: Any) -> None:
        raise ZeroDivisionError("no luck")

    monkeypatch.setattr(qlora_core.pipeline, "load_tokenizer", fail)
    result = qlora("verify", write_config(), "-q")
    assert (result.code, result.out) == (1, "")
    assert result.err.startswith("error: ZeroDivisionError: no luck\nThis is a defect of qlora-core or of a plugin; ")
    crash = Path(result.err.strip().rpartition(" ")[2])
    assert crash.read_text().startswith("qlora verify ")
    crash.unlink()


def test_the_help_says_what_it_does(qlora: Callable[..., Any]) -> None:
    result = qlora("verify", "--help")
    assert result.code == 0
    assert "qlora verify qlora.yaml" in result.out
    assert "micro-batch" in result.out

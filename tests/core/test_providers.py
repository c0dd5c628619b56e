"""What all providers have in common: a name, options that are checked, and defaults that do nothing."""

from __future__ import annotations

import json
from typing import Any

import pytest
from pydantic import Field, ValidationError

from qlora_bitsandbytes import NF4
from qlora_console import EarlyStopping
from qlora_core.errors import ConfigError
from qlora_core.providers import CallbackFactory, Kernels, Provider, ProviderOptions, Quantizer
from qlora_core.registry import KINDS, Provided, Registry
from qlora_peft import LoRA

ALL = [found for kind in KINDS for found in Registry().provided(kind) if found.plugin.distribution == "qlora-core"]
every_provider = pytest.mark.parametrize("found", ALL, ids=lambda found: f"{found.kind}-{found.provider.name}")


def test_a_provider_made_in_python_has_its_options_with_defaults() -> None:
    assert NF4(double_quant=False).options.model_dump() == {
        "double_quant": False,
        "compute_dtype": "auto",
        "storage_dtype": "uint8",
        "skip_modules": (),
    }


def test_a_provider_made_with_wrong_options_lists_every_problem() -> None:
    with pytest.raises(ConfigError) as caught:
        LoRA(r=0, rank=3, alpha="x")
    lines = {line.partition(":")[0]: line for line in str(caught.value).splitlines()}
    assert set(lines) == {"r", "rank", "alpha"}
    assert lines["r"].startswith("r: must be at least 1 (got 0); rank, typically 8 to 64")
    assert lines["rank"].startswith("rank: unknown option; lora accepts r, alpha, ")
    assert lines["rank"].endswith("; did you mean 'r'?")


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_an_option_that_is_no_finite_number_is_refused(value: float) -> None:
    with pytest.raises(ConfigError) as caught:
        LoRA(alpha=value)
    assert str(caught.value).startswith("alpha: ")


def test_options_can_not_be_changed() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        NF4().options.double_quant = False  # type: ignore[misc]


def test_a_provider_shows_its_options() -> None:
    assert repr(EarlyStopping(patience=2)) == "EarlyStopping(EarlyStoppingOptions(patience=2, min_delta=0.0))"


def test_attribute_docstrings_describe_options_too() -> None:
    class Options(ProviderOptions):
        width: int = 3
        """how wide"""

    assert Options.model_fields["width"].description == "how wide"


@pytest.mark.parametrize("kind", KINDS.values(), ids=list(KINDS))
def test_a_kind_itself_can_not_be_made(kind: type[Provider]) -> None:
    with pytest.raises(TypeError, match="abstract"):
        kind()


def test_a_provider_without_overrides_refuses_nothing_and_asks_for_nothing() -> None:
    class Quiet(CallbackFactory):
        name = "quiet"

        def build(self, run: Any) -> Any:
            return run

    class Idle(Kernels):
        name = "idle"

        def apply(self, model: Any) -> Any:
            return model

    quiet = Quiet()
    assert quiet.training_arguments() == {}
    assert quiet.needs_evaluation is False
    assert Idle().suits("cuda") == 0
    with pytest.raises(ConfigError) as caught:
        Quiet(loud=True)
    assert str(caught.value) == "loud: unknown option; quiet accepts no options"


def test_a_quantizer_without_overrides_leaves_the_model_alone_and_has_no_constants() -> None:
    class Same(Quantizer):
        name = "same"

        class Options(ProviderOptions):
            level: int = Field(1, description="how much")

        def load_kwargs(self, skeleton: Any) -> dict[str, Any]:
            return {}

        def is_quantized(self, module: Any) -> bool:
            return False

        def dequantize(self, module: Any) -> Any:
            return module.weight

        def stored_bytes(self, shape: tuple[int, int]) -> int:
            return 0

    same, model = Same(level=2), object()
    assert same.prepare(model) is model  # type: ignore[arg-type, comparison-overlap]
    assert same.constants(model) == []  # type: ignore[arg-type]
    assert same.options.level == 2  # type: ignore[attr-defined]
    assert same.quantizes is True


@every_provider
def test_each_of_our_options_says_what_it_is_and_takes_the_key_name_from_nobody(found: Provided) -> None:
    fields = found.provider.Options.model_fields
    assert all(field.description for field in fields.values())
    assert "name" not in fields


@every_provider
def test_each_of_our_options_is_frozen_and_forbids_unknown_ones(found: Provided) -> None:
    assert issubclass(found.provider.Options, ProviderOptions)
    assert found.provider.Options.model_config["frozen"] is True
    assert found.provider.Options.model_config["extra"] == "forbid"


@every_provider
def test_each_of_our_providers_says_what_it_is(found: Provided) -> None:
    assert (found.provider.__doc__ or "").strip()


@every_provider
def test_each_of_our_providers_has_defaults_that_are_plain_json(found: Provided) -> None:
    options = found.provider.Options.model_construct().model_dump(mode="json")
    assert json.loads(json.dumps(options)) == options

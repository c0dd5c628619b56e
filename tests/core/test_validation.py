"""What a user reads when an option does not validate."""

from __future__ import annotations

from typing import Any, Literal

import pytest
from pydantic import BaseModel, ConfigDict, Field, field_validator

from qlora_core.errors import ConfigError
from qlora_core.validation import did_you_mean, validate


class Inner(BaseModel):
    model_config = ConfigDict(extra="forbid")
    depth: int = Field(1, ge=1, le=9, description="how deep")


class Options(BaseModel):
    model_config = ConfigDict(extra="forbid")
    rank: int = Field(description="rank (r), typically 8 to 64")
    rate: float = Field(0.5, gt=0, lt=1, description="share (dropout)")
    mode: Literal["fast", "exact"] = Field("fast", description="how")
    on: bool = True
    title: str = "x"
    names: tuple[str, ...] = ()
    table: dict[str, int] = Field(default_factory=dict)
    inner: Inner = Field(default_factory=Inner)
    many: list[Inner] = Field(default_factory=list)
    even: int = 0

    @field_validator("even")
    @classmethod
    def _even(cls, value: int) -> int:
        if value % 2:
            raise ValueError(f"{value} is odd; write an even number")
        return value


def refusal(data: Any, owner: str = "") -> list[str]:
    with pytest.raises(ConfigError) as caught:
        validate(Options, data, owner=owner)
    return str(caught.value).splitlines()


def test_valid_data_becomes_the_model() -> None:
    options = validate(Options, {"rank": 4, "inner": {"depth": 2}, "names": ["a"]})
    assert (options.rank, options.inner.depth, options.names) == (4, 2, ("a",))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({}, "rank: required; rank (r), typically 8 to 64"),
        ({"rank": "two"}, "rank: must be a whole number (got 'two'); rank (r), typically 8 to 64"),
        ({"rank": 1.5}, "rank: must be a whole number (got 1.5); rank (r), typically 8 to 64"),
        ({"rank": None}, "rank: must be a whole number (got None); rank (r), typically 8 to 64"),
        ({"rank": 1, "rate": "x"}, "rate: must be a number (got 'x'); share (dropout)"),
        ({"rank": 1, "rate": 0}, "rate: must be more than 0.0 (got 0); share (dropout)"),
        ({"rank": 1, "rate": 1}, "rate: must be less than 1.0 (got 1); share (dropout)"),
        ({"rank": 1, "on": "perhaps"}, "on: must be true or false (got 'perhaps')"),
        ({"rank": 1, "title": 3}, "title: must be text (got 3)"),
        ({"rank": 1, "names": "a"}, "names: must be a list (got 'a')"),
        ({"rank": 1, "names": ["a", 2]}, "names[1]: must be text (got 2)"),
        ({"rank": 1, "many": 3}, "many: must be a list (got 3)"),
        ({"rank": 1, "table": []}, "table: must be a mapping of options (got [])"),
        ({"rank": 1, "inner": 3}, "inner: must be a mapping of options (got 3)"),
        ({"rank": 1, "inner": {"depth": 0}}, "inner.depth: must be at least 1 (got 0); how deep"),
        ({"rank": 1, "inner": {"depth": 10}}, "inner.depth: must be at most 9 (got 10); how deep"),
        ({"rank": 1, "many": [{}, {"depth": 0}]}, "many[1].depth: must be at least 1 (got 0); how deep"),
        ({"rank": 1, "mode": "exakt"}, "mode: must be 'fast' or 'exact' (got 'exakt'); did you mean 'exact'?"),
        ({"rank": 1, "mode": 7}, "mode: must be 'fast' or 'exact' (got 7)"),
        ({"rank": 1, "even": 3}, "even: 3 is odd; write an even number"),
    ],
)
def test_each_kind_of_fault_says_key_what_is_wanted_and_what_was_given(data: dict[str, Any], message: str) -> None:
    assert refusal(data) == [message]


def test_an_unknown_option_lists_what_is_accepted_and_the_likeliest() -> None:
    accepted = "rank, rate, mode, on, title, names, table, inner, many, even"
    assert refusal({"rank": 1, "rnak": 2}) == [
        f"rnak: unknown option; the configuration accepts {accepted}; did you mean 'rank'?"
    ]
    assert refusal({"rank": 1, "rnak": 2}, owner="lora") == [
        f"rnak: unknown option; lora accepts {accepted}; did you mean 'rank'?"
    ]


def test_an_unknown_option_of_a_section_lists_what_that_section_accepts() -> None:
    assert refusal({"rank": 1, "inner": {"dept": 1}}, owner="lora") == [
        "inner.dept: unknown option; inner accepts depth; did you mean 'depth'?"
    ]
    assert refusal({"rank": 1, "many": [{"dept": 1}]}) == [
        "many[0].dept: unknown option; many accepts depth; did you mean 'depth'?"
    ]


def test_an_option_known_by_another_librarys_name_is_found_through_its_description() -> None:
    assert refusal({"rank": 1, "dropout": 0.1})[0].endswith("; did you mean 'rate'?")


def test_options_of_a_provider_without_any_say_so() -> None:
    class Nothing(BaseModel):
        model_config = ConfigDict(extra="forbid")

    with pytest.raises(ConfigError) as caught:
        validate(Nothing, {"color": 1}, owner="progress")
    assert str(caught.value) == "color: unknown option; progress accepts no options"


def test_all_problems_are_reported_together() -> None:
    lines = refusal({"rate": 2, "mode": "slow", "color": 1})
    assert [line.partition(":")[0] for line in lines] == ["rank", "rate", "mode", "color"]


def test_a_key_that_is_no_text_is_an_unknown_option_not_a_crash() -> None:
    assert refusal({"rank": 1, 7: 2})[0].startswith("7: unknown option; ")


@pytest.mark.parametrize(
    ("word", "guess"),
    [("learning_rte", "; did you mean 'learning_rate'?"), ("LEARNING_RATE", "; did you mean 'learning_rate'?"), ("zzz", "")],
)
def test_did_you_mean_offers_only_what_is_close_whatever_the_case(word: str, guess: str) -> None:
    assert did_you_mean(word, ["learning_rate", "warmup"]) == guess


def test_a_list_with_a_wrong_item_is_not_called_too_short_as_well() -> None:
    class Lists(BaseModel):
        many: tuple[Inner, ...] = Field(min_length=1)

    with pytest.raises(ConfigError) as caught:
        validate(Lists, {"many": [{"depth": 0}]})
    assert str(caught.value) == "many[0].depth: must be at least 1 (got 0); how deep"
    with pytest.raises(ConfigError) as caught:
        validate(Lists, {"many": []})
    assert str(caught.value).startswith("many: must have at least 1 item (got [])")

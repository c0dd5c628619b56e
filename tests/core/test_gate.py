"""What the gate finds in the data, what it stops, and what `data.on_problem` makes of it."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import datasets
import pytest
import transformers

from qlora_core.config import DataConfig
from qlora_core.data.encode import encode
from qlora_core.data.mask import IGNORED
from qlora_core.errors import ConfigError, DataError
from qlora_core.providers import DatasetSource

GOOD = [{"role": "user", "content": "Say something."}, {"role": "assistant", "content": "Something."}]


class Rows(DatasetSource):
    """Rows made by hand."""

    name = "rows"
    splits: dict[str, datasets.Dataset | None]

    @classmethod
    def of(cls, train: list[dict[str, Any]], evaluation: list[dict[str, Any]] | None = None) -> Rows:
        source = cls()
        made = [datasets.Dataset.from_list(rows) if rows is not None else None for rows in (train, evaluation)]
        source.splits = dict(zip(("train", "eval"), made, strict=True))
        return source

    def examples(self, split: str) -> datasets.Dataset | None:
        return self.splits[split]


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> transformers.PreTrainedTokenizerBase:
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    return tokenizer


def data(**changes: Any) -> DataConfig:
    return DataConfig(**{"sequence_length": 128, "eval_fraction": 0.0, "template": "chatml", **changes})


def chats(*turns: list[dict[str, Any]]) -> Rows:
    return Rows.of([{"messages": messages, "origin": f"chats.jsonl:{line}"} for line, messages in enumerate(turns, 1)])


def answer(content: str) -> list[dict[str, Any]]:
    return [GOOD[0], {"role": "assistant", "content": content}]


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([{"role": "bot", "content": "x"}], "1 row with a role that is not known: chats.jsonl:2: turn 1: role 'bot'"),
        ([*GOOD, *GOOD[1:]], "1 row with turns in an order that no chat has: chats.jsonl:2: turn 3 (assistant)"),
        (answer("  "), "1 row with an empty turn: chats.jsonl:2: turn 2 (assistant)"),
        (answer("a <|im_end|> b"), "1 row with a special token typed in the text: chats.jsonl:2: '<|im_end|>'"),
        (answer("word " * 200), "1 row with more tokens than data.sequence_length: chats.jsonl:2: "),
        ([GOOD[0]], "1 row with no supervised token: chats.jsonl:2: "),
    ],
)
def test_a_bad_row_stops_a_run_and_is_named_with_its_remedy(tokenizer: Any, messages: Any, message: str) -> None:
    with pytest.raises(DataError) as caught:
        encode(chats(GOOD, messages), tokenizer, data())
    assert message in str(caught.value)
    assert "Remedy: " in str(caught.value)
    assert str(caught.value).endswith(
        "data.on_problem=skip leaves such rows out, data.on_problem=warn keeps those that can be kept"
    )


def test_skip_leaves_bad_rows_out_and_counts_them(tokenizer: Any, caplog: pytest.LogCaptureFixture) -> None:
    source = chats(GOOD, answer("word " * 200), answer("a <|im_end|> b"), answer("Other."))
    with caplog.at_level(logging.WARNING, "qlora_core"):
        encoded = encode(source, tokenizer, data(on_problem="skip"))
    assert encoded.train.samples == 2
    assert encoded.rows == {"train": 4}
    assert {code: finding.count for code, finding in encoded.findings["train"].items()} == {"long": 1, "special": 1}
    assert [record.message.endswith("These are left out.") for record in caplog.records] == [True, True]


def test_warn_keeps_what_can_be_kept(tokenizer: Any) -> None:
    source = chats(GOOD, answer("word " * 200), answer("a <|im_end|> b"), answer("Other."))
    assert encode(source, tokenizer, data(on_problem="warn")).train.samples == 3  # the long one can't be


def test_what_is_cut_is_counted_with_the_tokens_that_are_lost(tokenizer: Any) -> None:
    whole = encode(chats(answer("word " * 100)), tokenizer, data(sequence_length=1024)).train[0]
    encoded = encode(chats(GOOD, answer("word " * 100)), tokenizer, data(truncate=True, packing=False))
    found = encoded.findings["train"]["cut"]
    lost = len(whole["input_ids"]) - 128
    supervised = int((whole["labels"][128:] != IGNORED).sum())
    assert (found.count, found.error) == (1, False)
    assert found.examples == [f"chats.jsonl:2: {lost + 128} tokens, of which {lost} ({supervised} supervised) are lost"]
    assert encoded.train[1]["input_ids"].tolist() == whole["input_ids"][:128].tolist()


def test_an_answer_that_is_cut_off_whole_leaves_no_supervised_token(tokenizer: Any) -> None:
    long_question = [{"role": "user", "content": "word " * 200}, GOOD[1]]
    with pytest.raises(DataError) as caught:
        encode(chats(GOOD, long_question), tokenizer, data(truncate=True))
    assert "1 row with no supervised token: chats.jsonl:2: 128 tokens, all of them masked" in str(caught.value)


def test_rows_that_repeat_are_counted_and_left_out_only_on_demand(tokenizer: Any) -> None:
    source = chats(GOOD, answer("Other."), GOOD, GOOD)
    encoded = encode(source, tokenizer, data())
    assert encoded.findings["train"]["duplicate"].count == 2
    assert encoded.findings["train"]["duplicate"].examples == ["chats.jsonl:3", "chats.jsonl:4"]
    assert encoded.train.samples == 4
    assert encode(source, tokenizer, data(deduplicate=True)).train.samples == 2


def test_training_rows_that_are_held_out_too_are_counted_and_left_out_only_on_demand(tokenizer: Any) -> None:
    rows = [{"messages": messages} for messages in (GOOD, answer("Other."), answer("Third."))]
    source = Rows.of(rows, [rows[1]])
    encoded = encode(source, tokenizer, data())
    assert encoded.findings["train"]["overlap"].examples == ["row 2"]
    assert (encoded.train.samples, encode(source, tokenizer, data(deduplicate=True)).train.samples) == (3, 2)


def test_rows_that_repeat_or_are_held_out_are_found_over_all_sources_of_a_mix(tokenizer: Any) -> None:
    first = Rows.of([{"messages": messages} for messages in (GOOD, answer("Other."), answer("Third."))])
    second = Rows.of([{"messages": messages} for messages in (answer("Fourth."), GOOD)], [{"messages": answer("Other.")}])
    mix = [(first, 1.0), (second, 1.0)]
    encoded = encode(mix, tokenizer, data())
    assert encoded.findings["train"]["duplicate"].count == 1
    assert encoded.findings["train"]["overlap"].count == 1
    assert (encoded.train.samples, encode(mix, tokenizer, data(deduplicate=True)).train.samples) == (5, 3)


def test_too_long_rows_name_the_length_that_would_keep_all_of_every_source(tokenizer: Any, caplog: Any) -> None:
    mix = [(chats(GOOD, answer("word " * number)), 1.0) for number in (400, 200)]
    with caplog.at_level(logging.WARNING, "qlora_core"):
        encoded = encode(mix, tokenizer, data(on_problem="skip"))
    needs = encoded.findings["train"]["long"].needs
    assert f"set data.sequence_length to {needs} to keep all" in caplog.text
    assert encode(mix, tokenizer, data(sequence_length=needs)).train.samples == 4


def test_a_template_that_never_ends_a_turn_is_refused(tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "endless.jinja"
    turns = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    path.write_text(turns + "{% if add_generation_prompt %}assistant: {% endif %}")
    with pytest.raises(DataError) as caught:
        encode(chats(GOOD, answer("Other.")), tokenizer, data(template=str(path)))
    assert "2 supervised turns and the end of none is supervised: the template puts no special token" in str(caught.value)
    with pytest.raises(DataError):
        encode(chats(GOOD, answer("Other.")), tokenizer, data(template=str(path), on_problem="skip"))
    assert encode(chats(GOOD, answer("Other.")), tokenizer, data(template=str(path), on_problem="warn")).train.samples == 2


def test_special_tokens_in_raw_text_are_a_warning(tokenizer: Any) -> None:
    encoded = encode(Rows.of([{"text": "one <|im_end|> two"}, {"text": "three"}]), tokenizer, data())
    assert encoded.findings["train"]["typed"].examples == ["row 1: '<|im_end|>'"]


def test_a_last_turn_that_nobody_answers_is_a_warning(tokenizer: Any) -> None:
    encoded = encode(chats(GOOD, [*GOOD, GOOD[0]]), tokenizer, data())
    assert encoded.findings["train"]["unanswered"].examples == ["chats.jsonl:2: turn 3 (user)"]


@pytest.mark.parametrize(
    ("rows", "train_on", "message"),
    [
        ([{"text": "x"}], "assistant", "data.train_on: assistant: 'rows' gives raw text, where every token is supervised"),
        ([{"messages": GOOD}], "completion", "data.train_on: completion: 'rows' gives chats, not prompts with a completion"),
        ([{"input_ids": [1, 2], "labels": [1, 2]}], "all", "data.train_on: all: 'rows' gives token ids, whose labels say"),
    ],
)
def test_a_mask_that_does_not_suit_the_rows_is_refused(tokenizer: Any, rows: Any, train_on: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        encode(Rows.of(rows), tokenizer, data(train_on=train_on))
    assert str(caught.value).startswith(message)


def test_chats_without_a_template_are_refused(tokenizer: Any) -> None:
    with pytest.raises(ConfigError, match=r"data\.template: none: 'rows' gives chats, which need a template"):
        encode(chats(GOOD), tokenizer, data(template="none"))


def test_a_prompt_and_its_completion_are_a_chat_or_joined_as_they_are(tokenizer: Any) -> None:
    rows = [{"prompt": "Say something.", "completion": "Something."}]
    as_chat = encode(Rows.of(rows), tokenizer, data()).train[0]
    assert as_chat["input_ids"].tolist() == encode(chats(GOOD), tokenizer, data()).train[0]["input_ids"].tolist()
    joined = encode(Rows.of(rows), tokenizer, data(template="none")).train[0]
    assert tokenizer.decode(joined["input_ids"]) == "Say something.Something." + tokenizer.eos_token
    supervised = [token for token in joined["labels"].tolist() if token != IGNORED]
    assert tokenizer.decode(supervised) == "Something." + tokenizer.eos_token


def test_the_second_time_the_samples_come_from_the_cache(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from qlora_core.data.encoders import ChatEncoder

    source = chats(GOOD, answer("never seen before in any cache"))
    first = encode(source, tokenizer, data())
    calls: list[int] = []
    monkeypatch.setattr(ChatEncoder, "encode", lambda *_: calls.append(1))
    again = encode(source, tokenizer, data())
    assert calls == []
    assert again.fingerprint == first.fingerprint
    for change in ({"template": "plain"}, {"train_on": "all"}, {"sequence_length": 64}):
        with pytest.raises(TypeError):  # the encoder is called again, and gives nothing
            encode(source, tokenizer, data(**change))


def test_what_a_template_lacks_in_the_tokenizer_is_told_with_a_remedy_that_helps(
    tiny_model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bare = transformers.AutoTokenizer.from_pretrained(tiny_model)
    bare.eos_token = None
    for template, told in (
        ("plain", "data.template: plain ends answers with EOS, and the tokenizer has none; use chatml"),
        ("chatml", "writes <|im_start|>, <|im_end|>, no special tokens of the model's; add them with tokens.add, or use plain"),
    ):
        with caplog.at_level(logging.WARNING, "qlora_core"), pytest.raises(DataError, match="the end of none is supervised"):
            encode(chats(GOOD), bare, data(template=template))
        assert told in caplog.text

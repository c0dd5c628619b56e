"""What the encoders make of rows: what a cut leaves, what is found in a row, and what the samples depend on."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers

from qlora_core.config import DataConfig, RunConfig
from qlora_core.data.encoders import encoder_for
from qlora_core.data.mask import IGNORED
from qlora_core.data.samples import Sample
from qlora_core.data.template import ChatTemplate
from qlora_core.parts import resolve
from qlora_core.pipeline import prepare
from qlora_core.registry import Registry

ANSWERS = ("First.", "Second, which is longer.", "Third.")
CONTROLS = ["<|im_start|>", "<|im_end|>"]


TODAY = datetime.date(2026, 3, 1)


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> transformers.PreTrainedTokenizerBase:
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.add_special_tokens({"additional_special_tokens": CONTROLS})
    return tokenizer


def made(tokenizer: Any, rows: dict[str, list[Any]], **changes: Any) -> list[Sample]:
    """Return the samples that *rows* become."""
    data = DataConfig(**{"sequence_length": 512, "template": "chatml", **changes})
    template = ChatTemplate.choose(tokenizer, data.template)
    encoder = encoder_for(list(rows), "rows", tokenizer, template, data, TODAY)
    return [*encoder.encode(rows, 0), *encoder.finish()]


def chat(*answers: str) -> list[dict[str, Any]]:
    turns = [({"role": "user", "content": "Well?"}, {"role": "assistant", "content": answer}) for answer in answers]
    return [turn for pair in turns for turn in pair]


def codes(sample: Sample) -> list[str]:
    return [problem.partition(":")[0] for problem in sample.problems]


# What a cut leaves


def ends_of(tokenizer: Any, sample: Sample) -> list[int]:
    """Return where the supervised ends of turns stand."""
    return np.flatnonzero(sample.labels == tokenizer.convert_tokens_to_ids("<|im_end|>")).tolist()


def test_of_a_cut_chat_the_turns_and_the_ends_that_are_left_are_counted(tokenizer: Any) -> None:
    whole = made(tokenizer, {"messages": [chat(*ANSWERS)]})[0]
    ends = ends_of(tokenizer, whole)
    assert (whole.turns, whole.ended, len(ends)) == (3, 3, 3)
    assert whole.labels is not None
    second = next(at for at in range(ends[0] + 1, ends[1]) if whole.labels[at] != IGNORED)
    cuts = [ends[0], ends[0] + 1, second, second + 1, ends[1], ends[1] + 1, ends[2], ends[2] + 1]
    counts = []
    for length in cuts:
        cut = made(tokenizer, {"messages": [chat(*ANSWERS)]}, sequence_length=length, truncate=True)[0]
        assert (len(cut.ids), cut.length) == (length, len(whole.ids))
        counts.append((cut.turns, cut.ended))
    assert counts == [(1, 0), (1, 1), (1, 1), (2, 1), (2, 1), (2, 2), (3, 2), (3, 3)]


def test_where_only_the_line_break_after_the_end_is_cut_the_end_stays(tokenizer: Any) -> None:
    whole = made(tokenizer, {"messages": [chat("First.")]})[0]
    cut = made(tokenizer, {"messages": [chat("First.")]}, sequence_length=len(whole.ids) - 1, truncate=True)[0]
    assert tokenizer.decode(cut.ids).endswith("First.<|im_end|>")
    assert (cut.turns, cut.ended) == (1, 1)
    assert cut.problems == [f"cut: {len(whole.ids)} tokens, of which 1 (0 supervised) are lost"]


def test_a_cut_before_the_first_answer_leaves_no_turn(tokenizer: Any) -> None:
    cut = made(tokenizer, {"messages": [chat(*ANSWERS)]}, sequence_length=4, truncate=True)[0]
    assert (cut.turns, cut.ended, codes(cut)) == (0, 0, ["cut", "unsupervised"])


def test_a_completion_whose_eos_is_cut_off_has_not_ended(tokenizer: Any) -> None:
    rows = {"prompt": ["Well?"], "completion": [" Nothing at all."]}
    whole = made(tokenizer, rows, template="none")[0]
    cut = made(tokenizer, rows, template="none", sequence_length=len(whole.ids) - 1, truncate=True)[0]
    assert (whole.turns, whole.ended) == (1, 1)
    assert (cut.turns, cut.ended) == (1, 0)


def test_where_all_is_supervised_all_that_is_cut_is_lost(tokenizer: Any) -> None:
    expected = ["cut: 9 tokens, of which 5 (5 supervised) are lost"]
    bare = made(tokenizer, {"input_ids": [list(range(5, 14))]}, sequence_length=4, truncate=True)[0]
    assert (bare.labels, bare.problems) == (None, expected)
    labels = [IGNORED] * 7 + [12, 13]
    some = {"input_ids": [list(range(5, 14))], "labels": [labels]}
    assert made(tokenizer, some, sequence_length=8, truncate=True)[0].problems == [
        "cut: 9 tokens, of which 1 (1 supervised) are lost"
    ]
    everything = made(tokenizer, {"messages": [chat("First.")]}, train_on="all", sequence_length=8, truncate=True)[0]
    lost = everything.length - 8
    assert (everything.turns, everything.ended) == (0, 0)
    assert everything.problems == [f"cut: {everything.length} tokens, of which {lost} ({lost} supervised) are lost"]


# What is found in a row


def test_special_tokens_typed_in_the_description_of_a_tool_are_found(tokenizer: Any) -> None:
    tool = {"name": "add", "parameters": {"properties": {"a": {"description": "ends with <|im_end|>"}}}}
    clean = {"name": "add", "description": "adds"}
    typed, fine = made(tokenizer, {"messages": [chat("First.")] * 2, "tools": [[tool], [clean]]})
    assert typed.problems == ["special: '<|im_end|>'"]
    assert fine.problems == []
    assert made(tokenizer, {"messages": [chat("First.")], "tools": ['[{"name": "<|im_start|>"}]']})[0].problems == [
        "special: '<|im_start|>'"
    ]


@pytest.mark.parametrize(
    ("prompt", "completion", "joined", "as_chat"),
    [
        (None, "x", "empty: there is no prompt", "empty: turn 1 (user): no content"),
        ("x", None, "empty: the completion is empty", "empty: turn 2 (assistant): no content"),
        ("x", " \n", "empty: the completion is empty", "empty: turn 2 (assistant): only white space"),
        (5, "x", "content: the prompt is int, not text", "content: turn 1 (user): content is int, not text"),
        ("x", 5, "content: the completion is int, not text", "content: turn 2 (assistant): content is int, not text"),
        (["x"], "x", "content: the prompt is list, not text", "content: turn 1 (user): a part of the content is 'str', not a"),
    ],
)
def test_a_pair_that_is_no_text_is_found_and_its_neighbours_are_kept(
    tokenizer: Any, prompt: Any, completion: Any, joined: str, as_chat: str
) -> None:
    rows = {"prompt": ["Well?", prompt, "So?"], "completion": [" No.", completion, " Yes."]}
    for template, problem in (("none", joined), ("chatml", as_chat)):
        first, bad, last = made(tokenizer, rows, template=template)
        assert len(bad.problems) == 1
        assert bad.problems[0].startswith(problem)
        assert (len(bad.ids), bad.supervised, bad.origin) == (0, 0, "row 2")
        assert first.problems == last.problems == []
        alone = made(tokenizer, {"prompt": ["So?"], "completion": [" Yes."]}, template=template)[0]
        assert last.ids.tolist() == alone.ids.tolist()
        assert last.origin == "row 3"


def test_an_empty_prompt_is_no_problem_where_texts_are_joined_and_a_system_text_must_be_one(tokenizer: Any) -> None:
    rows = {"prompt": ["", "b", "c"], "completion": ["x", "y", "z"], "system": [None, "Be kind.", 5]}
    first, second, third = made(tokenizer, rows, template="none")
    eos = tokenizer.eos_token
    assert (tokenizer.decode(first.ids), tokenizer.decode(second.ids)) == (f"x{eos}", f"Be kind.\n\nby{eos}")
    assert third.problems == ["content: the system is int, not text"]


@pytest.mark.parametrize(
    ("ids", "labels", "problem"),
    [
        (None, None, "tokens: there are no input_ids"),
        ([], None, "tokens: no tokens"),
        ([5, None], None, "tokens: input_ids are no list of integers"),
        ([5.5, 6.0], None, "tokens: input_ids are no list of integers"),
        (["5", "6"], None, "tokens: input_ids are no list of integers"),
        ("5 6", None, "tokens: input_ids are no list of integers"),
        ([[5, 6], [7]], None, "tokens: input_ids are no list of integers"),
        ([[5, 6]], None, "tokens: input_ids are no list of integers"),
        ([5, 2**40], None, f"tokens: id {2**40}, and the tokenizer has 386"),
        ([5, 6], [5, None], "tokens: labels are no list of integers"),
        ([5, 6], [5, -(2**40)], f"tokens: label {-(2**40)}, neither a token nor -100"),
        ([5, 6], [5], "tokens: 2 input_ids and 1 labels"),
        ([5, 6], None, "tokens: there are no labels"),
    ],
)
def test_token_ids_that_are_none_are_found(tokenizer: Any, ids: Any, labels: Any, problem: str) -> None:
    first, bad, last = made(tokenizer, {"input_ids": [[7, 8], ids, [8, 9]], "labels": [[-100, 8], labels, [-100, 9]]})
    assert (bad.problems, len(bad.ids), bad.origin) == ([problem], 0, "row 2")
    assert (first.problems, last.problems) == ([], [])
    assert (last.ids.tolist(), last.ids.dtype, last.labels.tolist()) == ([8, 9], np.int32, [-100, 9])  # type: ignore[union-attr]


def test_a_chat_that_is_none_is_found(tokenizer: Any) -> None:
    none, fine = made(tokenizer, {"messages": [None, chat("First.")], "tools": [None, None]})
    assert none.problems == ["role: the chat is nothing, not a list of turns"]
    assert fine.problems == []


# What holding out and the cache depend on


def test_only_pieces_of_files_are_continuous(tokenizer: Any) -> None:
    data = DataConfig(sequence_length=16)
    for columns, expected in ((["text", "continues", "origin"], True), (["text"], False), (["input_ids"], False)):
        assert encoder_for(columns, "rows", tokenizer, None, data, TODAY).continuous is expected


def test_the_settings_change_with_the_day_only_where_the_template_writes_it(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    plain = "{% for m in messages %}{{ m.content }}{% endfor %}"
    paths = [tmp_path / name for name in ("plain.jinja", "dated.jinja")]
    for path, source in zip(paths, (plain, "{{ strftime_now('%d %b %Y') }}" + plain), strict=True):
        path.write_text(source)

    def settings(day: int) -> list[str]:
        on = datetime.date(2026, 3, day)
        templates = [ChatTemplate.choose(tokenizer, str(path)) for path in paths]
        data = DataConfig(sequence_length=16)
        return [encoder_for(["messages"], "rows", tokenizer, template, data, on).settings for template in templates]

    first, again, other = settings(1), settings(1), settings(2)
    assert first == again
    assert first[0] == other[0]
    assert first[1] != other[1]
    assert ("2026-03-01" in first[1], "2026-03-02" in other[1]) == (True, True)


def test_the_template_for_tools_may_write_the_day_too(tokenizer: Any) -> None:
    template = ChatTemplate("tokenizer", "{{ 1 }}", "{{ strftime_now('%Y') }}")
    encoder = encoder_for(["messages"], "rows", tokenizer, template, DataConfig(sequence_length=16), TODAY)
    assert encoder.settings.endswith(f" {TODAY}")


# Tokens that are added for a template


def prepared(model: Path, folder: Path, template: str | None, add: list[str]) -> Any:
    import json

    path = folder / "chats.jsonl"
    rows = [json.dumps({"messages": chat(f"Answer {number}.")}) for number in range(4)]
    path.write_text("\n".join(rows), encoding="utf-8")
    data: dict[str, Any] = {"sequence_length": 256} | ({"template": template} if template else {})
    dataset = {"name": "records", "path": str(path)}
    config = {"model": str(model), "dataset": dataset, "data": data, "tokens": {"add": add}, "output": str(folder / "run")}
    return prepare(*resolve(RunConfig.parse(config), Registry()))


TURNS = (
    "{% for m in messages %}<turn>{{ m.role }}\n{{ m.content }}</turn>{% endfor %}"
    "{{ '<turn>assistant\n' if add_generation_prompt }}"
)


def test_added_tokens_that_a_jinja_file_writes_are_special_and_others_are_not(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "turns.jinja").write_text(TURNS, encoding="utf-8")
    ready = prepared(tiny_model, tmp_path, str(tmp_path / "turns.jinja"), ["<turn>", "</turn>", "<scene>"])
    added = ready.tokenizer.added_tokens_decoder
    assert [(added[index].content, added[index].special) for index in ready.new_token_ids] == [
        ("<turn>", True),
        ("</turn>", True),
        ("<scene>", False),
    ]
    block = ready.encoded.train[0]
    assert ready.tokenizer.decode(block["labels"][block["labels"] != IGNORED]).endswith("</turn>")
    assert int(ready.encoded.train.table["ended"][0]) == 1


def test_so_are_those_of_the_tokenizers_own_template(tiny_model: Path, tmp_path: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.chat_template = TURNS
    model = tmp_path / "model"
    transformers.AutoModelForCausalLM.from_pretrained(tiny_model).save_pretrained(model)
    tokenizer.save_pretrained(model)
    ready = prepared(model, tmp_path, None, ["<turn>", "</turn>"])
    assert [ready.tokenizer.added_tokens_decoder[index].special for index in ready.new_token_ids] == [True, True]


def test_of_a_template_of_ours_control_tokens_are_special_and_words_of_tool_calls_are_not(
    tiny_model: Path, tmp_path: Path
) -> None:
    ready = prepared(tiny_model, tmp_path, "chatml", [*CONTROLS, "<tool_call>"])
    assert [ready.tokenizer.added_tokens_decoder[index].special for index in ready.new_token_ids] == [True, True, False]

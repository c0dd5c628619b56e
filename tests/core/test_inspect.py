"""What `qlora data` computes: counts against counts by hand, and tokens against the text that they came from."""

from __future__ import annotations

import itertools
from typing import Any

import datasets
import numpy as np
import pytest
import transformers

from qlora_core.config import RunConfig
from qlora_core.data.encode import encode
from qlora_core.data.inspect import Bin, Inspection, histogram, inspect
from qlora_core.data.preview import Token, shown, tokens_of, visible
from qlora_core.parts import Weighted
from qlora_core.pipeline import Prepared
from qlora_core.providers import DatasetSource

LENGTH = 8
IGNORED = -100


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Any) -> transformers.PreTrainedTokenizerBase:
    return transformers.AutoTokenizer.from_pretrained(tiny_model)


@pytest.fixture(autouse=True)
def _own_cache(own_cache: None) -> None:
    pass


class Rows(DatasetSource):
    """Examples made by hand: `Rows.of(train, eval)`."""

    name = "rows"
    splits: dict[str, datasets.Dataset | None]

    @classmethod
    def of(cls, train: dict[str, list[Any]], evaluation: dict[str, list[Any]] | None = None) -> Rows:
        source = cls()
        source.splits = {
            "train": datasets.Dataset.from_dict(train),
            "eval": datasets.Dataset.from_dict(evaluation) if evaluation else None,
        }
        return source

    def examples(self, split: str) -> datasets.Dataset | None:
        return self.splits[split]


def base(data: dict[str, Any], training: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return a configuration with the given keys of `data`."""
    data = {"sequence_length": LENGTH, "eval_fraction": 0.0, **data}
    return {"model": "m", "dataset": "rows", "data": data, "training": training or {}}


@pytest.fixture
def look(tokenizer: Any) -> Any:
    """Return a function that inspects sources as a run would, with the given keys of `data`."""

    def run(*sources: Rows | Weighted, samples: int = 3, training: dict[str, Any] | None = None, **data: Any) -> Inspection:
        mix = [Weighted(source) if isinstance(source, Rows) else source for source in sources]
        config = RunConfig.parse(base(data, training))
        encoded = encode(mix, tokenizer, config.data)
        return inspect(config, mix, Prepared(tokenizer, [], None, encoded), samples)  # type: ignore[arg-type]

    return run


def three() -> Rows:
    """Return rows of 4, 6 and 3 tokens, of which 2, 5 and 1 are supervised; the label of a first token is none."""
    return Rows.of(
        {
            "input_ids": [[10, 11, 12, 13], [20, 21, 22, 23, 24, 25], [30, 31, 32]],
            "labels": [[IGNORED, IGNORED, 12, 13], [20, 21, 22, 23, 24, 25], [IGNORED, IGNORED, 32]],
            "origin": ["a.jsonl:1", "a.jsonl:2", "b.jsonl:7"],
        }
    )


# Statistics


def test_the_counts_of_packed_blocks_are_those_made_by_hand(look: Any) -> None:
    counts = look(three()).statistics["train"]
    assert (counts.samples, counts.distinct, counts.tokens, counts.supervised) == (3, 3, 13, 8)
    assert counts.supervised_share == pytest.approx(8 / 13)
    assert (counts.shortest, counts.median, counts.longest) == (3, 4.0, 6)
    assert counts.blocks == 2  # 6, and 4 with 3
    assert counts.packing_efficiency == pytest.approx(13 / 16)
    assert counts.padding_share is None
    assert (counts.cut, counts.lost) == (0, 0)
    assert sum(one.count for one in counts.histogram) == 3


def test_without_packing_there_is_a_share_of_padding(look: Any) -> None:
    counts = look(three(), packing=False, pad_to_multiple_of=4, training={"batch_size": 2}).statistics["train"]
    assert counts.packing_efficiency is None
    assert counts.blocks == 3
    assert counts.padding_share == pytest.approx(1 - 13 / (2 * 8 + 4))  # 6 and 4 are padded to 8, 3 alone to 4


def test_what_is_cut_is_counted_and_said_at_the_sample(look: Any) -> None:
    rows = Rows.of({"input_ids": [[5, 6], list(range(10, 22))]})
    found = look(rows, truncate=True)
    counts = found.statistics["train"]
    assert (counts.cut, counts.lost, counts.longest) == (1, 4, LENGTH)
    assert [(one.low, one.high, one.count) for one in counts.histogram][-1][1] >= 12  # as long as before the cut
    cut = next(sample for block in found.blocks for sample in block.samples if sample.length == 12)
    assert cut.warnings[0] == "cut: 4 of 12 tokens are lost at the end"


def test_a_sample_that_is_too_long_is_left_out_and_stands_in_the_histogram(look: Any) -> None:
    rows = Rows.of({"input_ids": [[5, 6], list(range(10, 22)), [7, 8, 9]]})
    found = look(rows, on_problem="skip")
    assert (found.read, found.left_out) == ({"train": 3}, 1)
    assert found.statistics["train"].samples == 2
    assert sum(one.count for one in found.statistics["train"].histogram) == 3
    assert [(one.split, one.code, one.count, one.error) for one in found.findings] == [("train", "long", 1, True)]
    assert found.findings[0].examples == ["row 2: 12 tokens"]


def test_held_out_samples_are_not_left_out(look: Any) -> None:
    rows = Rows.of({"input_ids": [[index, index + 1, index + 2] for index in range(10, 20)]})
    found = look(rows, eval_fraction=0.2)
    assert (found.read, found.left_out) == ({"train": 10}, 0)
    assert {split: counts.samples for split, counts in found.statistics.items()} == {"train": 8, "eval": 2}


def test_evaluation_data_of_its_own_is_counted_by_itself(look: Any) -> None:
    found = look(Rows.of({"input_ids": [[1, 2, 3]]}, {"input_ids": [[4, 5], [6, 7, 8, 9]]}))
    assert found.read == {"train": 1, "eval": 2}
    assert (found.statistics["eval"].tokens, found.statistics["eval"].supervised) == (6, 4)


def test_a_sample_that_is_seen_twice_counts_twice(look: Any) -> None:
    first, second = Rows.of({"input_ids": [[1, 2, 3]]}), Rows.of({"input_ids": [[4, 5], [6, 7]]})
    found = look(Weighted(first, 2.0), Weighted(second, 0.5))
    counts = found.statistics["train"]
    assert (counts.samples, counts.distinct, counts.tokens) == (3, 2, 8)
    assert found.left_out == 0  # the weight chose, nothing was wrong
    assert [one.source for one in found.supervision] == ["rows", "rows"]


@pytest.mark.parametrize("changes", [{}, {"deduplicate": True}, {"packing": False}, {"eval_fraction": 0.0}])
def test_several_sources_are_numbered_as_their_blocks_are(look: Any, tokenizer: Any, changes: dict[str, Any]) -> None:
    def rows(start: int, count: int) -> dict[str, list[Any]]:
        ids = [[start, *range(10, 10 + index % 5 + 1), index + 100] for index in range(count)]
        return {"input_ids": ids, "origin": [f"{start}:{index}" for index in range(count)]}

    mix = [
        Weighted(Rows.of(rows(30, 20)), 1.5),
        Weighted(Rows.of(rows(31, 8), rows(32, 5)), 0.5),
        Weighted(Rows.of({**rows(33, 6), "labels": [[IGNORED, *ids[1:]] for ids in rows(33, 6)["input_ids"]]}), 1.0),
    ]
    data = {"eval_fraction": 0.2, **changes}
    found = look(*mix, samples=100, **data)
    encoded = encode(mix, tokenizer, RunConfig.parse(base(data)).data)
    for name, blocks in (("train", encoded.train), ("eval", encoded.eval)):
        assert found.statistics[name].tokens == blocks.tokens  # type: ignore[union-attr]
        assert found.statistics[name].supervised == blocks.supervised  # type: ignore[union-attr]
    assert len(found.blocks) == len(encoded.train)  # type: ignore[arg-type]
    for sample in (sample for block in found.blocks for sample in block.samples):
        assert sample.origin == f"{sample.tokens[0].id}:{sample.tokens[-1].id - 100}"


def test_a_stream_is_described_by_its_first_rows(look: Any) -> None:
    stored = look(three(), packing=True)
    streamed = look(three(), packing=True, streaming=True)
    assert streamed.streaming
    assert streamed.statistics["train"] == stored.statistics["train"]
    assert look(three(), streaming=True, gate_rows=2).statistics["train"].samples == 2
    origins = {sample.origin for block in streamed.blocks for sample in block.samples}
    assert origins == {"a.jsonl:1", "a.jsonl:2", "b.jsonl:7"}


def test_a_stream_without_packing_has_a_sample_in_each_block(look: Any) -> None:
    counts = look(three(), packing=False, streaming=True).statistics["train"]
    assert (counts.samples, counts.blocks) == (3, 3)


def test_what_is_supervised_and_how_a_turn_ends_is_said(look: Any) -> None:
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    found = look(Rows.of({"messages": [chat, [*chat, *chat]]}), sequence_length=128)
    assert (found.template, found.end_of_turn) == ("plain", "<eos>")
    assert [(one.form, one.train_on) for one in found.supervision] == [("chats", "assistant")]
    counts = found.statistics["train"]
    assert (counts.answers, counts.ended) == (3, 3)
    samples = [sample for block in found.blocks for sample in block.samples]
    assert {sample.ending for sample in samples} == {"ends with <eos> (supervised)"}
    assert [sample.warnings for sample in samples] == [[], []]


@pytest.mark.parametrize(("columns", "form", "train_on"), [("text", "text", "all"), ("input_ids", "tokens", "all")])
def test_everything_is_supervised_in_text_and_in_tokens_without_labels(
    look: Any, columns: str, form: str, train_on: str
) -> None:
    found = look(Rows.of({columns: [[1, 2, 3]] if columns == "input_ids" else ["Some text of a few words."]}))
    assert [(one.form, one.train_on) for one in found.supervision] == [(form, train_on)]
    assert found.template is None
    assert found.statistics["train"].answers == 0


# Histogram


@pytest.mark.parametrize(
    ("lengths", "limit"),
    [
        ([5], 8),
        ([5], 5),
        ([1, 1, 2], 100),
        (range(1, 4000), 512),
        (range(100, 700), 512),
        ([3, 3000, 90_000], 2048),
        ([511, 513], 512),
    ],
)
def test_every_length_stands_in_one_bin_and_the_limit_between_two(lengths: Any, limit: int) -> None:
    values = np.array(list(lengths))
    bins = histogram(values, limit)
    assert len(bins) <= 11
    assert [one.count for one in bins] == [int(((values >= one.low) & (values <= one.high)).sum()) for one in bins]
    assert sum(one.count for one in bins) == len(values)
    assert all(first.high + 1 == second.low for first, second in itertools.pairwise(bins))
    assert not any(one.low <= limit < one.high for one in bins)


def test_bins_end_at_round_numbers() -> None:
    assert [(one.low, one.high) for one in histogram(np.array([120, 250, 399]), 512)] == [
        (101, 150), (151, 200), (201, 250), (251, 300), (301, 350), (351, 400)
    ]  # fmt: skip
    assert histogram(np.array([1, 1000]), 512) == [
        Bin(1, 2, 1), *(Bin(2**n + 1, 2 ** (n + 1), 0) for n in range(1, 9)), Bin(513, 1024, 1)
    ]  # fmt: skip


# Tokens


@pytest.mark.parametrize(
    "words", ["Grüße 🦙🦙 an alle", "日本語 and English", "half \ufffd replaced \ufffd\ufffd", "a\n\n b", "\ufffd"]
)
def test_texts_of_tokens_put_together_are_the_text(tokenizer: Any, words: str) -> None:
    ids = np.array(tokenizer(words)["input_ids"])
    tokens = tokens_of(ids, ids, tokenizer)
    assert "".join(token.text for token in tokens) == words
    assert [token.id for token in tokens] == ids.tolist()
    assert not any(token.joins and token.text for token in tokens)


def test_a_character_of_several_tokens_stands_at_the_first(tokenizer: Any) -> None:
    ids = np.array(tokenizer("x🦙y")["input_ids"])
    tokens = tokens_of(ids, ids, tokenizer)
    assert [(token.text, token.joins) for token in tokens] == [
        ("x", False), ("🦙", False), ("", True), ("", True), ("", True), ("y", False)
    ]  # fmt: skip


def test_bytes_that_are_no_character_do_not_swallow_what_follows(tokenizer: Any) -> None:
    llama = tokenizer("🦙")["input_ids"]
    ids = np.array([*llama[:2], *tokenizer("yes")["input_ids"]])
    tokens = tokens_of(ids, ids, tokenizer)
    assert "".join(token.text for token in tokens).endswith("yes")
    assert tokens[0].text == "\ufffd"


def test_a_tokenizer_that_drops_the_space_at_the_beginning_keeps_those_within() -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    backend = Tokenizer(models.WordLevel({"▁one": 0, "▁two": 1, "<s>": 2}, unk_token="<s>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>")
    ids = np.array([2, *tokenizer("one two one", add_special_tokens=False)["input_ids"]])
    tokens = tokens_of(ids, ids, tokenizer)
    assert [token.text.strip() for token in tokens] == ["<s>", "one", "two", "one"]
    assert [token.text for token in tokens[2:]] == [" two", " one"]
    assert [token.special for token in tokens] == [True, False, False, False]


def test_the_first_token_is_never_supervised(look: Any) -> None:
    samples = {sample.origin: sample for block in look(three()).blocks for sample in block.samples}
    assert [token.supervised for token in samples["a.jsonl:2"].tokens] == [False, True, True, True, True, True]
    assert [token.label for token in samples["a.jsonl:1"].tokens] == [None, None, 12, 13]


# What should not be overlooked


def test_a_packed_block_shows_its_samples_with_where_they_come_from(look: Any) -> None:
    blocks = look(three()).blocks
    assert [(block.tokens, [sample.origin for sample in block.samples]) for block in blocks] == [
        (7, ["a.jsonl:1", "b.jsonl:7"]),
        (6, ["a.jsonl:2"]),
    ]
    assert [token.id for token in blocks[0].samples[1].tokens] == [30, 31, 32]


def test_samples_are_spread_over_the_data(look: Any) -> None:
    rows = Rows.of({"input_ids": [[index, index + 1] for index in range(10, 19)]})
    for wanted, expected in ((0, []), (1, [0]), (3, [0, 4, 8]), (50, list(range(9)))):
        assert [block.index for block in look(rows, samples=wanted, packing=False).blocks] == expected


def test_an_end_of_turn_that_is_masked_is_said(look: Any, tokenizer: Any) -> None:
    eos = tokenizer.eos_token_id
    rows = Rows.of({"input_ids": [[10, 11, 12, eos]], "labels": [[IGNORED, 11, 12, IGNORED]]})
    sample = look(rows).blocks[0].samples[0]
    assert sample.ending == "ends before <eos> (masked)"
    assert sample.warnings == ["the supervised part ends before <eos> (masked): nothing there teaches the model to stop"]


def test_an_answer_that_is_cut_before_its_end_is_said(look: Any) -> None:
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "a long answer " * 9}]
    sample = look(
        Rows.of({"messages": [chat, [chat[0], {"role": "assistant", "content": "b"}]]}), truncate=True, sequence_length=20
    )
    cut = next(one for block in sample.blocks for one in block.samples if one.length > 20)
    assert (cut.answers, cut.ended) == (1, 0)
    assert cut.warnings[0].startswith("cut: ")
    assert cut.warnings[1] == "1 of 1 answers without a supervised end: nothing there teaches the model to stop"


def test_labels_that_somebody_has_shifted_are_said(look: Any) -> None:
    rows = Rows.of({"input_ids": [[10, 11, 12, 13]], "labels": [[11, 12, 13, IGNORED]]})
    sample = look(rows).blocks[0].samples[0]
    assert sample.warnings[0] == "2 labels are not their token's id; the model shifts labels itself, so don't shift them"


# Shortening, and what a terminal would obey


def make(flags: str) -> list[Token]:
    return [Token(index, index, "x", False, flag == "s", None) for index, flag in enumerate(flags)]


def test_the_middle_of_a_long_stretch_is_left_out_and_its_ends_stay() -> None:
    pieces = shown(make("m" * 100 + "s" * 5 + "m" * 50), kept=(6, 4))
    left_out = [piece for piece in pieces if isinstance(piece, int)]
    assert left_out == [90, 40]
    kept = [piece.index for piece in pieces if isinstance(piece, Token)]
    assert kept == [*range(6), *range(96, 111), *range(151, 155)]


def test_a_short_sample_is_shown_whole() -> None:
    tokens = make("mmsss")
    assert shown(tokens, kept=(2, 1)) == tokens


def test_a_character_is_not_left_out_by_half() -> None:
    tokens = make("m" * 30)
    tokens[4] = Token(4, 4, "", False, False, None, joins=True)
    pieces = shown(tokens, kept=(4, 4))
    assert [piece.index for piece in pieces if isinstance(piece, Token)][:6] == [0, 1, 2, 3, 4, 26]


def test_control_characters_become_visible() -> None:
    assert visible("a\x1b[31m\tb\r\n\u202e\u200b") == "a␛[31m␉b␍\n\\u202e\\u200b"
    assert visible("👩\u200d🚀 ü 日") == "👩\u200d🚀 ü 日"

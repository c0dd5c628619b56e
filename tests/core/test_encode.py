"""Examples become tokens and blocks: which, how many, and in what order."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import transformers

from qlora_core.config import DataConfig
from qlora_core.data.encode import Encoded, encode, encode_split
from qlora_core.errors import DataError
from qlora_core.providers import DatasetSource
from qlora_text import TextFile

LENGTH = 16


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> transformers.PreTrainedTokenizerBase:
    return transformers.AutoTokenizer.from_pretrained(tiny_model)


@pytest.fixture
def beginning(tiny_model: Path) -> transformers.PreTrainedTokenizerBase:
    """A tokenizer that puts a token of its own before each text, as Llama's does."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_model)
    first = ("<pad>", tokenizer.pad_token_id)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<pad> $A", special_tokens=[first])
    return tokenizer


class Rows(DatasetSource):
    """Examples made by hand: `Rows.of(train, eval)`."""

    name = "rows"
    splits: dict[str, datasets.Dataset | None]

    @classmethod
    def of(cls, train: datasets.Dataset | dict[str, list[Any]] | None, evaluation: dict[str, list[Any]] | None = None) -> Rows:
        source = cls()
        made = [datasets.Dataset.from_dict(rows) if isinstance(rows, dict) else rows for rows in (train, evaluation)]
        source.splits = dict(zip(("train", "eval"), made, strict=True))
        return source

    def examples(self, split: str) -> datasets.Dataset | None:
        return self.splits[split]


def data(**changes: Any) -> DataConfig:
    return DataConfig(**{"sequence_length": LENGTH, "eval_fraction": 0.0, **changes})


def ids(blocks: Any) -> list[list[int]]:
    assert blocks is not None
    return [block["input_ids"].tolist() for block in blocks]


def samples(blocks: Any) -> list[list[int]]:
    """Return the samples in *blocks*, sorted."""
    found = []
    for block in blocks:
        ends = np.cumsum(block["lengths"])
        found += [part.tolist() for part in np.split(block["input_ids"], ends[:-1])]
    return sorted(found)


def stream(tokenizer: Any, documents: list[str], begin: list[int] | None = None) -> list[list[int]]:
    """Return the tokens of each of *documents* as the library gives them at once, an EOS token after each."""
    return [
        [*(begin or []), *tokenizer(document, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        for document in documents
    ]


def cut(documents: list[list[int]], length: int = LENGTH) -> list[list[int]]:
    """Return the pieces that documents are split into."""
    pieces = [tokens[start : start + length] for tokens in documents for start in range(0, len(tokens), length)]
    return [piece for piece in pieces if len(piece) > 1]


# Text


def test_a_document_is_split_into_pieces_and_nothing_of_it_is_lost(tokenizer: Any, text: str) -> None:
    documents = [text[:900], "short", text[2000:3500]]
    blocks = encode_split(Rows.of({"text": documents}), "train", tokenizer, data())
    assert samples(blocks) == sorted(cut(stream(tokenizer, documents)))
    assert max(len(block) for block in ids(blocks)) <= LENGTH
    assert any(len(block["lengths"]) > 1 for block in blocks)


def test_a_file_gives_the_tokens_that_tokenising_it_at_once_gives(tokenizer: Any, text: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(text[:30_000], encoding="utf-8")
    (tmp_path / "b.txt").write_text("Grüße 🦙 an alle.\r\n", encoding="utf-8", newline="")
    blocks = encode_split(TextFile(path=str(tmp_path)), "train", tokenizer, data())
    assert samples(blocks) == sorted(cut(stream(tokenizer, [text[:30_000], "Grüße 🦙 an alle.\n"])))


def test_separated_documents_end_with_the_end_token_each(tokenizer: Any, tmp_path: Path) -> None:
    documents = ["The first document of three.", "A second one, somewhat longer than that.", "And the last."]
    (tmp_path / "a.txt").write_text("\n---\n".join(documents), encoding="utf-8")
    source = TextFile(path=str(tmp_path / "a.txt"), separator="\n---\n")
    blocks = encode_split(source, "train", tokenizer, data(sequence_length=64))
    assert samples(blocks) == sorted(stream(tokenizer, documents))


def test_rows_that_continue_a_document_have_no_end_token_between_them(tokenizer: Any) -> None:
    rows = {"text": ["one two three ", "four five six ", "seven"], "continues": [False, True, False]}
    blocks = encode_split(Rows.of(rows), "train", tokenizer, data(sequence_length=64))
    parts = [tokenizer(part, add_special_tokens=False)["input_ids"] for part in rows["text"]]
    eos = tokenizer.eos_token_id
    assert samples(blocks) == sorted([[*parts[0], *parts[1], eos], [*parts[2], eos]])


def test_many_rows_keep_their_order_across_the_tokenizers_batches(tokenizer: Any) -> None:
    documents = [f"document number {index}" for index in range(150)]
    blocks = encode_split(Rows.of({"text": documents}), "train", tokenizer, data(packing=False))
    assert ids(blocks) == cut(stream(tokenizer, documents))


def test_each_document_begins_as_the_tokenizer_begins_a_text(beginning: Any, text: str) -> None:
    documents = [text[:200], text[300:610]]
    blocks = encode_split(Rows.of({"text": documents}), "train", beginning, data(sequence_length=512))
    assert samples(blocks) == sorted(stream(beginning, documents, begin=[beginning.pad_token_id]))


def test_a_tokenizer_without_an_end_token_puts_none(tiny_model: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.eos_token = None
    blocks = encode_split(Rows.of({"text": ["one two ", "three four"]}), "train", tokenizer, data(sequence_length=64))
    assert samples(blocks) == sorted(tokenizer(part)["input_ids"] for part in ("one two ", "three four"))


def test_a_rest_of_one_token_predicts_nothing_and_is_dropped(tokenizer: Any) -> None:
    word = next(w for n in range(1, 60) if len(stream(tokenizer, [w := "x" * n])[0]) == LENGTH + 1)
    blocks = encode_split(Rows.of({"text": [word]}), "train", tokenizer, data())
    assert ids(blocks) == [stream(tokenizer, [word])[0][:LENGTH]]


def test_without_packing_each_piece_is_a_block(tokenizer: Any, text: str) -> None:
    documents = [text[:200], "short", text[500:560]]
    blocks = encode_split(Rows.of({"text": documents}), "train", tokenizer, data(packing=False))
    assert ids(blocks) == cut(stream(tokenizer, documents))
    assert not blocks.packed
    assert {len(block["lengths"]) for block in blocks} == {1}


# Holding out


def test_of_a_text_the_end_is_held_out(tokenizer: Any, text: str) -> None:
    source = Rows.of({"text": [text[:1500], text[1500:3000]], "continues": [False, True]})
    ids = [token for part in (text[:1500], text[1500:3000]) for token in stream(tokenizer, [part])[0][:-1]]
    every = cut([[*ids, tokenizer.eos_token_id]])
    encoded = encode(source, tokenizer, data(eval_fraction=0.25))
    held_out = round(len(every) * 0.25)
    assert samples(encoded.eval) == sorted(every[-held_out:])
    assert samples(encoded.train) == sorted(every[:-held_out])
    assert encoded.train_tokens == sum(map(len, every[:-held_out]))
    assert encoded.eval_tokens == sum(map(len, every[-held_out:]))


def test_of_rows_some_that_are_spread_over_all_are_held_out(tokenizer: Any) -> None:
    rows = {"input_ids": [[5, 6, number] for number in range(100)]}
    encoded = encode(Rows.of(rows), tokenizer, data(eval_fraction=0.05, packing=False))
    assert [row[2] for row in ids(encoded.eval)] == [10, 30, 50, 70, 90]
    assert len(encoded.train) == 95


def test_at_least_one_sample_is_held_out(tokenizer: Any, text: str) -> None:
    encoded = encode(Rows.of({"text": [text[:400]]}), tokenizer, data(eval_fraction=0.001))
    assert len(ids(encoded.eval)) == 1


def test_nothing_is_held_out_where_nobody_asks_for_it(tokenizer: Any, text: str) -> None:
    encoded = encode(Rows.of({"text": [text[:400]]}), tokenizer, data(eval_fraction=0.0))
    assert encoded.eval is None
    assert encoded.eval_tokens == 0
    assert samples(encoded.train) == sorted(cut(stream(tokenizer, [text[:400]])))


def test_a_separate_evaluation_split_is_used_whole_and_nothing_is_held_out(tokenizer: Any, text: str) -> None:
    source = Rows.of({"text": [text[:400]]}, {"text": [text[600:700]]})
    encoded = encode(source, tokenizer, data(eval_fraction=0.5))
    assert samples(encoded.train) == sorted(cut(stream(tokenizer, [text[:400]])))
    assert samples(encoded.eval) == sorted(cut(stream(tokenizer, [text[600:700]])))


def test_a_separate_evaluation_file_may_be_shorter_than_a_block(tokenizer: Any, text: str, tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text(text[:400], encoding="utf-8")
    (tmp_path / "eval.txt").write_text("few words", encoding="utf-8")
    source = TextFile(path=str(tmp_path / "train.txt"), eval_path=str(tmp_path / "eval.txt"))
    assert ids(encode(source, tokenizer, data()).eval) == stream(tokenizer, ["few words"])


def test_too_few_samples_to_hold_any_out_name_three_remedies(tokenizer: Any) -> None:
    words = "one two three four five six seven eight"
    with pytest.raises(DataError) as caught:
        encode(Rows.of({"text": [words]}), tokenizer, data(sequence_length=64, eval_fraction=0.1))
    assert str(caught.value) == (
        "data.eval_fraction: 'rows' gives 1 sample of at most 64 tokens, too few to hold any out; "
        "set data.eval_fraction=0, a smaller data.sequence_length, or add data"
    )


# Several sources


def test_a_mix_sees_each_source_as_often_as_its_weight_says(tokenizer: Any) -> None:
    sources = [[f"first {n}" for n in range(4)], [f"second {n}" for n in range(6)], [f"third {n}" for n in range(3)]]
    made = [cut(stream(tokenizer, documents)) for documents in sources]
    mix = [(Rows.of({"text": documents}), weight) for documents, weight in zip(sources, (2.0, 0.5, 1.5), strict=True)]
    found = samples(encode(mix, tokenizer, data()).train)
    counts = [[found.count(sample) for sample in of_source] for of_source in made]
    assert counts[0] == [2, 2, 2, 2]
    assert sorted(counts[1]) == [0, 0, 0, 1, 1, 1]
    assert sorted(counts[2]) == [1, 2, 2] or sorted(counts[2]) == [1, 1, 2]
    assert encode(mix, tokenizer, data()).fingerprint == encode(mix, tokenizer, data()).fingerprint


def test_a_mix_holds_out_of_each_source_whatever_its_weight(tokenizer: Any) -> None:
    sources = [[f"first {n}" for n in range(10)], [f"second {n}" for n in range(10)]]
    mix = [(Rows.of({"text": documents}), weight) for documents, weight in zip(sources, (3.0, 0.1), strict=True)]
    encoded = encode(mix, tokenizer, data(eval_fraction=0.2))
    expected = [piece for documents in sources for piece in cut(stream(tokenizer, [documents[2], documents[7]]))]
    assert samples(encoded.eval) == sorted(expected)


def test_a_mix_of_text_and_labelled_tokens_has_labels_everywhere(tokenizer: Any) -> None:
    mix = [(Rows.of({"text": ["some words"]}), 1.0), (Rows.of({"input_ids": [[5, 6, 7]], "labels": [[-100, -100, 7]]}), 1.0)]
    blocks = encode(mix, tokenizer, data(packing=False)).train
    rows = [(block["input_ids"].tolist(), block["labels"].tolist()) for block in blocks]
    words = stream(tokenizer, ["some words"])[0]
    assert rows == [(words, words), ([5, 6, 7], [-100, -100, 7])]


# Tokens made by the source


def test_rows_of_tokens_are_taken_as_they_are(tokenizer: Any) -> None:
    rows = {"input_ids": [[5, 6, 7], [8, 9]], "labels": [[-100, 6, 7], [-100, 9]], "note": ["a", "b"]}
    encoded = encode(Rows.of(rows), tokenizer, data())
    assert samples(encoded.train) == rows["input_ids"]
    assert [block["labels"].tolist() for block in encode(Rows.of(rows), tokenizer, data(packing=False)).train] == rows["labels"]


def test_rows_of_tokens_may_have_one_fixed_length(tokenizer: Any) -> None:
    features = datasets.Features({"input_ids": datasets.List(datasets.Value("int32"), length=3)})
    rows = datasets.Dataset.from_dict({"input_ids": [[1, 2, 3], [4, 5, 6]]}, features=features)
    assert samples(encode(Rows.of(rows), tokenizer, data()).train) == [[1, 2, 3], [4, 5, 6]]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({"input_ids": [[1, 2], [1] * 17]}, "1 row with more tokens than data.sequence_length: row 2: 17 tokens."),
        ({"input_ids": [[1, 2]], "labels": [[1]]}, "1 row with token ids that don't fit: row 1: 2 input_ids and 1 labels."),
        ({"input_ids": [[1, 2], []]}, "1 row with token ids that don't fit: row 2: no tokens."),
        ({"input_ids": [[1, 10**6]]}, "1 row with token ids that don't fit: row 1: id 1000000, and the tokenizer has"),
        ({"input_ids": [[1, 2]], "labels": [[1, -7]]}, "row 1: label -7, neither a token nor -100"),
        (
            {"input_ids": [[1, 2]], "labels": [[1, -100]]},
            "1 row with no supervised token: row 1: 2 tokens, all of them masked.",
        ),
        ({"text": []}, "dataset: 'rows' gives no tokens in the train data; it is empty"),
        ({"input_ids": []}, "dataset: 'rows' gives no tokens in the train data; it is empty"),
        (
            {"prompt": ["x"], "answer": ["y"]},
            "dataset: 'rows' gives rows with the columns prompt, answer; rows must have text, or prompt and completion,",
        ),
    ],
)
def test_rows_that_can_not_be_used_say_why(tokenizer: Any, rows: dict[str, list[Any]], message: str) -> None:
    with pytest.raises(DataError) as caught:
        encode(Rows.of(rows), tokenizer, data())
    assert message in str(caught.value)


def test_a_text_that_is_no_text_is_refused_by_its_row(tokenizer: Any) -> None:
    with pytest.raises(DataError) as caught:
        encode(Rows.of({"text": ["some text", None]}), tokenizer, data())
    assert str(caught.value) == "row 2: text must be text (got None)"


def test_an_empty_file_is_refused(tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(DataError) as caught:
        encode(TextFile(path=str(tmp_path / "empty.txt")), tokenizer, data())
    assert str(caught.value) == "dataset: 'text' gives no tokens in the train data; it is empty"


def test_a_source_without_a_training_split_is_refused(tokenizer: Any) -> None:
    with pytest.raises(DataError) as caught:
        encode(Rows.of(None), tokenizer, data())
    assert str(caught.value) == "dataset: 'rows' gives no examples to train on"


# Fingerprints


def fingerprint(
    tokenizer: Any, train: dict[str, list[Any]], evaluation: dict[str, list[Any]] | None = None, **changes: Any
) -> str:
    return encode(Rows.of(train, evaluation), tokenizer, data(**changes)).fingerprint


def test_the_fingerprint_is_that_of_the_tokens_wherever_they_come_from(tokenizer: Any, text: str, tmp_path: Path) -> None:
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(text[:500], encoding="utf-8")
    marks = {encode(TextFile(path=str(tmp_path / name)), tokenizer, data()).fingerprint for name in ("a.txt", "b.txt")}
    marks.add(fingerprint(tokenizer, {"input_ids": cut(stream(tokenizer, [text[:500]]))}))
    assert len(marks) == 1
    assert len(marks.pop()) == 64


def test_the_fingerprint_changes_with_every_token_label_and_boundary(tokenizer: Any, beginning: Any, text: str) -> None:
    tokens = {"input_ids": [[1, 2, 3], [4, 5]]}
    marks = [
        fingerprint(tokenizer, tokens),
        fingerprint(tokenizer, {"input_ids": [[1, 2, 3], [4, 6]]}),
        fingerprint(tokenizer, {"input_ids": [[1, 2], [3, 4, 5]]}),
        fingerprint(tokenizer, {"input_ids": [[4, 5], [1, 2, 3]]}),
        fingerprint(tokenizer, {**tokens, "labels": [[1, 2, 3], [-100, 5]]}),
        fingerprint(tokenizer, tokens, {"input_ids": [[1, 7]]}),
        fingerprint(tokenizer, {"text": [text[:500]]}),
        fingerprint(tokenizer, {"text": [text[:500]]}, sequence_length=8),
        fingerprint(tokenizer, {"text": [text[1:501]]}),
        fingerprint(beginning, {"text": [text[:500]]}),
    ]
    assert len(set(marks)) == len(marks)


def test_the_same_file_with_another_text_gives_the_other_texts_blocks(tokenizer: Any, text: str, tmp_path: Path) -> None:
    path = tmp_path / "corpus.txt"
    for start in (0, 700, 0):
        path.write_text(text[start : start + 600], encoding="utf-8")
        blocks = samples(encode_split(TextFile(path=str(path)), "train", tokenizer, data()))
        assert blocks == sorted(cut(stream(tokenizer, [text[start : start + 600]])))


def test_blocks_made_once_are_found_again_only_for_the_same_tokenizer(tokenizer: Any, beginning: Any, text: str) -> None:
    source = Rows.of({"text": [text[:600]]})
    assert samples(encode_split(source, "train", tokenizer, data())) == sorted(cut(stream(tokenizer, [text[:600]])))
    expected = cut(stream(beginning, [text[:600]], begin=[beginning.pad_token_id]))
    assert samples(encode_split(source, "train", beginning, data())) == sorted(expected)


def test_a_text_of_the_shared_data_gives_the_stream_of_the_library(tokenizer: Any) -> None:
    path = Path(__file__).parents[2].parent / "shared" / "data" / "text" / "tiny_shakespeare.txt"
    if not path.is_file():
        pytest.skip("the text is not there")
    encoded = encode(TextFile(path=str(path)), tokenizer, data(sequence_length=256, eval_fraction=0.1))
    assert isinstance(encoded, Encoded)
    flat = [token for block in ids(encoded.train.select(range(100))) for token in block]
    beginning_of_text = path.read_text(encoding="utf-8")[:60_000]
    assert flat[:20_000] == tokenizer(beginning_of_text)["input_ids"][:20_000]


def test_what_a_source_raises_while_it_is_read_is_not_laid_to_the_cache(tmp_path: Path, own_cache: None) -> None:
    from qlora_core.data.arrow import cached_dataset

    def broken() -> Any:
        yield {"text": "a row"}
        raise ConnectionResetError("the line is down")

    with pytest.raises(ConnectionResetError, match="the line is down"):
        cached_dataset(broken, {"text": datasets.Value("string")}, "broken")
    assert cached_dataset(lambda: iter([{"text": "x"}]), {"text": datasets.Value("string")}, "broken")["text"][:] == ["x"]

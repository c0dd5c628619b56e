"""Samples token by token, as a person checks them: texts, what is supervised, and what should not be overlooked.

Makes plain texts and numbers, and draws nothing.
"""

from __future__ import annotations

import itertools
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy.typing as npt

from qlora_core.data.findings import FINDINGS
from qlora_core.data.mask import IGNORED
from qlora_core.data.specials import special_ids

if TYPE_CHECKING:
    import transformers

    from qlora_core.data.blocks import Blocks

__all__ = ["BlockView", "SampleView", "Token", "shown", "tokens_of", "view", "visible"]

Ints = npt.NDArray[Any]

CHARACTER = 4  # bytes of the longest character, hence tokens that may be parts of one
CONTEXT = 4  # tokens decoded before a token: some tokenizers leave out a space at the beginning of a text
KEPT = (48, 24)  # tokens shown at the beginning and the end of a stretch that is too long


@dataclass(frozen=True)
class Token:
    """One token of a sample. `label` is None where nothing is learnt; the first token is predicted by nothing.

    Where a character has several tokens, its text stands at the first, and the others have `joins` set and no text.
    """

    index: int
    id: int
    text: str
    special: bool
    supervised: bool
    label: int | None
    joins: bool = False


@dataclass(frozen=True)
class SampleView:
    """One sample. `length` is what it was before it was cut; `warnings` are what should not be overlooked.

    `answers` are supervised turns, `ended` those whose end-of-turn token is supervised.
    """

    origin: str
    length: int
    supervised: int
    answers: int
    ended: int
    ending: str
    warnings: list[str]
    tokens: list[Token]


@dataclass(frozen=True)
class BlockView:
    """One block, by its index in the training data, with the samples that lie in it."""

    index: int
    tokens: int
    samples: list[SampleView]


def view(blocks: Blocks, block: int, tokenizer: transformers.PreTrainedTokenizerBase) -> BlockView:
    """Return the block of this index with its samples, token by token."""
    content, start, samples = blocks[block], 0, []
    for length, row in zip(content["lengths"], blocks.rows(block).tolist(), strict=True):
        ids = content["input_ids"][start : start + length]
        labels = content["labels"][start : start + length] if "labels" in content else ids
        tokens = tokens_of(ids, labels, tokenizer)
        columns = blocks.table[row]
        ending, warnings = _judged(tokens, columns, "labels" in content)
        supervised = sum(token.supervised for token in tokens)
        numbers = (columns["length"], supervised, columns["turns"], columns["ended"])
        samples.append(SampleView(columns["origin"], *numbers, ending, warnings, tokens))
        start += length
    return BlockView(block, start, samples)


def tokens_of(ids: Ints, labels: Ints, tokenizer: transformers.PreTrainedTokenizerBase) -> list[Token]:
    """Return one sample's tokens; their texts put together are the sample's text, characters never in halves."""
    special = special_ids(tokenizer)
    texts: list[str | None] = []
    while len(texts) < len(ids):
        at = len(texts)
        if int(ids[at]) in special:
            texts.append(str(tokenizer.convert_ids_to_tokens(int(ids[at]))))
            continue
        stop = _end_of_character(ids, at, tokenizer)
        texts += [_decoded(ids, at, stop, tokenizer), *[None] * (stop - at - 1)]
    return [
        Token(
            index=index,
            id=token,
            text=text or "",
            special=token in special,
            supervised=index > 0 and label != IGNORED,
            label=None if index == 0 or label == IGNORED else label,
            joins=text is None,
        )
        for index, (token, label, text) in enumerate(zip(ids.tolist(), labels.tolist(), texts, strict=True))
    ]


def shown(tokens: Sequence[Token], kept: tuple[int, int] = KEPT) -> list[Token | int]:
    """Return *tokens* with a number in place of the middle of each long stretch, supervised or not: how many are left out.

    Where supervision begins and ends all tokens stay, and so do the sample's ends.
    """
    pieces: list[Token | int] = []
    for start, stop in _stretches(tokens):
        first, last = start + kept[0], stop - kept[1]
        while first < stop and tokens[first].joins:  # a character stays whole
            first += 1
        while last > start and tokens[last].joins:
            last -= 1
        if last - first < min(kept):
            pieces += tokens[start:stop]
        else:
            pieces += [*tokens[start:first], last - first, *tokens[last:stop]]
    return pieces


def visible(text: str) -> str:
    """Return *text* with what a terminal would obey or hide made visible, but for line breaks; tokens' texts may be hostile."""
    return "".join(_visible(character) for character in text)


def _visible(character: str) -> str:
    if character in "\n\u200c\u200d" or unicodedata.category(character) not in ("Cc", "Cf", "Cs", "Zl", "Zp"):
        return character
    code = ord(character)
    if code < 0x20:
        return chr(0x2400 + code)  # ␉ is a tab, ␛ an escape
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def _stretches(tokens: Sequence[Token]) -> list[tuple[int, int]]:
    """Return [start, stop) of each longest run of tokens that are all supervised or all not."""
    bounds = [0, *(i for i in range(1, len(tokens)) if tokens[i].supervised != tokens[i - 1].supervised), len(tokens)]
    return [*itertools.pairwise(bounds)]


def _end_of_character(ids: Ints, at: int, tokenizer: transformers.PreTrainedTokenizerBase) -> int:
    """Return where the last character that begins in token *at* ends. Half of one decodes to U+FFFD, until its rest comes."""
    stop, text = at + 1, _decoded(ids, at, at + 1, tokenizer)
    while text.endswith("\ufffd"):
        for further in range(stop + 1, min(stop + CHARACTER, len(ids) + 1)):
            longer = _decoded(ids, at, further, tokenizer)
            if not longer.startswith(text):
                stop, text = further, longer
                break
        else:
            return stop  # nothing mends it: it stands in the text, or the bytes are no UTF-8
    return stop


def _decoded(ids: Ints, start: int, stop: int, tokenizer: transformers.PreTrainedTokenizerBase) -> str:
    before = ids[max(0, start - CONTEXT) : start].tolist()

    def decode(some: list[int]) -> str:
        return str(tokenizer.decode(some, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    text, known = decode([*before, *ids[start:stop].tolist()]), decode(before) if before else ""
    return text[len(known) :] if text.startswith(known) else decode(ids[start:stop].tolist())


def _judged(tokens: list[Token], columns: dict[str, Any], labelled: bool) -> tuple[str, list[str]]:
    """Return how the supervised part of a sample ends, in words, and what should not be overlooked."""
    warnings = []
    lost = columns["length"] - len(tokens)
    if lost > 0:
        warnings.append(f"cut: {lost:,} of {columns['length']:,} tokens are lost at the end")
    if columns["turns"] > columns["ended"]:
        missing = columns["turns"] - columns["ended"]
        of = f"{missing} of {columns['turns']}"
        warnings.append(f"{of} answers without a supervised end: nothing there teaches the model to stop")
    shifted = sum(token.label not in (None, token.id) for token in tokens)
    if shifted:
        warnings.append(f"{shifted:,} labels are not their token's id; the model shifts labels itself, so don't shift them")
    stretches = [(start, stop) for start, stop in _stretches(tokens) if tokens[start].supervised]
    if not stretches:
        return "nothing is supervised", [*warnings, "nothing is supervised"]
    ending, good = _ending(tokens, *stretches[-1])
    if labelled and not good and not columns["turns"]:
        warnings.append(f"the supervised part {ending}: nothing there teaches the model to stop")
    told = [problem.partition(": ") for problem in columns["problems"]]
    warnings += [f"{FINDINGS[code].what}: {detail}" for code, _, detail in told if code in FINDINGS and code != "cut"]
    return ending, warnings


def _ending(tokens: list[Token], start: int, stop: int) -> tuple[str, bool]:
    """Return how the supervised stretch [start, stop) ends, and whether with a special token that is supervised."""
    last = next((token for token in reversed(tokens[start:stop]) if token.text.strip() or token.special), None)
    if last is not None and last.special:
        return f"ends with {last.text} (supervised)", True
    after = next((token for token in tokens[stop:] if token.text.strip() or token.special), None)
    if after is not None and after.special:
        return f"ends before {after.text} (masked)", False
    return "ends with no special token", False

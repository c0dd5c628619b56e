"""From text to token ids and labels: which tokens are supervised, exactly. Imports no torch.

A token is supervised where it lies wholly in a supervised stretch of the text. An answer's last supervised token is its
end of turn, so that the model learns to stop; what a template writes after that (the line break of ChatML) it never has to
say. A token that spans the beginning of an answer is known only together with the prompt: it is not supervised.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from qlora_core.data.chat import Turn
from qlora_core.data.findings import BadRow
from qlora_core.data.specials import special_ids, special_tokens
from qlora_core.data.template import ChatTemplate, Span, Tools, begin_ids
from qlora_core.errors import ModelError

if TYPE_CHECKING:
    import tokenizers
    import transformers

__all__ = ["IGNORED", "Masked", "end_of_turn", "joined", "tokenized", "typed_specials"]

IGNORED = -100  # the label of a token that is not supervised
NO_ID = -1
Ints = npt.NDArray[np.int32]
ASKED: Sequence[Turn] = ({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"})  # what templates are tried on


@dataclass(frozen=True, eq=False)
class Masked:
    """The token ids of one example, (T,) int32, and their labels, (T,) int32 with IGNORED where nothing is supervised."""

    input_ids: Ints
    labels: Ints
    starts: tuple[int, ...]
    """Where each supervised answer has its first label; where the whole text is supervised it is one."""
    ends: tuple[int, ...]
    """Where the end-of-turn tokens of these stand, as far as they have one; all are supervised."""
    merged: int
    """Tokens that span the beginning or the end of a supervised stretch, and are not supervised for it."""

    def within(self, limit: int) -> tuple[int, int]:
        """Return how many answers have a label among the first *limit* tokens, and how many their end of turn."""
        return sum(start < limit for start in self.starts), sum(end < limit for end in self.ends)

    @property
    def turns(self) -> int:
        """Answers that are supervised."""
        return len(self.starts)

    @property
    def ended(self) -> int:
        """How many of them have their end-of-turn token supervised."""
        return len(self.ends)


@dataclass(frozen=True)
class Specials:
    """What the mask has to know of a tokenizer and a template."""

    ids: frozenset[int]
    unknown: int  # the id of unk_token, or NO_ID: it stands for any text
    unknown_text: str
    end: int  # the template's usual end of turn, or NO_ID
    after: frozenset[int]  # those that may end a marked answer from behind its mark; others open the next turn

    @classmethod
    def of(
        cls, tokenizer: transformers.PreTrainedTokenizerBase, end: int = NO_ID, after: frozenset[int] = frozenset()
    ) -> Specials:
        """Return the special tokens of *tokenizer*."""
        unknown = tokenizer.unk_token_id
        return cls(special_ids(tokenizer), NO_ID if unknown is None else unknown, tokenizer.unk_token or "", end, after)


def tokenized(
    tokenizer: transformers.PreTrainedTokenizerBase,
    template: ChatTemplate,
    chats: Sequence[tuple[Sequence[Turn], Tools]],
    train_on: str = "assistant",
) -> list[Masked | BadRow]:
    """Return the masked tokens, or what is wrong, for each of *chats* (turns and tools); the ids are `apply_chat_template`'s.

    *train_on* is all, assistant (auto means that, too), last_turn or completion. Raise ModelError where the tokenizer
    can't say which text its tokens come from.
    """
    results: list[Any] = []
    for messages, tools in chats:
        try:
            text, turns = template.turns(messages, tools, train_on)
            _check_unicode(text)
            results.append((text, turns))
        except BadRow as error:
            results.append(error)
    texts = [result[0] for result in results if isinstance(result, tuple)]
    encodings = iter(_encode(tokenizer, texts))
    specials = _of_template(tokenizer, template) if texts and train_on != "all" else Specials.of(tokenizer)
    for place, result in enumerate(results):
        if isinstance(result, tuple):
            aligned = Aligned(result[0], next(encodings), specials)
            results[place] = aligned.everything() if train_on == "all" else aligned.masked(result[1])
    return results


def joined(
    tokenizer: transformers.PreTrainedTokenizerBase, pairs: Sequence[tuple[str, str]], *, masked: bool = True
) -> list[Masked | BadRow]:
    """Return the masked tokens of each prompt and completion joined as they are, with the tokenizer's BOS before and EOS after.

    Prompt and completion are tokenised as one text. Supervised are the completion and EOS; where it is not *masked*, all.
    """
    results: list[Masked | BadRow | None] = []
    for prompt, completion in pairs:
        try:
            _check_unicode(prompt + completion)
            results.append(None)
        except BadRow as error:
            results.append(error)
    good = [pair for pair, result in zip(pairs, results, strict=True) if result is None]
    begin = np.array(begin_ids(tokenizer), dtype=np.int32)
    finish = np.array([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id], dtype=np.int32)
    specials = Specials.of(tokenizer)
    samples = []
    for (prompt, completion), encoding in zip(good, _encode(tokenizer, [p + c for p, c in good]), strict=True):
        aligned = Aligned(prompt + completion, encoding, specials)
        labels = np.full(len(aligned.ids), IGNORED, dtype=np.int32)
        start = len(prompt) if masked else 0
        first, stop, merged = aligned.within((start, len(prompt + completion)))
        labels[first:stop] = aligned.ids[first:stop]
        labels = np.concatenate([np.full_like(begin, IGNORED) if masked else begin, labels, finish])
        ids = np.concatenate([begin, aligned.ids, finish])
        ends = (len(ids) - 1,) if len(finish) else ()
        samples.append(Masked(ids, labels, _first(labels), ends, merged))
    made = iter(samples)
    return [next(made) if result is None else result for result in results]


def end_of_turn(tokenizer: transformers.PreTrainedTokenizerBase, template: ChatTemplate) -> int | None:
    """Return the id of the token that ends an answer in *template*, or None where it ends with no special token.

    It is the last of those between an answer and the next turn: Cohere's models end with two. A text's own end, as
    Phi-3's <|endoftext|>, stands after the last turn only.
    """
    for chat in ([*ASKED, ASKED[0]], [*ASKED]):  # some templates want the last word to be an answer
        try:
            text, spans = template.told_apart(chat, None, [1])
        except BadRow:
            continue
        aligned = Aligned(text, _encode(tokenizer, [text])[0], Specials.of(tokenizer))
        first, stop, _ = aligned.within(spans[0])
        found = aligned.closing(first, stop)
        if found:
            return int(aligned.ids[found[-1] if len(chat) > 2 else found[0]])
    return None


def _of_template(tokenizer: transformers.PreTrainedTokenizerBase, template: ChatTemplate) -> Specials:
    """Return the special tokens of *tokenizer* with those that end an answer in *template*.

    Behind a mark the next turn's opener may follow, too. A token that stands there although no turn follows is none.
    """
    end = end_of_turn(tokenizer, template)
    usual = NO_ID if end is None else end
    specials = Specials.of(tokenizer, usual)
    if not template.marked:
        return specials
    after = {usual}
    try:
        text, turns = template.turns([*ASKED], None, "assistant")
    except BadRow:
        turns = []
    if turns:
        aligned, until = Aligned(text, _encode(tokenizer, [text])[0], specials), turns[-1][-1][1]
        after |= {int(aligned.ids[at]) for at in aligned.following(aligned.within(turns[-1][-1])[1], until)}
    return replace(specials, after=frozenset(after))


def typed_specials(tokenizer: transformers.PreTrainedTokenizerBase, texts: Iterable[str]) -> list[str]:
    """Return the special tokens that stand in *texts*, once each: the tokenizer can't tell them from a template's own."""
    pattern = _special_pattern(tokenizer, len(tokenizer))
    return [] if pattern is None else list(dict.fromkeys(token for text in texts for token in pattern.findall(text)))


@lru_cache(maxsize=4)
def _special_pattern(tokenizer: transformers.PreTrainedTokenizerBase, size: int) -> re.Pattern[str] | None:
    """Return a pattern that finds special tokens. Cached, vocabularies have thousands; *size* grows with a token added."""
    found = sorted(
        filter(None, special_tokens(tokenizer)), key=len, reverse=True
    )  # the longest that begins at a place is the one meant
    return re.compile("|".join(map(re.escape, found))) if found else None


class Aligned:
    """The tokens of one text and where they stand in it."""

    def __init__(self, text: str, encoding: tokenizers.Encoding, specials: Specials) -> None:
        self.text = text
        self.specials = specials
        self.ids: Ints = np.array(encoding.ids, dtype=np.int32)
        self._encoding = encoding

    @cached_property
    def offsets(self) -> npt.NDArray[np.int64]:
        """(T, 2): where each token begins and ends in the text, in characters."""
        return np.array(self._encoding.offsets, dtype=np.int64).reshape(-1, 2)

    def begins(self, at: int) -> int:
        """Return where token *at* begins. Some tokenizers (Llama 3) say that " a" begins at the a: the gap is its own."""
        start = int(self.offsets[at, 0])
        before = int(self.offsets[at - 1, 1]) if at else 0
        return before if before < start and not self.text[before:start].strip(" ") else start

    def within(self, span: Span) -> tuple[int, int, int]:
        """Return the first token in *span*, the one after the last that begins in it, and how many span its beginning."""
        start, end = span
        first, stop = (int(at) for at in np.searchsorted(self.offsets[:, 0], (start, end)))
        merged = 1 if first and self.offsets[first - 1, 1] > start else 0
        while first < len(self.ids) and self.begins(first) < start:
            merged += 1 if self.offsets[first, 1] > start else 0
            first += 1
        while stop < len(self.ids) and self.begins(stop) < end:
            stop += 1
        return first, max(first, stop), merged

    def closing(self, first: int, stop: int) -> list[int]:
        """Return the places of the special tokens of [first, stop) after which only such and white space stand."""
        found: list[int] = []
        for at in range(stop - 1, first - 1, -1):
            if self._special(at):
                found.insert(0, at)
            elif self.text[self.begins(at) : int(self.offsets[at, 1])].strip():
                break
        return found

    def end(self, first: int, stop: int, until: int) -> int | None:
        """Return the place of the end-of-turn token of the tokens [first, stop), which end at *until*; None without one.

        It is the template's usual one, or else the first special token of the closing. Where the template marks answers
        without their end, it is looked for in the special tokens that follow directly, of which some end a turn.
        """
        found = self.closing(first, stop)
        follow = [at for at in self.following(stop, until) if int(self.ids[at]) in self.specials.after]
        usual = [at for at in (*found, *follow) if self.ids[at] == self.specials.end]
        ends = usual or found or follow
        return ends[0] if ends else None

    def following(self, stop: int, until: int) -> range:
        """Return the places of the special tokens that stand directly after *until*, where token *stop* begins."""
        after = stop
        while after < len(self.ids) and self._special(after) and (after > stop or self.begins(stop) == until):
            after += 1
        return range(stop, after)

    def masked(self, turns: Sequence[Sequence[Span]]) -> Masked:
        """Return the tokens, of which *turns*, each in one or more stretches, are supervised up to their end of turn."""
        labels = np.full(len(self.ids), IGNORED, dtype=np.int32)
        starts: list[int] = []
        ends: list[int] = []
        merged = 0
        for spans in turns:
            begins: list[int] = []
            for number, span in enumerate(spans, 1):
                first, stop, spanning = self.within(span)
                last = self.end(first, stop, span[1]) if number == len(spans) else None
                if last is not None:
                    stop = last + 1
                    ends.append(last)
                elif stop > first and self.offsets[stop - 1, 1] > span[1]:
                    stop -= 1
                    spanning += 1
                labels[first:stop] = self.ids[first:stop]
                merged += spanning
                begins += [first] if first < stop else []
            starts += begins[:1]
        return Masked(self.ids, labels, tuple(starts), tuple(ends), merged)

    def everything(self) -> Masked:
        """Return the tokens, all supervised as one turn; it has ended where the last token is special."""
        last = len(self.ids) - 1
        ended = last >= 0 and int(self.ids[last]) in self.specials.ids
        return Masked(self.ids, self.ids.copy(), _first(self.ids), (last,) if ended else (), 0)

    def _special(self, at: int) -> bool:
        token = int(self.ids[at])
        if token == self.specials.unknown:  # a token of that name, or any text that the vocabulary lacks?
            start, end = self.offsets[at]
            return self.text[start:end].strip() == self.specials.unknown_text
        return token in self.specials.ids


def _encode(tokenizer: transformers.PreTrainedTokenizerBase, texts: list[str]) -> list[tokenizers.Encoding]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ModelError(
            f"the tokenizer {type(tokenizer).__name__} can't say which text its tokens come from, so answers can't be told "
            "from prompts; use a model with a fast tokenizer (a tokenizer.json)"
        )
    backend.no_truncation()  # both may have been left in tokenizer.json
    backend.no_padding()
    encodings: list[tokenizers.Encoding] = backend.encode_batch(texts, add_special_tokens=False)
    return encodings


def _first(labels: Ints) -> tuple[int, ...]:
    """Return where the first of *labels* stands that is supervised, as one place or none."""
    return tuple(np.flatnonzero(labels != IGNORED)[:1].tolist())


def _check_unicode(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadRow("content", f"half of a character, {text[error.start]!r}, that no tokenizer takes") from error

"""Turn rows of examples into samples of token ids and labels: one encoder for each form that rows have."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from qlora_core.config import DataConfig
from qlora_core.data.chat import Turn, answered, checked, checked_tools, of_pair, said
from qlora_core.data.findings import BadRow
from qlora_core.data.mask import IGNORED, joined, tokenized, typed_specials
from qlora_core.data.samples import Sample
from qlora_core.data.template import ChatTemplate, begin_ids
from qlora_core.errors import ConfigError, DataError, Problem

if TYPE_CHECKING:
    import transformers

__all__ = ["Encoder", "encoder_for", "form_of"]

Form = Literal["text", "pairs", "chats", "tokens"]


class Encoder:
    """Makes samples of rows that come in batches of columns."""

    rows: ClassVar[int] = 128
    """Rows per call: the tokenizer works on a batch in parallel."""

    labels: bool = True
    """Whether some tokens are not supervised."""

    continuous: ClassVar[bool] = False
    """Whether neighbouring samples are pieces of one text."""

    state: Any = None
    """What is held of a row that is not complete yet, JSON-ready."""

    def __init__(self, tokenizer: transformers.PreTrainedTokenizerBase, data: DataConfig) -> None:
        self.tokenizer = tokenizer
        self.data = data

    @property
    def settings(self) -> str:
        """What, beside rows and tokenizer, the samples depend on."""
        return f"{self.data.sequence_length} {self.data.truncate}"

    def encode(self, rows: dict[str, list[Any]], first: int) -> Iterator[Sample]:
        """Yield the samples of *rows*; *first* is the index of its first row."""
        raise NotImplementedError

    def finish(self) -> Iterator[Sample]:
        """Yield what is left once all rows have come."""
        yield from ()

    def fitted(self, sample: Sample) -> Sample:
        """Return *sample* with at most `sequence_length` tokens, and with what is wrong about its length and labels noted."""
        limit = self.data.sequence_length
        sample.length = len(sample.ids)
        if sample.length > limit and not self.data.truncate:
            sample.note("long", f"{sample.length:,} tokens")
            sample.ids = sample.ids[:0]
            sample.labels = None if sample.labels is None else sample.labels[:0]
            return sample
        if sample.length > limit:
            sample.ids = sample.ids[:limit]
            lost = 0
            if sample.labels is not None:
                lost = int((sample.labels[limit:] != IGNORED).sum())
                sample.labels = sample.labels[:limit]
            sample.note("cut", f"{sample.length:,} tokens, of which {sample.length - limit:,} ({lost:,} supervised) are lost")
            sample.ended -= int(sample.ended > 0)  # the last turn's end is beyond the cut
        if not sample.supervised:
            sample.note("unsupervised", f"{len(sample.ids)} tokens, all of them masked")
        return sample


class TextEncoder(Encoder):
    """Raw text: each document between the tokenizer's own begin and end tokens, split into pieces, none of it lost."""

    rows = 64  # pieces of a file, of 64 Ki characters each
    labels = False
    continuous = True

    def __init__(self, tokenizer: transformers.PreTrainedTokenizerBase, data: DataConfig) -> None:
        super().__init__(tokenizer, data)
        self.begin = np.array(begin_ids(tokenizer), dtype=np.int32)
        self.end = np.array([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id], dtype=np.int32)
        self.special = _special_table(tokenizer)
        self.rest: np.ndarray | None = None  # of the document that is open
        self.origin = ""

    @property
    def state(self) -> Any:
        """The open document's tokens that fill no piece yet, and where it began."""
        return None if self.rest is None else {"rest": self.rest.tolist(), "origin": self.origin}

    @state.setter
    def state(self, value: Any) -> None:
        self.rest = None if value is None else np.array(value["rest"], dtype=np.int32)
        self.origin = "" if value is None else value["origin"]

    def encode(self, rows: dict[str, list[Any]], first: int) -> Iterator[Sample]:
        """Yield full pieces, and the shorter end of each document that another one follows."""
        texts = rows["text"]
        continues = rows.get("continues") or [False] * len(texts)
        origins = rows.get("origin") or [f"row {first + index + 1}" for index in range(len(texts))]
        for index, text in enumerate(texts):
            if not isinstance(text, str):
                raise DataError(f"{origins[index]}: text must be text (got {text!r:.60})")
        for ids, goes_on, origin in zip(_token_ids(self.tokenizer, texts), continues, origins, strict=True):
            if not goes_on:
                yield from self.finish()
                self.rest, self.origin = self.begin, origin
            elif self.rest is None:
                self.rest, self.origin = self.begin, origin
            yield from self._pieces(ids)

    def finish(self) -> Iterator[Sample]:
        """Yield the end of the open document; a token alone predicts nothing."""
        if self.rest is None:
            return
        yield from self._pieces(self.end)
        if len(self.rest) > 1:
            yield self._piece(self.rest)
        self.rest = None

    def _pieces(self, ids: np.ndarray) -> Iterator[Sample]:
        assert self.rest is not None
        length = self.data.sequence_length
        tokens = np.concatenate([self.rest, ids])
        full = len(tokens) // length * length
        for start in range(0, full, length):
            yield self._piece(tokens[start : start + length])
        self.rest = tokens[full:]

    def _piece(self, ids: np.ndarray) -> Sample:
        sample = Sample(ids, None, self.origin, len(ids))
        inner = ids[:-1] if len(self.end) and ids[-1] == self.end[0] else ids
        found = inner[self.special[inner]]
        if len(self.begin) and len(found) and ids[0] == self.begin[0]:
            found = found[1:]
        if len(found):
            sample.note("typed", repr(self.tokenizer.convert_ids_to_tokens(int(found[0]))))
        return sample


class ChatEncoder(Encoder):
    """Chats and prompts in a template; what the assistant says is supervised, as `train_on` says."""

    def __init__(
        self,
        tokenizer: transformers.PreTrainedTokenizerBase,
        data: DataConfig,
        template: ChatTemplate | None,
        train_on: Literal["all", "completion", "assistant", "last_turn"],
    ) -> None:
        super().__init__(tokenizer, data)
        self.template = template
        self.train_on = train_on

    @property
    def settings(self) -> str:
        """Template and mask, too."""
        made = self.template
        written = (made.source, made.tool_source, sorted(made.special.items())) if made is not None else None
        return f"{super().settings} {self.train_on} {written}"

    def encode(self, rows: dict[str, list[Any]], first: int) -> Iterator[Sample]:
        """Yield one sample per row."""
        count = len(next(iter(rows.values())))
        origins = rows.get("origin") or [f"row {first + index + 1}" for index in range(count)]
        columns = {name: values for name, values in rows.items() if name != "origin"}
        made = self._pairs(columns) if "prompt" in columns else self._chats(columns)
        for sample, origin in zip(made, origins, strict=True):
            sample.origin = origin
            yield sample if sample.problems and not len(sample.ids) else self.fitted(sample)

    def _pairs(self, rows: dict[str, list[Any]]) -> list[Sample]:
        systems = rows.get("system") or [None] * len(rows["prompt"])
        pairs = list(zip(rows["prompt"], rows["completion"], systems, strict=True))
        if self.template is not None:
            return self._chats({"messages": [of_pair(*pair) for pair in pairs]})
        texts = [(f"{system}\n\n{prompt}" if system else prompt, completion) for prompt, completion, system in pairs]
        made = joined(self.tokenizer, texts, masked=self.train_on != "all")
        empty = BadRow("empty", "the completion is empty")
        return [self._sample(one if pair[1].strip() else empty, pair) for one, pair in zip(made, texts, strict=True)]

    def _chats(self, rows: dict[str, list[Any]]) -> list[Sample]:
        assert self.template is not None
        tools = rows.get("tools") or [None] * len(rows["messages"])
        chats = [_judged(messages, kit) for messages, kit in zip(rows["messages"], tools, strict=True)]
        good = [chat for chat in chats if not isinstance(chat, BadRow)]
        encoded = iter(tokenized(self.tokenizer, self.template, good, self.train_on))
        samples = []
        for chat in chats:
            if isinstance(chat, BadRow):
                samples.append(self._sample(chat, ()))
                continue
            turns = chat[0]
            sample = self._sample(next(encoded), said(turns))
            if not answered(turns):
                sample.note("unanswered", f"turn {len(turns)} ({turns[-1]['role']})")
            samples.append(sample)
        return samples

    def _sample(self, made: Any, texts: Iterable[str]) -> Sample:
        if isinstance(made, BadRow):
            return Sample(np.empty(0, np.int32), np.empty(0, np.int32), problems=[f"{made.code}: {made.detail}"])
        turns, ended = (0, 0) if self.train_on == "all" else (made.turns, made.ended)  # where all is, every end is supervised
        sample = Sample(made.input_ids, made.labels, turns=turns, ended=ended)
        if made.merged:
            sample.note("merged", f"{made.merged} token{'s' if made.merged > 1 else ''}")
        found = typed_specials(self.tokenizer, texts)
        if found:
            sample.note("special", ", ".join(repr(token) for token in found))
        return sample


class TokenEncoder(Encoder):
    """Rows that are token ids already, with labels or without."""

    def __init__(self, tokenizer: transformers.PreTrainedTokenizerBase, data: DataConfig, *, labels: bool) -> None:
        super().__init__(tokenizer, data)
        self.labels = labels

    def encode(self, rows: dict[str, list[Any]], first: int) -> Iterator[Sample]:
        """Yield one sample per row."""
        count = len(rows["input_ids"])
        origins = rows.get("origin") or [f"row {first + index + 1}" for index in range(count)]
        labels = rows.get("labels") or [None] * count
        for ids, wanted, origin in zip(rows["input_ids"], labels, origins, strict=True):
            sample = Sample(np.asarray(ids, np.int32), None if wanted is None else np.asarray(wanted, np.int32), origin)
            problem = self._problem(sample)
            if problem:
                sample.note("tokens", problem)
                sample.ids, sample.labels = sample.ids[:0], None if sample.labels is None else sample.labels[:0]
                yield sample
            else:
                yield self.fitted(sample)

    def _problem(self, sample: Sample) -> str:
        size = len(self.tokenizer)
        if not len(sample.ids):
            return "no tokens"
        if sample.ids.min() < 0 or sample.ids.max() >= size:
            worst = sample.ids.min() if sample.ids.min() < 0 else sample.ids.max()
            return f"id {worst}, and the tokenizer has {size:,}"
        if sample.labels is None:
            return ""
        if len(sample.labels) != len(sample.ids):
            return f"{len(sample.ids)} input_ids and {len(sample.labels)} labels"
        wrong = sample.labels[(sample.labels != IGNORED) & ((sample.labels < 0) | (sample.labels >= size))]
        return f"label {wrong[0]}, neither a token nor {IGNORED}" if len(wrong) else ""


def form_of(columns: Sequence[str], source: str) -> Form:
    """Return what rows with these *columns* are; raise DataError where they are nothing that can be trained on."""
    names = set(columns)
    for wanted, kind in (("input_ids", "tokens"), ("messages", "chats"), ("text", "text")):
        if wanted in names:
            return kind  # type: ignore[return-value]
    if {"prompt", "completion"} <= names:
        return "pairs"
    raise DataError(
        f"dataset: {source!r} gives rows with the columns {', '.join(columns)}; rows must have text, or prompt and completion, "
        "or messages, or input_ids with optional labels"
    )


def encoder_for(
    columns: Sequence[str],
    source: str,
    tokenizer: transformers.PreTrainedTokenizerBase,
    template: ChatTemplate | None,
    data: DataConfig,
) -> Encoder:
    """Return the encoder of rows with these *columns*; raise ConfigError where `train_on` or `template` don't suit them."""
    kind, wanted = form_of(columns, source), data.train_on

    def refuse(what: str, remedy: str) -> ConfigError:
        return ConfigError([Problem(("data", "train_on"), f"{wanted}: {source!r} gives {what}; {remedy}")])

    if kind == "text":
        if wanted not in ("auto", "all"):
            raise refuse("raw text, where every token is supervised", "use auto or all")
        return TextEncoder(tokenizer, data)
    if kind == "tokens":
        if wanted != "auto" and not (wanted == "all" and "labels" not in columns):
            raise refuse("token ids, whose labels say what is supervised", "use auto")
        return TokenEncoder(tokenizer, data, labels="labels" in columns)
    if kind == "pairs":
        return ChatEncoder(tokenizer, data, template, "all" if wanted == "all" else "completion")
    if wanted == "completion":
        raise refuse("chats, not prompts with a completion", "use assistant or last_turn")
    if template is None:
        raise ConfigError([Problem(("data", "template"), f"none: {source!r} gives chats, which need a template; name one")])
    return ChatEncoder(tokenizer, data, template, "assistant" if wanted == "auto" else wanted)


def _judged(messages: Any, tools: Any) -> tuple[list[Turn], list[dict[str, Any]] | None] | BadRow:
    try:
        return checked(messages), checked_tools(tools)
    except BadRow as problem:
        return problem


def _token_ids(tokenizer: transformers.PreTrainedTokenizerBase, texts: list[str]) -> Iterator[np.ndarray]:
    """Yield the ids (T,) int32 of each of *texts*, without special tokens around it."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or not hasattr(backend, "encode_batch_fast"):
        encoded = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
        yield from (np.asarray(ids, np.int32) for ids in encoded["input_ids"])
        return
    backend.no_padding()
    backend.no_truncation()
    for one in backend.encode_batch_fast(texts, add_special_tokens=False):  # without offsets, which nobody asks for
        yield np.asarray(one.ids, np.int32)


def _special_table(tokenizer: transformers.PreTrainedTokenizerBase) -> np.ndarray:
    """Return a table (vocabulary,) of bool: which ids are special tokens."""
    special = {int(index) for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    special |= set(tokenizer.all_special_ids)
    table = np.zeros(max(len(tokenizer), max(special, default=0) + 1), bool)
    table[list(special)] = True
    return table

"""Turn rows of examples into samples of token ids and labels: one encoder for each form that rows have."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from datetime import date
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from qlora_core.config import DataConfig
from qlora_core.data.chat import Turn, answered, checked, checked_pair, checked_tools, of_pair, said
from qlora_core.data.encoder import Encoder
from qlora_core.data.findings import BadRow
from qlora_core.data.mask import IGNORED, Masked, joined, tokenized, typed_specials
from qlora_core.data.samples import Sample
from qlora_core.data.template import ChatTemplate
from qlora_core.data.text import TextEncoder
from qlora_core.errors import ConfigError, DataError, Problem

if TYPE_CHECKING:
    import transformers

__all__ = ["Encoder", "encoder_for", "form_of"]

Form = Literal["text", "pairs", "chats", "tokens"]


class ChatEncoder(Encoder):
    """Chats and prompts in a template; what the assistant says is supervised, as `train_on` says."""

    def __init__(
        self,
        tokenizer: transformers.PreTrainedTokenizerBase,
        data: DataConfig,
        template: ChatTemplate | None,
        train_on: Literal["all", "completion", "assistant", "last_turn"],
        day: date,
    ) -> None:
        super().__init__(tokenizer, data)
        self.template = template
        self.train_on = train_on
        self.day = day

    @property
    def settings(self) -> str:
        """Template and mask, too; and the day where the template writes it, as Llama 3.1's does."""
        made = self.template
        written = (made.source, made.tool_source, sorted(made.special.items())) if made is not None else None
        dated = made is not None and "strftime_now" in made.source + (made.tool_source or "")
        return f"{super().settings} {self.train_on} {written}{f' {self.day}' if dated else ''}"

    def encode(self, rows: dict[str, list[Any]], first: int) -> Iterator[Sample]:
        """Yield one sample per row."""
        columns = {name: values for name, values in rows.items() if name != "origin"}
        made = self._pairs(columns) if "prompt" in columns else self._chats(columns)
        for sample, origin in zip(made, self.origins(rows, first), strict=True):
            sample.origin = origin
            yield sample

    def _pairs(self, rows: dict[str, list[Any]]) -> list[Sample]:
        systems = rows.get("system") or [None] * len(rows["prompt"])
        pairs = list(zip(rows["prompt"], rows["completion"], systems, strict=True))
        if self.template is not None:
            return self._chats({"messages": [of_pair(*pair) for pair in pairs]})
        texts = [_judged_pair(*pair) for pair in pairs]
        good = [pair for pair in texts if not isinstance(pair, BadRow)]
        encoded = iter(joined(self.tokenizer, good, masked=self.train_on != "all"))
        return [self._sample(pair, ()) if isinstance(pair, BadRow) else self._sample(next(encoded), pair) for pair in texts]

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
            sample = self._sample(next(encoded), said([*turns, *(chat[1] or ())]))
            if not answered(turns):
                sample.note("unanswered", f"turn {len(turns)} ({turns[-1]['role']})")
            samples.append(sample)
        return samples

    def _sample(self, made: Masked | BadRow, texts: Iterable[str]) -> Sample:
        """Return the sample of *made*; *texts* are what a template or a pair writes of the row."""
        if isinstance(made, BadRow):
            return Sample(np.empty(0, np.int32), np.empty(0, np.int32), problems=[f"{made.code}: {made.detail}"])
        everything = self.train_on == "all"  # then every end is supervised, and no turn is counted
        turns, ended = (0, 0) if everything else (made.turns, made.ended)
        sample = Sample(made.input_ids, made.labels, turns=turns, ended=ended)
        if made.merged:
            sample.note("merged", f"{made.merged} token{'s' if made.merged > 1 else ''}")
        found = typed_specials(self.tokenizer, texts)
        if found:
            sample.note("special", ", ".join(repr(token) for token in found))
        return self.fitted(sample, None if everything else made)


class TokenEncoder(Encoder):
    """Rows that are token ids already, with labels or without."""

    def __init__(self, tokenizer: transformers.PreTrainedTokenizerBase, data: DataConfig, *, labels: bool) -> None:
        super().__init__(tokenizer, data)
        self.labels = labels

    def encode(self, rows: dict[str, list[Any]], first: int) -> Iterator[Sample]:
        """Yield one sample per row."""
        labels = rows.get("labels") or [None] * len(rows["input_ids"])
        for ids, wanted, origin in zip(rows["input_ids"], labels, self.origins(rows, first), strict=True):
            try:
                read = self._read(ids, wanted)
            except BadRow as problem:
                nothing = np.empty(0, np.int32)
                sample = Sample(nothing, nothing if self.labels else None, origin)
                sample.note(problem.code, problem.detail)
                yield sample
            else:
                yield self.fitted(Sample(*read, origin))

    def _read(self, given: Any, wanted: Any) -> tuple[np.ndarray, np.ndarray | None]:
        """Return ids and labels, (T,) int32 each, or raise BadRow."""
        size = len(self.tokenizer)
        ids = _integers(given, "input_ids")
        if not len(ids):
            raise BadRow("tokens", "no tokens")
        if ids.min() < 0 or ids.max() >= size:
            raise BadRow("tokens", f"id {ids.min() if ids.min() < 0 else ids.max()}, and the tokenizer has {size:,}")
        if not self.labels:
            return ids.astype(np.int32), None
        labels = _integers(wanted, "labels")
        if len(labels) != len(ids):
            raise BadRow("tokens", f"{len(ids)} input_ids and {len(labels)} labels")
        wrong = labels[(labels != IGNORED) & ((labels < 0) | (labels >= size))]
        if len(wrong):
            raise BadRow("tokens", f"label {wrong[0]}, neither a token nor {IGNORED}")
        return ids.astype(np.int32), labels.astype(np.int32)


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
    day: date,
) -> Encoder:
    """Return the encoder of rows with these *columns*; raise ConfigError where `train_on` or `template` don't suit them.

    *day* is that of the samples to look for in the cache, where a template writes the date.
    """
    kind, wanted = form_of(columns, source), data.train_on

    def refuse(what: str, remedy: str) -> ConfigError:
        return ConfigError([Problem(("data", "train_on"), f"{wanted}: {source!r} gives {what}; {remedy}")])

    if kind == "text":
        if wanted not in ("auto", "all"):
            raise refuse("raw text, where every token is supervised", "use auto or all")
        return TextEncoder(tokenizer, data, continuous="continues" in columns)
    if kind == "tokens":
        if wanted != "auto" and not (wanted == "all" and "labels" not in columns):
            raise refuse("token ids, whose labels say what is supervised", "use auto")
        return TokenEncoder(tokenizer, data, labels="labels" in columns)
    if kind == "pairs":
        return ChatEncoder(tokenizer, data, template, "all" if wanted == "all" else "completion", day)
    if wanted == "completion":
        raise refuse("chats, not prompts with a completion", "use assistant or last_turn")
    if template is None:
        raise ConfigError([Problem(("data", "template"), f"none: {source!r} gives chats, which need a template; name one")])
    return ChatEncoder(tokenizer, data, template, "assistant" if wanted == "auto" else wanted, day)


def _judged(messages: Any, tools: Any) -> tuple[list[Turn], list[dict[str, Any]] | None] | BadRow:
    try:
        return checked(messages), checked_tools(tools)
    except BadRow as problem:
        return problem


def _judged_pair(prompt: Any, completion: Any, system: Any) -> tuple[str, str] | BadRow:
    try:
        return checked_pair(prompt, completion, system)
    except BadRow as problem:
        return problem


def _integers(values: Any, name: str) -> np.ndarray:
    """Return *values* as integers (T,), as wide as they come, or raise BadRow for what is no list of integers."""
    if values is None:
        raise BadRow("tokens", f"there are no {name}")
    try:
        read = np.asarray(values)
    except ValueError:  # lists of several lengths
        read = np.empty((0, 0))
    if read.ndim != 1 or (len(read) and read.dtype.kind not in "iu"):
        raise BadRow("tokens", f"{name} are no list of integers")
    return read

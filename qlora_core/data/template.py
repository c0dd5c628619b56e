"""How a chat becomes text, and which stretches of the text the assistant says. Imports no torch.

Where a template marks the answers with `{% generation %}`, the marks decide. Elsewhere an answer is what follows the
prompt that the template writes for it at inference: both are rendered, and an answer that can't be told so is refused.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib import resources
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_core.data.chat import Turn, called, visible_end
from qlora_core.data.findings import BadRow
from qlora_core.data.patience import Patience, TooLong
from qlora_core.data.specials import special_tokens
from qlora_core.errors import ConfigError, Problem
from qlora_core.validation import did_you_mean

if TYPE_CHECKING:
    import transformers

__all__ = ["CONTROL_TOKENS", "NAMES", "ChatTemplate", "Span", "begin_ids"]

Span = tuple[int, int]
Tools = Sequence[dict[str, Any]] | None

CONTROL_TOKENS = {
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "llama3": ("bos_token", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "mistral": ("bos_token", "eos_token", "[INST]", "[/INST]"),
    "gemma": ("bos_token", "<start_of_turn>", "<end_of_turn>"),
    "phi": ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
    "plain": ("eos_token",),
}
"""The tokens that our templates write, by the template's name; bos_token and eos_token are the tokenizer's own."""

NAMES = tuple(CONTROL_TOKENS)
OPTIONAL_BOS = "{{- bos_token }}{#- left out where the tokenizer puts none before a text #}\n"
MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")
SECONDS = 5.0  # that a template may take for a chat; a thousandth of it is usual

OTHERWISE = "writes the turn otherwise when later turns follow; its end is not clear; data.train_on=last_turn may do"


@dataclass(frozen=True)
class ChatTemplate:
    """A Jinja template with the special tokens that it may write.

    `name` is one of NAMES, `tokenizer` for the tokenizer's own, or the path of a file. `tool_source` is what a tokenizer
    with several templates uses where tools are given. `special` are the tokenizer's named tokens (`eos_token`, ...).
    """

    name: str
    source: str
    tool_source: str | None = None
    special: dict[str, str] = field(default_factory=dict, hash=False)

    @classmethod
    def choose(cls, tokenizer: transformers.PreTrainedTokenizerBase, wanted: str | None) -> ChatTemplate | None:
        """Return the template *wanted*, by default the tokenizer's own or else `plain`; None for the word none.

        Raise ConfigError where there is no such template, or where it is no valid Jinja.
        """
        special = dict(tokenizer.special_tokens_map)
        own = tokenizer.chat_template
        if wanted is None and own:
            made = _own(own, special)
        elif wanted == "none":
            return None
        elif wanted is None or wanted in NAMES:
            made = _named(wanted or "plain", tokenizer, special)
        else:
            made = cls(wanted, _read(wanted), special=special)
        for source in filter(None, (made.source, made.tool_source)):
            _check_syntax(made.name, source)
        return made

    def missing_tokens(self, tokenizer: transformers.PreTrainedTokenizerBase) -> list[str]:
        """Return the tokens that a template of ours writes and that are no special tokens of *tokenizer*.

        They are then spelt with ordinary tokens: legal, but the model has to learn a longer end of turn. A BOS token that
        the tokenizer has not is simply not written.
        """
        known = special_tokens(tokenizer)
        tokens = [self.special.get(token, token) for token in CONTROL_TOKENS.get(self.name, ()) if token != "bos_token"]
        return [token for token in tokens if token not in known]

    def controls(self, token: str) -> bool:
        """Return whether *token* is one that the template writes around turns; of ours it is known."""
        if self.name in CONTROL_TOKENS:  # phi puts some together, chatml has words of tool calls that are text
            return token in CONTROL_TOKENS[self.name]
        return token in self.source or token in (self.tool_source or "")

    @cached_property
    def marked(self) -> bool:
        """Whether the template marks what the assistant says with `{% generation %}`."""
        return MARK.search(self.source + (self.tool_source or "")) is not None

    @cached_property
    def _patience(self) -> Patience:
        return Patience(SECONDS)

    def render(self, messages: Sequence[Turn], tools: Tools = None, add_generation_prompt: bool = False) -> str:
        """Return the text of a chat, as `apply_chat_template(tokenize=False)` does, or raise BadRow."""
        return self._render([messages], tools, add_generation_prompt)[0][0]

    def turns(self, messages: Sequence[Turn], tools: Tools, train_on: str) -> tuple[str, list[list[Span]]]:
        """Return the text of a chat and the stretches, [start, end) in characters, of each supervised turn.

        *train_on* is all, assistant (auto means that, too), last_turn or completion. A stretch holds the answer and how the
        template closes it; a template may mark several in a turn. Raise BadRow where the template refuses the chat or an
        answer can't be told from the rest.
        """
        if train_on == "all":
            text = self.render(messages, tools)
            return text, [[(0, len(text))]]
        answers = [index for index, turn in enumerate(messages) if turn["role"] == "assistant"]
        last = train_on in ("last_turn", "completion")
        if MARK.search(self._source(tools)):
            texts, marks = self._render([messages], tools, False, marks=True)
            text, turns = texts[0], self._marked_turns(messages, tools, answers, texts[0], marks[0])
        else:
            text, spans = self.told_apart(messages, tools, answers[-1:] if last else answers)
            turns = [[span] for span in spans]
        turns = turns[-1:] if last else turns
        for index, turn in zip(answers[len(answers) - len(turns) :], turns, strict=True):
            self._check_said(messages[index], index, "".join(text[start:end] for start, end in turn))
        return text, [turn for turn in turns if turn]

    def _check_said(self, turn: Turn, index: int, written: str) -> None:
        """Raise BadRow where *written* lacks what the turn says: many templates know no tool calls and drop them."""
        where = f"turn {index + 1} (assistant): template {self.name} leaves out"
        if any(name not in written for name in called(turn)):
            raise BadRow("template", f"{where} the tool calls")
        if written and visible_end(turn) not in written:
            raise BadRow("template", f"{where} or rewrites {visible_end(turn)[:60]!r}")

    def _source(self, tools: Tools) -> str:
        return self.tool_source if tools is not None and self.tool_source is not None else self.source

    def _render(
        self, chats: Sequence[Sequence[Turn]], tools: Tools, prompt: bool, *, marks: bool = False
    ) -> tuple[list[str], list[list[Span]]]:
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            with self._patience.watching():
                texts, found = render_jinja_template(
                    chats,
                    tools=tools,
                    chat_template=self._source(tools),
                    return_assistant_tokens_mask=marks,
                    add_generation_prompt=prompt,
                    **self.special,
                )
        except ImportError:  # jinja2 itself
            raise
        except TooLong as error:  # it would be so for every row
            what = f"{self.name}: more than {SECONDS:g} s for one chat; does it come to an end?"
            raise ConfigError([Problem(("data", "template"), what)]) from error
        except Exception as error:  # a template is a program: any exception can come out of it
            raise BadRow("template", f"{self.name}: {error or type(error).__name__}") from error
        return texts, found

    def told_apart(self, messages: Sequence[Turn], tools: Tools, answers: list[int]) -> tuple[str, list[Span]]:
        """Return the text and the stretch of each of *answers* (indices), from what the template writes for parts of the chat.

        An answer begins where the prompt for it ends, the chat before it with `add_generation_prompt`. Its own text
        is what the chat up to it has after that prompt.
        """
        until = [messages[: index + 1] for index in answers if index + 1 < len(messages)]
        text, *wholes = self._render([messages, *until], tools, False)[0]
        if len(wholes) < len(answers):  # the last answer ends the chat
            wholes.append(text)
        prompts = self._prompts(messages, tools, answers)
        spans: list[Span] = []
        before = ""
        for index, prompt, whole in zip(answers, prompts, wholes, strict=True):
            where = f"turn {index + 1} (assistant): template {self.name}"
            start = len(prompt)
            if not text.startswith(prompt):  # unless the difference is all in the answer before, whose end is known
                between = prompt[len(before) :] if spans and prompt.startswith(before) else None
                if between is None or not text.startswith(between, spans[-1][1]):
                    raise BadRow("ambiguous", f"{where}: {_asked_otherwise(text, prompt, index + 1 < len(messages))}")
                start = spans[-1][1] + len(between)
            if not whole.startswith(prompt) or len(whole) == len(prompt):
                raise BadRow("ambiguous", f"{where}: does not write the answer after the prompt for it")
            end = self._end(text, start, whole[len(prompt) :], messages[index])
            if end is None:
                raise BadRow("ambiguous", f"{where}: {OTHERWISE}")
            spans.append((start, end))
            before = whole
        return text, spans

    def _prompts(self, messages: Sequence[Turn], tools: Tools, answers: list[int]) -> list[str]:
        if not answers:
            return []
        try:
            return self._render([messages[:index] for index in answers], tools, True)[0]
        except BadRow as error:  # the whole chat can be rendered, so the chat is not to blame
            raise BadRow("ambiguous", f"the chat is fine, but not its beginning as a prompt: {error.detail}") from error

    def _end(self, text: str, start: int, own: str, turn: Turn) -> int | None:
        """Return where in *text* the turn that begins at *start* ends, or None; *own* is the turn as the last of a chat.

        Two things may stand in *own* only: an EOS that ends a text, not a turn (Phi-3), and the beginning of the turn,
        the thinking that a template leaves out of earlier turns (Qwen3).
        """
        closings = [token for token in self.special.values() if token and own.endswith(token)]
        forms = [own, *(own[: -len(closing)] for closing in closings)]
        for form in forms:
            if form and text.startswith(form, start):
                return start + len(form)
        needle = visible_end(turn)
        rest = text[start:]
        for form in forms:  # a stretch is left out: before all, between the same beginning and end, or but for a blank line
            for at in (0, _alike(form, rest), len(rest) - len(rest.lstrip())):
                for cut in range(form.rfind(needle) + 1):  # what it says last must be there whole
                    if form[cut] == rest[at : at + 1] and rest.startswith(form[cut:], at):
                        return start + at + len(form) - cut
        return None

    def _marked_turns(
        self, messages: Sequence[Turn], tools: Tools, answers: list[int], text: str, marks: list[Span]
    ) -> list[list[Span]]:
        """Return the marked stretches of each of *answers*; prompts are rendered only where the count leaves a doubt."""
        marks = [(start, end) for start, end in marks if end > start]
        if len(marks) == len(answers):
            pairs = zip(answers, marks, strict=True)
            if all(visible_end(messages[index]) in text[start:end] for index, (start, end) in pairs):
                return [[mark] for mark in marks]
        prompts = self._prompts(messages, tools, answers)
        for index, prompt in zip(answers, prompts, strict=True):
            if not text.startswith(prompt):
                where = f"turn {index + 1} (assistant): template {self.name}"
                raise BadRow("ambiguous", f"{where}: has {len(marks)} marks for {len(answers)} answers")
        bounds = [*map(len, prompts), len(text)]
        turns = [[m for m in marks if start <= m[0] and m[1] <= end] for start, end in pairwise(bounds)]
        if sum(map(len, turns)) != len(marks):
            raise BadRow("ambiguous", f"template {self.name}: marks with {{% generation %}} what is no answer")
        return [_united(turn) for turn in turns]


def begin_ids(tokenizer: transformers.PreTrainedTokenizerBase) -> list[int]:
    """Return what the tokenizer itself puts before a text: the id of BOS, or nothing."""
    probe = list(tokenizer("a")["input_ids"])
    bare = list(tokenizer("a", add_special_tokens=False)["input_ids"])
    places = [at for at in range(len(probe)) if probe[at : at + len(bare)] == bare]
    return probe[: places[0]] if places else []


def _own(own: str | dict[str, str], special: dict[str, str]) -> ChatTemplate:
    if isinstance(own, str):
        return ChatTemplate("tokenizer", own, special=special)
    if "default" not in own:
        what = f"the tokenizer has the chat templates {', '.join(own)}, none of them the default; {_choices()}"
        raise ConfigError([Problem(("data", "template"), what)])
    return ChatTemplate("tokenizer", own["default"], own.get("tool_use"), special)


def _named(name: str, tokenizer: transformers.PreTrainedTokenizerBase, special: dict[str, str]) -> ChatTemplate:
    source = resources.files("qlora_core.data").joinpath("templates", f"{name}.jinja").read_text(encoding="utf-8")
    if OPTIONAL_BOS in source and not begin_ids(tokenizer):
        source = source.replace(OPTIONAL_BOS, "")
    return ChatTemplate(name, source, special=special)


def _read(wanted: str) -> str:
    path = Path(os.path.expanduser(wanted))  # that of pathlib raises for a user who is not there
    if not os.path.isfile(path):
        if path.suffix in (".jinja", ".jinja2", ".j2") or "/" in wanted or "\\" in wanted:
            raise ConfigError([Problem(("data", "template"), f"{wanted}: no such file; {_choices()}")])
        hint = did_you_mean(wanted, (*NAMES, "none"))
        raise ConfigError([Problem(("data", "template"), f"no template {wanted!r}{hint}; {_choices()}")])
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError([Problem(("data", "template"), f"{wanted}: can't be read ({error})")]) from error


def _choices() -> str:
    return f"write one of {', '.join(NAMES)}, the path of a Jinja file, or none"


def _check_syntax(name: str, source: str) -> None:
    from jinja2 import TemplateSyntaxError
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        render_jinja_template([], chat_template=source)  # only compiles it
    except TemplateSyntaxError as error:
        what = "the tokenizer's own chat template" if name == "tokenizer" else name
        problem = Problem(("data", "template"), f"{what}: line {error.lineno}: no valid Jinja ({error.message})")
        raise ConfigError([problem]) from error


def _united(spans: list[Span]) -> list[Span]:
    """Return *spans* with those made one that follow directly upon each other."""
    united: list[Span] = []
    for start, end in spans:
        united[-1:] = [(united[-1][0], end)] if united and united[-1][1] == start else [*united[-1:], (start, end)]
    return united


def _alike(one: str, other: str) -> int:
    """Return how many characters *one* and *other* begin with alike."""
    return next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _asked_otherwise(text: str, prompt: str, later: bool) -> str:
    """Return how the prompt for an answer differs from the chat that has the answer, in words."""
    same = _alike(text, prompt)
    asks, writes = prompt[max(0, same - 10) : same + 30], text[max(0, same - 10) : same + 30]
    remedy = "; data.train_on=last_turn may do" if later else ""
    return f"asks for the answer with {asks!r}, but a chat that has it says {writes!r}{remedy}"

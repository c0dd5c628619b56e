"""What can be wrong with a row of data, and with a data set as a whole. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["FINDINGS", "BadRow", "Kind"]


@dataclass(frozen=True)
class Kind:
    """One kind of finding. An error stops the run unless `data.on_problem` says otherwise; a warning is counted."""

    what: str
    remedy: str
    error: bool = True


FINDINGS = {
    "role": Kind("a role that is not known", "use system, user, assistant or tool, or map it with dataset.roles"),
    "order": Kind("turns in an order that no chat has", "put user and assistant in turn, one system turn before them"),
    "empty": Kind("an empty turn", "give it content, or leave the row out"),
    "content": Kind("content that is no text", "only text can be trained on; leave out images and audio"),
    "call": Kind("a tool call that can't be read", "a call needs a function's name, and arguments in JSON"),
    "template": Kind("a chat that the template refuses", "change the chat, or choose another data.template"),
    "ambiguous": Kind(
        "answers that can't be told from the rest in the rendered text",
        "mark them with {% generation %} in the template, choose another data.template, or set data.train_on=all",
    ),
    "unsupervised": Kind("no supervised token", "give it an answer, raise data.sequence_length, or leave the row out"),
    "long": Kind("more tokens than data.sequence_length", "raise data.sequence_length, or set data.truncate=true"),
    "tokens": Kind("token ids that don't fit", "tokenise the rows with the model's own tokenizer"),
    "special": Kind("a special token typed in the text", "take it out: it would end a turn or a text in the middle"),
    "cut": Kind("an end that is cut off by data.sequence_length", "raise data.sequence_length", error=False),
    "typed": Kind("a special token typed in raw text", "take it out unless it is meant", error=False),
    "merged": Kind("a token that spans the end of the prompt and the start of the answer", "trim the answer", error=False),
    "duplicate": Kind("the tokens of an earlier one", "set data.deduplicate=true to leave them out", error=False),
    "overlap": Kind("the tokens of a held-out one", "set data.deduplicate=true to leave them out", error=False),
    "unanswered": Kind("a last turn that nobody answers", "it is not supervised; leave it out", error=False),
}
"""Every kind of finding, by its code."""


class BadRow(Exception):
    """A row that can't be used as it is: the *code* of a finding and what is wrong, in words."""

    def __init__(self, code: str, detail: str) -> None:
        self.code = code
        self.detail = detail
        super().__init__(f"{code}: {detail}")

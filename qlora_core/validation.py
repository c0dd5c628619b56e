"""Turn pydantic's errors into ours: the key, what is wrong, what is accepted, "did you mean". Imports no torch."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from qlora_core.errors import ConfigError, Problem

__all__ = ["ONE", "SEVERAL", "did_you_mean", "validate"]

M = TypeVar("M", bound=BaseModel)

ONE, SEVERAL = "<one>", "<several>"  # tags of what a section may be; pydantic puts them into the places of errors

_BOUNDS = {
    "greater_than_equal": ("at least", "ge"),
    "greater_than": ("more than", "gt"),
    "less_than_equal": ("at most", "le"),
    "less_than": ("less than", "lt"),
}
_TYPES = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "string": "text",
    "list": "a list",
    "tuple": "a list",
    "dict": "a mapping of options",
    "model": "a mapping of options",
}


def validate(model: type[M], data: Any, *, owner: str = "") -> M:
    """Return *data* as a *model*, or raise ConfigError listing every problem.

    *owner* names what accepts the options in messages ("lora accepts r, alpha, ..."); by default it is
    the section in which the unknown option stands.
    """
    if isinstance(data, Mapping):
        data = {str(key): value for key, value in data.items()}
    try:
        return model.model_validate(data)
    except ValidationError as error:
        items = error.errors(include_url=False)
        # a list is called too short, too, where something in it is wrong
        places = {item["loc"][:end] for item in items for end in range(len(item["loc"]))}
        problems = [_problem(model, i, owner) for i in items if i["type"] != "too_short" or i["loc"] not in places]
    raise ConfigError(problems) from None


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return "; did you mean x?" for the closest of *known*, or an empty string."""
    lower = {name.lower(): name for name in known}
    close = difflib.get_close_matches(word.lower(), lower, n=1, cutoff=0.6)
    return f"; did you mean {lower[close[0]]!r}?" if close else ""


def _problem(model: type[BaseModel], error: Any, owner: str) -> Problem:
    where = tuple(part for part in error["loc"] if part not in (ONE, SEVERAL))
    kind, context, value = error["type"], error.get("ctx", {}), error.get("input")
    if kind == "extra_forbidden":
        return Problem(where, _unknown_option(model, where, owner))
    field = _field(model, where)
    hint = f"; {field.description}" if field is not None and field.description else ""
    if kind == "missing":
        return Problem(where, f"required{hint}")
    if kind in _BOUNDS:
        words, key = _BOUNDS[kind]
        return Problem(where, f"must be {words} {context[key]} (got {value!r}){hint}")
    if kind == "too_short":
        least = context["min_length"]
        return Problem(where, f"must have at least {least} item{'s' if least > 1 else ''} (got {value!r}){hint}")
    if kind in ("literal_error", "enum"):
        choices = re.findall(r"'([^']*)'", context["expected"])
        return Problem(where, f"must be {context['expected']} (got {value!r}){did_you_mean(str(value), choices)}")
    if kind in ("value_error", "assertion_error"):
        return Problem(where, f"{context['error']}")
    named = re.fullmatch(r"([a-z]+)_(type|parsing|from_float|attributes_type|parsing_size)", kind)
    if named and named[1] in _TYPES:
        return Problem(where, f"must be {_TYPES[named[1]]} (got {value!r}){hint}")
    return Problem(where, f"{error['msg'][0].lower()}{error['msg'][1:]} (got {value!r}){hint}")


def _unknown_option(model: type[BaseModel], where: tuple[str | int, ...], owner: str) -> str:
    section = _model(model, where[:-1]) or model
    names = [part for part in where[:-1] if isinstance(part, str)]
    fields, word = section.model_fields, str(where[-1])
    guess = did_you_mean(word, fields)
    if not guess:  # people know an option by another library's name; descriptions carry those names
        described = [n for n, f in fields.items() if word.lower() in re.findall(r"\w+", (f.description or "").lower())]
        guess = f"; did you mean {described[0]!r}?" if described else ""
    subject = names[-1] if names else owner or "the configuration"
    accepts = ", ".join(fields) if fields else "no options"
    return f"unknown option; {subject} accepts {accepts}{guess}"


def _field(model: type[BaseModel], where: tuple[str | int, ...]) -> FieldInfo | None:
    section = _model(model, where[:-1])
    return section.model_fields.get(str(where[-1])) if section is not None and where else None


def _model(model: type[BaseModel], where: tuple[str | int, ...]) -> type[BaseModel] | None:
    """Return the model that stands at *where* inside *model*, or None where another type stands there."""
    for part in where:
        if isinstance(part, int):
            continue
        field = model.model_fields.get(part)
        nested = _nested(field.annotation) if field is not None else None
        if nested is None:
            return None
        model = nested
    return model


def _nested(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for arg in get_args(annotation) if (found := _nested(arg)) is not None), None)

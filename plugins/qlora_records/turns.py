"""Turns of chats, brought from OpenAI's and ShareGPT's form into OpenAI's. Order and content are the core's to judge."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from qlora_core.errors import DataError
from qlora_records.json_text import kind_of

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "ai": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool_call": "assistant",
    "tool": "tool",
    "tool_response": "tool",
    "function_response": "tool",
    "observation": "tool",
    "ipython": "tool",
    "function": "tool",
}
"""The usual names of roles. One that is not known stays as it is."""

CALLS = ("function_call", "tool_call", "function")
"""ShareGPT's names of a turn that calls a function; "function" is its answer, too, and what it says tells which."""


def conversation(value: Any, roles: Mapping[str, str], where: str) -> list[dict[str, Any]]:
    """Return the turns in *value* in OpenAI's form; raise DataError, beginning with *where*, where it is no list of turns."""
    turns = _from_text(value, where) if isinstance(value, str) else value
    if not isinstance(turns, list):
        raise DataError(f"{where} is {kind_of(turns)}, not a list of messages; mend the row or leave it out")
    return [_turn(turn, roles, f"{where}[{index}]") for index, turn in enumerate(turns)]


def tools_of(value: Any, where: str) -> list[Any] | None:
    """Return the tools in *value*, a list or one as JSON text, or None where there are none."""
    tools = _from_text(value, where) if isinstance(value, str) and value.strip() else value
    if not tools:
        return None
    if not isinstance(tools, list):
        raise DataError(f"{where} is {kind_of(tools)}, not a list of tools; mend the row or leave it out")
    tools = [_from_text(tool, where) if isinstance(tool, str) else tool for tool in tools]
    for index, tool in enumerate(tools):
        if not isinstance(tool, dict):
            raise DataError(
                f"{where}[{index}] is {kind_of(tool)}, not the description of a function; mend the row or leave it out"
            )
    return tools


def _turn(turn: Any, roles: Mapping[str, str], where: str) -> dict[str, Any]:
    if isinstance(turn, str):  # as `datasets` writes nested data of many shapes
        turn = _from_text(turn, where)
    if not isinstance(turn, dict):
        raise DataError(f"{where} is {kind_of(turn)}, not a message; a message is {{role, content}} or {{from, value}}")
    if turn.get("role") is not None:
        # Parquet gives every turn all keys; one that is null says nothing, but for the content of a call
        kept = {key: value for key, value in turn.items() if value is not None or key == "content"}
        return {**kept, "role": _role(turn["role"], roles)}
    if turn.get("from") is None:
        raise DataError(f"{where} has neither role nor from (it has {', '.join(turn) or 'nothing'}); say who speaks")
    name, content = turn["from"], turn.get("value", turn.get("content"))
    calls = _calls(content) if name in CALLS and name not in roles else None
    if calls:
        return {"role": "assistant", "content": None, "tool_calls": calls}
    return {"role": _role(name, roles), "content": content}


def _role(name: Any, roles: Mapping[str, str]) -> Any:
    if not isinstance(name, str):
        return name
    return roles.get(name) or ROLES.get(name) or ROLES.get(name.lower(), name)


def _calls(content: Any) -> list[dict[str, Any]] | None:
    """Return the calls that *content* is, in OpenAI's form, or None where it is none."""
    try:
        called = json.loads(content) if isinstance(content, str) else content
    except (ValueError, RecursionError):
        return None
    calls = called if isinstance(called, list) else [called]
    if not all(isinstance(call, dict) and isinstance(call.get("name"), str) and "arguments" in call for call in calls):
        return None
    return [{"type": "function", "function": {"name": call["name"], "arguments": call["arguments"]}} for call in calls] or None


def _from_text(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} is a text that is no JSON ({error}); mend the row or leave it out") from error

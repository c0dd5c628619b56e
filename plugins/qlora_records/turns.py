"""Turns of chats, brought from OpenAI's and ShareGPT's form into OpenAI's. What they may be is the core's to judge."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from qlora_core.errors import DataError
from qlora_records.json_text import from_text

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


def conversation(value: Any, roles: Mapping[str, str], where: str) -> list[Any]:
    """Return the turns in *value*, a list or one as JSON text, in OpenAI's form; what is no turn stays as it is.

    Raises DataError, beginning with *where*, for an answer that is not to be trained.
    """
    turns = from_text(value)
    listed = turns if isinstance(turns, list) else [turns]
    return [_turn(from_text(turn), roles, f"{where}[{index}]") for index, turn in enumerate(listed)]


def tools_of(value: Any) -> Any:
    """Return the tools in *value*, of which the list or each one may be JSON text, or None where there are none."""
    tools = from_text(value)
    if not tools or (isinstance(tools, str) and not tools.strip()):
        return None
    return [from_text(tool) for tool in tools] if isinstance(tools, list) else tools


def _turn(turn: Any, roles: Mapping[str, str], where: str) -> Any:
    if not isinstance(turn, dict):
        return turn
    if turn.get("role") is not None:
        # Parquet gives every turn all keys; one that is null says nothing, but for the content of a call
        kept = {key: value for key, value in turn.items() if (value is not None or key == "content") and key != "weight"}
        made = {**kept, "role": _role(turn["role"], roles)}
    elif turn.get("from") is not None:
        name, content = turn["from"], turn.get("value", turn.get("content"))
        calls = _calls(content) if name in CALLS and name not in roles else None
        called = {"role": "assistant", "content": None, "tool_calls": calls}
        made = called if calls else {"role": _role(name, roles), "content": content}
    else:
        return turn
    if made["role"] == "assistant" and turn.get("weight") not in (None, 1):
        raise DataError(
            f"{where} has the weight {turn['weight']!r}, and every answer of a chat is trained alike; leave the chat out, "
            "end it before that answer, or take the weights out and set data.train_on=last_turn if only the last answer counts"
        )
    return made


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

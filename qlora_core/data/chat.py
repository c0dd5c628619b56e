"""What a chat may be: its turns, their order and their content, brought into one form. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from qlora_core.data.findings import BadRow

__all__ = ["ROLES", "Turn", "answered", "called", "checked", "checked_pair", "checked_tools", "of_pair", "said", "visible_end"]

Turn = dict[str, Any]

ROLES = ("system", "user", "assistant", "tool")
FOLLOWS = {
    "": ("system", "user"),
    "system": ("user",),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("tool", "assistant"),
}
"""The roles that may follow a role; "" is the beginning."""


def checked(messages: Any) -> list[Turn]:
    """Return the turns of a chat in one form, or raise BadRow that names the first turn that is wrong.

    Keys without a value are left out: Arrow gives every row the keys of all. Content becomes one text, the arguments of
    tool calls become objects, and `developer` becomes `system`; other keys stay, templates may know them.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, (str, bytes)):
        raise BadRow("role", f"the chat is {_kind(messages)}, not a list of turns")
    if not messages:
        raise BadRow("empty", "the chat has no turns")
    turns: list[Turn] = []
    before, calling = "", False
    for number, message in enumerate(messages, 1):
        turn = _turn(message, number)
        role = turn["role"]
        if role not in FOLLOWS[before]:
            raise BadRow("order", f"{_name(number, role)}: {_order(before, role)}")
        if role == "tool" and before == "assistant" and not calling:
            raise BadRow("order", f"{_name(number, role)}: answers no call; the turn before it has no tool_calls")
        before, calling = role, "tool_calls" in turn
        turns.append(turn)
    if before == "system":
        raise BadRow("order", f"{_name(len(turns), before)}: no user turn follows")
    return turns


def answered(turns: Sequence[Turn]) -> bool:
    """Return whether the last turn is the assistant's; where it isn't, that turn teaches nothing."""
    return bool(turns) and turns[-1]["role"] == "assistant"


def called(turn: Turn) -> list[str]:
    """Return the names of the functions that a turn calls."""
    return [(call.get("function") or call)["name"] for call in turn.get("tool_calls", ())]


def visible_end(turn: Turn) -> str:
    """Return the last line of what an assistant's turn says, its thinking aside: it must stand in any text of the turn."""
    said = turn["content"].rpartition("</think>")[2].strip() or turn["content"].strip()
    return str(said.splitlines()[-1].strip()) if said else called(turn)[-1]


def checked_pair(prompt: Any, completion: Any, system: Any = None) -> tuple[str, str]:
    """Return prompt, the system's text before it, and completion, or raise BadRow: they are to be joined as they are."""
    for name, text in (("prompt", prompt), ("completion", completion), ("system", system)):
        if text is not None and not isinstance(text, str):
            raise BadRow("content", f"the {name} is {_kind(text)}, not text")
    if prompt is None:
        raise BadRow("empty", "there is no prompt")
    if completion is None or not completion.strip():
        raise BadRow("empty", "the completion is empty")
    return f"{system}\n\n{prompt}" if system else prompt, completion


def of_pair(prompt: Any, completion: Any, system: Any = None) -> list[Turn]:
    """Return *prompt* and *completion* as a chat of one question and its answer, which `checked` judges."""
    first = [{"role": "system", "content": system}] if system else []
    return [*first, {"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]


def checked_tools(tools: Any) -> list[dict[str, Any]] | None:
    """Return the descriptions of *tools*, without the keys that Arrow filled, or None where there are none.

    The list or each tool may be given as JSON text; raise BadRow where it is none.
    """
    if not tools or (isinstance(tools, str) and not tools.strip()):
        return None
    listed = _json(tools, "tools") if isinstance(tools, str) else tools
    if not isinstance(listed, Sequence) or isinstance(listed, str):
        raise BadRow("call", f"tools: {_kind(listed)}, not a list")
    read = [_json(tool, f"tool {number}") if isinstance(tool, str) else tool for number, tool in enumerate(listed, 1)]
    for number, tool in enumerate(read, 1):
        if not isinstance(tool, Mapping):
            raise BadRow("call", f"tool {number}: {_kind(tool)}, not an object")
    return [_without_none(tool) for tool in read] or None


def said(turns: Any) -> Iterator[str]:
    """Yield every text in *turns* that a template may write: content, reasoning, the names and arguments of calls."""
    if isinstance(turns, str):
        yield turns
    elif isinstance(turns, Mapping):
        for key, value in turns.items():
            yield key
            yield from said(value)
    elif isinstance(turns, (list, tuple)):
        for turn in turns:
            yield from said(turn)


def _turn(message: Any, number: int) -> Turn:
    if not isinstance(message, Mapping):
        raise BadRow("role", f"turn {number}: {_kind(message)}, not an object with role and content")
    role = "system" if message.get("role") == "developer" else message.get("role")
    if role not in ROLES:
        said = f"role {role!r}" if role is not None else f"no role; its keys are {', '.join(map(str, message)) or 'none'}"
        raise BadRow("role", f"turn {number}: {said}")
    where = _name(number, role)
    turn = {key: value for key, value in message.items() if value is not None}
    turn |= {"role": role, "content": _content(message.get("content"), where)}
    if "function_call" in turn:
        raise BadRow("call", f"{where}: function_call is an old form that templates ignore; write tool_calls")
    if calls := turn.pop("tool_calls", None):
        if role != "assistant":
            raise BadRow("call", f"{where}: only the assistant can call a tool")
        turn["tool_calls"] = _calls(calls, where)
    if role != "tool" and not calls and not turn["content"].strip():
        raise BadRow("empty", f"{where}: {'only white space' if turn['content'] else 'no content'}")
    return turn


def _content(content: Any, where: str) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, Sequence) or isinstance(content, bytes):
        raise BadRow("content", f"{where}: content is {_kind(content)}, not text")
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else _kind(part)
        if not isinstance(part, Mapping) or kind != "text" or not isinstance(part.get("text"), str):
            raise BadRow("content", f"{where}: a part of the content is {kind!r}, not a text")
        texts.append(part["text"])
    return "".join(texts)


def _calls(calls: Any, where: str) -> list[dict[str, Any]]:
    if not isinstance(calls, Sequence) or isinstance(calls, str):
        raise BadRow("call", f"{where}: tool_calls is {_kind(calls)}, not a list")
    return [_call(call, f"{where}: call {number}") for number, call in enumerate(calls, 1)]


def _call(call: Any, where: str) -> dict[str, Any]:
    """Return *call*, which is `{function: {name, arguments}}` or only `{name, arguments}`, with arguments as an object."""
    function = call.get("function") or call if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping):
        raise BadRow("call", f"{where}: {_kind(call)}, not an object with a function")
    name, arguments = function.get("name"), function.get("arguments")
    if not isinstance(name, str) or not name:
        raise BadRow("call", f"{where}: the function has no name")
    if isinstance(arguments, str):
        arguments = _json(arguments, f"{where} ({name}): arguments")
        if not isinstance(arguments, dict):
            raise BadRow("call", f"{where} ({name}): arguments are {_kind(arguments)}, not an object")
    elif arguments is None:  # a function without parameters
        arguments = {}
    elif isinstance(arguments, Mapping):
        arguments = _without_none(arguments)  # who means null writes the arguments as JSON text
    else:
        raise BadRow("call", f"{where} ({name}): arguments are {_kind(arguments)}, not an object")
    read = {**{key: value for key, value in function.items() if value is not None}, "arguments": arguments}
    if function is call:
        return read
    return {**{key: value for key, value in call.items() if value is not None}, "function": read}


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadRow("call", f"{where}: no JSON ({error})") from error


def _without_none(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    if isinstance(value, (list, tuple)):
        return [_without_none(item) for item in value]
    return value


def _order(before: str, role: str) -> str:
    if role == "system":
        return "only the first turn can be the system's"
    expected = " or ".join(FOLLOWS[before])
    return f"follows {f'a turn of the role {before}' if before else 'nothing'}; {expected} must stand there"


def _name(number: int, role: str) -> str:
    return f"turn {number} ({role})"


def _kind(value: Any) -> str:
    return "nothing" if value is None else type(value).__name__

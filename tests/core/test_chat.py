from __future__ import annotations

from typing import Any

import pytest

from qlora_core.data.chat import answered, checked, checked_pair, checked_tools, of_pair, said
from qlora_core.data.findings import FINDINGS, BadRow

S, U, A = ({"role": role, "content": role[0]} for role in ("system", "user", "assistant"))
T = {"role": "tool", "content": "4"}
CALL = {
    "role": "assistant",
    "content": None,
    "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": "{}"}}],
}


@pytest.mark.parametrize(
    "chat",
    [
        [U],
        [U, A],
        [S, U, A],
        [U, A, U, A],
        [U, A, U],
        [U, CALL, T, A],
        [U, CALL, T, T, A, U, A],
        [U, CALL, U, A],
        [U, CALL, T, CALL, T, A],
    ],
)
def test_turns_in_an_order_that_chats_have_are_kept(chat: list[dict[str, Any]]) -> None:
    assert [turn["role"] for turn in checked(chat)] == [turn["role"] for turn in chat]


@pytest.mark.parametrize(
    ("chat", "code", "detail"),
    [
        ([U, S, A], "order", "turn 2 (system): only the first turn can be the system's"),
        ([S, S, U], "order", "turn 2 (system): only the first turn can be the system's"),
        ([A], "order", "turn 1 (assistant): follows nothing; system or user must stand there"),
        ([S, A], "order", "turn 2 (assistant): follows a turn of the role system; user must stand there"),
        ([S], "order", "turn 1 (system): no user turn follows"),
        ([U, U], "order", "turn 2 (user): follows a turn of the role user; assistant must stand there"),
        ([U, A, A], "order", "turn 3 (assistant): follows a turn of the role assistant; user or tool must stand there"),
        ([U, T], "order", "turn 2 (tool): follows a turn of the role user; assistant must stand there"),
        ([U, A, T], "order", "turn 3 (tool): answers no call; the turn before it has no tool_calls"),
        ([U, CALL, T, U], "order", "turn 4 (user): follows a turn of the role tool; tool or assistant must stand there"),
        ([{"role": "human", "content": "x"}], "role", "turn 1: role 'human'"),
        ([{"from": "human", "value": "x"}], "role", "turn 1: no role; its keys are from, value"),
        (["hello"], "role", "turn 1: str, not an object with role and content"),
        ("hello", "role", "the chat is str, not a list of turns"),
        (None, "role", "the chat is nothing, not a list of turns"),
        ([], "empty", "the chat has no turns"),
        ([U, {"role": "assistant", "content": ""}], "empty", "turn 2 (assistant): no content"),
        ([U, {"role": "assistant"}], "empty", "turn 2 (assistant): no content"),
        ([{"role": "user", "content": " \n"}], "empty", "turn 1 (user): only white space"),
        ([{"role": "user", "content": 5}], "content", "turn 1 (user): content is int, not text"),
        ([{"role": "user", "content": {"text": "x"}}], "content", "turn 1 (user): content is dict, not text"),
        (
            [{"role": "user", "content": [{"type": "text", "text": "see"}, {"type": "image", "url": "x.png"}]}],
            "content",
            "turn 1 (user): a part of the content is 'image', not a text",
        ),
        ([{"role": "user", "content": ["x"]}], "content", "turn 1 (user): a part of the content is 'str', not a text"),
        ([U | {"tool_calls": CALL["tool_calls"]}], "call", "turn 1 (user): only the assistant can call a tool"),
        ([U, A | {"function_call": {"name": "f"}}], "call", "turn 2 (assistant): function_call is an old form"),
        ([U, A | {"tool_calls": "f()"}], "call", "turn 2 (assistant): tool_calls is str, not a list"),
        ([U, A | {"tool_calls": ["f"]}], "call", "turn 2 (assistant): call 1: str, not an object with a function"),
        (
            [U, A | {"tool_calls": [{"function": {"arguments": "{}"}}]}],
            "call",
            "turn 2 (assistant): call 1: the function has no name",
        ),
        (
            [U, A | {"tool_calls": [{"name": "f", "arguments": "{'a': 1}"}]}],
            "call",
            "call 1 (f): arguments: no JSON (Expecting",
        ),
        ([U, A | {"tool_calls": [{"name": "f", "arguments": "5"}]}], "call", "call 1 (f): arguments are int, not an object"),
        ([U, A | {"tool_calls": [{"name": "f", "arguments": [1]}]}], "call", "call 1 (f): arguments are list, not an object"),
    ],
)
def test_a_wrong_chat_names_its_first_wrong_turn(chat: Any, code: str, detail: str) -> None:
    with pytest.raises(BadRow) as caught:
        checked(chat)
    assert caught.value.code == code
    assert code in FINDINGS
    assert detail in caught.value.detail


def test_keys_that_arrow_fills_are_left_out_and_others_stay() -> None:
    chat = [
        {"role": "user", "content": "x", "name": "Ann", "tool_calls": None},
        {"role": "assistant", "content": "y", "tool_calls": []},
    ]
    assert checked(chat) == [{"role": "user", "content": "x", "name": "Ann"}, {"role": "assistant", "content": "y"}]
    assert chat[0]["tool_calls"] is None  # what was given stays as it was


def test_parts_are_joined_and_developer_is_system() -> None:
    parts = [{"type": "text", "text": "a ", "image_url": None}, {"type": "text", "text": "b"}]
    assert checked([{"role": "developer", "content": parts}, U])[0] == {"role": "system", "content": "a b"}


def test_a_tool_may_answer_with_nothing() -> None:
    assert checked([U, CALL, {"role": "tool", "content": None}, A])[2] == {"role": "tool", "content": ""}


@pytest.mark.parametrize(
    ("arguments", "read"),
    [('{"a": [1, null]}', {"a": [1, None]}), ({"a": 1, "b": None, "c": {"d": None}}, {"a": 1, "c": {}}), (None, {})],
)
def test_arguments_become_objects(arguments: Any, read: dict[str, Any]) -> None:
    call = {"id": "1", "type": None, "function": {"name": "f", "arguments": arguments}}
    turn = checked([U, {"role": "assistant", "content": None, "tool_calls": [call]}])[1]
    assert turn == {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": read}}],
    }
    bare = {"name": "f", "arguments": arguments}
    assert checked([U, A | {"tool_calls": [bare]}])[1]["tool_calls"] == [{"name": "f", "arguments": read}]


def test_an_unanswered_last_turn_is_told() -> None:
    assert answered([U, A])
    assert not answered([U, A, U])
    assert not answered([])


def test_a_pair_is_a_chat_of_one_question() -> None:
    assert of_pair("p", "c") == [{"role": "user", "content": "p"}, {"role": "assistant", "content": "c"}]
    assert of_pair("p", "c", "s")[0] == {"role": "system", "content": "s"}
    assert of_pair("p", "c", "") == of_pair("p", "c")


def test_a_pair_to_be_joined_is_text_with_the_system_before_the_prompt() -> None:
    assert checked_pair("p", "c") == checked_pair("p", "c", None) == checked_pair("p", "c", "") == ("p", "c")
    assert checked_pair("", " c") == ("", " c")
    assert checked_pair("p", "c", "s") == ("s\n\np", "c")
    for pair, message in (
        ((None, "c"), "empty: there is no prompt"),
        (("p", None), "empty: the completion is empty"),
        (("p", "c", 5), "content: the system is int, not text"),
    ):
        with pytest.raises(BadRow) as caught:
            checked_pair(*pair)
        assert str(caught.value) == message


def test_tools_lose_what_arrow_filled_and_may_be_json_text() -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {"properties": {"a": {"type": "string"}, "b": None}}}}
    clean = {"type": "function", "function": {"name": "f", "parameters": {"properties": {"a": {"type": "string"}}}}}
    assert checked_tools([tool]) == [clean]
    assert checked_tools('[{"name": "f"}]') == checked_tools(['{"name": "f"}']) == [{"name": "f"}]
    assert checked_tools(None) is checked_tools([]) is checked_tools(" ") is None
    for wrong, detail in (
        ("{", "tools: no JSON"),
        ({"name": "f"}, "tools: dict, not a list"),
        ([5], "tool 1: int, not an object"),
    ):
        with pytest.raises(BadRow, match=detail):
            checked_tools(wrong)


def test_said_gives_every_text_of_a_chat() -> None:
    call = {"function": {"name": "f", "arguments": {"key": ["deep"]}}}
    texts = list(said([{"role": "user", "content": "hello"}, {"role": "assistant", "tool_calls": [call]}]))
    assert {"hello", "f", "key", "deep"} <= set(texts)

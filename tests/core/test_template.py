from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import transformers
from tokenizers import Tokenizer, models, processors

from qlora_core.data.findings import BadRow
from qlora_core.data.template import NAMES, ChatTemplate, begin_ids
from qlora_core.errors import ConfigError

FOLDER = Path(__file__).parent / "chat_templates"
USER, ASSISTANT = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
CHAT = [{"role": "system", "content": "Be kind."}, USER, ASSISTANT, {"role": "user", "content": "Bye"}, ASSISTANT]


def make(template: Any = None, *, begins: bool = False, special: tuple[str, ...] = ()) -> transformers.PreTrainedTokenizerFast:
    """A tokenizer of few words; *begins* says whether it puts BOS before a text, as Llama's does."""
    backend = Tokenizer(models.WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2, "a": 3}, unk_token="<unk>"))
    if begins:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    made.add_special_tokens({"extra_special_tokens": list(special)})
    made.chat_template = template
    return made


def fixture(name: str, **special: str) -> ChatTemplate:
    source = (FOLDER / f"{name}.jinja").read_text()
    return ChatTemplate(name, source, special={"bos_token": "<s>", "eos_token": "</s>", **special})


def flat(rendered: tuple[str, list[list[tuple[int, int]]]]) -> tuple[str, list[tuple[int, int]]]:
    """Return the text and the stretches of all turns in one list."""
    text, turns = rendered
    return text, [span for turn in turns for span in turn]


def cut(template: ChatTemplate, messages: list[dict[str, Any]], train_on: str = "assistant", tools: Any = None) -> list[str]:
    text, spans = flat(template.turns(messages, tools, train_on))
    return [text[start:end] for start, end in spans]


def test_by_default_the_tokenizers_own_template_is_chosen_else_plain() -> None:
    own = ChatTemplate.choose(make("{{ messages[0].content }}"), None)
    assert own is not None
    assert (own.name, own.source) == ("tokenizer", "{{ messages[0].content }}")
    plain = ChatTemplate.choose(make(), None)
    assert plain is not None
    assert plain.name == "plain"
    assert ChatTemplate.choose(make("{{ 1 }}"), "none") is None


def test_a_tokenizer_with_several_templates_uses_the_one_for_tools() -> None:
    template = ChatTemplate.choose(make({"default": "d", "tool_use": "t {{ tools | length }}"}), None)
    assert template is not None
    assert template.render([USER]) == "d"
    assert template.render([USER], [{"name": "f"}]) == "t 1"
    with pytest.raises(ConfigError, match="has the chat templates rag, none of them the default; write one of chatml"):
        ChatTemplate.choose(make({"rag": "r"}), None)


def test_a_file_is_read_and_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.jinja").write_text("{{ messages[0].content }}!")
    template = ChatTemplate.choose(make(), "mine.jinja")
    assert template is not None
    assert template.render([USER]) == "Hi!"
    Path("broken.jinja").write_text("fine\n{% for x in %}\n")
    with pytest.raises(ConfigError, match=r"data\.template: broken\.jinja: line 2: no valid Jinja"):
        ChatTemplate.choose(make(), "broken.jinja")
    with pytest.raises(ConfigError, match=r"data\.template: gone/x\.jinja: no such file; write one of chatml"):
        ChatTemplate.choose(make(), "gone/x.jinja")
    with pytest.raises(ConfigError, match="the tokenizer's own chat template: line 1: no valid Jinja"):
        ChatTemplate.choose(make("{% if %}"), None)


def test_a_file_in_the_home_of_nobody_is_no_file() -> None:
    with pytest.raises(ConfigError, match=r"data\.template: ~no-such-user/x\.jinja: no such file; write one of chatml"):
        ChatTemplate.choose(make(), "~no-such-user/x.jinja")


def test_a_name_too_long_for_a_file_is_no_template() -> None:
    with pytest.raises(ConfigError, match=r"data\.template: no template 'aaaa"):
        ChatTemplate.choose(make(), "a" * 5_000)


LOOPS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


def test_a_template_that_does_not_end_stops_the_run_whatever_becomes_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qlora_core.data.template.SECONDS", 0.2)
    template = ChatTemplate("loops.jinja", LOOPS)
    with pytest.raises(ConfigError) as caught:
        template.turns([USER, ASSISTANT], None, "assistant")
    assert str(caught.value) == "data.template: loops.jinja: more than 0.2 s for one chat; does it come to an end?"


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError) as caught:
        ChatTemplate.choose(make(), "chatlm")
    message = (
        "no template 'chatlm'; did you mean 'chatml'?; write one of " + ", ".join(NAMES) + ", the path of a Jinja file, or none"
    )
    assert str(caught.value) == f"data.template: {message}"


TEXTS = {
    "chatml": "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
    "<|im_start|>assistant\n[Hello<|im_end|>\n]"
    "<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n[Hello<|im_end|>\n]",
    "llama3": "<s><|start_header_id|>system<|end_header_id|>\n\nBe kind.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n[Hello<|eot_id|>]<|start_header_id|>user<|end_header_id|>\n\nBye<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n[Hello<|eot_id|>]",
    "mistral": "<s>{INST} Be kind.\n\nHi{/INST}[ Hello</s>]{INST} Bye{/INST}[ Hello</s>]",
    "gemma": "<s><start_of_turn>user\nBe kind.\n\nHi<end_of_turn>\n<start_of_turn>model\n[Hello<end_of_turn>\n]"
    "<start_of_turn>user\nBye<end_of_turn>\n<start_of_turn>model\n[Hello<end_of_turn>\n]",
    "phi": "<|system|>\nBe kind.<|end|>\n<|user|>\nHi<|end|>\n<|assistant|>\n[Hello<|end|>\n]"
    "<|user|>\nBye<|end|>\n<|assistant|>\n[Hello<|end|>\n]",
    "plain": "System:\nBe kind.\n\nUser:\nHi\n\nAssistant:\n[Hello</s>\n\n]User:\nBye\n\nAssistant:\n[Hello</s>\n\n]",
}


@pytest.mark.parametrize("name", NAMES)
def test_our_templates_write_the_published_forms_and_their_answers_are_found(name: str) -> None:
    tokenizer = make()
    template = ChatTemplate.choose(tokenizer, name)
    assert template is not None
    text, spans = flat(template.turns(CHAT, None, "assistant"))
    for start, end in reversed(spans):
        text = f"{text[:start]}[{text[start:end]}]{text[end:]}"
    expected = TEXTS[name].replace("{INST}", "\0").replace("{/INST}", "\1")
    assert text == expected.replace("\0", "[INST]").replace("\1", "[/INST]")
    assert template.render(CHAT[:2], None, True) + cut(template, CHAT)[0] == template.render(CHAT[:3])
    assert template.render(CHAT) == tokenizer.apply_chat_template(CHAT, tokenize=False, chat_template=template.source)


@pytest.mark.parametrize("name", NAMES)
def test_our_templates_begin_with_bos_where_the_tokenizer_does(name: str) -> None:
    template = ChatTemplate.choose(make(begins=True), name)
    assert template is not None
    assert template.render(CHAT).startswith("<s>")
    assert not template.render(CHAT).startswith("<s><s>")
    assert (begin_ids(make(begins=True)), begin_ids(make())) == ([1], [])


@pytest.mark.parametrize("name", [name for name in NAMES if name != "chatml"])
def test_templates_without_tools_refuse_them(name: str) -> None:
    template = ChatTemplate.choose(make(), name)
    assert template is not None
    called = [USER, ASSISTANT | {"tool_calls": [{"name": "f", "arguments": {}}]}]
    for messages, tools in (([USER], [{"name": "f"}]), (called, None), ([*called, {"role": "tool", "content": "4"}], None)):
        with pytest.raises(BadRow, match=f"template: {name}: the template {name} knows no tools"):
            template.render(messages, tools)


def test_chatml_writes_calls_and_results() -> None:
    template = ChatTemplate.choose(make(), "chatml")
    assert template is not None
    calls = [{"function": {"name": "f", "arguments": {"a": "é"}}}, {"name": "g", "arguments": {}}]
    chat = [USER, {"role": "assistant", "content": "", "tool_calls": calls}, {"role": "tool", "content": "1"}]
    chat += [{"role": "tool", "content": "2"}, ASSISTANT]
    first = '<tool_call>\n{"name": "f", "arguments": {"a": "é"}}\n</tool_call>\n'
    first += '<tool_call>\n{"name": "g", "arguments": {}}\n</tool_call>'
    results = "<|im_start|>user\n<tool_response>\n1\n</tool_response>\n<tool_response>\n2\n</tool_response><|im_end|>\n"
    assert cut(template, chat) == [f"{first}<|im_end|>\n", "Hello<|im_end|>\n"]
    assert results in template.render(chat)
    with_tools = template.render(CHAT, [{"name": "f"}])
    assert with_tools.startswith(
        '<|im_start|>system\nBe kind.\n\nYou may call these functions:\n<tools>\n{"name": "f"}\n</tools>\n'
    )
    assert with_tools.count("Be kind.") == 1
    assert template.render([USER], [{"name": "f"}]).count("<|im_start|>system") == 1


def test_missing_tokens_are_those_that_a_named_template_writes() -> None:
    for special, missing in ((("<|im_start|>", "<|im_end|>"), []), (("<|im_start|>",), ["<|im_end|>"])):
        tokenizer = make(special=special)
        template = ChatTemplate.choose(tokenizer, "chatml")
        assert template is not None
        assert template.missing_tokens(tokenizer) == missing
    tokenizer = make()
    plain = ChatTemplate.choose(tokenizer, "plain")
    assert plain is not None
    assert plain.missing_tokens(tokenizer) == []
    tokenizer.eos_token = None
    plain = ChatTemplate.choose(tokenizer, "plain")
    assert plain is not None
    assert plain.missing_tokens(tokenizer) == ["eos_token"]
    tokenizer.bos_token = None  # which a template then does not write: nobody has to add a token of that name
    llama = ChatTemplate.choose(tokenizer, "llama3")
    assert llama is not None
    assert llama.missing_tokens(tokenizer) == ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]


def test_control_tokens_are_those_that_a_file_has_and_those_known_of_ours() -> None:
    template = ChatTemplate("mine.jinja", "{% for m in messages %}<turn>{{ m.content }}{% endfor %}", "<tools></turn>")
    assert [template.controls(token) for token in ("<turn>", "</turn>", "<tools>", "<scene>")] == [True, True, True, False]
    phi, chatml = (ChatTemplate.choose(make(), name) for name in ("phi", "chatml"))
    assert phi is not None
    assert chatml is not None
    assert (phi.controls("<|user|>"), phi.controls("<|im_end|>")) == (True, False)  # it writes '<|' + role + '|>'
    assert (chatml.controls("<|im_end|>"), chatml.controls("<tool_call>")) == (True, False)


def test_what_a_template_raises_is_about_the_row() -> None:
    with pytest.raises(BadRow, match="template: gemma: System role not supported"):
        fixture("gemma").render(CHAT)
    with pytest.raises(BadRow, match="template: x: can only concatenate str"):
        ChatTemplate("x", "{{ 'a' + 5 }}").render([USER])


def test_the_last_turn_alone_may_be_supervised() -> None:
    template = fixture("qwen25")
    chat = [USER, {"role": "assistant", "content": "one"}, USER, {"role": "assistant", "content": "two"}, USER]
    assert cut(template, chat) == ["one<|im_end|>\n", "two<|im_end|>\n"]
    assert cut(template, chat, "last_turn") == cut(template, chat, "completion") == ["two<|im_end|>\n"]
    assert cut(template, chat, "all") == [template.render(chat)]
    assert cut(template, [USER]) == cut(template, [USER], "last_turn") == []


def test_an_eos_that_ends_the_text_only_is_no_part_of_earlier_turns() -> None:
    assert cut(fixture("phi3"), CHAT) == ["Hello<|end|>\n", "Hello<|end|>\n</s>"]


def test_thinking_that_is_left_out_of_earlier_turns_is_no_riddle() -> None:
    thinking = {"role": "assistant", "content": "4", "reasoning_content": "2 and 2"}
    inline = {"role": "assistant", "content": "<think>\nhm\n</think>\n\n4\n\n4"}
    last = "<think>\n2 and 2\n</think>\n\n4<|im_end|>\n"
    assert cut(fixture("qwen3"), [USER, inline, USER, thinking, USER, thinking]) == [
        "4\n\n4<|im_end|>\n",
        "4<|im_end|>\n",
        last,
    ]
    spaced = {"role": "assistant", "content": "\n4"}
    assert cut(fixture("qwen3"), [USER, spaced, USER, spaced])[0] == "\n4<|im_end|>\n"
    assert cut(fixture("qwen3"), [USER, ASSISTANT]) == ["<think>\n\n</think>\n\nHello<|im_end|>\n"]


def test_thinking_before_a_tool_call() -> None:
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    written = '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call><|im_end|>\n'
    result = {"role": "tool", "content": "4"}
    assert cut(fixture("qwen3"), [USER, call, result, ASSISTANT]) == [written, "<think>\n\n</think>\n\nHello<|im_end|>\n"]
    thinks = call | {"reasoning_content": "x"}
    assert cut(fixture("qwen3"), [USER, thinks, result, ASSISTANT])[0] == f"<think>\nx\n</think>\n\n{written}"
    assert cut(fixture("qwen3"), [USER, thinks, result, ASSISTANT, USER, ASSISTANT])[0] == written


def test_a_template_that_asks_otherwise_than_it_answers_is_refused() -> None:
    with pytest.raises(BadRow) as caught:
        cut(fixture("thinks_first"), [USER, ASSISTANT])
    assert caught.value.code == "ambiguous"
    assert caught.value.detail == (
        "turn 2 (assistant): template thinks_first: asks for the answer with 'assistant\\n<think>\\n', "
        "but a chat that has it says 'assistant\\nHello<|im_end|>\\n'"
    )
    assert cut(fixture("mistral_system_last"), CHAT[1:]) == [" Hello</s>", " Hello</s>"]
    with pytest.raises(BadRow, match=r"turn 5 .* asks for the answer with 's>\[INST\] Be kind") as caught:
        cut(fixture("mistral_system_last"), CHAT, "last_turn")
    assert "but a chat that has it says 's>[INST] Bye" in caught.value.detail  # such a chat loses its system turn


def test_a_turn_whose_end_is_not_clear_is_refused() -> None:
    source = (
        "{% for m in messages %}{{ m.role[0] }}{{ m.content if loop.last or m.role == 'user' else m.content | reverse }}"
        "{% endfor %}{{ 'a' if add_generation_prompt }}"
    )
    chat = [USER, {"role": "assistant", "content": "xyzw"}, USER, {"role": "assistant", "content": "x"}]
    with pytest.raises(BadRow, match=r"turn 2 .*: writes the turn otherwise when later turns follow"):
        cut(ChatTemplate("odd", source), chat)
    with pytest.raises(BadRow, match=r"turn 2 .*: does not write the answer after the prompt for it"):
        cut(ChatTemplate("silent", "{{ messages[0].content }}"), [USER, ASSISTANT])
    picky = "{{ raise_exception('no answer') if messages[-1].role != 'assistant' }}{{ messages[-1].content }}"
    with pytest.raises(BadRow, match="ambiguous: the chat is fine, but not its beginning as a prompt: picky: no answer"):
        cut(ChatTemplate("picky", picky), [USER, ASSISTANT])


def test_thinking_that_is_left_out_between_its_marks() -> None:
    source = (
        "{% for m in messages %}{% if m.role == 'user' %}<|user|>{{ m.content }}{% else %}<|assistant|><think>"
        "{{ m.reasoning_content if loop.last }}</think>{{ m.content }}{% endif %}{% endfor %}"
        "{{ '<|assistant|>' if add_generation_prompt }}"
    )
    thinking = ASSISTANT | {"reasoning_content": "hm"}
    assert cut(ChatTemplate("glm", source), [USER, thinking, USER, thinking]) == [
        "<think></think>Hello",
        "<think>hm</think>Hello",
    ]


def test_what_a_template_leaves_out_is_told() -> None:
    call = {"role": "assistant", "content": "", "tool_calls": [{"name": "add", "arguments": {}}]}
    with pytest.raises(BadRow, match=r"template: turn 2 \(assistant\): template phi3 leaves out the tool calls"):
        cut(fixture("phi3"), [USER, call])
    asks = "{{ 'assistant: ' if add_generation_prompt }}"
    parts = ChatTemplate("parts", "{% for m in messages %}{{ m.role }}: {{ m.content[0].text }};{% endfor %}" + asks)
    with pytest.raises(BadRow, match=r"template: turn 3 \(assistant\): template parts leaves out or rewrites 'Hello'"):
        cut(parts, CHAT)


def test_marks_decide_where_the_template_has_them() -> None:
    assert fixture("chatml_marked").marked
    assert not fixture("qwen25").marked
    assert cut(fixture("chatml_marked"), CHAT) == ["Hello<|im_end|>\n", "Hello<|im_end|>\n"]
    assert cut(fixture("chatml_marked_short"), CHAT) == ["Hello", "Hello"]
    assert cut(fixture("chatml_marked_short"), [*CHAT[:4], ASSISTANT | {"content": "End"}], "last_turn") == ["End"]


def test_several_marks_belong_to_the_turn_that_they_stand_in() -> None:
    template = fixture("chatml_marked_parts")
    chat = [USER, ASSISTANT | {"reasoning_content": "hm"}, USER, ASSISTANT]
    assert cut(template, chat) == ["<think>hm", "Hello<|im_end|>", "Hello<|im_end|>"]
    assert cut(template, chat[:2], "last_turn") == ["<think>hm", "Hello<|im_end|>"]
    assert [len(turn) for turn in template.turns(chat, None, "assistant")[1]] == [2, 1]


def test_a_mark_that_follows_directly_upon_another_is_one_with_it() -> None:
    source = fixture("chatml_marked").source
    source += "{% if not add_generation_prompt %}{% generation %}{{ eos_token }}{% endgeneration %}{% endif %}"
    template = ChatTemplate("x", source, special={"eos_token": "</s>"})
    chat = [USER, ASSISTANT, USER, ASSISTANT]
    assert cut(template, chat) == ["Hello<|im_end|>\n", "Hello<|im_end|>\n</s>"]


def test_marks_that_are_elsewhere_than_the_answers_are_refused() -> None:
    marked = "{% if m.role == 'user' %}{% generation %}{{ m.content }}{% endgeneration %}{% else %}-{% endif %}"
    source = "{% for m in messages %}" + marked + "{% endfor %}"
    with pytest.raises(BadRow, match="ambiguous"):
        cut(ChatTemplate("odd", source), [USER, ASSISTANT])


def test_a_template_can_go_to_another_process_and_loads_no_torch() -> None:
    template = fixture("qwen25")
    assert pickle.loads(pickle.dumps(template)) == template
    code = "import sys, qlora_core.data.mask\n"
    code += "print([m for m in ('torch', 'transformers', 'jinja2') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"

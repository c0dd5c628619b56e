from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from qlora_core.data.chat import checked
from qlora_core.data.findings import BadRow
from qlora_core.data.mask import IGNORED, Masked, end_of_turn, joined, tokenized, typed_specials
from qlora_core.data.specials import special_ids, special_tokens
from qlora_core.data.template import ChatTemplate
from qlora_core.errors import ModelError

FOLDER = Path(__file__).parent / "chat_templates"
DATA = Path(__file__).parents[2].parent / "shared" / "data" / "chat"
WORDS = "user assistant system model tool name arguments Hi there Hello How are you Bye Be kind think hm answer response"
LLAMA3_SPLIT = r"(?i:'s|'t)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"

Tokenizers = Callable[[str], transformers.PreTrainedTokenizerFast]
CHATML = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
SPECIAL: dict[str, tuple[str, ...]] = {
    "chatml": CHATML,
    "qwen25": CHATML,
    "qwen3": (*CHATML, "<think>", "</think>", "<tool_call>", "</tool_call>"),  # the last four are added, but not special
    "llama3": ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "phi3": ("<s>", "<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
    "mistral": ("<s>", "</s>"),
    "gemma": ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"),
}
NAMED = {
    "chatml": {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
    "llama3": {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"},
    "phi3": {"bos_token": "<s>", "eos_token": "<|endoftext|>"},
    "mistral": {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
    "gemma": {"bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"},
}


def byte_level(family: str) -> Tokenizer:
    """Byte-level BPE, as GPT-2, Qwen, Llama 3; Llama 3's leaves the space before a word out of its offsets."""
    backend = Tokenizer(models.BPE())
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=family != "llama3")
    backend.pre_tokenizer = bytes_
    if family == "llama3":
        backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(LLAMA3_SPLIT), "isolated"), bytes_])
        backend.post_processor = processors.ByteLevel(trim_offsets=True)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    backend.train_from_iterator([f" {WORDS} {WORDS}", *WORDS.split()] * 20, trainer)
    return backend


def sentencepiece(family: str) -> Tokenizer:
    """A Unigram model of words, as Mistral's with a space before the text, or Gemma's without; other signs are bytes."""
    words = [(f"▁{word}", -4.0) for word in WORDS.split()] + [(word, -6.0) for word in WORDS.split()]
    signs = [(sign, -9.0) for sign in ["▁", "\n", *"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.?!,<>/[]|_{}:"]]
    in_bytes = [(f"<0x{byte:02X}>", -20.0) for byte in range(256)] if family != "mistral_unk" else []
    vocabulary = dict([("<unk>", 0.0), *words, *signs, *in_bytes])
    backend = Tokenizer(models.Unigram(list(vocabulary.items()), unk_id=0, byte_fallback=bool(in_bytes)))
    if family == "gemma":
        backend.normalizer = normalizers.Replace(" ", "▁")
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return backend


@pytest.fixture(scope="session")
def tokenizers() -> Tokenizers:
    """Returns the tokenizer of a family, with the family's special tokens and published template."""
    made: dict[str, transformers.PreTrainedTokenizerFast] = {}

    def make(name: str) -> transformers.PreTrainedTokenizerFast:
        if name not in made:
            family = name.removesuffix("_unk") if name.removesuffix("_unk") in SPECIAL else "chatml"
            backend = (sentencepiece if family in ("mistral", "gemma") else byte_level)(name)
            strips = family == "phi3"  # Phi-3's tokens swallow the white space after them
            for token in SPECIAL[family]:
                plain = token.strip("</>") in ("think", "tool_call")
                added = AddedToken(token, special=not plain, normalized=False, rstrip=strips and token.startswith("<|"))
                (backend.add_tokens if plain else backend.add_special_tokens)([added])
            named = NAMED.get(family, NAMED["chatml"])
            made[name] = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **named)
            made[name].chat_template = None if name == "chatml" else (FOLDER / f"{name.removesuffix('_unk')}.jinja").read_text()
        return made[name]

    return make


def template_of(tokenizer: transformers.PreTrainedTokenizerBase, wanted: str | None = None) -> ChatTemplate:
    template = ChatTemplate.choose(tokenizer, wanted)
    assert template is not None
    return template


def chat(*contents: str, system: str | None = None) -> list[dict[str, Any]]:
    turns = [{"role": ("user", "assistant")[index % 2], "content": text} for index, text in enumerate(contents)]
    return [*([{"role": "system", "content": system}] if system else []), *turns]


def one(
    tokenizer: transformers.PreTrainedTokenizerFast,
    messages: list[dict[str, Any]],
    wanted: str | None = None,
    train_on: str = "assistant",
    tools: Any = None,
) -> Masked:
    sample = tokenized(tokenizer, template_of(tokenizer, wanted), [(messages, tools)], train_on)[0]
    if isinstance(sample, BadRow):
        raise sample
    assert sample.input_ids.dtype == sample.labels.dtype == np.int32
    kept = sample.labels != IGNORED
    assert (sample.labels[kept] == sample.input_ids[kept]).all()
    return sample


def pieces(tokenizer: transformers.PreTrainedTokenizerFast, sample: Masked) -> list[tuple[str, bool]]:
    """Each token as it is written in the vocabulary, and whether it is supervised."""
    tokens = tokenizer.convert_ids_to_tokens(sample.input_ids.tolist())
    return list(zip(tokens, (sample.labels != IGNORED).tolist(), strict=True))


def marked(tokenizer: transformers.PreTrainedTokenizerFast, sample: Masked) -> str:
    """The text, with what is supervised in ⟦ ⟧; each run of tokens is decoded by itself."""
    text, run = "", []
    kept = (sample.labels != IGNORED).tolist()
    for index, (token, inside) in enumerate(zip(sample.input_ids.tolist(), kept, strict=True)):
        run.append(token)
        if index + 1 == len(kept) or kept[index + 1] != inside:
            said = tokenizer.decode(run, skip_special_tokens=False)
            text += f"⟦{said}⟧" if inside else said
            run = []
    return text


def test_chatml_token_by_token(tokenizers: Tokenizers) -> None:
    tokenizer = tokenizers("chatml")
    sample = one(tokenizer, chat("Hi there", "Hello you", "Bye", "Bye", system="Be kind"), "chatml")
    start, end, line = ("<|im_start|>", False), ("<|im_end|>", False), ("Ċ", False)
    assert pieces(tokenizer, sample) == [
        *(start, ("system", False), line, ("Be", False), ("Ġkind", False), end, line),
        *(start, ("user", False), line, ("Hi", False), ("Ġthere", False), end, line),
        *(start, ("assistant", False), line, ("Hello", True), ("Ġyou", True), ("<|im_end|>", True), line),
        *(start, ("user", False), line, ("Bye", False), end, line),
        *(start, ("assistant", False), line, ("Bye", True), ("<|im_end|>", True), line),
    ]
    assert (sample.turns, sample.ended, sample.merged) == (2, 2, 0)


def test_llama3_token_by_token(tokenizers: Tokenizers) -> None:
    tokenizer = tokenizers("llama3")
    sample = one(tokenizer, chat("Hi there", "Hello you", system="Be kind"))
    start, stop, end = ("<|start_header_id|>", False), ("<|end_header_id|>", False), ("<|eot_id|>", False)
    lines = ("Ċ", False), ("Ċ", False)
    assert pieces(tokenizer, sample) == [
        *(("<|begin_of_text|>", False), start, ("system", False), stop, *lines, ("Be", False), ("Ġkind", False), end),
        *(start, ("user", False), stop, *lines, ("Hi", False), ("Ġthere", False), end),
        *(start, ("assistant", False), stop, *lines, ("Hello", True), ("Ġyou", True), ("<|eot_id|>", True)),
    ]


def test_mistral_token_by_token(tokenizers: Tokenizers) -> None:
    tokenizer = tokenizers("mistral")
    sample = one(tokenizer, chat("Hi there", "Hello you", "Bye", "Bye"))
    shown = [piece for piece in pieces(tokenizer, sample) if piece[0] not in "[]/INST▁"]
    user = ("▁Hi", False), ("▁there", False)
    assert shown == [
        *(("<s>", False), *user, ("▁Hello", True), ("▁you", True), ("</s>", True)),
        *(("▁Bye", False), ("▁Bye", True), ("</s>", True)),
    ]
    assert (sample.turns, sample.ended, sample.merged) == (2, 2, 0)


def test_gemma_token_by_token(tokenizers: Tokenizers) -> None:
    tokenizer = tokenizers("gemma")
    sample = one(tokenizer, chat("Hi there", "Hello you"))
    start, end, line = ("<start_of_turn>", False), ("<end_of_turn>", False), ("\n", False)
    assert pieces(tokenizer, sample) == [
        *(("<bos>", False), start, ("user", False), line, ("Hi", False), ("▁there", False), end, line),
        *(start, ("model", False), line, ("Hello", True), ("▁you", True), ("<end_of_turn>", True), line),
    ]


def test_phi3_ends_a_turn_with_end_and_leaves_the_texts_eos_out(tokenizers: Tokenizers) -> None:
    tokenizer = tokenizers("phi3")
    sample = one(tokenizer, chat("Hi", "Hello", "Bye", "Hello you", system="Be kind"))
    user, assistant, end = ("<|user|>", False), ("<|assistant|>", False), ("<|end|>", False)
    assert pieces(tokenizer, sample) == [
        *(("<|system|>", False), ("Be", False), ("Ġkind", False), end),
        *(user, ("Hi", False), end, assistant, ("Hello", True), ("<|end|>", True)),
        *(user, ("Bye", False), end, assistant, ("Hello", True), ("Ġyou", True), ("<|end|>", True)),
        ("<|endoftext|>", False),
    ]
    assert (sample.turns, sample.ended, sample.merged) == (2, 2, 0)
    spaced = one(tokenizer, chat("Hi", " Hello"))  # <|assistant|> swallows the line break and the space
    assert (spaced.merged, marked(tokenizer, spaced)) == (1, "<|user|>Hi<|end|><|assistant|>⟦Hello<|end|>⟧<|endoftext|>")


def test_qwen3_thinking_is_supervised_where_the_template_leaves_it(tokenizers: Tokenizers) -> None:
    tokenizer = tokenizers("qwen3")
    thinks = {"role": "assistant", "content": "Hello", "reasoning_content": "hm"}
    sample = one(tokenizer, [*chat("Hi"), thinks, *chat("Bye"), thinks])
    assert marked(tokenizer, sample) == (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n⟦Hello<|im_end|>⟧\n"
        "<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n⟦<think>\nhm\n</think>\n\nHello<|im_end|>⟧\n"
    )
    assert (sample.turns, sample.ended) == (2, 2)


def test_tool_calls_are_supervised_and_their_results_are_not(tokenizers: Tokenizers) -> None:
    call = {"function": {"name": "add", "arguments": '{"a": 1}'}}
    turns = [*chat("Hi"), {"role": "assistant", "content": None, "tool_calls": [call, call]}, {"role": "tool", "content": "2"}]
    messages = checked([*turns, {"role": "tool", "content": "3"}, {"role": "assistant", "content": "Hello"}])
    called = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
    results = "<tool_response>\n2\n</tool_response>\n<tool_response>\n3\n</tool_response>"
    tail = f"<|im_end|>\n<|im_start|>user\n{results}<|im_end|>\n<|im_start|>assistant\n⟦Hello<|im_end|>⟧\n"
    tools = [{"name": "add"}]
    ours = marked(tokenizers("chatml"), one(tokenizers("chatml"), messages, "chatml", tools=tools))
    assert ours.endswith(
        f"Hi<|im_end|>\n<|im_start|>assistant\n⟦{called}\n{called}<|im_end|>⟧" + tail.removeprefix("<|im_end|>")
    )
    # Qwen 2.5 asks with a line break that the turn of a call then has before the call: the prompt is still its beginning
    theirs = marked(tokenizers("qwen25"), one(tokenizers("qwen25"), messages, tools=tools))
    assert theirs.endswith(
        f"Hi<|im_end|>\n<|im_start|>assistant\n⟦{called}\n{called}<|im_end|>⟧" + tail.removeprefix("<|im_end|>")
    )
    last = marked(tokenizers("qwen25"), one(tokenizers("qwen25"), messages, None, "last_turn"))
    assert last.count("⟦") == 1
    assert last.endswith("⟦Hello<|im_end|>⟧\n")


@pytest.mark.parametrize("name", ["chatml_marked", "chatml_marked_short", "chatml_marked_parts"])
def test_marks_give_what_prompts_give_with_the_end_of_turn(tokenizers: Tokenizers, name: str) -> None:
    tokenizer = tokenizers(name)
    messages = chat("Hi", "Hello you", "Bye", "Bye", system="Be kind")
    by_marks, by_prompts = one(tokenizer, messages), one(tokenizer, messages, "chatml")
    assert by_marks.input_ids.tolist() == by_prompts.input_ids.tolist()
    assert by_marks.labels.tolist() == by_prompts.labels.tolist()
    assert (by_marks.turns, by_marks.ended) == (2, 2)


NO_END = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
    "{{ '<|im_start|>assistant\n' if add_generation_prompt }}"
)


def test_behind_a_mark_the_next_turns_opener_is_no_end_of_turn(tokenizers: Tokenizers) -> None:
    tokenizer = tokenizers("chatml")
    sample = tokenized(tokenizer, ChatTemplate("x", NO_END), [(chat("Hi", "Hello", "Bye", "Bye"), None)])[0]
    assert isinstance(sample, Masked)
    turn = "<|im_start|>user\n{}<|im_start|>assistant\n⟦{}⟧"
    assert marked(tokenizer, sample) == turn.format("Hi", "Hello") + turn.format("Bye", "Bye")
    assert (sample.turns, sample.ended, sample.ends) == (2, 0, ())


def test_nor_is_it_where_only_the_text_has_an_end(tokenizers: Tokenizers) -> None:
    tokenizer = tokenizers("chatml")
    template = ChatTemplate("x", NO_END + "{{ '' if add_generation_prompt else '<|endoftext|>' }}")
    sample = tokenized(tokenizer, template, [(chat("Hi", "Hello", "Bye", "Bye"), None)])[0]
    assert isinstance(sample, Masked)
    assert marked(tokenizer, sample).endswith("⟦Bye<|endoftext|>⟧")
    assert "⟦Hello⟧<|im_start|>user" in marked(tokenizer, sample)
    assert (sample.turns, sample.ended) == (2, 1)


def test_behind_a_mark_what_follows_the_last_answer_ends_each_where_prompts_tell_nothing(tokenizers: Tokenizers) -> None:
    tokenizer = tokenizers("chatml")
    ended = NO_END.replace("{% endgeneration %}", "{% endgeneration %}<|im_end|>")
    template = ChatTemplate("x", ended.replace("assistant\n' if", "assistant\n<think>' if"))  # asks otherwise than it answers
    assert end_of_turn(tokenizer, template) is None
    sample = tokenized(tokenizer, template, [(chat("Hi", "Hello", "Bye", "Bye"), None)])[0]
    assert isinstance(sample, Masked)
    assert "⟦Hello<|im_end|>⟧<|im_start|>user" in marked(tokenizer, sample)
    assert marked(tokenizer, sample).endswith("⟦Bye<|im_end|>⟧")
    assert (sample.turns, sample.ended) == (2, 2)


def test_where_answers_begin_and_end_is_kept_and_counted_before_a_place(tokenizers: Tokenizers) -> None:
    tokenizer = tokenizers("chatml")
    sample = one(tokenizer, chat("Hi there", "Hello you", "Bye", "Bye", system="Be kind"), "chatml")
    tokens = [token for token, _ in pieces(tokenizer, sample)]
    assert [tokens[at] for at in (*sample.starts, *sample.ends)] == ["Hello", "Bye", "<|im_end|>", "<|im_end|>"]
    assert (sample.starts, sample.ends) == ((17, 30), (19, 31))
    counted = {limit: sample.within(limit) for limit in (17, 18, 19, 20, 30, 31, 32)}
    assert counted == {17: (0, 0), 18: (1, 0), 19: (1, 0), 20: (1, 1), 30: (1, 1), 31: (2, 1), 32: (2, 2)}


def test_several_marks_in_a_turn_are_one_turn(tokenizers: Tokenizers) -> None:
    tokenizer = tokenizers("chatml_marked_parts")
    sample = one(tokenizer, [*chat("Hi"), {"role": "assistant", "content": "Hello", "reasoning_content": "hm"}])
    assert marked(tokenizer, sample).endswith("assistant\n⟦<think>hm⟧</think>\n⟦Hello<|im_end|>⟧\n")
    assert (sample.turns, sample.ended) == (1, 1)


def test_a_template_without_end_of_turn_is_counted_as_such(tokenizers: Tokenizers) -> None:
    tokenizer = tokenizers("alpaca")
    sample = one(tokenizer, chat("Hi", "Hello", "Bye", "Hello"))
    shown = "### Instruction:\nHi\n\n### Response:\n⟦Hello\n\n⟧### Instruction:\nBye\n\n### Response:\n⟦Hello\n\n⟧"
    assert marked(tokenizer, sample) == shown
    assert (sample.turns, sample.ended) == (2, 0)
    assert end_of_turn(tokenizer, template_of(tokenizer)) is None


def test_chatml_spelt_with_ordinary_tokens_is_not_counted_as_ended(tokenizers: Tokenizers) -> None:
    tokenizer = tokenizers("gemma")
    sample = one(tokenizer, chat("Hi", "Hello"), "chatml")
    assert marked(tokenizer, sample) == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n⟦Hello<|im_end|>\n⟧"
    assert (sample.turns, sample.ended) == (1, 0)


@pytest.mark.parametrize(
    ("family", "end"),
    [
        ("qwen25", "<|im_end|>"),
        ("qwen3", "<|im_end|>"),
        ("chatml_marked_short", "<|im_end|>"),
        ("llama3", "<|eot_id|>"),
        ("mistral", "</s>"),
        ("gemma", "<end_of_turn>"),
        ("phi3", "<|end|>"),
    ],
)
def test_the_end_of_turn_of_a_template_is_known(tokenizers: Tokenizers, family: str, end: str) -> None:
    tokenizer = tokenizers(family)
    assert tokenizer.convert_ids_to_tokens(end_of_turn(tokenizer, template_of(tokenizer))) == end


@pytest.mark.parametrize("marks", [("", ""), ("{% generation %}", "{% endgeneration %}")])
def test_where_two_tokens_end_a_turn_the_last_is_its_end(tokenizers: Tokenizers, marks: tuple[str, str]) -> None:
    tokenizer = tokenizers("phi3")  # Cohere's models have <|END_RESPONSE|><|END_OF_TURN_TOKEN|>; the second one stops them
    answer = "{{ m.content if m.role == 'user' }}{% if m.role == 'assistant' %}" + "{{ m.content }}".join(marks) + "{% endif %}"
    source = "{% for m in messages %}<|{{ m.role }}|>" + answer + "<|system|><|end|>{% endfor %}"
    template = ChatTemplate(
        "x", source + "{{ '<|assistant|>' if add_generation_prompt else eos_token }}", special=NAMED["phi3"]
    )
    sample = tokenized(tokenizer, template, [(chat("Hi", "Hello", "Hi", "Hello"), None)])[0]
    assert isinstance(sample, Masked)
    turn = "<|user|>Hi<|system|><|end|><|assistant|>⟦Hello<|system|><|end|>⟧"
    assert marked(tokenizer, sample) == f"{turn}{turn}<|endoftext|>"
    assert (sample.turns, sample.ended) == (2, 2)


def test_special_tokens_before_the_end_of_turn_are_no_end(tokenizers: Tokenizers) -> None:
    tokenizer = tokenizers("phi3")
    source = (FOLDER / "alpaca.jinja").read_text().replace("message.content", "message.content + message.get('tail', '')")
    template = ChatTemplate("x", source.replace("'\\n\\n'", "'<|end|>'"))
    turn = {"role": "assistant", "content": "Hello", "tail": "<|user|><|system|>"}
    sample = tokenized(tokenizer, template, [([*chat("Hi"), turn], None)])[0]
    assert isinstance(sample, Masked)
    assert marked(tokenizer, sample).endswith("⟦Hello<|user|><|system|><|end|>⟧")


def test_an_unknown_character_at_the_end_is_no_end_of_turn(tokenizers: Tokenizers) -> None:
    tokenizer = tokenizers("mistral_unk")
    sample = one(tokenizer, chat("Hi", "Hello ☃"))
    assert pieces(tokenizer, sample)[-3:] == [("▁", True), ("<unk>", True), ("</s>", True)]
    template = ChatTemplate("x", (FOLDER / "alpaca.jinja").read_text().replace("\\n\\n", ""))
    alone = tokenized(tokenizer, template, [(chat("Hi", "Hello ☃"), None)])[0]
    assert isinstance(alone, Masked)
    assert alone.ended == 0
    assert pieces(tokenizer, alone)[-3:] == [("Hello", True), ("▁", True), ("<unk>", True)]


CONTENTS = ("Hello", "Hello you, how are you?", "héllo 😀 you", "two\n\nlines", "ends\n", "日本語 あ", "a  b   c", "x" * 40)


@pytest.mark.parametrize(
    "family", ["qwen25", "qwen3", "llama3", "phi3", "gemma", "mistral", "chatml_marked", "chatml_marked_short"]
)
@pytest.mark.parametrize("content", CONTENTS)
def test_supervised_tokens_are_the_answers_and_their_ends(tokenizers: Tokenizers, family: str, content: str) -> None:
    tokenizer = tokenizers(family)
    template = template_of(tokenizer)
    messages = chat("Hi there", content, "é 日", "Bye", "Bye", content)
    sample = one(tokenizer, messages)
    end = {"llama3": "<|eot_id|>", "phi3": "<|end|>", "gemma": "<end_of_turn>", "mistral": "</s>"}.get(family, "<|im_end|>")
    said = content.strip() if family in ("llama3", "gemma") else content
    expected = [f"{said}{end}", f"Bye{end}", f"{said}{end}"]
    if family == "qwen3":
        expected[-1] = f"<think>\n\n</think>\n\n{expected[-1]}"
    if family == "mistral":
        expected = [f" {text}" for text in expected]
    assert tokenizer.decode(sample.labels[sample.labels != IGNORED], skip_special_tokens=False) == "".join(expected)
    assert (sample.turns, sample.ended, sample.merged) == (3, 3, 0)
    ids = tokenizer.apply_chat_template(messages, tokenize=True)["input_ids"]
    assert sample.input_ids.tolist() == ids
    for index in (1, 3, 5):
        prompt = tokenizer.apply_chat_template(messages[:index], add_generation_prompt=True)["input_ids"]
        assert ids[: len(prompt)] == prompt
        kept = (sample.labels != IGNORED).tolist()
        assert not kept[len(prompt) - 1]
        assert kept[len(prompt)]
    assert template.render(messages) == tokenizer.apply_chat_template(messages, tokenize=False)


@pytest.mark.parametrize("family", ["chatml", "llama3"])
def test_a_token_that_spans_prompt_and_answer_is_not_supervised(tokenizers: Tokenizers, family: str) -> None:
    tokenizer = tokenizers(family)
    source = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{{ 'assistant: ' if add_generation_prompt }}"
    template = ChatTemplate("x", source)
    spanning, fitting, inner = (
        tokenized(tokenizer, template, [(chat("Hi", text), None)])[0] for text in ("Hello you", ".Hello", " Hello")
    )
    assert isinstance(spanning, Masked)
    assert pieces(tokenizer, spanning)[-4:] == [(":", False), ("ĠHello", False), ("Ġyou", True), ("Ċ", True)]
    assert spanning.merged == 1
    assert isinstance(inner, Masked)
    assert inner.merged == 0  # the first of two spaces is a token of its own, and the prompt's
    assert pieces(tokenizer, inner)[-4:] == [(":", False), ("Ġ", False), ("ĠHello", True), ("Ċ", True)]
    assert isinstance(fitting, Masked)
    assert [piece for piece in pieces(tokenizer, fitting) if piece[1]][-1] == ("Ċ", True)


def test_a_bad_chat_does_not_stop_the_others(tokenizers: Tokenizers) -> None:
    tokenizer = tokenizers("mistral")
    chats = [chat("Hi", "Hello"), [*chat("Hi"), *chat("Hi")], chat("Hi", "\ud83d"), chat("Bye", "Bye")]
    first, refused, half, last = tokenized(tokenizer, template_of(tokenizer), [(messages, None) for messages in chats])
    assert isinstance(first, Masked)
    assert isinstance(last, Masked)
    assert first.input_ids.tolist() == one(tokenizer, chats[0]).input_ids.tolist()
    assert last.labels.tolist() == one(tokenizer, chats[3]).labels.tolist()
    assert isinstance(refused, BadRow)
    assert refused.detail == "tokenizer: roles must alternate user/assistant"
    assert isinstance(half, BadRow)
    assert half.code == "content"
    assert tokenized(tokenizer, template_of(tokenizer), []) == []


def test_all_and_unanswered(tokenizers: Tokenizers) -> None:
    tokenizer = tokenizers("qwen25")
    everything = one(tokenizer, chat("Hi", "Hello"), None, "all")
    assert everything.labels.tolist() == everything.input_ids.tolist()
    nothing = one(tokenizer, chat("Hi"))
    assert (nothing.labels == IGNORED).all()
    assert (nothing.turns, nothing.ended) == (0, 0)


def test_truncation_and_padding_left_in_the_tokenizer_are_switched_off(tokenizers: Tokenizers) -> None:
    tokenizer = tokenizers("qwen25")
    tokenizer.backend_tokenizer.enable_truncation(5)
    tokenizer.backend_tokenizer.enable_padding(length=100)
    sample = one(tokenizer, chat("Hi", "Hello"))
    assert sample.input_ids.tolist() == tokenizer.apply_chat_template(chat("Hi", "Hello"))["input_ids"]


def test_prompt_and_completion_are_joined_as_one_text(tokenizers: Tokenizers) -> None:
    tokenizer = tokenizers("qwen25")
    good, spanning, half = joined(tokenizer, [("Hi there", " you"), ("Hi ", "there you"), ("Hi", "\udc00")])
    assert isinstance(good, Masked)
    assert pieces(tokenizer, good) == [("Hi", False), ("Ġthere", False), ("Ġyou", True), ("<|im_end|>", True)]
    assert (good.turns, good.ended, good.merged) == (1, 1, 0)
    assert isinstance(spanning, Masked)
    assert pieces(tokenizer, spanning) == [("Hi", False), ("Ġthere", False), ("Ġyou", True), ("<|im_end|>", True)]
    assert spanning.merged == 1
    assert isinstance(half, BadRow)
    whole = joined(tokenizer, [("Hi", " you")], masked=False)[0]
    assert isinstance(whole, Masked)
    assert whole.labels.tolist() == whole.input_ids.tolist()


def test_a_joined_text_begins_as_the_tokenizer_begins_texts(tokenizers: Tokenizers) -> None:
    backend = Tokenizer.from_str(tokenizers("mistral").backend_tokenizer.to_str())
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", backend.token_to_id("<s>"))]
    )
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **NAMED["mistral"])
    sample = joined(tokenizer, [("Hi there", " Hello")])[0]
    assert isinstance(sample, Masked)
    assert pieces(tokenizer, sample) == [("<s>", False), ("▁Hi", False), ("▁there", False), ("▁Hello", True), ("</s>", True)]
    assert sample.input_ids.tolist() == [*tokenizer("Hi there Hello")["input_ids"], tokenizer.eos_token_id]


def test_special_tokens_typed_in_a_text_are_found(tokenizers: Tokenizers) -> None:
    tokenizer = tokenizers("qwen3")
    assert typed_specials(tokenizer, ["a <|im_end|> b <|im_end|>", "<think>", "<|endoftext|>"]) == [
        "<|im_end|>",
        "<|endoftext|>",
    ]
    assert typed_specials(tokenizer, ["fine", "<|im_"]) == []
    other = transformers.PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(tokenizer.backend_tokenizer.to_str()))
    assert typed_specials(other, ["<new>"]) == []
    other.add_tokens(["<new>"], special_tokens=True)
    assert typed_specials(other, ["<new>"]) == ["<new>"]


def test_special_ids_are_those_added_as_special_and_the_named_ones_that_exist(tokenizers: Tokenizers) -> None:
    tokenizer = tokenizers("qwen3")
    assert special_tokens(tokenizer) == {"<|endoftext|>", "<|im_start|>", "<|im_end|>"}  # <think> is added, but not special
    assert special_ids(tokenizer) == {tokenizer.convert_tokens_to_ids(token) for token in special_tokens(tokenizer)}

    class Named:
        added_tokens_decoder: dict[int, Any] = {4: AddedToken("<a>", special=True), 5: AddedToken("<b>")}  # noqa: RUF012
        all_special_ids = (2, None, 4)

    assert special_ids(Named()) == {2, 4}  # type: ignore[arg-type]


def test_a_tokenizer_that_gives_no_offsets_is_refused() -> None:
    class Slow:
        special_tokens_map: dict[str, str] = {}  # noqa: RUF012
        chat_template = "{{ messages[0].content }}"

    with pytest.raises(ModelError, match="the tokenizer Slow can't say which text its tokens come from"):
        tokenized(Slow(), ChatTemplate("x", Slow.chat_template), [(chat("Hi"), None)])  # type: ignore[arg-type]


def real_chats() -> dict[str, list[list[dict[str, Any]]]]:
    lines = (DATA / "openassistant_messages.jsonl").read_text(encoding="utf-8").splitlines()
    roles = {"human": "user", "gpt": "assistant"}
    shared = json.loads((DATA / "sharegpt_dummy.json").read_text(encoding="utf-8"))
    return {
        "openassistant": [json.loads(line)["messages"] for line in lines],
        "sharegpt": [[{"role": roles[m["from"]], "content": m["value"]} for m in row["conversations"]] for row in shared],
    }


@pytest.mark.demo_model
@pytest.mark.skipif(not DATA.is_dir(), reason="the shared chats are not there")
@pytest.mark.parametrize("wanted", [None, "chatml", "plain"])
def test_real_chats_with_a_real_tokenizer(demo_folder: Path, wanted: str | None) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(demo_folder)
    template = template_of(tokenizer, wanted)
    for name, chats in real_chats().items():
        samples = tokenized(tokenizer, template, [(checked(messages), None) for messages in chats])
        for messages, sample in zip(chats, samples, strict=True):
            assert isinstance(sample, Masked), name
            answers = [turn["content"] for turn in messages if turn["role"] == "assistant"]
            said = "".join((text.strip() if wanted == "plain" else text) + "<|im_end|>" for text in answers)
            assert tokenizer.decode(sample.labels[sample.labels != IGNORED]) == said
            assert (sample.turns, sample.ended, sample.merged) == (len(answers), len(answers), 0)
            assert (
                sample.input_ids.tolist() == tokenizer.apply_chat_template(messages, chat_template=template.source)["input_ids"]
            )

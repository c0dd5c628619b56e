"""`qlora data`: a person can't miss what is wrong, a program gets all of it, and nothing in the data can do harm."""

from __future__ import annotations

import html
import json
import re
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from rich.style import Style
from rich.text import Text

REAL = Path(__file__).parents[3] / "shared" / "data"
CHATS = [
    [{"role": "user", "content": "What is 1 and 1?"}, {"role": "assistant", "content": "It is two."}],
    [
        {"role": "user", "content": "Say <script>alert(1)</script> & go"},
        {"role": "assistant", "content": "No, [bold]never\x1b[2J."},
    ],
    [{"role": "user", "content": "🦙?"}, {"role": "assistant", "content": "Yes,\na llama."}],
]


@pytest.fixture
def chats(here: Path, write_config: Callable[..., Path]) -> Callable[..., Path]:
    """Return a function that writes a configuration for chats, by default for the three above in blocks of 128 tokens."""

    def write(rows: list[Any] = CHATS, **data: Any) -> Path:
        (here / "chats.jsonl").write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows), encoding="utf-8")
        source = {"name": "records", "path": str(here / "chats.jsonl")}
        return write_config(dataset=source, data={"sequence_length": 128, "eval_fraction": 0.0, **data})

    return write


def report(qlora: Callable[..., Any], *arguments: object) -> Any:
    result = qlora("data", *arguments, "--json")
    assert result.code == 0, result.err
    return json.loads(result.out)


def test_its_help_has_an_example_and_it_refuses_a_wrong_configuration_before_anything_heavy(
    qlora: Callable[..., Any], here: Path
) -> None:
    text = qlora("data", "--help").out
    assert "qlora data qlora.yaml" in text
    assert "Example" in text
    (here / "wrong.yaml").write_text("model: m\ndataset: {name: text, path: x}\ndata: {length: 1}\n")
    code = (
        "import sys, atexit\n"
        "heavy = ('torch', 'transformers', 'datasets', 'numpy')\n"
        "atexit.register(lambda: print([n for n in heavy if n in sys.modules], file=sys.stderr))\n"
        "from qlora_core.cli.main import main\nmain(['data', 'wrong.yaml'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "wrong.yaml:3: data.length" in done.stderr
    assert done.stderr.splitlines()[-1] == "[]"


# Statistics


def test_the_counts_stand_in_the_text_as_in_the_json(qlora: Callable[..., Any], chats: Callable[..., Path]) -> None:
    config = chats()
    counts = report(qlora, config)["statistics"]["train"]
    result = qlora("data", config, "--sample", "0")
    assert result.code == 0
    cells = dict(re.findall(r"^│ ([a-z ]+?) +│ (.+?) +│$", result.out, re.MULTILINE))
    assert cells["samples"] == "3"
    assert cells["tokens"] == f"{counts['tokens']:,}"
    assert cells["supervised"] == f"{counts['supervised']:,} ({100 * counts['supervised'] / counts['tokens']:.1f} %)"
    assert cells["answers"] == "3, all with a supervised end"
    assert cells["packing"] == f"{100 * counts['tokens'] / (counts['blocks'] * 128):.1f} % full"
    assert cells["cut off"] == "none"
    assert "what the assistant says (records: chats, train_on assistant)" in result.out
    assert "plain, ends an answer with <eos>" in result.out
    assert "⟦" not in result.out


def test_without_a_configuration_file_model_and_data_are_enough(
    qlora: Callable[..., Any], tiny_model: Path, text_file: Path
) -> None:
    found = report(qlora, "--model", tiny_model, "--data", text_file, "--set", "data.sequence_length=64")
    assert found["template"] is None
    assert found["statistics"]["train"]["longest"] == 64
    assert qlora("data", "--model", tiny_model).code == 2


def test_without_packing_the_padding_is_said(qlora: Callable[..., Any], chats: Callable[..., Path]) -> None:
    result = qlora("data", chats(packing=False))
    assert re.search(r"padding +│ \d+\.\d % of the positions", result.out)
    assert "── sample 1 · chats.jsonl:1" in result.out
    assert "block 1" not in result.out


def test_a_template_that_cannot_end_an_answer_is_marked() -> None:
    from qlora_core.cli.data_facts import facts
    from qlora_core.data.inspect import Inspection

    found = Inspection(128, True, False, {"train": 2}, 1, "chatml", None, ["<|im_start|>", "<|im_end|>"], [], {}, [], [])
    assert facts(found) == [
        ("read", "2 train samples, 1 left out"),
        ("template", "chatml, ⚠ ends an answer with no special token"),
        ("⚠ no tokens", "<|im_start|>, <|im_end|>: the tokenizer has them not, so they are spelt with several others"),
    ]


def test_a_bar_shows_the_count_and_a_mark_the_limit() -> None:
    from qlora_core.cli.data_terminal import BAR, bars
    from qlora_core.data.inspect import Bin

    lines = bars([Bin(1, 64, 80), Bin(65, 128, 40), Bin(129, 256, 0), Bin(257, 512, 1)], 128)
    assert [line.count("█") for line in lines] == [BAR, BAR // 2, 0, 0, 0]
    assert [line.rpartition(" ")[2] for line in lines] == ["80", "40", "128", "0", "1"]
    assert lines[2].endswith("┄ sequence_length 128")
    assert "▌" in lines[4]
    assert bars([Bin(1, 64, 1)], 128)[-1].endswith("┄ sequence_length 128")


def test_a_stream_says_that_its_counts_are_those_of_the_first_rows(
    qlora: Callable[..., Any], chats: Callable[..., Path]
) -> None:
    result = qlora("data", chats(streaming=True, gate_rows=2))
    assert result.code == 0, result.err
    assert "these are the first rows of the stream" in result.out
    assert "chats.jsonl:2" in result.out
    assert "chats.jsonl:3" not in result.out


# The preview


def test_plain_text_marks_what_is_supervised_and_what_is_special(qlora: Callable[..., Any], chats: Callable[..., Path]) -> None:
    result = qlora("data", chats())
    assert "\x1b" not in result.out
    assert "What is 1 and 1?" in result.out
    assert "⟦It is two.«<eos>»⟧" in result.out.replace("⟦ ", "⟦")
    assert "Yes,⏎\na llama." in result.out
    assert "🦙?" in result.out


def test_a_packed_block_shows_where_one_sample_ends_and_the_next_comes_from(
    qlora: Callable[..., Any], chats: Callable[..., Path]
) -> None:
    result = qlora("data", chats(sequence_length=256))
    found = report(qlora, chats(sequence_length=256))
    assert found["read"] == {"train": 3}
    (block,) = found["blocks"]
    headings = re.findall(r"^[━─]{2} (.*?) [━─]+$", result.out, re.MULTILINE)
    sizes = [len(sample["tokens"]) for sample in block["samples"]]
    assert headings == [
        f"block 1 of 1 · 3 samples · {sum(sizes)} tokens",
        *(f"sample {n} of 3 · chats.jsonl:{n} · {size} tokens" for n, size in enumerate(sizes, 1)),
    ]
    assert (
        len(re.findall(r"^supervised \d+ of \d+ tokens · 1 answer, 1 with a supervised end · ends with", result.out, re.M)) == 3
    )


def test_what_a_terminal_would_obey_is_shown_and_not_obeyed(qlora: Callable[..., Any], chats: Callable[..., Path]) -> None:
    result = qlora("data", chats())
    assert "[bold]never␛[2J." in result.out


def style_of(text: Text, part: str) -> Style:
    return style_at(text, text.plain.index(part))


def style_at(text: Text, at: int) -> Style:
    styles = [Style.parse(str(span.style)) for span in text.spans if span.start <= at < span.end]
    return Style.combine([Style(), *styles])


def test_colours_stand_for_the_marks(
    qlora: Callable[..., Any], chats: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    out = qlora("data", chats()).out
    preview = Text.from_ansi(out[out.index("sample 1 of") :])
    assert "⟦" not in preview.plain
    assert "«" not in preview.plain
    assert style_of(preview, "two").color.number == 2  # type: ignore[union-attr]
    assert style_of(preview, "and 1?").dim
    special = style_of(preview, "<eos>")
    assert (special.bold, special.bgcolor.number) == (True, 2)  # type: ignore[union-attr]
    at = preview.plain.index("\n") + 1  # below the heading
    for token in report(qlora, chats())["blocks"][0]["samples"][0]["tokens"]:
        text = token["text"].replace("\n", "⏎\n")
        assert preview.plain.startswith(text.rstrip("\n"), at)
        assert style_at(preview, at).underline is (token["index"] % 2 == 1 or None)
        at += len(text)


@pytest.mark.parametrize("variable", [("NO_COLOR", "1"), ("TERM", "dumb")])
def test_a_terminal_without_colours_gets_the_marks(
    qlora: Callable[..., Any], chats: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, variable: tuple[str, str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv(*variable)
    assert "«<eos>»⟧" in Text.from_ansi(qlora("data", chats()).out).plain


def test_tokens_stand_one_per_line_with_index_id_and_label(qlora: Callable[..., Any], chats: Callable[..., Path]) -> None:
    config = chats()
    sample = report(qlora, config)["blocks"][0]["samples"][0]
    lines = qlora("data", config, "--tokens", "--sample", "1").out.splitlines()
    at = next(index for index, line in enumerate(lines) if line.split() == ["index", "id", "label", "text"])
    for token, line in zip(sample["tokens"], lines[at + 1 :], strict=False):
        index, number, label, said = line.split(maxsplit=3)
        assert (int(index), int(number)) == (token["index"], token["id"])
        assert label == ("-" if token["label"] is None else str(token["id"]))
        assert said.startswith("⟦") == token["supervised"]
    assert any("of the same character" in line for line in qlora("data", config, "--tokens").out.splitlines())


def test_long_samples_are_shortened_unless_all_is_wanted(qlora: Callable[..., Any], chats: Callable[..., Path]) -> None:
    words = " ".join(f"word{number}" for number in range(40))
    config = chats([[{"role": "user", "content": "Go"}, {"role": "assistant", "content": words}]], sequence_length=256)
    short, full = qlora("data", config).out, qlora("data", config, "--full").out
    (left_out,) = re.findall(r"⋯ (\d+) tokens ⋯", short)
    sample = report(qlora, config)["blocks"][0]["samples"][0]
    assert int(left_out) == sample["supervised"] - 48 - 24
    assert "word20" not in short
    assert "word39" in short
    assert words in full
    assert "⋯" not in full


def test_of_a_full_block_some_samples_are_shown_unless_all_are_wanted(
    qlora: Callable[..., Any], chats: Callable[..., Path]
) -> None:
    rows = [[{"role": "user", "content": f"{n}"}, {"role": "assistant", "content": f"{n + 1}"}] for n in range(7)]
    config = chats(rows, sequence_length=256)
    shown = [int(n) for n in re.findall(r"chats.jsonl:(\d) ·", qlora("data", config).out)]
    assert shown == [1, 2, 3, 7]
    assert "⋯ 3 more samples in this block" in qlora("data", config).out
    assert re.findall(r"chats.jsonl:(\d) ·", qlora("data", config, "--full").out) == list("1234567")


# What should not be overlooked


def test_an_answer_that_is_cut_off_is_marked(qlora: Callable[..., Any], chats: Callable[..., Path]) -> None:
    long = [{"role": "user", "content": "Go"}, {"role": "assistant", "content": "on and on " * 20}]
    result = qlora("data", chats([CHATS[0], long], sequence_length=64, truncate=True))
    assert re.search(r"^⚠ cut: \d+ of \d+ tokens are lost at the end$", result.out, re.MULTILINE)
    assert re.search(r"^⚠ 1 of 1 answers without a supervised end", result.out, re.MULTILINE)
    assert re.search(r"cut off +│ ⚠ 1 sample, \d+ tokens lost", result.out)
    assert "answers           │ 2, ⚠ 1 without a supervised end" in result.out


def test_an_end_of_turn_that_is_not_trained_is_marked(
    qlora: Callable[..., Any], here: Path, write_config: Callable[..., Path]
) -> None:
    row = {"input_ids": [10, 11, 12, 0], "labels": [-100, 11, 12, -100]}
    (here / "ids.jsonl").write_text(json.dumps(row) + "\n")
    config = write_config(dataset={"name": "records", "path": str(here / "ids.jsonl")}, data={"eval_fraction": 0.0})
    result = qlora("data", config)
    assert "⚠ the supervised part ends before <eos> (masked): nothing there teaches the model to stop" in result.out
    assert "what the labels say (records: tokens, train_on labels)" in result.out


def test_findings_stand_in_the_results_and_only_there(qlora: Callable[..., Any], chats: Callable[..., Path]) -> None:
    result = qlora("data", chats([*CHATS, CHATS[0]]))
    assert "⚠ train: 1 row with the tokens of an earlier one (duplicate)" in result.out
    assert "chats.jsonl:4" in result.out
    assert "earlier one" not in result.err
    assert len(result.err.splitlines()) == len(set(result.err.splitlines()))
    (found,) = report(qlora, chats([*CHATS, CHATS[0]]))["findings"]
    assert (found["code"], found["count"], found["error"]) == ("duplicate", 1, False)


def test_what_the_gate_refuses_is_refused_here_too_and_can_be_looked_at(
    qlora: Callable[..., Any], chats: Callable[..., Path]
) -> None:
    typed = [{"role": "user", "content": "Go"}, {"role": "assistant", "content": "Stop <eos> here"}]
    result = qlora("data", chats([CHATS[0], typed]))
    assert (result.code, result.out) == (2, "")
    assert "chats.jsonl:2" in result.err
    result = qlora("data", chats([CHATS[0], typed]), "--set", "data.on_problem=warn")
    assert result.code == 0
    assert "⚠ a special token typed in the text: '<eos>'" in result.out


# JSON and HTML


def test_json_has_every_token_with_its_origin(qlora: Callable[..., Any], chats: Callable[..., Path], here: Path) -> None:
    found = report(qlora, chats(), "--sample", "9")
    samples = [sample for block in found["blocks"] for sample in block["samples"]]
    assert [sample["origin"] for sample in samples] == [f"{here / 'chats.jsonl'}:{number}" for number in (1, 2, 3)]
    assert sum(len(sample["tokens"]) for sample in samples) == found["statistics"]["train"]["tokens"]
    assert (
        sum(token["supervised"] for sample in samples for token in sample["tokens"])
        == found["statistics"]["train"]["supervised"]
    )
    text = "".join(token["text"] for token in samples[1]["tokens"])
    assert CHATS[1][0]["content"] in text
    assert CHATS[1][1]["content"] in text


class Balanced(HTMLParser):
    """Asserts that every tag is closed where it has to be."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.open += [tag] if tag != "meta" else []

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_a_page_has_all_of_the_text_escaped_and_runs_nothing(
    qlora: Callable[..., Any], chats: Callable[..., Path], here: Path
) -> None:
    result = qlora("data", chats(), "--html", "page.html")
    assert result.code == 0, result.err
    assert "Wrote page.html" in result.out
    assert "⟦" not in result.out
    page = (here / "page.html").read_text(encoding="utf-8")
    assert "<script" not in page.lower()
    assert not re.search(r"(?:src|href|url)\s*[=(]", page)
    shown = html.unescape(re.sub(r"<[^>]*>", "", page))
    assert "Say <script>alert(1)</script> & go" in shown
    assert "␛[2J" in shown
    assert "\x1b" not in page
    assert "prefers-color-scheme: dark" in page
    Balanced().feed(page)
    assert "chats.jsonl:2" in shown
    assert [p.name for p in here.iterdir() if p.suffix in (".html", ".partial")] == ["page.html"]


def test_a_page_tells_index_id_and_label_of_each_token(
    qlora: Callable[..., Any], chats: Callable[..., Path], here: Path
) -> None:
    sample = report(qlora, chats(), "--html", "page.html")["blocks"][0]["samples"][0]
    page = (here / "page.html").read_text(encoding="utf-8")
    for token in sample["tokens"]:
        label = "none" if token["label"] is None else token["label"]
        tag = "b" if token["supervised"] else "i"
        kind = ' class="x"' if token["special"] else ""
        assert f'<{tag}{kind} title="{token["index"]}: id {token["id"]}, label {label}">' in page


def test_a_page_that_cannot_be_written_is_refused_at_once(
    qlora: Callable[..., Any], chats: Callable[..., Path], here: Path
) -> None:
    config = chats()
    for path, words in ((here, "is a folder"), (here / "none" / "page.html", f"there is no folder {here / 'none'}")):
        result = qlora("data", config, "--html", path)
        assert (result.code, result.out) == (2, "")
        assert result.err.startswith(f"error: --html {path}: ")
        assert words in result.err
    assert not (here / "none").exists()


def test_a_page_stays_as_it_is_where_the_data_are_refused(
    qlora: Callable[..., Any], chats: Callable[..., Path], here: Path
) -> None:
    (here / "page.html").write_text("old")
    assert qlora("data", chats(), "--html", "page.html", "--set", "data.sequence_length=4").code == 2
    assert (here / "page.html").read_text() == "old"


def test_nothing_but_the_page_is_written(
    qlora: Callable[..., Any], chats: Callable[..., Path], here: Path, snapshot: Callable[[Path], dict[str, bytes]]
) -> None:
    config = chats()
    before = snapshot(here)
    assert qlora("data", config).code == 0
    assert snapshot(here) == before


# Other people's data


@pytest.mark.parametrize(
    ("file", "options", "form"),
    [
        ("chat/openassistant_messages.jsonl", {}, "chats"),
        ("chat/sharegpt_dummy.json", {}, "chats"),
        ("instruct/gsm8k_test.jsonl", {}, "prompts"),
        ("instruct/self_instruct_seed_tasks.jsonl", {"prompt": "instruction", "completion": "instances[].output"}, "prompts"),
    ],
)
def test_real_data_can_be_looked_at(
    qlora: Callable[..., Any], write_config: Callable[..., Path], file: str, options: dict[str, str], form: str
) -> None:
    path = REAL / file
    if not path.is_file():
        pytest.skip(f"{path} is not there")
    source = {"name": "records", "path": str(path), **options}
    config = write_config(dataset=source, data={"sequence_length": 256, "truncate": True, "on_problem": "skip"})
    found = report(qlora, config)
    assert [one["form"] for one in found["supervision"]] == [form]
    for counts in found["statistics"].values():
        assert 0 < counts["supervised"] < counts["tokens"]
        assert counts["longest"] <= 256
        assert counts["ended"] <= counts["answers"]
        assert (counts["cut"] > 0) == (counts["lost"] > 0)
    for block in found["blocks"]:
        for sample in block["samples"]:
            assert Path(sample["origin"].rpartition(":")[0]) == path or str(path) in sample["origin"]
            assert sample["supervised"] == sum(token["supervised"] for token in sample["tokens"])
            assert (sample["length"] > len(sample["tokens"])) == any(w.startswith("cut: ") for w in sample["warnings"])

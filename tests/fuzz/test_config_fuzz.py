"""Configurations, valid ones that are changed in one place: each is accepted or refused by key or line, and quickly.

What `qlora config show` accepts goes on to `qlora train` with a model that has no weights: that checks everything that a run
checks before it loads them. What trains for real is drawn in test_training_fuzz.
"""

from __future__ import annotations

import copy
import datetime
import json
import math
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import strategies as st

from qlora_core.config import DataConfig, ModelConfig, RunConfig, TokensConfig, TrainingConfig
from qlora_core.registry import Registry

SECTIONS = "|".join(RunConfig.model_fields)
Where = tuple[str | int, ...]

TENS = [f"&z{n} [{', '.join([f'*z{n - 1}' if n else 'x'] * 10)}]" for n in range(10)]
BOMB = f"[{', '.join(TENS)}]"  # ten thousand million values in some hundred bytes
FRAGMENTS = [  # of YAML, that no value dumps as
    *('"\\ud800"', "!!binary /w==", "!!binary aGk=", "!!python/object/apply:os.getcwd []", "!unknown x", "*nowhere", "&a [*a]"),
    *("2020-13-45", "2020-01-01", "!!timestamp 2020-01-01T00:00:00Z", "1:30", "017", "0o17", ".nan", "-.inf", "!!set {a}"),
    *("!!omap [a: 1]", "!!pairs [a: 1]", "!!float x", "!!int x", "!!bool x", "!!null x", "!!str 1", "!!map {}", "<<", "="),
    *("? x", "- x", "|\n  a", "'", '"', "[", "{", "]", "}", "@x", "`x", "%x", "{<<: {a: 1}}", "{? [a] : b}", "{null: 1}"),
    *(
        "{1: 2}",
        "{true: 1}",
        "{a: 1, a: 2}",
        "a: b",
        "[a, b]: c",
        "\tx",
        "\x00",
        "\x1b[31m",
        "\x85",
        "&a",
        "*",
        "!",
        "#",
        "---",
    ),
    *("0x" + "f" * 5000, "1" * 5000, "[" * 300 + "]" * 300, "{a: " * 90 + "}" * 90, "[" * 1500 + "]" * 1500, BOMB),
]
ODD = st.one_of(
    st.sampled_from(
        [
            *(None, True, False, 0, 1, -1, 2, 3, 10**9, 2**31, 2**63, 10**30, 10**400, 0.0, -0.5, 0.5, 5e-324, 1e30, 1e300),
            *(math.inf, -math.inf, math.nan, "", " ", "\n", "\t", "\x00", "a\nb", "é", "🦙", "\u2028", "\x1b[31m", "~", "none"),
            *(
                "~no-such-user/x",
                "~no-such-user",
                ".",
                "..",
                "/dev/null",
                "/dev/null/x",
                "/proc/self/mem",
                "a" * 5000,
                "*",
                "[",
                "(",
                "{{",
            ),
            *("%s", "{0}", "a.b", "a:b", "a/b", "a/b/c", "-1", "1e5", "auto", "all", "yes", "nf4", "lora", "text", "os", "x:y"),
            *(
                "text:text",
                ":",
                "bitsandbytes:",
                "rot13",
                "utf-16",
                "idna",
                [],
                [[]],
                {},
                [None],
                [1],
                ["a", "a"],
                [""],
                ["\x00"],
            ),
            *({"name": None}, {"name": "nf4"}, {"name": "text", "path": "x"}, {"a": {"b": [1]}}, {1: 2}, {None: 1}, {"": 1}),
            *(datetime.date(2020, 1, 1), datetime.datetime(2020, 1, 1, 1), b"\xff", b"hi", {"x": b"\xff"}, [datetime.date.min]),
        ]
    ),
    st.integers(),
    st.floats(),
    st.text(max_size=12),
    st.lists(st.text(max_size=4), max_size=3),
    st.dictionaries(st.text(max_size=4), st.integers(), max_size=3),
)


@dataclass(frozen=True)
class Case:
    """A configuration file, what was changed in it, and the keys one of which a refusal is expected to name."""

    what: str
    content: bytes
    keys: tuple[str, ...] = ()
    overrides: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return f"{self.what[:300]} {[text[:300] for text in self.overrides]} {self.content[:1500]!r}"


@pytest.fixture(scope="module")
def bases(tiny_model: Path, text: str, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Valid configurations, which have every key and every option of ours between them; their model has no weights."""
    folder = tmp_path_factory.mktemp("ground")
    shutil.copytree(tiny_model, folder / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    (folder / "text.txt").write_text(text[:4_000], encoding="utf-8")
    pairs = [{"q": f"What is {n}?", "a": f"{n} is {n}.", "s": "Be short.", "i": "x"} for n in range(40)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs), encoding="utf-8")
    turns = [{"role": "user", "content": "Hi, how are you?"}, {"role": "bot", "content": "Well."}]
    chats = [{"c": [*turns, {"role": "user", "content": str(n)}], "t": None, "s": "Be kind."} for n in range(40)]
    (folder / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chats), encoding="utf-8")
    return [_full(folder), _mix(folder), _stream(folder), _short(folder), _hub(folder)]


def _full(folder: Path) -> dict[str, Any]:
    training = {name: field.get_default(call_default_factory=True) for name, field in TrainingConfig.model_fields.items()}
    data = {name: field.get_default() for name, field in DataConfig.model_fields.items()}
    return {
        "model": {"path": f"{folder}/model", "dtype": "float32", "upcast": True, "cache": False, "trust_remote_code": False}
        | {"revision": None},
        "quantizer": {"name": "nf4", "double_quant": True, "compute_dtype": "float32", "storage_dtype": "uint8"}
        | {"skip_modules": ["o_proj"]},
        "adapter": {"name": "lora", "r": 2, "alpha": 4.0, "dropout": 0.1, "target_modules": ["q_proj"], "bias": "none"}
        | {"init": "gaussian", "use_dora": False, "use_rslora": True, "modules_to_save": ["norm"]},
        "dataset": {"name": "text", "path": f"{folder}/text.txt", "eval_path": [f"{folder}/text.txt"], "encoding": "utf-8"}
        | {"separator": "\n\n"},
        "data": data | {"sequence_length": 32},
        "tokens": {"add": ["<one>", "<two>"]},
        "kernels": "reference",
        "callbacks": ["progress", {"name": "early_stopping", "patience": 2, "min_delta": 0.01}],
        "training": training | {"max_steps": 2, "extra": {"adam_beta2": 0.95, "data_seed": 1, "lr_scheduler_kwargs": {}}},
        "exports": [{"name": "merged", "dtype": "float32", "max_shard_size": "1GB"}],
        "output": "out",
        "plugins": [],
        "disable_plugins": [],
    }


def _mix(folder: Path) -> dict[str, Any]:
    fused = {"linear": True, "mlp": True, "norm": True, "rotary": True, "attention": True, "liger": False, "compiled": False}
    pairs = {"prompt": "q", "completion": "a", "system": "s", "input": "i", "format": "instruction", "weight": 0.5}
    chats = {"messages": "c", "tools": "t", "system": "s", "roles": {"bot": "assistant"}, "format": "chat", "weight": 2}
    records = {"name": "records", "path": [f"{folder}/pairs.jsonl"], "eval_path": f"{folder}/pairs.jsonl"}
    return {
        "model": f"{folder}/model",
        "quantizer": {"name": "int8", "threshold": 0.0, "skip_modules": []},
        "adapter": {"name": "peft", "method": "lora", "config": {"r": 2, "target_modules": ["q_proj"], "lora_alpha": 4}},
        "dataset": [records | pairs, {"name": "records", "path": f"{folder}/chats.jsonl"} | chats],
        "data": {"sequence_length": 64, "packing": False, "truncate": True, "on_problem": "skip", "template": "plain"},
        "kernels": {"name": "fused", "keep_pages": False, "loss": False, "tiles": False} | fused,
        "callbacks": [{"name": "transformers", "integration": "transformers:PrinterCallback", "arguments": {}}],
        "training": {"epochs": 1.5, "keep": "best", "eval_steps": 2, "save_steps": 2},
        "output": "runs/mix",
    }


def _stream(folder: Path) -> dict[str, Any]:
    return {
        "model": {"path": f"{folder}/model"},
        "quantizer": "none",
        "adapter": {"name": "lora", "r": 2, "init": "pissa"},
        "dataset": {"name": "records", "path": f"{folder}/pairs.jsonl", "text": "q"},
        "data": {"streaming": True, "eval_fraction": 0, "gate_rows": 10, "buffer": 5, "sequence_length": 32},
        "training": {"max_steps": 2},
    }


def _short(folder: Path) -> dict[str, Any]:
    text = {"name": "text", "path": f"{folder}/text.txt"}
    return {"model": f"{folder}/model", "quantizer": "fp4", "dataset": text, "data": {"sequence_length": 32}}


def _hub(folder: Path) -> dict[str, Any]:
    hub = {"subset": "main", "split": "train", "eval_split": "test", "revision": "main"}
    return {
        "model": f"{folder}/model",
        "quantizer": {"name": "ao_int8", "skip_modules": ["q_proj"]},
        "dataset": {"name": "records", "path": "nobody/nothing", "prompt": "q", "completion": "a"} | hub,
        "exports": ["merged"],
    }


def test_the_bases_have_every_key_and_every_option_of_ours(bases: list[dict[str, Any]]) -> None:
    """A new one must be added above, so that it is fuzzed."""
    for name, section in (("model", ModelConfig), ("data", DataConfig), ("training", TrainingConfig), ("tokens", TokensConfig)):
        assert set(section.model_fields) == set(bases[0][name])
    assert set(RunConfig.model_fields) == set(bases[0])
    written = yaml.safe_dump(bases)
    registry = Registry()
    for kind in ("quantizer", "adapter", "dataset", "kernels", "callback", "exporter"):
        for provided in registry.provided(kind):
            for option in provided.provider.Options.model_fields:
                assert f"{option}:" in written, f"{provided.qualified}: {option}"


def _places(tree: Any, where: Where = ()) -> Iterator[Where]:
    inner = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in inner:
        yield (*where, key)
        yield from _places(value, (*where, key))


def _at(tree: Any, where: Where) -> Any:
    for key in where:
        tree = tree[key]
    return tree


def _dumped(tree: Any) -> str:
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True, width=10_000)


TYPOS: list[Callable[[str], str]] = [
    lambda key: key[:-1],
    lambda key: key + key[-1],
    lambda key: key.upper(),
    lambda key: key.replace("_", "-"),
    lambda key: f" {key}",
    lambda key: f"{key}.x",
    lambda key: key[::-1],
    lambda key: f"_{key}",
]


@st.composite
def changed_trees(draw: Callable[..., Any], bases: list[dict[str, Any]]) -> Case:
    """Return a configuration with one key or value that is changed, left out, added, doubled or moved."""
    tree = copy.deepcopy(draw(st.sampled_from(bases)))
    where = draw(st.sampled_from(list(_places(tree))))
    parent, key = _at(tree, where[:-1]), where[-1]
    keys = tuple(part for part in where if isinstance(part, str))
    kind = draw(st.sampled_from(["value"] * 5 + ["fragment"] * 3 + ["delete", "typo", "add", "twice", "reorder", "wrap"]))
    replaced: tuple[str, str] | None = None
    what = ""
    if kind == "value":
        parent[key] = draw(ODD)
    elif kind == "fragment":
        parent[key], replaced = "FRAGMENT", ("FRAGMENT", draw(st.sampled_from(FRAGMENTS)))
        what = replaced[1][:200]
    elif kind == "delete":
        del parent[key]
    elif kind == "wrap":
        parent[key] = draw(st.sampled_from([[parent[key]], {"name": parent[key]}, {"x": parent[key]}, [[parent[key]]]]))
    elif isinstance(parent, dict):
        items = list(parent.items())
        place = list(parent).index(key)
        if kind == "typo":
            items[place] = (draw(st.sampled_from(TYPOS))(str(key)), items[place][1])
        elif kind == "add":
            items.insert(place, (draw(st.text(max_size=6) | st.sampled_from(["name", "<<", "lr", "1", "x" * 300])), draw(ODD)))
        elif kind == "twice":
            items.insert(place, ("TWICE", draw(ODD)))
            replaced = ("TWICE", str(key))
        else:
            items = draw(st.permutations(items))
        keys = (*keys, *(str(name) for name, _ in items if name not in parent))
        parent.clear()
        parent.update(items)
    else:
        parent.insert(int(key), draw(ODD))
    content = _dumped(tree)
    if replaced is not None:
        content = content.replace(*replaced, 1)
    return Case(f"{kind} at {'.'.join(map(str, where))} {what}", content.encode("utf-8", "surrogatepass"), keys)


PIECES = [b"\t", b"\x00", b"\xef\xbb\xbf", b"\xff", b"\xc3", b"\xc2\x85", b"\xe2\x80\xa8", b"\xed\xa0\x80", b"\r", b"\n", b" "]
PIECES += [
    *(bytes([code]) for code in b"\"'[]{}:#&*!|>%@`,?-~=\\\x1b\x7f"),
    b"\n  ",
    b": ",
    b"- ",
    b"? ",
    b"--- ",
    b"...\n",
    b"<<: ",
]


@st.composite
def changed_bytes(draw: Callable[..., Any], bases: list[dict[str, Any]]) -> Case:
    """Return a configuration with something put into its bytes, or taken out of them."""
    content = _dumped(draw(st.sampled_from(bases))).encode()
    lines = content.splitlines(keepends=True)
    at, line = draw(st.integers(0, len(content))), draw(st.integers(0, len(lines) - 1))
    kind = draw(st.sampled_from(["insert"] * 4 + ["cut", "remove", "indent", "outdent", "double", "swap", "ends", "encode"]))
    if kind == "insert":
        content = content[:at] + draw(st.sampled_from(PIECES) | st.binary(min_size=1, max_size=3)) + content[at:]
    elif kind == "cut":
        content = content[:at]
    elif kind == "remove":
        content = content[:at] + content[at + draw(st.integers(1, 40)) :]
    elif kind in ("ends", "encode"):
        text = content.decode()
        ways = [text.replace("\n", "\r\n"), text.replace("\n", "\r"), text.replace("\n", "\u2028")]
        codecs = ["utf-16", "utf-32", "utf-8-sig", "utf-16-le", "cp037"]
        content = draw(st.sampled_from(ways)).encode() if kind == "ends" else text.encode(draw(st.sampled_from(codecs)))
    else:
        other = draw(st.integers(0, len(lines) - 1))
        indented = draw(st.sampled_from([b" ", b"  ", b"\t", b"        "])) + lines[line]
        changes: dict[str, Callable[[], None]] = {
            "indent": lambda: lines.__setitem__(line, indented),
            "outdent": lambda: lines.__setitem__(line, lines[line].lstrip()),
            "double": lambda: lines.insert(other, lines[line]),
            "swap": lambda: lines.insert(other, lines.pop(line)),
        }
        changes[kind]()
        content = b"".join(lines)
    return Case(f"{kind} at byte {at}, line {line + 1}", content)


@st.composite
def overrides(draw: Callable[..., Any], bases: list[dict[str, Any]]) -> Case:
    """Return a valid configuration with one --set that is odd in its key or its value."""
    tree = draw(st.sampled_from(bases))
    where = [str(part) for part in draw(st.sampled_from(list(_places(tree))))]
    kind = draw(st.sampled_from(["value"] * 3 + ["typo", "deeper", "odd", "elsewhere"]))
    value = draw(st.sampled_from(FRAGMENTS) | ODD.map(lambda odd: _flow(odd)))
    if kind == "typo":
        where[-1] = draw(st.sampled_from(TYPOS))(where[-1])
    elif kind == "deeper":
        where.append(draw(st.sampled_from(["x", "0", "-1", "", "name", "99", "path", "²", "1e3"])))
    elif kind == "odd":
        where = [
            draw(st.sampled_from(["", ".", "..x", "x.", "=", " ", "0", "\x00", "model.", ".model", "é", "training..seed"]))
        ]
    elif kind == "elsewhere":
        where = draw(st.lists(st.sampled_from([*RunConfig.model_fields, "name", "0", "x"]), min_size=1, max_size=4))
    text = f"{'.'.join(where)}{draw(st.sampled_from(['=', '=', '=', '=', ' = ', '', '==']))}{value}"
    return Case("set", _dumped(tree).encode(), (*where, "--set"), (text,))


def _flow(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True, width=10_000, allow_unicode=True).removesuffix("\n...\n").strip("\n")


@pytest.fixture
def judged(qlora: Callable[..., Any], here: Path, snapshot: Callable[[Path], dict[str, bytes]]) -> Callable[[Case], str]:
    """Return a function that says how a case ended, "refused" or "accepted", or fails."""

    def run(case: Case) -> str:
        (here / "run.yaml").write_bytes(case.content)
        sets = [argument for text in case.overrides for argument in ("--set", text)]
        for command in ("show", "train"):
            arguments = ["config", "show", "run.yaml"] if command == "show" else ["train", "run.yaml", "-q"]
            result = qlora(*arguments, *sets)
            if result.code not in ((0, 2) if command == "show" else (2,)) or "Traceback" in result.err:
                raise AssertionError(f"{command} gives {result.code}: {result.out[-200:]}{result.err[-2500:]}")
            if snapshot(here) != {"run.yaml": case.content}:
                raise AssertionError(f"{command} has left {', '.join(snapshot(here))} or changed run.yaml")
            if result.code:
                return _refusal(case, result.err)
        raise AssertionError("a model without weights has trained")

    return run


def _refusal(case: Case, err: str) -> str:
    """Return in which way *err* names what is wrong; fail where it does not."""
    message = err[err.find("error: ") :] if "error: " in err else err  # a command line that typer refuses has a box instead
    if "can't be loaded with" in message or "nobody/nothing: neither a file" in message:
        return "accepted"
    if any(key and key in message for key in case.keys):
        return "refused by key"
    if re.search(r"run\.yaml:\d+", message):
        return "refused by line"
    if re.search(rf"(error: |\n)({SECTIONS})\b[.:\[]", message) or re.search(rf"\b({SECTIONS})\.\w+", message):
        return "refused by another key"
    raise AssertionError(f"names no key and no line: {message[-1500:]}")


@pytest.fixture(scope="module")
def _warm(bases: list[dict[str, Any]], qlora: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> None:
    """Import what a case would import first, outside its time."""
    import torch  # noqa: F401
    import transformers  # noqa: F401

    path = tmp_path_factory.mktemp("warm") / "run.yaml"
    path.write_text(_dumped(bases[0] | {"output": str(path.parent / "out")}), encoding="utf-8")
    qlora("train", path, "-q")


@pytest.mark.usefixtures("_warm")
class TestInOnePlace:
    def test_the_bases_themselves_are_accepted(self, bases: list[dict[str, Any]], judged: Callable[[Case], str]) -> None:
        assert [judged(Case("as it is", _dumped(base).encode())) for base in bases] == ["accepted"] * len(bases)

    def test_a_key_or_value(self, explore: Any, bases: list[dict[str, Any]], judged: Callable[[Case], str]) -> None:
        explore(changed_trees(bases), judged, short=40, long=2_500)

    def test_bytes(self, explore: Any, bases: list[dict[str, Any]], judged: Callable[[Case], str]) -> None:
        explore(changed_bytes(bases), judged, short=30, long=1_000)

    def test_an_override(self, explore: Any, bases: list[dict[str, Any]], judged: Callable[[Case], str]) -> None:
        explore(overrides(bases), judged, short=30, long=1_000)

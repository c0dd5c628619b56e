"""`qlora eval`: data are scored as the run would supervise them, and what may be set otherwise can be."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

QUESTIONS = [{"question": f"What is {n}?", "answer": f"It is {n}.", "why": f"Because {n} is {n}."} for n in range(12)]
CHATS = [
    {"turns": [{"role": "client", "content": f"Say {n}."}, {"role": "agent", "content": f"{n}, said."}]} for n in range(12)
]
ROLES = {"client": "user", "agent": "assistant"}


@pytest.fixture
def train(qlora: Callable[..., Any], write_config: Callable[..., Path], here: Path) -> Callable[..., Path]:
    """Return a function that makes a run of one step on a dataset, and gives its folder."""

    def run(dataset: Any, **data: Any) -> Path:
        for name, rows in (("q.jsonl", QUESTIONS), ("c.jsonl", CHATS)):
            (here / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        path = write_config(training={"max_steps": 1}, quantizer="none", data={"sequence_length": 64, **data})
        config = yaml.safe_load(path.read_text())
        path.write_text(yaml.safe_dump({**config, "dataset": dataset}))
        result = qlora("train", path, "--quiet")
        assert result.code == 0, result.err
        return here / "out"

    return run


@pytest.fixture
def score(qlora: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that gives the number of tokens that `qlora eval` scored, and what it said."""

    def run(*arguments: object) -> tuple[int, str]:
        result = qlora("eval", *arguments, "--json")
        assert result.code == 0, result.err
        return json.loads(result.out)["base"]["tokens"], result.err

    return run


@pytest.fixture
def refuse(qlora: Callable[..., Any]) -> Callable[..., str]:
    """Return a function that gives why `qlora eval` refuses."""

    def run(*arguments: object) -> str:
        result = qlora("eval", *arguments, "--json")
        assert (result.code, result.out) == (2, "")
        assert "Traceback" not in result.err
        return str(result.err.partition("error: ")[2])

    return run


def supervised(run: Path, texts: list[str]) -> int:
    """Return the tokens of *texts*, each with the end of its turn."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(run / "adapter")
    return sum(len(ids) + 1 for ids in tokenizer(texts)["input_ids"])


def test_what_the_gate_advises_can_be_set(train: Any, score: Any, refuse: Any, here: Path) -> None:
    run = train({"name": "records", "path": "q.jsonl"})
    long = [*QUESTIONS, {"question": "Q", "answer": " ".join(["very"] * 200)}]
    (here / "long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in long))
    assert "or data.truncate=true to cut them" in refuse(run, "--data", "long.jsonl")
    short, _ = score(run, "--data", "q.jsonl")
    assert short == supervised(run, [row["answer"] for row in QUESTIONS])
    assert score(run, "--data", "long.jsonl", "--set", "data.on_problem=skip")[0] == short
    whole = supervised(run, [row["answer"] for row in long])
    cut, _ = score(run, "--data", "long.jsonl", "--set", "data.truncate=true")
    assert short < cut < whole
    needed = refuse(run, "--data", "long.jsonl").partition("set data.sequence_length to ")[2].split()[0]
    assert score(run, "--data", "long.jsonl", "--set", f"data.sequence_length={needed}")[0] == whole
    assert score(run, "--data", "q.jsonl", "--set", "data.train_on=all")[0] > 2 * short
    named = ("--set", "dataset.completion=why")
    assert score(run, "--data", "q.jsonl", *named)[0] == supervised(run, [row["why"] for row in QUESTIONS])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("adapter.r=4", "--set adapter.r=4: `qlora eval` takes data.KEY and dataset.KEY only; model and adapter are those of"),
        ("data.truncat=true", "--set data.truncat=true: data.truncat: unknown option; data accepts sequence_length, "),
        ("dataset.promt=x", "--set dataset.promt=x: dataset.promt: unknown option; records accepts path, "),
        ("dataset.subset=x", "--set dataset.subset=x: dataset.subset: only a dataset on the hub has one, and '"),
        ("dataset", "--set dataset: write key=value, such as "),
    ],
)
def test_what_can_not_be_set_is_refused(train: Any, refuse: Any, override: str, message: str) -> None:
    run = train({"name": "records", "path": "q.jsonl"})
    assert refuse(run, "--data", "q.jsonl", "--set", override).startswith(message)


def test_a_run_on_the_hub_scores_a_file(train: Any, score: Any) -> None:
    run = train({"name": "records", "path": "q.jsonl", "completion": "why"})
    path = run / "config.yaml"
    config = yaml.safe_load(path.read_text())
    config["dataset"] |= {"path": "openai/gsm8k", "subset": "main", "split": "test", "eval_split": "test", "revision": "v1"}
    path.write_text(yaml.safe_dump(config))
    tokens, said = score(run, "--data", "q.jsonl")
    assert tokens == supervised(run, [row["why"] for row in QUESTIONS])
    names = "dataset.eval_split, dataset.revision, dataset.split, dataset.subset"
    assert f"--data: leaves out what applies to the run's own data only: {names}\n" in said


def test_of_a_mix_the_source_that_fits_decides(train: Any, score: Any, refuse: Any, here: Path) -> None:
    run = train(
        [
            {"name": "records", "path": "q.jsonl", "prompt": "question", "completion": "why"},
            {"name": "records", "path": "c.jsonl", "messages": "turns", "roles": ROLES},
        ]
    )
    assert score(run, "--data", "c.jsonl")[0] == supervised(run, [row["turns"][1]["content"] for row in CHATS])
    tokens, said = score(run, "--data", "q.jsonl")
    assert tokens == supervised(run, [row["why"] for row in QUESTIONS])
    assert said.count("records: prompts and completions from the columns question and why; not used: answer\n") == 1
    (here / "other.jsonl").write_text('{"prompt": "Q", "completion": "A B C"}\n' * 3)
    assert score(run, "--data", "other.jsonl")[0] == 3 * supervised(run, ["A B C"])
    (here / "wrong.jsonl").write_text('{"title": "Q"}\n')
    assert refuse(run, "--data", "wrong.jsonl").startswith(
        f"{here / 'wrong.jsonl'}:1: nothing to train on is recognised; the columns are title; "
    )
    assert refuse(run, "--data", "none.jsonl").startswith(f"dataset.path: no file {str(here / 'none.jsonl')!r}; ")


def test_of_sources_that_read_alike_the_one_with_that_path_decides(train: Any, score: Any) -> None:
    run = train(
        [
            {"name": "records", "path": "c.jsonl", "messages": "turns", "roles": ROLES},
            {"name": "records", "path": "q.jsonl"},
            {"name": "records", "path": "q.jsonl", "completion": "why"},
        ]
    )
    assert score(run, "--data", "q.jsonl")[0] == supervised(run, [row["answer"] for row in QUESTIONS])


def test_what_the_gate_refuses_is_told_before_any_weight_is_loaded(
    train: Callable[..., Path], refuse: Callable[..., str], here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = train({"name": "records", "path": "q.jsonl"})
    (here / "bad.jsonl").write_text(json.dumps({"question": "Well?", "answer": ""}) + "\n", encoding="utf-8")

    def load(self: Any) -> Any:
        raise AssertionError("weights are loaded")

    monkeypatch.setattr("qlora_core.saved.SavedRun.load_base", load)
    assert "1 row with an empty turn" in refuse(run, "--data", "bad.jsonl")


def test_the_adapted_model_is_scored_with_the_kernels_of_the_run(
    qlora: Callable[..., Any], write_config: Callable[..., Path], text_file: Path, here: Path
) -> None:
    losses = {}
    for kernels in ("fused", "reference", "auto"):
        path = write_config(training={"max_steps": 1}, kernels=kernels, output=str(here / kernels))
        assert qlora("train", path, "--quiet").code == 0
        result = qlora("eval", here / kernels, "--data", text_file, "--json", "--verbose")
        assert result.code == 0, result.err
        assert ("kernels fused: 14 LoRA layers" in result.err) == (kernels != "reference")
        losses[kernels] = json.loads(result.out)["adapted"]["loss"]
    assert losses["fused"] == losses["auto"] == pytest.approx(losses["reference"], rel=1e-3)

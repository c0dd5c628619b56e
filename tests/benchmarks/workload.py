"""The token rows that peers and ours train on: written once to a file, read by both, so that the work is the same.

    python workload.py text  FILE --model DIR --seq 512 --rows 24
    python workload.py gsm8k FILE --model DIR --seq 1024 --data DIR
    python workload.py chats FILE --model DIR --seq 1024 --data DIR

`text` is the documentation that comes with Python, cut into consecutive rows of exactly `--seq` tokens, all supervised. `gsm8k`
and `chats` are ragged: real prompts and chats in the model's own template, cut at `--seq`, only answers supervised. They are
looked for in the folder `--data` as `gsm8k_test.jsonl` (`question`, `answer`) and `openassistant_messages.jsonl` (`messages`).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

IGNORED = -100
FILES = {"gsm8k": "gsm8k_test.jsonl", "chats": "openassistant_messages.jsonl"}

Row = dict[str, list[int]]


def find(kind: str, folder: Path | None) -> Path | None:
    """Return the file of *kind* in *folder* or below it, or None."""
    return next(iter(sorted(folder.rglob(FILES[kind]))), None) if folder is not None else None


def read(path: Path) -> list[Row]:
    """Return the rows in *path*: `input_ids` and `labels`, IGNORED where not supervised."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def blocks(ids: list[int], seq: int, count: int) -> Iterator[Row]:
    """Yield *count* rows of *seq* consecutive tokens; raise ValueError where *ids* has too few."""
    if len(ids) < seq * count:
        raise ValueError(f"the text has {len(ids)} tokens, fewer than the {seq * count} asked for")
    for start in range(0, seq * count, seq):
        row = ids[start : start + seq]
        yield {"input_ids": row, "labels": row}


def chat(tokenizer: Any, messages: list[dict[str, str]], seq: int) -> Row:
    """Return one chat in the tokenizer's template, at most *seq* tokens; only what the assistant says is supervised."""
    row: Row = {"input_ids": [], "labels": []}
    done = ""
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        asked = tokenizer.apply_chat_template(messages[:index], tokenize=False, add_generation_prompt=True)
        answered = tokenizer.apply_chat_template(messages[: index + 1], tokenize=False)
        for text, supervised in ((asked[len(done) :], False), (answered[len(asked) :], True)):
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            row["input_ids"] += ids
            row["labels"] += ids if supervised else [IGNORED] * len(ids)
        done = answered
    return {name: ids[:seq] for name, ids in row.items()}


def chats(kind: str, path: Path) -> Iterator[list[dict[str, str]]]:
    """Yield the messages of each line of *path*, a file of *kind*."""
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if kind == "chats":
            yield row["messages"]
        else:
            yield [{"role": "user", "content": row["question"]}, {"role": "assistant", "content": row["answer"]}]


def main() -> None:
    """Write the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=["text", *FILES])
    parser.add_argument("file", type=Path)
    parser.add_argument("--model", required=True)
    parser.add_argument("--seq", type=int, required=True)
    parser.add_argument("--rows", type=int, default=0)
    parser.add_argument("--data", type=Path)
    options = parser.parse_args()

    from qlora_core import load_tokenizer
    from qlora_core.demo_model import demo_text

    tokenizer = load_tokenizer(options.model)
    rows: Iterator[Row]
    if options.kind == "text":
        rows = blocks(tokenizer(demo_text().read_text(encoding="utf-8"))["input_ids"], options.seq, options.rows)
    else:
        source = find(options.kind, options.data)
        if source is None:
            sys.exit(f"no {FILES[options.kind]} in {options.data}")
        made = (chat(tokenizer, messages, options.seq) for messages in chats(options.kind, source))
        rows = (row for row in made if any(label != IGNORED for label in row["labels"][1:]))
    options.file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    main()

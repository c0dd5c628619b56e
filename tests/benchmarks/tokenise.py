"""How long it takes to read, tokenise, judge and pack a large text, against the bare tokenizer on the same text.

    python tests/benchmarks/tokenise.py [--megabytes 1000] [--rounds 3] [--json FILE]

The text is the documentation that comes with Python, repeated, with words changed in every copy so that no copy is known from
before. "bare" calls `encode_batch` of the tokenizers library on pieces of 64 Ki characters, 64 at once, and keeps nothing;
"ours" is `encode` from the file to the blocks, its cache empty. Each runs in a process of its own, in turn. The peak is that
of anonymous and shared memory, which a process really needs; beside it stands that of the whole resident set, which also
counts the pages of mapped files that the system happens to keep.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path


def make_text(path: Path, megabytes: int) -> None:
    """Write the text: in each copy every eighth word or so gets other letters."""
    from pydoc_data import topics

    words = "\n\n".join(topics.topics.values()).split(" ")
    chance = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        while file.tell() < megabytes * 1e6:
            changed = list(words)
            for index in chance.sample(range(len(words)), len(words) // 8):
                changed[index] += chance.choice("aeiou") + chance.choice("bcdfghklmnprst") + str(chance.randrange(100))
            file.write(" ".join(changed))
            file.write("\n\n")


def bare(path: Path) -> None:
    """Tokenise the text with the library alone."""
    from qlora_core import load_tokenizer
    from qlora_core.demo_model import demo_model

    backend = load_tokenizer(demo_model().path).backend_tokenizer
    tokens, peak = 0, Peak()
    started = time.perf_counter()
    with path.open(encoding="utf-8") as file:
        while pieces := [piece for _ in range(64) if (piece := file.read(2**16))]:
            tokens += sum(len(one) for one in backend.encode_batch(pieces, add_special_tokens=False))
    print(json.dumps({"seconds": time.perf_counter() - started, "tokens": tokens, **peak.report()}))


def ours(path: Path) -> None:
    """Encode the text as a run does."""
    from qlora_core import DataConfig, encode, load_tokenizer
    from qlora_core.demo_model import demo_model
    from qlora_core.libraries import import_libraries
    from qlora_text import TextFile

    import_libraries()
    tokenizer = load_tokenizer(demo_model().path)
    peak = Peak()
    started = time.perf_counter()
    encoded = encode(TextFile(path=str(path)), tokenizer, DataConfig())
    seconds = time.perf_counter() - started
    tokens = encoded.train_tokens + encoded.eval_tokens
    print(json.dumps({"seconds": seconds, "tokens": tokens, "blocks": len(encoded.train), **peak.report()}))


class Peak(threading.Thread):
    """Samples the anonymous and shared memory of this process every 10 ms."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.bytes = 0
        self.start()

    def run(self) -> None:
        while True:
            lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
            now = sum(int(lines[name].split()[0]) * 1024 for name in ("RssAnon", "RssShmem"))
            self.bytes = max(self.bytes, now)
            time.sleep(0.01)

    def report(self) -> dict[str, int]:
        """Return the peaks in bytes."""
        return {"peak": self.bytes, "resident": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}


def child(kind: str, path: Path) -> dict[str, float]:
    """Return what a fresh process measures, with an empty cache."""
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "HF_DATASETS_CACHE": cache, "TOKENIZERS_PARALLELISM": "true"}
        command = [sys.executable, __file__, "--child", kind, str(path)]
        done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    result: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", nargs=2, metavar=("KIND", "FILE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        {"bare": bare, "ours": ours}[arguments.child[0]](Path(arguments.child[1]))
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "text.txt"
        make_text(path, arguments.megabytes)
        size = path.stat().st_size / 1e6
        runs = [{kind: child(kind, path) for kind in ("bare", "ours")} for _ in range(arguments.rounds)]
    for kind in ("bare", "ours"):
        seconds = statistics.median(run[kind]["seconds"] for run in runs)
        largest, resident = (max(run[kind][name] for run in runs) / 1e9 for name in ("peak", "resident"))
        tokens = runs[0][kind]["tokens"]
        rate = f"{size / seconds:.2f} MB/s, {tokens / seconds:,.0f} tokens/s"
        print(f"{kind}: {rate}, peak {largest:.2f} GB ({resident:.2f} GB resident)")
    ratios = [run["bare"]["seconds"] / run["ours"]["seconds"] for run in runs]
    print(f"ours / bare, rate: {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f}), {size:.0f} MB")
    if arguments.json:
        arguments.json.write_text(json.dumps({"megabytes": size, "runs": runs}, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()

"""Quantising at load holds one tensor at a time: measured in a process of its own, on a model large enough to show it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

MEASURE = """
import json, sys, threading

from qlora_core import Footprint, ModelConfig, load_model
from qlora_core.testing.tiny import tiny_model
from qlora_bitsandbytes import NF4


def own():
    lines = open("/proc/self/status").read().splitlines()
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith(("RssAnon", "RssShmem")))


load_model(str(tiny_model()), NF4())  # what the libraries keep for themselves
before, peak, over = own(), 0, threading.Event()


def watch():
    global peak
    while not over.wait(0.001):
        peak = max(peak, own())


thread = threading.Thread(target=watch)
thread.start()
model = load_model(ModelConfig(path=sys.argv[1], dtype="bfloat16", cache=sys.argv[2] == "kept"), NF4())
over.set()
thread.join()
size = Footprint.of(model, NF4())
print(json.dumps({"before": before, "peak": peak, "after": own(), "model": size.bytes, "plain": 2 * size.parameters}))
"""


INTERPRETER = 32 * 2**20  # the model's modules, and what the allocator holds back


def write_model(folder: Path, dtype: str) -> int:
    """Write a Llama of 210 million parameters in several files, and return the bytes of the largest tensor in bfloat16."""
    import torch
    import transformers
    from safetensors.torch import save_file

    config = transformers.LlamaConfig(
        vocab_size=8192,
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=12,
        num_attention_heads=16,
        num_key_value_heads=4,
        dtype=dtype,
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(folder)
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    noise = torch.randn(max(shape.numel() for shape in shapes.values()), generator=torch.Generator().manual_seed(0))
    noise = (0.02 * noise).to(getattr(torch, dtype))
    places, files = {}, [list(shapes)[start::4] for start in range(4)]
    for number, names in enumerate(files):
        file = f"model-{number}.safetensors"
        save_file({n: noise[: shapes[n].numel()].view(shapes[n]).clone() for n in names}, folder / file, {"format": "pt"})
        places |= dict.fromkeys(names, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return 2 * max(shape.numel() for shape in shapes.values())


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="memory is read from /proc")
@pytest.mark.parametrize("stored", ["bfloat16", "float32"])
def test_the_peak_is_two_of_the_largest_tensors_above_the_quantised_model(tmp_path: Path, stored: str) -> None:
    largest = write_model(tmp_path / "model", stored)

    def measure(cache: str) -> dict[str, int]:
        command = [sys.executable, "-c", MEASURE, str(tmp_path / "model"), cache]
        environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache")}
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        assert done.returncode == 0, done.stderr[-2000:]
        found: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
        return found

    quantised = measure("kept" if stored == "bfloat16" else "not kept")
    assert quantised["model"] < quantised["plain"] / 3  # so that a 16-bit copy would show
    assert quantised["peak"] - quantised["after"] <= 2 * largest
    assert quantised["peak"] - quantised["before"] <= quantised["model"] + 2 * largest + INTERPRETER
    if stored == "bfloat16":
        found = measure("kept")  # mapped from the cache
        assert found["peak"] - found["before"] <= 2 * largest + INTERPRETER

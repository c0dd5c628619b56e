"""Small real models, tokenizers and texts that every test can make for itself."""

from __future__ import annotations

import contextlib
import gc
import io
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test waits for a hub
os.environ.setdefault("HF_DATASETS_CACHE", tempfile.mkdtemp(prefix="qlora-test-datasets-"))  # not the user's
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models are quicker so, and other processes don't slow them down

VOCABULARY, EMBEDDINGS = 384, 416  # real models, too, have more embeddings than their tokenizer has tokens
SIZES: dict[str, dict[str, Any]] = {
    "llama": {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2},
    "opt": {"hidden_size": 64, "ffn_dim": 128, "num_attention_heads": 4, "word_embed_proj_dim": 64},
    "gpt_neox": {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4},
    "gpt2": {"n_embd": 64, "n_head": 4, "n_layer": 2, "n_positions": 256},
    "qwen2": {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2},
    "qwen3": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
    },
    "gemma": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
    },
    "mixtral": {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2},
    "phi": {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4},
}


@pytest.fixture(scope="module", autouse=True)
def _a_small_heap() -> None:
    """Leave what is there, the libraries, out of the collections that each training run asks for: they take a third of it."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep prepared data out of the user's cache, where an older version's could be found again."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(folder))
    if "datasets" in sys.modules:
        monkeypatch.setattr(sys.modules["datasets"].config, "HF_DATASETS_CACHE", str(folder))


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder that modules and distributions are imported from, and forgotten again."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    before = set(sys.modules)
    yield folder
    for name in set(sys.modules) - before:
        if str(folder) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


@pytest.fixture(scope="session")
def text() -> str:
    """Real English prose, from the standard library."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics)[:12])


@pytest.fixture
def text_file(tmp_path: Path, text: str) -> Path:
    """A file with some 20,000 characters."""
    path = tmp_path / "corpus.txt"
    path.write_text(text[:20_000], encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def make_model(tmp_path_factory: pytest.TempPathFactory, text: str) -> Callable[..., Path]:
    """Return a function that makes a small random model of an architecture, with a real tokenizer, as a folder."""
    import torch
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE(unk_token=None))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<eos>", "<pad>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    backend.train_from_iterator([text[:100_000]], trainer)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", pad_token="<pad>")
    made: dict[str, Path] = {}

    def make(architecture: str = "llama", **changes: Any) -> Path:
        key = f"{architecture}{sorted(changes.items())}"
        if key not in made:
            sizes = {"num_hidden_layers": 2, "max_position_embeddings": 256, "vocab_size": EMBEDDINGS}
            sizes |= SIZES[architecture] | changes
            config = transformers.AutoConfig.for_model(
                architecture,
                eos_token_id=tokenizer.eos_token_id,
                bos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
                **sizes,
            )
            torch.manual_seed(0)
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
            folder = tmp_path_factory.mktemp(architecture)
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            made[key] = folder
        return made[key]

    return make


@pytest.fixture(scope="session")
def demo_folder() -> Path:
    """The folder of the demo's model, the real SmolLM2-135M-Instruct; skips where it can't be had."""
    from qlora_core.demo_model import demo_model
    from qlora_core.errors import ModelError

    try:
        return Path(demo_model().path)
    except ModelError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def tiny_model(make_model: Callable[..., Path]) -> Path:
    """The folder of a random Llama with 2 layers and a vocabulary of 384 tokens."""
    return make_model("llama")


@dataclass(frozen=True)
class Result:
    """What a command gave: exit code, standard output, standard error."""

    code: int
    out: str
    err: str


@pytest.fixture(scope="session")
def qlora() -> Callable[..., Result]:
    """Return a function that runs `qlora` with the given arguments in this process."""
    from qlora_core.cli.main import main

    def run(*arguments: object) -> Result:
        out, err, path = io.StringIO(), io.StringIO(), list(sys.path)
        logger = logging.getLogger("qlora_core")
        kept = list(logger.handlers), logger.level, logger.propagate
        try:
            with (
                contextlib.redirect_stdout(out),
                contextlib.redirect_stderr(err),
                warnings.catch_warnings(),
                pytest.raises(SystemExit) as exit_,
            ):
                main([str(argument) for argument in arguments])
        finally:
            sys.path[:] = path
            logger.handlers[:], logger.level, logger.propagate = kept
        return Result(int(exit_.value.code or 0), out.getvalue(), err.getvalue())

    return run


@pytest.fixture
def plain_surroundings(tmp_path: Path, own_cache: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run each test in a folder of its own, without colours forced by the environment, with a cache of its own."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for name in ("FORCE_COLOR", "CLICOLOR_FORCE", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "QLORA_DISABLE_PLUGINS"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def here(plain_surroundings: None) -> Path:
    """The working directory of this test."""
    return Path(os.getcwd())


@pytest.fixture
def snapshot() -> Callable[[Path], dict[str, bytes]]:
    """Return a function that gives every path under a folder with its content."""

    def take(folder: Path) -> dict[str, bytes]:
        return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else b"" for p in sorted(folder.rglob("*"))}

    return take

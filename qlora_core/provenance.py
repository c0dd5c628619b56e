"""What a run was made of: providers, packages, model, data, machine. Recorded in provenance.json."""

from __future__ import annotations

import hashlib
import os
import platform
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, entry_points, version
from pathlib import Path
from typing import Any

from qlora_core.config import ModelConfig
from qlora_core.hooks import PROJECT
from qlora_core.parts import Parts
from qlora_core.providers import Provider
from qlora_core.registry import module_of

__all__ = ["describe_provider", "fingerprint_model", "package_versions", "plugin_of", "provenance"]

PACKAGES = (
    "qlora-core",
    "torch",
    "transformers",
    "peft",
    "bitsandbytes",
    "accelerate",
    "datasets",
    "tokenizers",
    "safetensors",
    "pluggy",
    "pydantic",
    "rich",
)
OPTIONAL = ("numba",)
WHOLE = 64 * 2**20  # a file up to this many bytes is fingerprinted whole
SAMPLE, SAMPLES = 2**16, 256  # of a larger one, so many bytes at so many places


def provenance(
    parts: Parts, model: ModelConfig, *, kernels: Provider | None = None, data_fingerprint: str, commit: str | None
) -> dict[str, Any]:
    """Return the content of provenance.json, JSON-ready."""
    providers: dict[str, Any] = {
        "quantizer": describe_provider(parts.quantizer),
        "adapter": describe_provider(parts.adapter),
        "datasets": [describe_provider(source) for source, _ in parts.datasets],
        "kernels": describe_provider(kernels) if kernels is not None else None,
        "callbacks": [describe_provider(callback) for callback in parts.callbacks],
        "exports": [describe_provider(exporter) for exporter in parts.exporters],
    }
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": sys.argv,
        "providers": providers,
        "packages": package_versions(),
        "model": {
            "path": model.path,
            "revision": commit or model.revision,
            "fingerprint": fingerprint_model(model.path),
            "trust_remote_code": model.trust_remote_code,
        },
        "data": {"fingerprint": data_fingerprint},
        "platform": {
            "python": platform.python_version(),
            "system": platform.platform(),
            "machine": platform.machine(),
            "cpus": os.cpu_count(),
            **_device(),
        },
    }


def describe_provider(provider: Provider) -> dict[str, str]:
    """Return the `provider` as plugin:name, and the distribution, version and class that it comes from.

    The plugin of a class that no entry point lists is its module.
    """
    plugin, distribution, number = plugin_of(type(provider))
    kind = type(provider)
    return {
        "provider": f"{plugin or kind.__module__}:{provider.name}",
        "distribution": distribution,
        "version": number,
        "class": f"{kind.__module__}.{kind.__qualname__}",
    }


def plugin_of(provider: type[Provider]) -> tuple[str, str, str]:
    """Return the plugin, distribution and version of *provider*; empty strings for a class that no plugin lists."""
    for entry in entry_points(group=PROJECT):
        module = module_of(entry)
        if provider.__module__ == module or provider.__module__.startswith(f"{module}."):
            return entry.name, entry.dist.name if entry.dist else "", entry.dist.version if entry.dist else ""
    return "", "", ""


def package_versions() -> dict[str, str | None]:
    """Return the installed versions of the packages that decide what a run computes, None for a missing one.

    Packages that a run can do without are left out where they are missing.
    """
    found: dict[str, str | None] = {}
    for name in (*PACKAGES, *OPTIONAL):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return {name: known for name, known in found.items() if known is not None or name in PACKAGES}


def fingerprint_model(path: str) -> str | None:
    """Return a SHA-256 over the names, sizes and contents of the files in the model folder *path*; None for a hub id.

    A file over 64 MiB is sampled at 256 evenly spaced places, so that a large model costs no minute; the commit that
    `revision` records identifies a model on the hub.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        return None
    digest = hashlib.sha256()
    for file in sorted(p for p in folder.iterdir() if p.suffix in (".safetensors", ".json", ".model", ".jinja", ".txt")):
        size = file.stat().st_size
        digest.update(f"{file.name} {size}\n".encode())
        with file.open("rb") as stream:
            if size <= WHOLE:
                digest.update(stream.read())
                continue
            for index in range(SAMPLES):
                stream.seek((size - SAMPLE) * index // (SAMPLES - 1))
                digest.update(stream.read(SAMPLE))
    return digest.hexdigest()


def _device() -> dict[str, Any]:
    import torch

    from qlora_core.device import pick_device, supports_bf16

    device = pick_device()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    return {"device": name, "bf16": supports_bf16(device)}

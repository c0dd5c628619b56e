"""`qlora doctor`: what this machine can do, and what is wrong with the installation."""

from __future__ import annotations

import json
import os
import platform
import sys
from typing import Any

import typer

from qlora_core.cli.options import Disable, Json, Modules, Trace, make_registry, stdout

__all__ = ["doctor"]


def doctor(modules: Modules = None, disable: Disable = None, as_json: Json = False, trace: Trace = False) -> None:
    """Check the installation: Python, packages, devices, number formats, bitsandbytes, memory, plugins.

    Exits with 2 where something that a run needs is broken.

    [bold]Example[/bold]

      qlora doctor
    """
    registry = make_registry(modules, disable)
    plugins = {
        plugin.name: {"status": plugin.status, "from": plugin.origin, "failure": plugin.failure or None}
        for plugin in registry.plugins
    }
    report = {**_report(), "plugins": plugins}
    wrong = [f"plugin {name}: {plugin['failure']}" for name, plugin in plugins.items() if plugin["status"] == "failed"]
    wrong += [f"package {name}: not installed" for name, version in report["packages"].items() if version is None]
    wrong += [report["bitsandbytes"]["problem"]] if report["bitsandbytes"]["problem"] else []
    report["problems"] = wrong
    if as_json:
        print(json.dumps(report))
    else:
        _show(report)
    if wrong:
        raise typer.Exit(2)


def _report() -> dict[str, Any]:
    from qlora_core.libraries import import_libraries
    from qlora_core.provenance import package_versions

    packages = package_versions()
    bitsandbytes: dict[str, Any]
    try:
        import_libraries()
        bitsandbytes = _bitsandbytes()
    except ImportError as error:
        bitsandbytes = {"backend": None, "problem": f"a library can't be imported: {error}"}
    import torch

    from qlora_core.device import pick_device, supports_bf16
    from qlora_core.quantized import kept_entries, quantized_folder

    device, kept = pick_device(), kept_entries()
    return {
        "python": {"version": platform.python_version(), "executable": sys.executable, "system": platform.platform()},
        "packages": packages,
        "device": {
            "used": str(device),
            "name": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine(),
            "cuda_devices": torch.cuda.device_count(),
            "cpu_threads": torch.get_num_threads(),
            "bf16": supports_bf16(device),
        },
        "bitsandbytes": bitsandbytes,
        "memory": _memory(device),
        "quantized_models": {"folder": str(quantized_folder()), "number": len(kept), "bytes": sum(size for _, size in kept)},
    }


def _bitsandbytes() -> dict[str, Any]:
    """Return the library that bitsandbytes computes with, proven by a real quantisation there and back."""
    import torch
    from bitsandbytes import functional
    from bitsandbytes.cextension import lib

    from qlora_core.device import pick_device

    native = type(lib).__name__
    try:
        weight = torch.randn(64, 64, device=pick_device())
        packed, state = functional.quantize_4bit(weight, quant_type="nf4")
        error = float((functional.dequantize_4bit(packed, state) - weight).abs().mean())
    except Exception as failure:
        return {"backend": native, "problem": f"bitsandbytes can't quantise on this device: {failure}"}
    return {"backend": native, "nf4_mean_error": round(error, 4), "problem": None}


def _memory(device: Any) -> dict[str, int | None]:
    pages = os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 0
    total = pages * os.sysconf("SC_PHYS_PAGES") if pages else None
    free = pages * os.sysconf("SC_AVPHYS_PAGES") if pages else None
    if device.type == "cuda":
        import torch

        free, total = torch.cuda.mem_get_info(device)
    return {"free_bytes": free, "total_bytes": total}


def _show(report: dict[str, Any]) -> None:
    from rich.markup import escape
    from rich.table import Table

    def mark(good: bool) -> str:
        return "[green]ok[/green]" if good else "[red]problem[/red]"

    table = Table("what", "found", "")
    table.add_row("Python", f"{report['python']['version']} on {report['python']['system']}", mark(True))
    for name, version in report["packages"].items():
        table.add_row(name, version or "not installed", mark(version is not None))
    device = report["device"]
    table.add_row("device", f"{device['used']} ({device['name']}), {device['cpu_threads']} CPU threads", mark(True))
    table.add_row("CUDA devices", str(device["cuda_devices"]), mark(True))
    table.add_row("bfloat16", "yes, in hardware" if device["bf16"] else "no: float32 is used", mark(True))
    backend = report["bitsandbytes"]
    table.add_row("bitsandbytes backend", escape(backend["problem"] or backend["backend"]), mark(not backend["problem"]))
    memory = report["memory"]
    if memory["total_bytes"]:
        table.add_row("memory", f"{memory['free_bytes'] / 1e9:.1f} of {memory['total_bytes'] / 1e9:.1f} GB free", mark(True))
    kept = report["quantized_models"]
    table.add_row(
        "quantised models kept", f"{kept['number']}, {kept['bytes'] / 1e6:,.0f} MB in {escape(kept['folder'])}", mark(True)
    )
    for name, plugin in report["plugins"].items():
        status = {"ok": mark(True), "blocked": "[yellow]disabled[/yellow]"}.get(plugin["status"], mark(False))
        table.add_row(escape(f"plugin {name}"), escape(plugin["failure"] or plugin["from"]), status)
    stdout().print(table)

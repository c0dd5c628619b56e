"""The extension API of qlora-core: one hook per kind of part, each returning classes.

A plugin is a module (or package) with functions named as below and marked with `hookimpl`, listed in an entry
point of the group `qlora_core`:

    # my_plugin/__init__.py
    from qlora_core import Quantizer, hookimpl

    class NF3(Quantizer):
        name = "nf3"
        ...

    @hookimpl
    def qlora_quantizers():
        return [NF3]

    # pyproject.toml
    [project.entry-points.qlora_core]
    my-plugin = "my_plugin"

The module is *light*: it imports no torch, transformers, peft or bitsandbytes, because `qlora plugins list` and a
configuration error must not pay for them. Heavy code lives in a second module that the provider imports late.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    from qlora_core.providers import Adapter, CallbackFactory, DatasetSource, Exporter, Kernels, Quantizer

__all__ = ["HOOK_API", "PROJECT", "ProviderHooks", "hookimpl", "hookspec"]

PROJECT = "qlora_core"  # pluggy's project name and the entry-point group
HOOK_API = 1
"""The version of these hooks. It rises when a hook is added or gets an argument; older plugins go on working.

A plugin that needs at least version N says so: `qlora_hook_api = N` in its module.
"""
hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


class ProviderHooks:
    """The hooks. Each is called once, when a part of its kind is first looked up."""

    @hookspec
    def qlora_quantizers(self) -> list[type[Quantizer]]:
        """Quantizers this plugin provides: how the frozen base model is stored."""

    @hookspec
    def qlora_adapters(self) -> list[type[Adapter]]:
        """Adapters this plugin provides: which small set of parameters is trained, and how it is added."""

    @hookspec
    def qlora_datasets(self) -> list[type[DatasetSource]]:
        """Dataset sources this plugin provides: where examples come from."""

    @hookspec
    def qlora_kernels(self) -> list[type[Kernels]]:
        """Kernels this plugin provides: rewritings of an adapted model that compute the same, faster."""

    @hookspec
    def qlora_callbacks(self) -> list[type[CallbackFactory]]:
        """Callbacks this plugin provides: what watches or steers the training loop."""

    @hookspec
    def qlora_exporters(self) -> list[type[Exporter]]:
        """Exporters this plugin provides: what writes a finished run in another format."""

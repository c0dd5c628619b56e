"""Find a TrainerCallback by the name that transformers gives its integration, or by module:Class. Imported late."""

from __future__ import annotations

import importlib

from transformers import TrainerCallback
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from qlora_core.validation import did_you_mean


def find(name: str) -> type[TrainerCallback]:
    """Return the callback class for *name*; raise ValueError, ImportError or AttributeError where there is none."""
    module, colon, attribute = name.partition(":")
    if colon:
        found = getattr(importlib.import_module(module), attribute)
        if not (isinstance(found, type) and issubclass(found, TrainerCallback)):
            raise ValueError("it is no transformers.TrainerCallback")
        return found
    if name not in INTEGRATION_TO_CALLBACK:
        known = ", ".join(sorted(INTEGRATION_TO_CALLBACK))
        raise ValueError(f"transformers has no such integration{did_you_mean(name, INTEGRATION_TO_CALLBACK)}; it has {known}")
    callback: type[TrainerCallback] = INTEGRATION_TO_CALLBACK[name]
    return callback

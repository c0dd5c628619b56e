"""The conformance kit for plugin authors: one class per kind, to subclass in a test file.

    from qlora_core.testing import QuantizerConformance

    class TestMine(QuantizerConformance):
        name = "mine"
        options = {"bits": 3}

pytest collects the checks; `qlora plugins check` runs the same without pytest. Every check runs on a tiny random Llama on this
machine's device, in seconds.
"""

from __future__ import annotations

from qlora_core.testing.adapter import AdapterConformance
from qlora_core.testing.callback import CallbackConformance
from qlora_core.testing.conformance import Conformance, Outcome, conformance_of, run_checks
from qlora_core.testing.dataset import DatasetConformance
from qlora_core.testing.exporter import ExporterConformance
from qlora_core.testing.kernels import KernelsConformance
from qlora_core.testing.quantizer import QuantizerConformance
from qlora_core.testing.tiny import tiny_model

__all__ = [
    "AdapterConformance",
    "CallbackConformance",
    "Conformance",
    "DatasetConformance",
    "ExporterConformance",
    "KernelsConformance",
    "Outcome",
    "QuantizerConformance",
    "conformance_of",
    "run_checks",
    "tiny_model",
]

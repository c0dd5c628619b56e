"""What qlora-core demands of each kind of part, from its own kit."""

import pytest
from qlora_core.testing import (
    AdapterConformance,
    CallbackConformance,
    DatasetConformance,
    ExporterConformance,
    KernelsConformance,
    QuantizerConformance,
)


class Ours:
    plugins = ("qlora_example_parts",)  # not needed once it is installed


@pytest.mark.parametrize("bits", [2, 3, 4])
class TestNFBlocks(Ours, QuantizerConformance):
    name = "nf_blocks"

    @pytest.fixture(autouse=True)
    def with_bits(self, bits):
        self.options = {"bits": bits, "block_size": 32}


class TestTinyLoRA(Ours, AdapterConformance):
    name = "tiny_lora"


class TestSQLite(Ours, DatasetConformance):
    name = "sqlite"


class TestStopFile(Ours, CallbackConformance):
    name = "stop_file"


class TestOneNorm(Ours, KernelsConformance):
    name = "one_norm"


class TestMetricsCSV(Ours, ExporterConformance):
    name = "metrics_csv"

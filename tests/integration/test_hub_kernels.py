"""No library that we import may fetch kernels from a hub, nor advise the user to let it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SPY = """
from pathlib import Path
def get_kernel(*arguments, **options):
    Path({mark!r}).write_text(f"{{arguments}}")
    raise OSError("a kernel was asked for")
"""


def test_bitsandbytes_asks_no_hub_for_a_kernel(tmp_path: Path, tiny_model: Path) -> None:
    mark = tmp_path / "asked"
    (tmp_path / "kernels.py").write_text(SPY.format(mark=str(mark)))
    code = f"""
import sys
sys.path.insert(0, {str(tmp_path)!r})
from qlora_core import inject_adapter, load_model
from qlora_bitsandbytes import NF4
from qlora_peft import LoRA
model = inject_adapter(load_model({str(tiny_model)!r}, NF4()), LoRA(r=4))
import torch
model.eval()(torch.arange(8)[None])
from transformers.integrations import hub_kernels
assert hub_kernels._kernels_enabled is False
import kernels
print(kernels.__file__)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("kernels.py")  # importable again afterwards
    assert not mark.exists(), mark.read_text()
    assert "kernels" not in done.stderr

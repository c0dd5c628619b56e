"""Memory that is left: of the machine, of control groups of both versions, and of this process's share."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from qlora_core.training.available import available_bytes

CPU = torch.device("cpu")


def machine(root: Path, groups: str = "", **files: str) -> Path:
    """Make a `proc` and `sys` in *root*, with 8,000 kB available; *files* have __ for / and ___ for a dot."""
    texts = {"proc__meminfo": "MemTotal: 9000 kB\nMemAvailable:    8000 kB\n", "proc__self__cgroup": groups, **files}
    for name, text in texts.items():
        path = root / name.replace("___", ".").replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def group(folder: str, limit: int | str, usage: int, cache: int = 0, version: int = 2) -> dict[str, str]:
    names = ("memory___max", "memory___current", "inactive_file")
    if version == 1:
        names = ("memory___limit_in_bytes", "memory___usage_in_bytes", "total_inactive_file")
    stat = f"anon 1\n{names[2]} {cache}\n"
    return {f"{folder}__{names[0]}": f"{limit}\n", f"{folder}__{names[1]}": f"{usage}\n", f"{folder}__memory___stat": stat}


def test_without_groups_it_is_what_the_machine_has_left(tmp_path: Path) -> None:
    assert available_bytes(CPU, machine(tmp_path)) == 8000 * 1024


@pytest.mark.parametrize(
    ("version", "line", "top"), [(2, "0::/a/b\n", "sys__fs__cgroup"), (1, "5:cpu,memory:/a/b\n", "sys__fs__cgroup__memory")]
)
def test_the_tightest_group_above_the_process_counts(tmp_path: Path, version: int, line: str, top: str) -> None:
    inner = group(f"{top}__a__b", 7_000_000, 1_000_000, version=version)
    outer = group(f"{top}__a", 5_000_000, 3_000_000, 500_000, version=version)
    assert available_bytes(CPU, machine(tmp_path, line, **inner, **outer)) == 2_500_000


def test_a_group_without_a_limit_or_that_is_not_to_be_seen_does_not_count(tmp_path: Path) -> None:
    files = group("sys__fs__cgroup__a", "max", 10)
    assert available_bytes(CPU, machine(tmp_path, "0::/a/not/mounted\n", **files)) == 8000 * 1024


def test_processes_of_torchrun_share_what_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert available_bytes(CPU, machine(tmp_path)) == 2000 * 1024


def test_it_is_unknown_where_there_is_no_proc(tmp_path: Path) -> None:
    assert available_bytes(CPU, tmp_path) is None


def test_a_tensor_shows_in_what_is_used() -> None:
    """In a process of its own: memory that other tests have given back may still be this one's."""
    code = """
import torch
from qlora_core.training.available import used_bytes
before = used_bytes(torch.device("cpu"))
tensor = torch.ones(2**24)
print((used_bytes(torch.device("cpu")) - before) / tensor.nbytes)
"""
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert float(shown) == pytest.approx(1, rel=0.05)

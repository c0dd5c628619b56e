"""Products in halves: the same numbers, and once found on a machine, always the same way."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from qlora_fused import products

SHAPE = (1024, 576, 576)  # of the size that is looked at


def given(transposed: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    rows, inner, columns = SHAPE
    y, x, w = (
        torch.randn(*size, generator=generator).bfloat16() for size in ((rows, columns), (rows, inner), (inner, columns))
    )
    return y, x, w.t().contiguous().t() if transposed else w


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Give where findings are kept, empty, as on a machine with AMX and two threads."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(products, "has_amx", lambda: True)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    products.halves_are_quicker.cache_clear()
    yield tmp_path / "qlora-core" / "products.json"
    products.halves_are_quicker.cache_clear()  # or what was pretended here would hold for other tests


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("ratio", [1.6, 1.1])
def test_halves_give_the_product_and_what_was_found_is_kept(
    cache: Path, monkeypatch: pytest.MonkeyPatch, transposed: bool, ratio: float
) -> None:
    measured, halved = [], []
    add_halves = products._add_halves
    monkeypatch.setattr(products, "_measured", lambda *shape: measured.append(shape) or ratio)
    monkeypatch.setattr(products, "_add_halves", lambda *given: halved.append(1) or add_halves(*given))
    y, x, w = given(transposed)
    wanted = y.double() + x.double() @ w.double()
    for _ in range(2):
        got = products.add_product(y.clone(), x, w)
        assert float((got.double() - wanted).norm() / wanted.norm()) < 2**-9
        products.halves_are_quicker.cache_clear()  # as another process has it
    assert measured == [(*SHAPE, transposed)]
    assert len(halved) == (2 if ratio > products.GAIN else 0)
    assert list(json.loads(cache.read_text()).values()) == [ratio > products.GAIN]


def test_a_file_that_is_none_and_a_folder_that_cannot_be_made_harm_nothing(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "_measured", lambda *shape: 2.0)
    cache.parent.mkdir()
    cache.write_text("{")
    assert products.halves_are_quicker(*SHAPE, False, 2)
    assert len(json.loads(cache.read_text())) == 1
    cache.unlink()
    cache.parent.rmdir()
    cache.parent.write_text("a file")
    products.halves_are_quicker.cache_clear()
    assert not products.halves_are_quicker(*SHAPE, False, 2)


def test_what_another_process_found_meanwhile_stands(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys: list[str] = []

    def measured(*shape: object) -> float:
        cache.parent.mkdir(exist_ok=True)
        cache.write_text(json.dumps(dict.fromkeys(["other", *keys], False)))
        return 2.0

    monkeypatch.setattr(products, "_measured", measured)
    assert products.halves_are_quicker(*SHAPE, False, 2)
    keys += [key for key in json.loads(cache.read_text()) if key != "other"]
    assert len(keys) == 1
    cache.unlink()
    products.halves_are_quicker.cache_clear()
    assert not products.halves_are_quicker(*SHAPE, False, 2)
    assert json.loads(cache.read_text()) == {"other": False, keys[0]: False}


def test_one_thread_and_sizes_that_do_not_matter_are_not_measured(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(products, "_measured")
    assert not products.halves_are_quicker(*SHAPE, False, 1)
    y, x, w = given(False)
    assert torch.equal(products.add_product(y[:4].clone(), x[:4], w), y[:4].clone().addmm_(x[:4], w))
    wide = [tensor.float() for tensor in (y, x, w)]
    assert torch.equal(products.add_product(wide[0].clone(), *wide[1:]), wide[0].clone().addmm_(*wide[1:]))
    assert not cache.exists()


@pytest.mark.parametrize("transposed", [False, True])
def test_both_ways_are_measured(transposed: bool) -> None:
    assert 0.05 < products._measured(64, 96, 80, transposed) < 20

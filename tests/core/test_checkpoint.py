"""The state of a training run on disk: the same types and bits back, and never a pickle."""

from __future__ import annotations

import json
import math
import pickle
import random
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qlora_core.errors import RunError
from qlora_core.training.checkpoint import load_tree, load_weights, restore_rng, rng_state, save_tree, save_weights

TENSORS = {
    "float32": torch.randn(3, 4),
    "bfloat16": torch.randn(5).bfloat16(),
    "float16": torch.randn(5).half(),
    "float64": torch.randn(2, 2, dtype=torch.float64),
    "int64": torch.arange(6).view(2, 3),
    "uint8": torch.arange(6, dtype=torch.uint8),
    "bool": torch.tensor([True, False]),
    "scalar": torch.tensor(3.5),
    "empty": torch.empty(0, 3),
    "transposed": torch.randn(3, 4).T,
    "strided": torch.arange(10)[::3],
    "expanded": torch.ones(1).expand(4),
    "special": torch.tensor([math.nan, math.inf, -0.0, 1e-45]),
    "requires_grad": torch.ones(2, requires_grad=True),
}
ARRAYS = {
    "float64": np.linspace(0, 1, 5),
    "float32": np.ones((2, 3), dtype=np.float32),
    "uint32": np.arange(4, dtype=np.uint32) + 2**31,
    "int32": np.arange(4, dtype=np.int32),
    "uint64": np.array([2**64 - 1], dtype=np.uint64),
    "bool": np.array([True, False]),
    "scalar": np.array(2.5),
    "empty": np.zeros((0, 2)),
    "fortran": np.asfortranarray(np.arange(6).reshape(2, 3)),
}
PLAIN: list[Any] = [
    None,
    True,
    0,
    -(2**70),
    1.5,
    0.1,
    1e-320,
    math.inf,
    "",
    "é\n\u2028🦙",
    [],
    (),
    {},
    [1, [2, (3, None)]],
    (1, (2, [3])),
    {"a": {"b": [1, {"c": ()}]}},
    {1: "int", "1": "text", None: 0, False: 1, 2.5: 2, (1, "x"): 3},
    {"tensor": "0", "array": True},
    {"tuple": [1]},
    {"dict": [[1, 2]]},
]


def round_trip(tree: Any, folder: Path) -> Any:
    save_tree(tree, folder, "state")
    return load_tree(folder, "state")


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("tree", PLAIN, ids=repr)
def test_plain_values_come_back_with_the_same_types(tree: Any, tmp_path: Path) -> None:
    assert repr(round_trip(tree, tmp_path)) == repr(tree)


def test_nan_comes_back_as_nan(tmp_path: Path) -> None:
    assert math.isnan(round_trip({"x": math.nan}, tmp_path)["x"])


@pytest.mark.parametrize("name", TENSORS)
def test_tensors_come_back_with_the_same_type_shape_and_bits(name: str, tmp_path: Path) -> None:
    tensor = TENSORS[name]
    back = round_trip({"x": [tensor]}, tmp_path)["x"][0]
    assert isinstance(back, torch.Tensor)
    assert (back.dtype, back.shape) == (tensor.dtype, tensor.shape)
    assert bits(back) == bits(tensor)
    assert not back.requires_grad


@pytest.mark.parametrize("name", ARRAYS)
def test_arrays_come_back_as_arrays_with_the_same_bits(name: str, tmp_path: Path) -> None:
    array = ARRAYS[name]
    back = round_trip((array,), tmp_path)[0]
    assert isinstance(back, np.ndarray)
    assert (back.dtype, back.shape) == (array.dtype, array.shape)
    assert back.tobytes() == array.tobytes()


def test_numbers_of_numpy_come_back_as_pythons(tmp_path: Path) -> None:
    back = round_trip([np.float32(0.5), np.int64(3), np.bool_(True)], tmp_path)
    assert repr(back) == "[0.5, 3, True]"


def test_tensors_that_share_storage_come_back_whole_and_apart(tmp_path: Path) -> None:
    base = torch.arange(12.0).view(3, 4)
    back = round_trip({"base": base, "row": base[1], "column": base[:, 2], "same": base}, tmp_path)
    assert torch.equal(back["base"], base)
    assert torch.equal(back["row"], base[1])
    assert torch.equal(back["column"], base[:, 2])
    back["same"].zero_()
    assert torch.equal(back["base"], base)


def test_a_tree_without_tensors_and_one_tensor_alone_are_trees_too(tmp_path: Path) -> None:
    assert round_trip({"a": 1}, tmp_path) == {"a": 1}
    assert torch.equal(round_trip(torch.ones(2), tmp_path), torch.ones(2))


def test_an_ordered_dictionary_keeps_its_order(tmp_path: Path) -> None:
    assert list(round_trip(OrderedDict(b=1, a=2), tmp_path).items()) == [("b", 1), ("a", 2)]


def test_the_state_of_an_optimizer_goes_on_exactly_as_if_it_had_not_been_saved(tmp_path: Path) -> None:
    def stepped(steps: int, interrupted_at: int | None) -> torch.Tensor:
        torch.manual_seed(0)
        weight = torch.nn.Parameter(torch.randn(4))
        optimizer = torch.optim.AdamW([weight], lr=0.1)
        for step in range(steps):
            if step == interrupted_at:
                save_tree(optimizer.state_dict(), tmp_path, "optimizer")
                optimizer = torch.optim.AdamW([weight], lr=0.5)
                optimizer.load_state_dict(load_tree(tmp_path, "optimizer"))
            optimizer.zero_grad()
            (weight**2).sum().backward()
            optimizer.step()
        return weight.detach()

    assert torch.equal(stepped(6, 3), stepped(6, None))


@pytest.mark.parametrize("value", [{1, 2}, object(), b"bytes", 1j, print], ids=lambda value: type(value).__name__)
def test_what_a_checkpoint_can_not_hold_is_named_before_anything_is_written(value: Any, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=f"a checkpoint can't hold a {type(value).__name__}"):
        save_tree({"x": [value]}, tmp_path, "state")
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_pickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("pickled")

    for owner, names in ((pickle, ("dump", "dumps", "load", "loads", "Pickler", "Unpickler")), (torch, ("save", "load"))):
        for name in names:
            monkeypatch.setattr(owner, name, refuse)
    model = torch.nn.Linear(2, 2)
    save_weights(model, tmp_path)
    load_weights(model, tmp_path)
    assert round_trip(rng_state(), tmp_path)["python"] == rng_state()["python"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter.safetensors", "state.json", "state.safetensors"]
    json.loads((tmp_path / "state.json").read_text())


def test_generators_draw_the_same_again_after_restoring(tmp_path: Path) -> None:
    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), torch.rand(1).item()

    save_tree(rng_state(), tmp_path, "generators")
    first = draw()
    draw()
    restore_rng(load_tree(tmp_path, "generators"))
    assert draw() == first


@pytest.mark.parametrize("missing", ["state.json", "state.safetensors"])
def test_half_a_checkpoint_is_refused_by_the_name_of_what_is_missing(missing: str, tmp_path: Path) -> None:
    save_tree({"x": torch.ones(1)}, tmp_path, "state")
    (tmp_path / missing).unlink()
    with pytest.raises(RunError) as caught:
        load_tree(tmp_path, "state")
    assert str(caught.value) == f"{tmp_path}: no complete checkpoint, {missing} is missing; name another one"


# Weights


def two_layers(frozen: bool = True, width: int = 3) -> torch.nn.Sequential:
    model = torch.nn.Sequential(torch.nn.Linear(2, width), torch.nn.Linear(width, 2).bfloat16())
    model[0].requires_grad_(not frozen)
    return model


def test_only_trained_weights_are_saved_and_come_back_bit_for_bit(tmp_path: Path) -> None:
    saved, other = two_layers(), two_layers()
    before = {name: parameter.detach().clone() for name, parameter in other.named_parameters()}
    save_weights(saved, tmp_path)
    load_weights(other, tmp_path)
    assert torch.equal(other[1].weight, saved[1].weight)
    assert torch.equal(other[1].bias, saved[1].bias)
    assert torch.equal(other[0].weight, before["0.weight"])
    from safetensors import safe_open

    with safe_open(tmp_path / "adapter.safetensors", "pt") as file:
        assert sorted(file.keys()) == ["1.bias", "1.weight"]


@pytest.mark.parametrize("other", [two_layers(frozen=False), two_layers(width=5)], ids=["names", "shapes"])
def test_weights_of_another_adapter_are_refused_and_change_nothing(other: torch.nn.Module, tmp_path: Path) -> None:
    save_weights(two_layers(), tmp_path)
    before = [parameter.detach().clone() for parameter in other.parameters()]
    with pytest.raises(RunError) as caught:
        load_weights(other, tmp_path)
    assert str(caught.value).startswith(f"{tmp_path}: holds another adapter than the configuration asks for (")
    assert str(caught.value).endswith("differs); resume with the configuration of that run")
    assert all(torch.equal(parameter, old) for parameter, old in zip(other.parameters(), before, strict=True))


def test_missing_weights_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"no complete checkpoint, adapter\.safetensors is missing; name another one"):
        load_weights(two_layers(), tmp_path)

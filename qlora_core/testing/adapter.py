"""What every adapter must keep."""

from __future__ import annotations

import tempfile
import unittest
from pathlib import Path
from typing import Any

from qlora_core.model import build_skeleton, inject_adapter, load_model
from qlora_core.providers import Adapter
from qlora_core.testing.conformance import Conformance, check_no_pickle
from qlora_core.testing.tiny import PackedLinear, loss_of, tiny_config, tiny_ids

import torch  # isort: skip

__all__ = ["AdapterConformance"]


class AdapterConformance(Conformance):
    """The checks of an adapter, on a tiny Llama in float32."""

    kind = "adapter"
    tolerance = 1e-4
    """How far logits that should be equal may be apart, absolutely: the rounding of float32."""
    packed_layers = True
    """False for a method that must read the base weights, and says so in its documentation."""

    def base(self) -> Any:
        """Return a new plain base model."""
        return load_model(tiny_config(), None)

    def adapted(self, base: Any = None) -> tuple[Adapter, Any]:
        """Return the adapter and a base model that it was added to."""
        adapter = self.usable()
        if not adapter.trains:
            raise unittest.SkipTest("it trains nothing")
        adapter.check_model(build_skeleton(tiny_config()))
        torch.manual_seed(0)
        return adapter, inject_adapter(self.base() if base is None else base, adapter)

    def trained(self) -> tuple[Adapter, Any]:
        """Return the adapter and an adapted model after two steps."""
        adapter, model = self.adapted()
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.02)
        model.train()
        for _ in range(2):
            loss_of(model).backward()
            optimizer.step()
            optimizer.zero_grad()
        return adapter, model.eval()

    def test_it_starts_as_the_base(self) -> None:
        """before the first step the adapted model's logits are the base's"""
        base = self.base()
        before = _logits(base)
        _, model = self.adapted(base)
        apart = float((_logits(model.eval()) - before).abs().max())
        assert apart <= self.tolerance, f"logits differ from the base's by up to {apart:.3g} before the first step"

    def test_only_its_parameters_get_gradients(self) -> None:
        """its parameters get finite gradients, some not 0; no parameter of the base gets any"""
        base = self.base()
        own = {id(parameter): name for name, parameter in base.named_parameters()}
        adapter, model = self.adapted(base)
        loss = loss_of(model.train())
        assert loss.requires_grad, "no gradient reaches its parameters; the forward pass uses none of them"
        loss.backward()
        touched = [own[id(p)] for p in model.parameters() if p.grad is not None and id(p) in own]
        wrong = [name for name in touched if not adapter.may_train(name)]
        assert not wrong, f"{wrong[0]}, of the base, got a gradient"
        gradients = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
        without = [name for name, gradient in gradients.items() if gradient is None]
        assert not without, f"{without[0]} requires a gradient and got none"
        assert all(bool(g.isfinite().all()) for g in gradients.values() if g is not None), "a gradient is not finite"
        assert any(bool(g.any()) for g in gradients.values() if g is not None), "all gradients are 0; it can't learn"

    def test_a_step_leaves_the_base_and_changes_the_output(self) -> None:
        """two steps leave every bit of the base as it was, and change the logits"""
        base = self.base()
        held = [(name, p, p.detach().clone()) for name, p in base.named_parameters()]
        before = _logits(base)
        adapter, model = self.adapted(base)
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.02)
        model.train()
        for _ in range(2):
            loss_of(model).backward()
            optimizer.step()
            optimizer.zero_grad()
        changed = [name for name, p, old in held if not torch.equal(p, old) and not adapter.may_train(name)]
        assert not changed, f"a step changed {changed[0]}, of the base"
        assert not torch.equal(_logits(model.eval()), before), "two steps changed nothing"

    def test_saving_and_loading_gives_the_same_logits(self) -> None:
        """save and load on a fresh base give the same logits, frozen, without a pickle"""
        adapter, model = self.trained()
        with tempfile.TemporaryDirectory() as folder:
            adapter.save(model, Path(folder))
            check_no_pickle(Path(folder))
            again = self.provider().load(self.base(), Path(folder)).eval()
        apart = float((_logits(model) - _logits(again)).abs().max())
        assert apart <= self.tolerance, f"logits differ by up to {apart:.3g} after loading"
        loose = [name for name, parameter in again.named_parameters() if parameter.requires_grad]
        assert not loose, f"{loose[0]} requires a gradient after loading"

    def test_packed_layers_are_adapted_too(self) -> None:
        """it works on linear layers whose weight is packed: neither the shape nor the dtype of the matrix"""
        if not self.packed_layers:
            raise unittest.SkipTest("it must read the base weights")
        base = self.base()
        head = base.get_output_embeddings()
        linear = [(n, m) for n, m in base.named_modules() if isinstance(m, torch.nn.Linear) and m is not head]
        for name, module in linear:
            base.set_submodule(name, PackedLinear(module))
        _, model = self.adapted(base)
        loss_of(model).backward()
        gradients = [p.grad for p in model.parameters() if p.requires_grad]
        assert any(g is not None and bool(g.any()) for g in gradients), "no gradient through packed layers"

    def test_merging_keeps_the_output(self) -> None:
        """where it is mergeable, the merged model is plain and has the adapted model's logits"""
        adapter, model = self.trained()
        if not adapter.mergeable:
            raise unittest.SkipTest("it says that it can't be merged")
        adapted = _logits(model)
        base = self.base()
        with tempfile.TemporaryDirectory() as folder:
            adapter.save(model, Path(folder))
            merged = adapter.merge(adapter.load(base, Path(folder))).eval()
        names = {name for name, _ in merged.named_parameters()}
        assert names == {name for name, _ in self.base().named_parameters()}, (
            "the merged model has other parameters than the base"
        )
        apart = float((_logits(merged) - adapted).abs().max())
        assert apart <= 10 * self.tolerance, f"merged, logits differ by up to {apart:.3g}"


def _logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=tiny_ids(model), use_cache=False).logits
    return logits

"""What all kernels must keep."""

from __future__ import annotations

from typing import Any

from qlora_core.model import inject_adapter, load_model
from qlora_core.testing.conformance import Conformance
from qlora_core.testing.tiny import LowRank, loss_of, tiny_config, tiny_ids

import torch  # isort: skip

__all__ = ["KernelsConformance"]


class KernelsConformance(Conformance):
    """The checks of kernels, on a tiny Llama in float32."""

    kind = "kernels"
    tolerance = 1e-3
    """How far logits and gradients may be from the reference's, relative to them."""

    def models(self) -> tuple[Any, Any]:
        """Return an adapted model as it is, and the same with the kernels applied."""
        made = []
        for kernels in (None, self.usable()):
            torch.manual_seed(0)
            model = inject_adapter(load_model(tiny_config(), None), LowRank())
            for parameter in (p for p in model.parameters() if p.requires_grad):
                torch.nn.init.normal_(parameter, std=0.1)
            applied = model if kernels is None else kernels.apply(model)
            assert applied is model, "apply returns something else than the model; rewrite it in place, and return it"
            made.append(model)
        return made[0], made[1]

    def test_it_says_how_well_it_suits_a_device(self) -> None:
        """suits gives a whole number, 0 or more, for cpu and cuda"""
        for device in ("cpu", "cuda"):
            rank = self.provider().suits(device)
            assert isinstance(rank, int), f"suits({device!r}) gives {rank!r}"
            assert rank >= 0, f"suits({device!r}) gives {rank}"

    def test_logits_are_the_reference_s(self) -> None:
        """logits are those of the model without the kernels, in train and in eval mode"""
        plain, fast = self.models()
        for mode in (True, False):
            with torch.no_grad():
                wanted, got = (m.train(mode)(input_ids=tiny_ids(m), use_cache=False).logits for m in (plain, fast))
            self.__close(got, wanted, "logits")

    def test_loss_and_gradients_are_the_reference_s(self) -> None:
        """loss and the gradient of every trained parameter are those without the kernels"""
        plain, fast = self.models()
        results = []
        for model in (plain, fast):
            loss = loss_of(model.train())
            assert loss.requires_grad, "no gradient reaches the adapter"
            loss.backward()
            results.append({"loss": loss.detach(), **{n: p.grad for n, p in model.named_parameters() if p.requires_grad}})
        wanted, got = results
        assert wanted.keys() == got.keys(), f"other parameters are trained: {sorted(wanted.keys() ^ got.keys())[0]}"
        for name, value in wanted.items():
            assert got[name] is not None, f"{name} got no gradient"
            self.__close(got[name], value, name)

    def __close(self, got: torch.Tensor, wanted: torch.Tensor, what: str) -> None:
        error = float((got - wanted).norm() / wanted.norm())
        assert error <= self.tolerance, f"{what}: {error:.2g} from the reference, relative to it; at most {self.tolerance}"

"""What every quantizer must keep."""

from __future__ import annotations

import tempfile
import unittest
from pathlib import Path
from typing import Any

from qlora_core.footprint import held_bytes
from qlora_core.model import inject_adapter, load_model
from qlora_core.providers import Quantizer
from qlora_core.testing.conformance import Conformance, check_no_pickle
from qlora_core.testing.tiny import LowRank, loss_of, tiny_config, tiny_ids

import torch  # isort: skip

__all__ = ["QuantizerConformance"]


class QuantizerConformance(Conformance):
    """The checks of a quantizer, on a tiny Llama in float32."""

    kind = "quantizer"
    tolerance = 0.02
    """How far the layer may be from x Q(W)^T, relative to it: nothing but rounding (int8 rounds its inputs too)."""

    def base(self) -> tuple[Quantizer, Any]:
        """Return the quantizer and the base model that it stores."""
        quantizer = self.usable()
        return quantizer, load_model(tiny_config(), quantizer)

    def layers(self, quantizer: Quantizer, model: torch.nn.Module) -> dict[str, Any]:
        """Return the quantised layers by name; skip where this quantizer leaves weights as they are."""
        if not quantizer.quantizes:
            raise unittest.SkipTest("it quantises nothing")
        found = {name: module for name, module in model.named_modules() if quantizer.is_quantized(module)}
        assert found, "is_quantized is true for no layer of a Llama"
        return found

    def test_logits_keep_their_shape_and_are_finite(self) -> None:
        """logits have the shape of the plain model's and are finite"""
        _, model = self.base()
        with torch.no_grad():
            logits = model(input_ids=tiny_ids(model)).logits
        assert logits.shape == (2, 24, 64), f"logits have the shape {tuple(logits.shape)}, not (2, 24, 64)"
        assert bool(logits.isfinite().all()), "logits are not finite"

    def test_quantized_layers_are_linear_layers(self) -> None:
        """quantised layers are torch.nn.Linear, so that every adapter finds them; the head is left alone"""
        quantizer, model = self.base()
        layers = self.layers(quantizer, model)
        odd = [name for name, layer in layers.items() if not isinstance(layer, torch.nn.Linear)]
        assert not odd, f"{odd[0]} is a {type(layers[odd[0]]).__name__}; make it a subclass of torch.nn.Linear" if odd else ""
        head = model.get_output_embeddings()
        assert not quantizer.is_quantized(head), "the output head is quantised; its error goes straight into the loss"

    def test_dequantize_is_what_the_layer_multiplies_by(self) -> None:
        """dequantize has the shape of W, and the layer computes x Q(W)^T with it, its input's gradient too"""
        quantizer, model = self.base()
        for name, layer in self.layers(quantizer, model).items():
            weight = quantizer.dequantize(layer).detach().float()
            shape = layer.out_features, layer.in_features
            assert weight.shape == shape, f"{name}: dequantize gives {tuple(weight.shape)}, not {shape}"
            x = torch.randn(5, layer.in_features, device=weight.device, requires_grad=True)
            y = layer(x)
            bias = layer.bias if layer.bias is not None else 0
            self.__close(y.detach(), (x @ weight.T + bias).detach(), f"{name}: the layer's output is not x Q(W)^T")
            assert y.requires_grad, f"{name}: no gradient goes through the layer to its input"
            g = torch.randn_like(y)
            (grad,) = torch.autograd.grad(y, x, g)
            self.__close(grad, g @ weight, f"{name}: the gradient of the layer's input is not g Q(W)")

    def test_bfloat16_and_autocast_give_about_the_same_loss(self) -> None:
        """loaded in bfloat16, and under autocast to it, the loss is within 0.1 nats of float32's"""
        quantizer, model = self.base()
        half = load_model(tiny_config().model_copy(update={"dtype": "bfloat16"}), quantizer)
        with torch.no_grad():
            wanted = float(loss_of(model))
            losses = {"in bfloat16": float(loss_of(half))}
            for name, other in (("float32 under autocast", model), ("bfloat16 under autocast", half)):
                with torch.autocast(next(other.parameters()).device.type, dtype=torch.bfloat16):
                    losses[name] = float(loss_of(other))
        for name, loss in losses.items():
            assert abs(loss - wanted) <= 0.1, f"{name} the loss is {loss:.3f}, in float32 {wanted:.3f}"

    def test_stored_bytes_are_the_bytes_held(self) -> None:
        """stored_bytes gives, for each layer, the bytes of packed weight and constants that it really holds"""
        quantizer, model = self.base()
        for name, layer in self.layers(quantizer, model).items():
            said, held = quantizer.stored_bytes((layer.out_features, layer.in_features)), held_bytes(layer, quantizer)
            assert said == held, f"{name}: stored_bytes says {said}, the layer holds {held}"

    def test_the_base_is_frozen(self) -> None:
        """no parameter of the base requires a gradient"""
        _, model = self.base()
        loose = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        assert not loose, f"{loose[0]} requires a gradient"

    def test_gradients_reach_the_adapter_and_the_base_stays(self) -> None:
        """every matrix of an adapter gets a finite gradient that is not 0; a step leaves every bit of the base"""
        _, model = self.base()
        base = {name: held.detach().clone() for name, held in model.state_dict().items() if torch.is_tensor(held)}
        adapted = inject_adapter(model, LowRank())
        for parameter in (p for p in adapted.parameters() if p.requires_grad):
            torch.nn.init.normal_(parameter, std=0.1)
        loss = loss_of(adapted.train())
        assert loss.requires_grad, "no gradient reaches the adapter"
        loss.backward()
        for name, parameter in adapted.named_parameters():
            if parameter.requires_grad:
                assert parameter.grad is not None, f"{name} got no gradient"
                assert bool(parameter.grad.isfinite().all()), f"the gradient of {name} is not finite"
                assert bool(parameter.grad.any()), f"the gradient of {name} is 0"
        torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.1).step()
        now = {name.replace(".layer.", "."): held for name, held in adapted.state_dict().items()}
        changed = [name for name, held in base.items() if not _same(held, now[name])]
        assert not changed, f"a step changed {changed[0]}"

    def test_evaluating_changes_nothing(self) -> None:
        """a forward pass in eval mode changes neither the next loss nor its gradients"""
        _, model = self.base()
        adapted = inject_adapter(model, LowRank())

        def gradients() -> list[torch.Tensor]:
            adapted.train()
            adapted.zero_grad()
            loss = loss_of(adapted)
            loss.backward()
            return [loss.detach(), *(p.grad.clone() for p in adapted.parameters() if p.grad is not None)]

        before = gradients()
        adapted.eval()
        with torch.no_grad():
            adapted(input_ids=tiny_ids(adapted))
        same = all(torch.equal(a, b) for a, b in zip(before, gradients(), strict=True))
        assert same, "loss or gradients differ after an evaluation; the layers repack their weights in eval mode"

    def test_saving_and_loading_gives_the_same_bits(self) -> None:
        """save and load give a model with the same parameters and logits, bit for bit, on the same device, without a pickle"""
        quantizer, model = self.base()
        with tempfile.TemporaryDirectory() as folder:
            quantizer.save(model, Path(folder))
            check_no_pickle(Path(folder))
            again = quantizer.load(Path(folder)).eval()
        forms, forms_again = ({n: (p.dtype, p.shape, p.device) for n, p in m.named_parameters()} for m in (model, again))
        odd = sorted({name for name, _ in forms.items() ^ forms_again.items()})
        assert not odd, f"{odd[0]} has another dtype, shape or device after loading: {forms_again.get(odd[0])}" if odd else ""
        with torch.no_grad():
            ours, theirs = (m.eval()(input_ids=tiny_ids(m)).logits for m in (model, again))
        assert torch.equal(ours, theirs), f"logits differ by up to {float((ours - theirs).abs().max()):.3g} after loading"

    def __close(self, got: torch.Tensor, wanted: torch.Tensor, what: str) -> None:
        error = float((got.float() - wanted).norm() / wanted.norm())
        assert error <= self.tolerance, f"{what}; they differ by {error:.2g} of it, more than {self.tolerance}"


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    if hasattr(one, "__tensor_flatten__"):
        names, _ = one.__tensor_flatten__()
        return all(_same(getattr(one, name), getattr(other, name)) for name in names)
    return torch.equal(one, other)

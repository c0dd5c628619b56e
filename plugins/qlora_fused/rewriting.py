"""What an adapted model is made of, and which of its parts are replaced. Imported late."""

from __future__ import annotations

import functools
import importlib.util
import logging
from collections import Counter
from typing import TYPE_CHECKING, Any

import torch
import transformers
from bitsandbytes.nn import Linear4bit
from peft.tuners.lora import LoraLayer
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from qlora_core.attention import base_of
from qlora_core.packed import at_rest
from qlora_core.training.cross_entropy import LOSSES_OF_LOGITS
from qlora_fused import has_liger
from qlora_fused.blockwise import BLOCKWISE, COMPILED, TILED, attention
from qlora_fused.cpu import has_amx
from qlora_fused.lora import fuse_group, fusible, output_dtype
from qlora_fused.mlp import activation_of, fuse_mlp
from qlora_fused.norms import fuse_layer_norm, fuse_rms_norm, rms_norm_of
from qlora_fused.pages import keep_pages
from qlora_fused.rotary import apply_rotary_pos_emb, fuse_rotary, rotates_halves

if TYPE_CHECKING:
    from qlora_fused import FusedOptions

__all__ = ["rewrite"]

logger = logging.getLogger("qlora_core")


def rewrite(model: torch.nn.Module, options: FusedOptions) -> None:
    """Replace in place what *options* name and *model* has, and log what was replaced and what was left alone."""
    base = base_of(model)
    done: Counter[str] = Counter()
    loops = _loops() if options.compiled and base.device.type == "cpu" else None
    tiles = _tiles() if options.tiles and loops is not None else None
    layers = [module for module in base.modules() if fusible(module)]
    if options.linear:
        for group in _sharing_inputs(base, layers) if layers else []:
            fuse_group(group, loops, tiles)
        done["LoRA layers"] = len(layers)
        for name, module in base.named_modules():
            if isinstance(module, LoraLayer) and not fusible(module):
                logger.debug("kernels fused: %s (%s) is left alone", name, type(module.get_base_layer()).__name__)  # type: ignore[attr-defined]
        if tiled := _by_tiles(base, tiles):
            done["of them by tiles"] = tiled
    if options.liger and base.device.type == "cuda" and has_liger():
        from qlora_fused.liger import use_liger

        done["modules of liger-kernel"] = use_liger(base)
    if not done["modules of liger-kernel"]:
        _between_products(base, options, loops, tiles, done, lora=bool(layers))
    if options.attention:
        done["attention"] = _attention(base, loops, tiles is not None)
    if options.loss and loops is not None:
        done["loss"] = _losses(base, loops)
    if options.keep_pages and base.device.type == "cpu":
        sizes = [layer.in_features * layer.out_features for layer in layers]
        keep_pages(max(sizes, default=0) * base.dtype.itemsize)
    logger.info("kernels fused: %s", ", ".join(f"{n} {what}" for what, n in done.items() if n) or "nothing here applies")
    missing = [what for what, n in done.items() if not n]
    if missing:
        logger.debug("kernels fused: %s has no %s of the kind that is replaced", type(base).__name__, ", ".join(missing))


def _between_products(base: Any, options: FusedOptions, loops: Any, tiles: Any, done: Counter[str], *, lora: bool) -> None:
    if options.mlp:
        done["MLPs"] = _mlps(base, loops, tiles)
    if options.norm and lora:
        done["norms"] = _norms(base, loops)
    if options.rotary:
        found = [module for module in base.modules() if rotates_halves(module)]
        for module in found:
            fuse_rotary(module, functools.partial(apply_rotary_pos_emb, loops=loops))
        done["rotary embeddings"] = len(found)


def _loops() -> Any:
    """Return the module of compiled loops, or None and why in the log: they need numba, and the threads of torch."""
    if importlib.util.find_spec("numba") is None:
        logger.info(
            "kernels fused: loops are not compiled, which makes steps slower: pip install 'qlora-core[cpu]' brings numba"
        )
        return None
    try:
        from qlora_fused import jit, loops
    except Exception as error:  # numba, for one, refuses a numpy that is newer than it
        logger.warning("kernels fused: loops are not compiled, which makes steps slower: %s", error)
        return None
    if jit.threads() is None:
        logger.debug("kernels fused: loops are not compiled: torch's threads are not to be had here")
        return None
    return loops


def _tiles() -> Any:
    """Return the module of products by tiles, or None where the CPU has no units for them."""
    if not has_amx():
        return None
    from qlora_fused import jit
    from qlora_fused.tiles import lora

    if jit.has_tiles():
        return lora
    older = "numba is older than 0.62 (pip install -U numba), or told not to compile for this CPU"
    logger.info("kernels fused: no products by tiles, which makes steps slower: %s", older)
    return None


def _by_tiles(base: torch.nn.Module, tiles: Any) -> int:
    """Return how many LoRA layers are of a size that products by tiles take, and log the others."""
    count = 0
    if tiles is None:
        return count
    from qlora_fused.fourbit import Packed

    for name, module in base.named_modules():
        if fusible(module):
            layer: Any = module.get_base_layer()  # type: ignore[operator]
            fits = tiles.fits(layer, Packed.of(layer) if isinstance(layer, Linear4bit) else None)
            count += fits
            if not fits:
                size = f"{layer.in_features} inputs and {layer.out_features} outputs"
                logger.debug("kernels fused: %s, with %s, is computed without tiles", name, size)
    return count


def _sharing_inputs(base: transformers.PreTrainedModel, layers: list[Any]) -> list[list[Any]]:
    """Return *layers* in groups that their parents call one after the other with the same tensor: seen in a forward pass."""
    parents = {module: parent for parent in base.modules() for module in parent.children()}
    groups: list[list[Any]] = []
    seen: list[torch.Tensor] = []  # kept, so that an id stands for one tensor

    def note(layer: torch.nn.Module, args: tuple[Any, ...]) -> None:
        shared = seen and args[0] is seen[-1] and parents[groups[-1][-1]] is parents[layer]
        if shared and layer not in groups[-1]:
            groups[-1].append(layer)
        else:
            groups.append([layer])
        seen.append(args[0])

    hooks = [layer.register_forward_pre_hook(note) for layer in layers]
    try:
        with at_rest(base):
            base(input_ids=torch.zeros(1, 2, dtype=torch.int64, device=base.device), use_cache=False)
    except Exception as error:  # (a model that takes other inputs: nothing is lost but the grouping)
        logger.debug("kernels fused: layers are not grouped: %s", error)
        groups = []
    finally:
        for hook in hooks:
            hook.remove()
    once = Counter(layer for group in groups for layer in group)
    good = [group for group in groups if all(once[layer] == 1 for layer in group)]
    grouped = {layer for group in good for layer in group}
    return [*good, *([layer] for layer in layers if layer not in grouped)]


def _mlps(base: torch.nn.Module, loops: Any, tiles: Any = None) -> int:
    count = 0
    for module in base.modules():
        parts = [getattr(module, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
        act = getattr(module, "act_fn", None)
        if not all(part is not None and fusible(part) for part in parts) or not isinstance(act, torch.nn.Module):
            continue
        activation = activation_of(act)
        if activation is not None and len(list(module.children())) == 4 and _is_gated(module):
            fuse_mlp(module, activation, loops, tiles)
            count += 1
    return count


class _Times(torch.nn.Module):
    """Stands for a projection: a factor."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.factor


def _is_gated(module: Any) -> bool:
    """Return whether *module* computes down(act(gate(x)) * up(x)) to the bit, whatever these three are."""
    own = dict(module._modules)
    # large numbers too, for some models clamp what they multiply
    x = torch.cat([torch.linspace(-most, most, 32) for most in (4, 30, 1e3, 1e6)]).view(1, 4, 32)
    x = x.to(module.gate_proj.weight.device)
    try:
        module._modules.update(gate_proj=_Times(1.5), up_proj=_Times(-0.7), down_proj=_Times(0.3))
        with at_rest(module):
            return torch.equal(module(x), module.down_proj(module.act_fn(module.gate_proj(x)) * module.up_proj(x)))
    except Exception:  # whatever a stranger's module raises for parts of another size
        return False
    finally:
        module._modules.update(own)


def _norms(base: transformers.PreTrainedModel, loops: Any) -> int:
    """Replace norms, and let the residual stream be float32, as `prepare_model_for_kbit_training` of peft has it."""
    count = 0
    for module in list(base.modules()):
        if type(module) is torch.nn.LayerNorm and not any(p.requires_grad for p in module.parameters()):
            fuse_layer_norm(module, output_dtype)
        elif (found := rms_norm_of(module)) is not None:
            fuse_rms_norm(module, *found, output_dtype, loops)
        else:
            continue
        count += 1
    if count:
        base.get_input_embeddings().register_forward_hook(_widen)
    return count


def _widen(module: torch.nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
    """Begin a float32 residual stream, where autocast sees to it that the rest of the model can take it."""
    return output.float() if torch.is_autocast_enabled(output.device.type) else output


def _losses(base: transformers.PreTrainedModel, loops: Any) -> int:
    head = base.get_output_embeddings()
    if head is None:
        return 0
    setattr(head, LOSSES_OF_LOGITS, loops.cross_entropies)
    return 1


def _attention(base: transformers.PreTrainedModel, loops: Any, tiled: bool) -> int:
    if base.device.type != "cpu" or base.config._attn_implementation != "sdpa" or not base._can_set_attn_implementation():
        return 0
    name, tiles = BLOCKWISE if loops is None else COMPILED, None
    if tiled:
        from qlora_fused.tiles import attention as tiles

        name = TILED
    transformers.AttentionInterface.register(name, functools.partial(attention, loops=loops, tiles=tiles))
    AttentionMaskInterface.register(name, sdpa_mask)
    base.set_attn_implementation(name)
    return 1

"""On CUDA: what liger-kernel replaces in a model, for that model alone. Imported late; never run on a GPU by this project.

liger-kernel patches the module that a model's class is from, too, so that every later model of the process gets its kernels,
on the CPU as well, where they fail; that is undone here.
"""

from __future__ import annotations

import inspect
import sys
from typing import Any

from qlora_fused.rotary import fuse_rotary, rotates_halves

__all__ = ["use_liger"]

NOT_WANTED = ("rope", "cross_entropy", "fused_linear_cross_entropy")  # patched by name below; the loss is the core's


def use_liger(base: Any) -> int:
    """Let liger-kernel replace norms, gated MLPs and rotary positions of *base*; return how many modules have its kernels.

    0 where it does not know the architecture.
    """
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN
    from liger_kernel.transformers.rope import liger_rotary_pos_emb

    patch = MODEL_TYPE_TO_APPLY_LIGER_FN.get(base.config.model_type)
    if patch is None:
        return 0
    accepted = inspect.signature(patch).parameters
    classes = vars(sys.modules[type(base).__module__])
    before = dict(classes)
    forwards = {module: module.forward for module in base.modules()}
    try:
        patch(model=base, **{name: False for name in NOT_WANTED if name in accepted})
    finally:
        classes.update(before)
    if "rope" in accepted:
        for module in base.modules():
            if rotates_halves(module):
                fuse_rotary(module, liger_rotary_pos_emb)
    return sum(module.forward != forwards[module] for module in base.modules())

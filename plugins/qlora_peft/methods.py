"""What is known of PEFT's methods by measuring each, with PEFT 0.21, on every quantizer. Light: imports no torch.

Methods that are not named here add to a layer's input or output, or to the embedded text, and work on any quantizer.
tests/plugins/test_peft.py verifies the tables for every method that PEFT has.
"""

from __future__ import annotations

READS_WEIGHT: dict[str, tuple[str, ...]] = {
    "adamss": (),
    "deft": (),
    "delora": (),
    "frod": (),
    "glora": (),
    "hira": ("nf4", "fp4", "int8"),
    "hra": (),
    "loha": ("int8",),
    "lokr": ("int8",),
    "osf": (),
    "peanut": (),
    "psoft": (),
    "shira": ("nf4", "fp4"),
    "supertuning": (),
    "tinylora": (),
    "unilora": (),
}
"""Methods that read a layer's weight or its shape, and the quantizers whose packed weights they can read.

On others PEFT fails, or takes the codes for weights and trains another model: deft, hra and peanut on int8.
"""

NEVER: dict[str, str] = {
    "adalora": "it needs a call after every step that moves rank between layers, and its own loss; use lora",
    "cpt": "it weighs the loss of the tokens of its context itself; use prompt_tuning",
    "multitask_prompt_tuning": "it needs a task id with every example; use prompt_tuning",
    "poly": "it needs a task id with every example; use lora",
    "shadow": "its auxiliary loss would be left out, and it was made to be trained with it; use lora",
    "xlora": "it mixes LoRA adapters that were trained before; use lora",
}
"""Methods that need more than the tokens of a text and the loss of the next one."""

OWN_TARGETS = frozenset({"adaption_prompt", "beft", "ia3", "ln_tuning", "trainable_tokens"})
"""Methods that are not for all linear layers; where the user names none, PEFT knows them for each architecture."""

UNMERGEABLE = frozenset({"adaption_prompt", "beft", "cartridge", "lily", "p_tuning", "prefix_tuning", "prompt_tuning"})
"""Methods that are no change of the weights: prompts, and what PEFT can't merge (beft on layers without a bias)."""

LENGTHENS = frozenset({"p_tuning", "prompt_tuning"})
"""Methods that put virtual tokens before the text, which get logits too."""

PROMPTS = frozenset({*LENGTHENS, "prefix_tuning"})
"""Methods that put a prompt before a row, which packed samples would share."""

PLAIN_INIT = (True, False, "gaussian")
"""The values of init_lora_weights that leave the base weights alone."""

OWNED: dict[str, str] = {
    "auto_mapping": "it is for models without a task",
    "base_model_name_or_path": "it is the model of the run",
    "inference_mode": "it is set when a finished run is loaded",
    "peft_type": "it is the option method",
    "peft_version": "it is the version that is installed",
    "revision": "it is model.revision",
    "task_type": "it is CAUSAL_LM",
}
"""Fields of every PEFT configuration that are not the user's, and why."""

REQUIRED = ("adapter_layers", "adapter_len", "encoder_hidden_size", "num_virtual_tokens", "token_indices")
"""Fields without which a method fails later on, though PEFT gives them a default."""


def why_not(method: str, quantizer: str) -> str:
    """Return why *method* can't work on weights that *quantizer* has packed, with the remedy, or an empty text."""
    readable = READS_WEIGHT.get(method, (quantizer,))
    if quantizer in readable:
        return ""
    others = " or ".join([*readable, "none"])
    return (
        f"{method} reads the base weights, and {quantizer} has packed them; use quantizer: {others}, or a method that "
        "only adds to a layer's output, such as lora, vera or ia3"
    )

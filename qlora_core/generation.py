"""Continue a prompt with a model, streaming the text as it comes."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from qlora_core.libraries import import_libraries

if TYPE_CHECKING:
    import torch
    import transformers

__all__ = ["generate"]


def generate(
    model: torch.nn.Module,
    tokenizer: transformers.PreTrainedTokenizerBase,
    prompt: str,
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_p: float = 1.0,
    chat: bool = False,
    on_text: Callable[[str], object] | None = None,
) -> str:
    """Return the text that *model* adds to *prompt*; *on_text* is given each piece as soon as it is final.

    Greedy at *temperature* 0, else sampled from the smallest set of tokens with probability *top_p*. With *chat* the
    prompt is one user turn in the tokenizer's chat template. The model is left in the mode that it was in.
    """
    import_libraries()
    import torch
    from transformers import TextStreamer

    class Pieces(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            if on_text is not None and text:
                on_text(text)

    device = next(model.parameters()).device
    if chat:
        turns = [{"role": "user", "content": prompt}]
        encoded: Any = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    else:
        encoded = tokenizer(prompt, return_tensors="pt")
    inputs = {name: encoded[name].to(device) for name in ("input_ids", "attention_mask")}
    sampling = {"temperature": temperature, "top_p": top_p, "top_k": 0} if temperature > 0 else {}
    mode = model.training
    model.eval()
    try:
        with torch.no_grad():
            output = model.generate(  # type: ignore[operator]
                **inputs,
                **sampling,
                do_sample=temperature > 0,
                max_new_tokens=max_new_tokens,
                use_cache=True,
                pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
                streamer=Pieces(tokenizer, skip_prompt=True, skip_special_tokens=True) if on_text else None,
            )
    finally:
        model.train(mode)
    text = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert isinstance(text, str)
    return text

"""Continue a prompt with a model, streaming the text as it comes."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from qlora_core.errors import ModelError
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
    from transformers.generation.streamers import BaseStreamer

    class Pieces(BaseStreamer):
        """Gives *on_text* what each token adds to the decoded whole: a token alone may lose the space before it."""

        def __init__(self) -> None:
            self.ids: list[int] = []
            self.shown = ""

        def put(self, value: torch.Tensor) -> None:
            first = not self.ids
            self.ids += value.flatten().tolist()
            text = tokenizer.decode(self.ids, skip_special_tokens=True)
            if first:
                self.shown = text
            elif not text.endswith("\ufffd"):  # half of a character
                self.show(text)

        def end(self) -> None:
            self.show(tokenizer.decode(self.ids, skip_special_tokens=True))

        def show(self, text: str) -> None:
            if on_text is not None and len(text) > len(self.shown):
                on_text(text[len(self.shown) :])
                self.shown = text

    device = next(model.parameters()).device
    if chat and tokenizer.chat_template is None:
        raise ModelError("the model has no chat template; leave out --chat")
    stop: Any = model.generation_config.eos_token_id  # type: ignore[union-attr]
    ends = list(stop) if isinstance(stop, list) else [stop]
    if chat:
        turns = [{"role": "user", "content": prompt}]
        ends.append(_end_of_turn(tokenizer))
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
                eos_token_id=sorted({end for end in ends if end is not None}) or None,
                pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
                streamer=Pieces() if on_text else None,
            )
    finally:
        model.train(mode)
    shown = tokenizer.decode(inputs["input_ids"][0], skip_special_tokens=True)
    return str(tokenizer.decode(output[0], skip_special_tokens=True))[len(shown) :]


def _end_of_turn(tokenizer: transformers.PreTrainedTokenizerBase) -> int | None:
    """Return the id of the token that ends an answer in the tokenizer's template, which need not be EOS."""
    from qlora_core.data.mask import end_of_turn
    from qlora_core.data.template import ChatTemplate

    template = ChatTemplate.choose(tokenizer, None)
    return end_of_turn(tokenizer, template) if template is not None else None

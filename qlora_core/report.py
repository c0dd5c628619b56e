"""What a run says of its data and its model before it trains."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence, Sized
from typing import TYPE_CHECKING

from qlora_core.config import RunConfig
from qlora_core.footprint import Coverage, Footprint
from qlora_core.parts import Parts

if TYPE_CHECKING:
    from qlora_core.data.encode import Encoded

__all__ = ["data_line", "report_model"]

logger = logging.getLogger("qlora_core")


def data_line(encoded: Encoded, config: RunConfig) -> str:
    """Return how much there is to train and to evaluate on, and how full the blocks or batches are."""
    data, training, train = config.data, config.training, encoded.train
    if not isinstance(train, Sized):
        return f"data: a stream, of which {encoded.rows['train']:,} samples were checked, blocks of {data.sequence_length}"
    held_out = f"{len(encoded.eval):,} blocks ({encoded.eval_tokens:,} tokens)" if encoded.eval is not None else "none"
    if train.packed:
        full = 100 * train.tokens / (len(train) * data.sequence_length)
        filled = f"{train.samples:,} samples packed into blocks of {data.sequence_length}, {full:.1f} % full"
    else:
        from qlora_core.training.order import padding_share, training_order

        together = training.batch_size * int(os.environ.get("WORLD_SIZE", "1"))
        order = training_order(train.lengths, training.seed, 0, together)
        waste = padding_share(train.lengths, training.batch_size, data.pad_to_multiple_of, order)
        filled = f"one sample per block, {100 * waste:.1f} % of the positions in a batch are padding"
    return f"data: {len(train):,} blocks ({train.tokens:,} tokens) to train on, held out {held_out}; {filled}"


def report_model(size: Footprint, coverage: Coverage, parts: Parts) -> None:
    """Say what is quantised and adapted, and warn where that is less than people expect."""
    stored = f"{size.bytes / 1e6:,.1f} MB, {size.bits_per_parameter:.2f} bits per parameter"
    logger.info("model: %s parameters in %s", f"{size.parameters:,}", stored)
    if parts.quantizer.quantizes:
        bits = f"{size.quantized_bits:.2f} bits each, constants included"
        logger.info("%s stores %.1f %% of the parameters in %s", parts.quantizer.name, 100 * size.quantized_share, bits)
        if size.quantized_share < 0.8:
            logger.warning("not quantised: %s", _named_sizes(size.left_out, size.parameters))
    logger.info("%s adapts %.1f %% of the linear weights", parts.adapter.name, 100 * coverage.share)
    if coverage.share < 0.8:
        logger.warning("without an adapter: %s", _named_sizes(coverage.left_out, coverage.weights))


def _named_sizes(left_out: Sequence[tuple[str, int]], total: int) -> str:
    shown = ", ".join(f"{name} ({100 * size / total:.1f} %)" for name, size in left_out[:5])
    return shown + (f", and {len(left_out) - 5} more" if len(left_out) > 5 else "")

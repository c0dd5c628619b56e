"""What a run refuses once model and data are known, and before it trains: what would only fail, or mislead, later."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
from typing import TYPE_CHECKING

from qlora_core.config import DataConfig, RunConfig, TrainingConfig
from qlora_core.errors import ConfigError, DataError, ModelError, Problem, RunError
from qlora_core.parts import Parts
from qlora_core.run import Run

if TYPE_CHECKING:
    import torch
    import transformers

    from qlora_core.data.encode import Encoded

__all__ = ["check_evaluates", "check_positions", "check_space", "check_vocabulary"]

logger = logging.getLogger("qlora_core")


def check_vocabulary(
    tokenizer: transformers.PreTrainedTokenizerBase,
    skeleton: transformers.PreTrainedModel,
    new_token_ids: Sequence[int],
) -> None:
    """Raise ModelError for a tokenizer that has more tokens than the model has embeddings, the new ones aside."""
    rows = skeleton.get_input_embeddings().weight.shape[0]
    size = max(len(tokenizer), 1 + max(tokenizer.get_vocab().values(), default=0)) - len(new_token_ids)  # ids may have gaps
    if size > rows:
        raise ModelError(
            f"model.path: the tokenizer has {size} tokens and the model only {rows} embeddings; use the model's own tokenizer"
        )


def check_positions(skeleton: transformers.PreTrainedModel, data: DataConfig) -> None:
    """Raise ConfigError for blocks longer than a table of learned positions; warn where positions are computed."""
    limit = getattr(skeleton.config, "max_position_embeddings", None)
    if not isinstance(limit, int) or data.sequence_length <= limit:
        return
    what = f"the model was made for {limit} positions (got {data.sequence_length}); set data.sequence_length to at most {limit}"
    tables = [m for m in skeleton.modules() if hasattr(m, "num_embeddings") and m is not skeleton.get_input_embeddings()]
    if any(limit <= table.num_embeddings <= limit + 8 for table in tables):  # OPT's table has two rows more
        raise ConfigError([Problem(("data", "sequence_length"), what)])
    logger.warning("data.sequence_length: %s", what)


def check_evaluates(encoded: Encoded, config: RunConfig, parts: Parts) -> None:
    """Raise DataError where something needs evaluation data and there is none."""
    wanting = [f"callback {callback.name!r}" for callback in parts.callbacks if callback.needs_evaluation]
    wanting += ["training.keep: best"] if config.training.keep == "best" else []
    if wanting and encoded.eval is None:
        raise DataError(f"data.eval_fraction: nothing is held out, and {wanting[0]} needs evaluation data; set it above 0")


def check_space(run: Run, model: torch.nn.Module, training: TrainingConfig) -> None:
    """Raise RunError unless the disk has room for the checkpoints (weights and two moments each) and the adapter."""
    trained = sum(p.numel() * 4 for p in model.parameters() if p.requires_grad)
    needed = trained * (3 * ((training.save_total_limit or 2) + 1) + 1)
    parent = next(p for p in (run.folder, *run.folder.parents) if p.exists())
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise RunError(
            f"output: {parent} has {free / 1e6:,.0f} MB free and the run writes about {needed / 1e6:,.0f} MB; "
            "free some space, name another folder, or lower training.save_total_limit or the adapter's rank"
        )

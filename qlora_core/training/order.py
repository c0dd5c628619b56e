"""The order in which blocks are trained: a function of seed and epoch alone, so that a resumed run goes on in it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
import transformers

if TYPE_CHECKING:
    from qlora_core.data.blocks import Blocks

__all__ = ["EpochOrder", "FollowEpochs", "padding_share", "training_order"]

Numbers = npt.NDArray[np.int64]
MEGABATCH = 50  # batches that are sorted by length together: more would pad less and shuffle less


class EpochOrder(torch.utils.data.Sampler[int]):
    """Yields the indices of *blocks* in the order of the epoch that `set_epoch` named last.

    Packed blocks are all but equally long and come in random order. Others are grouped by length, *batch_size* at a time (of
    all processes together): less padding, while batches are still made of random blocks and come in random order.
    """

    def __init__(self, blocks: Blocks, batch_size: int, seed: int) -> None:
        self.blocks = blocks
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = 0

    @classmethod
    def of(cls, blocks: Any, args: transformers.TrainingArguments) -> EpochOrder | None:
        """Return the order of *blocks* for the Trainer's *args*; None for a stream, or where they ask for another."""
        if not hasattr(blocks, "__len__") or args.train_sampling_strategy != "random":
            return None
        seed = args.seed if args.data_seed is None else args.data_seed
        return cls(blocks, args.train_batch_size * args.world_size, seed)

    def set_epoch(self, epoch: int) -> None:
        """Name the epoch, from 0, whose order the next iteration follows."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.blocks)

    def __iter__(self) -> Iterator[int]:
        batch_size = None if self.blocks.packed else self.batch_size
        return iter(training_order(self.blocks.lengths, self.seed, self.epoch, batch_size).tolist())


class FollowEpochs(transformers.TrainerCallback):
    """Tells an EpochOrder each epoch. accelerate does too, but not with several processes in a resumed epoch (1.15)."""

    def __init__(self, order: EpochOrder) -> None:
        self.order = order

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Pass the epoch on; a resumed one begins at a fraction."""
        self.order.set_epoch(int(state.epoch or 0))


def training_order(lengths: Numbers, seed: int, epoch: int, batch_size: int | None = None) -> Numbers:
    """Return a permutation (n,) int64 of the blocks; with *batch_size*, one whose batches hold similar *lengths*.

    Shuffled, then sorted by length within each MEGABATCH batches, then the batches shuffled; the batch with the longest block
    comes first, so that memory that does not suffice shows at once, and one that is not full last.
    """
    random = np.random.default_rng([seed, epoch])
    order = random.permutation(len(lengths))
    if batch_size is None:
        return order
    group = np.arange(len(order)) // (MEGABATCH * batch_size)
    order = order[np.lexsort((-lengths[order], group))]
    full = len(order) // batch_size
    batches = random.permutation(full)
    if full:
        longest = int(np.argmax(lengths[order[: full * batch_size : batch_size]][batches]))
        batches[[0, longest]] = batches[[longest, 0]]
    shuffled = order[: full * batch_size].reshape(full, batch_size)[batches]
    return np.concatenate([shuffled.ravel(), order[full * batch_size :]])


def padding_share(lengths: Numbers, batch_size: int, multiple: int = 1, order: Numbers | None = None) -> float:
    """Return the share of positions that are padding when blocks of *lengths* are batched in *order*, from 0 to below 1."""
    if not len(lengths):
        return 0.0
    ordered = lengths if order is None else lengths[order]
    starts = np.arange(0, len(ordered), batch_size)
    rows = np.diff(np.append(starts, len(ordered)))
    widths = -(-np.maximum.reduceat(ordered, starts) // multiple) * multiple
    return 1 - float(ordered.sum()) / float((rows * widths).sum())

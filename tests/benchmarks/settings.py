"""What is compared, each setting by a name, and what the project wants to reach in it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

PEERS = ("trainer", "trl")
WHO = (*PEERS, "ours")


@dataclass(frozen=True)
class Setting:
    """One piece of work that peers and ours do in turn."""

    name: str
    words: str
    work: Literal["train", "evaluate", "generate", "startup"] = "train"
    rows: Literal["text", "gsm8k", "chats"] = "text"
    seq: int = 512
    """Tokens of a row of text; of ragged rows the most, and the length of our packed blocks."""
    batch: int = 2
    peer_batch: int | None = None
    """Rows of a peer's batch where it is another: padded rows are shorter than packed blocks."""
    checkpointing: bool = False
    speed: float | None = None
    """Wanted: our tokens/s over the best peer's."""
    memory: float | None = None
    """Wanted: at most this share of the best peer's peak."""
    bound: float | None = None
    """Wanted: at least this share of the tokens/s that the measured matrix multiplication allows."""

    @property
    def ragged(self) -> bool:
        """Whether rows differ in length, so that the peer pads."""
        return self.rows != "text"

    def flop_per_token(self, parameters: int) -> int:
        """Return the FLOP of the matrix products of a token in training, the base frozen: forward 2 per parameter, gradient
        of the input 2, and 2 more where the forward pass is done again."""
        return (6 if self.checkpointing else 4) * parameters


SETTINGS = (
    Setting("seq512", "train, 2 x 512 tokens", speed=3.0, memory=0.5, bound=0.6),
    Setting("seq512-ckpt", "train, 2 x 512, checkpointing", checkpointing=True, speed=3.0, memory=0.5, bound=0.6),
    Setting("seq128", "train, 8 x 128 tokens", seq=128, batch=8, speed=2.5, memory=0.5),
    Setting("seq2048", "train, 1 x 2,048 tokens", seq=2048, batch=1, speed=2.5, memory=0.5),
    Setting("gsm8k", "train, GSM8K: packed 2 x 1,024, peers 8 padded", rows="gsm8k", seq=1024, peer_batch=8, speed=4.0),
    Setting("chats", "train, chats: packed 2 x 1,024, peers 4 padded", rows="chats", seq=1024, peer_batch=4, speed=4.0),
    Setting("eval", "evaluate, 2 x 512 tokens", work="evaluate"),
    Setting("generate", "generate 64 tokens, adapted model", work="generate"),
    Setting("startup", "start to first step, warm cache", work="startup"),
)
QUICK = ("seq512", "seq512-ckpt", "generate")


def named(names: str) -> list[Setting]:
    """Return the settings that *names*, separated by commas, name; raise ValueError for an unknown one."""
    known = {setting.name: setting for setting in SETTINGS}
    unknown = [name for name in names.split(",") if name not in known]
    if unknown:
        raise ValueError(f"no setting {unknown[0]!r}; known: {', '.join(known)}")
    return [known[name] for name in names.split(",")]

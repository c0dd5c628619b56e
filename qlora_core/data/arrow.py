"""Data sets in memory-mapped Arrow files, made once by a generator and found again by a key."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from typing import Any

import datasets

from qlora_core.errors import QLoRAError

__all__ = ["cached_dataset"]

FORMAT = 1  # raise it when the same key would give other rows than before


def cached_dataset(
    generator: Callable[..., Iterator[dict[str, Any]]], features: dict[str, Any], key: str, **arguments: Any
) -> datasets.Dataset:
    """Return the rows of `generator(**arguments)` as a data set on disk; constant memory, however many rows.

    *key* must change whenever the rows would: rows that were made for it before are taken from the cache of `datasets`.
    A QLoRAError that the generator raises comes through as it is, and a generator without rows gives an empty data set.
    """
    columns = datasets.Features(features)
    try:
        return datasets.Dataset.from_generator(
            generator,
            features=columns,
            gen_kwargs=arguments,
            fingerprint=hashlib.sha256(f"{FORMAT} {key}".encode()).hexdigest()[:32],
        )
    except datasets.exceptions.DatasetGenerationError as error:
        if isinstance(error.__cause__, QLoRAError):
            raise error.__cause__ from None
        raise
    except ValueError as error:
        if "corresponds to no data" not in str(error):
            raise
        return datasets.Dataset.from_dict({name: [] for name in features}, features=columns)

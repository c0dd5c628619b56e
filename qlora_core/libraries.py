"""Import the heavy libraries the way a run needs them: quiet, and without fetching code or kernels from a hub."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import sys
import warnings
from collections.abc import Iterator

__all__ = ["import_libraries"]


def import_libraries() -> None:
    """Import torch, bitsandbytes and transformers so that none fetches a kernel, and let them report errors only.

    bitsandbytes 0.50 asks the package `kernels`, where it is installed, to download a CPU kernel at import, and otherwise
    warns that one should install it. transformers does the like for some models unless USE_HUB_KERNELS says no.
    """
    os.environ["USE_HUB_KERNELS"] = "NO"  # read by transformers when its module is first imported
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    if importlib.util.find_spec("bitsandbytes") is not None and "bitsandbytes" not in sys.modules:
        with _kernels_hidden(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            importlib.import_module("bitsandbytes")
    import datasets
    import transformers

    hub_kernels = sys.modules.get("transformers.integrations.hub_kernels")
    if hub_kernels is not None:  # imported before us, so the environment came too late
        hub_kernels._kernels_enabled = False  # type: ignore[attr-defined]
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # int8 warns of a cast in every product
    for name in ("torchao", "torch.utils._pytree"):  # of kernels for other devices, when peft or transformers import torchao
        logging.getLogger(name).setLevel(logging.ERROR)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    datasets.utils.logging.set_verbosity_error()


@contextlib.contextmanager
def _kernels_hidden() -> Iterator[None]:
    """Make `import kernels` fail as if it were not installed, and don't repeat the advice to install it."""
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    level, hidden = logger.level, sys.modules.get("kernels")
    logger.setLevel(logging.ERROR)
    sys.modules["kernels"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        logger.setLevel(level)
        if hidden is None:
            del sys.modules["kernels"]
        else:
            sys.modules["kernels"] = hidden

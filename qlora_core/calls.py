"""Calls into plugins: each is named, timed for the trace, and an exception in one names the plugin. Imports no torch.

With QLORA_TRACE=1 in the environment (`--trace`) every call writes a line to standard error: what was called, who answered, how
long it took.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from qlora_core.errors import PluginError, QLoRAError

__all__ = ["ProviderFailed", "answered", "calling", "named", "reason", "traced", "watched"]


class ProviderFailed(PluginError):
    """An exception that a provider raised and did not mean for the user; its cause is that exception."""

    def __init__(self, who: str, what: str, error: BaseException, *, ours: bool) -> None:
        self.ours = ours
        """True for a provider of this distribution: then it is our defect."""
        super().__init__(f"{who} failed in {what}: {reason(error)}")


@contextlib.contextmanager
def calling(provider: Any, what: str) -> Iterator[None]:
    """Run a call of *provider*'s method *what*: trace it, and turn an unexpected exception into ProviderFailed.

    A QLoRAError passes: it is what a provider says to the user. So does running out of memory, which is nobody's defect.
    """
    with traced(what, lambda: named(provider)):
        try:
            yield
        except (QLoRAError, MemoryError):
            raise
        except (Exception, SystemExit) as error:  # a stranger's sys.exit(0) must not pass for success
            if type(error).__name__ == "OutOfMemoryError":  # torch's, which need not be imported
                raise
            from qlora_core.provenance import plugin_of

            ours = plugin_of(type(provider))[1] == "qlora-core"
            raise ProviderFailed(named(provider), what, error, ours=ours) from error


@contextlib.contextmanager
def traced(what: str, who: Callable[[], str], result: Callable[[], str] = lambda: "") -> Iterator[None]:
    """Time a call and, where tracing is on, write who answered *what*, after how long, and the *result* if it has one."""
    if os.environ.get("QLORA_TRACE", "0") in ("", "0"):
        yield
        return
    started = time.perf_counter()
    outcome = "failed"
    try:
        yield
        outcome = result()
    finally:
        milliseconds = 1e3 * (time.perf_counter() - started)  # before who(), which takes some itself
        line = f"trace: {what:<28} {who():<44} {milliseconds:9.2f} ms  {outcome}"
        print(line.rstrip(), file=sys.stderr, flush=True)


def watched(callback: Any, factory: Any) -> Any:
    """Return *callback*, whose events name the plugin of *factory* where they raise, and the event."""
    for event in dir(callback):
        if event.startswith("on_") and callable(getattr(callback, event)):
            setattr(callback, event, _watched_event(getattr(callback, event), factory, event))
    return callback


def answered(provider: Any, what: str, answer: Any, kind: type | tuple[type, ...], words: str) -> Any:
    """Return *answer* of *provider*'s method *what*; raise PluginError unless it is a *kind*, in *words*."""
    if not isinstance(answer, kind) or (kind is int and isinstance(answer, bool)):
        raise PluginError(f"{named(provider)}: {what} must return {words} (got {answer!r:.80})")
    return answer


def reason(error: BaseException) -> str:
    """Return the type and message of *error*; of ours the message says it all."""
    return str(error) if isinstance(error, QLoRAError) else f"{type(error).__name__}: {error}"


def _watched_event(method: Callable[..., Any], factory: Any, event: str) -> Callable[..., Any]:
    @functools.wraps(method)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        with calling(factory, event):
            return method(*args, **kwargs)

    return guarded


def named(provider: Any) -> str:
    """Return kind, name and plugin: "quantizer 'nf4' of plugin 'bitsandbytes' (qlora-core 0.1.0)"."""
    from qlora_core.provenance import plugin_of
    from qlora_core.registry import kind_of

    plugin, distribution, version = plugin_of(type(provider))
    origin = f"plugin {plugin!r} ({distribution} {version})" if plugin else f"module {type(provider).__module__!r}"
    return f"{kind_of(type(provider))} {provider.name!r} of {origin}"

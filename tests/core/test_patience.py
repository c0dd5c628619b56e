"""Code that does not come to an end is stopped; code that does is not, and nothing is left behind."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import threading
import time

import pytest

from qlora_core.data.patience import Patience, TooLong


def endless() -> None:
    while True:
        pass


def test_what_takes_too_long_is_stopped_again_and_again() -> None:
    patience = Patience(0.1)
    for _ in range(2):
        started = time.monotonic()
        with pytest.raises(TooLong), patience.watching():
            endless()
        assert 0.1 <= time.monotonic() - started < 2


def test_what_ends_in_time_is_left_alone_and_so_is_what_follows() -> None:
    patience = Patience(0.1)
    for _ in range(2_000):
        with patience.watching():
            pass
    until = time.monotonic() + 0.3
    while time.monotonic() < until:  # in no block
        pass


def test_it_is_raised_in_the_block_or_at_its_end_and_never_below() -> None:
    """Blocks that end just when their time is over."""
    patience, late = Patience(0.02), 0
    until = time.monotonic() + 2
    while time.monotonic() < until:
        try:
            with patience.watching():
                end = time.monotonic() + 0.0215
                while time.monotonic() < end:
                    pass
        except TooLong:
            late += 1
        for _ in range(1000):
            pass
    assert late > 0


def test_an_error_that_comes_too_late_is_raised_at_the_end_of_a_block_that_would_not_hear_it() -> None:
    patience = Patience(0.05)
    with pytest.raises(TooLong), patience.watching():
        time.sleep(0.3)  # in a call into C


def test_a_profiler_can_be_switched_on_afterwards() -> None:
    code = """
import cProfile
from qlora_core.data.patience import Patience, TooLong
patience = Patience(0.05)
with patience.watching():
    pass
try:
    with patience.watching():
        while True:
            pass
except TooLong:
    cProfile.run("sum(range(10))")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert "function calls" in done.stdout, done.stderr


def test_an_error_of_the_block_comes_through() -> None:
    with pytest.raises(ZeroDivisionError), Patience(1).watching():
        raise ZeroDivisionError


def test_each_thread_is_stopped_in_its_own_block() -> None:
    stopped: list[str] = []

    def run() -> None:
        try:
            with Patience(0.1).watching():
                endless()
        except TooLong:
            stopped.append(threading.current_thread().name)

    threads = [threading.Thread(target=run, name=name) for name in ("one", "two")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert sorted(stopped) == ["one", "two"]


def test_the_thread_that_watches_ends_when_nothing_is_to_watch() -> None:
    time.sleep(0.3)  # those of other tests
    before = threading.active_count()
    patience = Patience(0.05)
    with patience.watching():
        assert threading.active_count() == before + 1
    time.sleep(0.2)
    assert threading.active_count() == before


def test_it_works_in_a_forked_process_too_and_can_be_pickled() -> None:
    patience = Patience(0.1)
    with patience.watching():
        pass
    assert pickle.loads(pickle.dumps(patience)).seconds == 0.1
    child = os.fork()
    if not child:
        try:
            with patience.watching():
                endless()
        except TooLong:
            os._exit(7)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7

"""A process that has imported the libraries, used none of them, and forks for each command: what reads files in C may crash.

A process of the tests can't do that itself: it has used the libraries, and their threads and what these hold do not survive
a fork. Each line of standard input is a JSON list of arguments, working directory and environment; the answer to each is
a line with exit code (negative for a signal), standard output and standard error, likewise. Imported by no test.
"""

from __future__ import annotations

import faulthandler
import importlib
import json
import os
import resource
import sys
import tempfile
from typing import IO, NoReturn

SECONDS = 20  # a command may take
MEMORY = 16 * 2**30  # bytes of address space that it may take
IMPORTED = (
    "bitsandbytes",
    "datasets",
    "peft",
    "pyarrow.json",
    "pyarrow.parquet",
    "torch",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.llama.modeling_llama",
    "qlora_core.pipeline",
    "qlora_core.cli.main",
)


def answer(arguments: list[str], folder: str, environment: dict[str, str]) -> tuple[int, str, str]:
    """Return exit code, standard output and standard error of `qlora` in a fork."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        child = os.fork()
        if not child:
            _become(arguments, folder, environment, out, err)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        return code, _text(out), _text(err)


def _become(arguments: list[str], folder: str, environment: dict[str, str], out: IO[bytes], err: IO[bytes]) -> NoReturn:
    """Run `qlora` in this process and end it; what takes too long ends it too, with a traceback of each thread."""
    import datasets

    from qlora_core.cli.main import main

    os.dup2(out.fileno(), 1)
    os.dup2(err.fileno(), 2)
    faulthandler.dump_traceback_later(SECONDS, exit=True)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    datasets.config.HF_DATASETS_CACHE = environment["HF_DATASETS_CACHE"]  # read at import
    code = 1
    try:
        main(arguments)
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:  # so that the tests see it
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _text(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode("utf-8", "replace")


if __name__ == "__main__":
    for name in IMPORTED:
        importlib.import_module(name)
    assert len(os.listdir("/proc/self/task")) == 1, "a fork with threads may hang"
    for line in sys.stdin:
        print(json.dumps(answer(*json.loads(line))), flush=True)

"""Standard output for what a verb was asked for, and nothing else."""

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import IO


@contextlib.contextmanager
def claim_stdout() -> Iterator[IO[str]]:
    """The standard output, as a file; what else is printed there within goes to standard error.

    The libraries that carry collectives print on it.
    """
    sys.stdout.flush()
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as output:
        os.dup2(2, 1)
        try:
            yield output
        finally:
            try:
                output.flush()
            finally:
                os.dup2(output.fileno(), 1)

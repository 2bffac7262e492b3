"""When Python looks for garbage in cycles: between steps, at times that the loop chooses."""

import contextlib
import gc
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def collect_only_when_asked() -> Iterator[Callable[[], int]]:
    """Switches Python's own collections off; gives a function that collects what is new.

    A collection in the middle of a step keeps the next one from the devices, and looks through all
    that jax and the data have made, in every process at another time. What exists at the beginning
    is therefore frozen: no collection looks at it. Afterwards, collections find everything again,
    and are on or off as they were.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    gc.collect()
    gc.freeze()
    try:
        yield gc.collect
    finally:
        gc.unfreeze()
        if was_enabled:
            gc.enable()

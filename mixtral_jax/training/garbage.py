"""When Python looks for garbage in cycles: between steps, at times that the loop chooses."""

import contextlib
import gc
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def collect_only_when_asked() -> Iterator[Callable[[], int]]:
    """Switches Python's own collections off; gives a function that collects what is new.

    A collection in the middle of a step keeps the next one from the devices, and looks through all
    that jax and the data have made, in every process at another time. What exists at the beginning
    is therefore frozen: no collection looks at it. Afterwards, everything is as it was.
    """
    was_enabled, had_frozen = gc.isenabled(), gc.get_freeze_count() > 0
    gc.disable()
    gc.collect()
    gc.freeze()
    try:
        yield gc.collect
    finally:
        if not had_frozen:  # Python cannot thaw a part of what is frozen.
            gc.unfreeze()
        if was_enabled:
            gc.enable()

"""How a run is told to stop: by SIGTERM, by Ctrl-C, or by another of its processes."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any

from mixtral_jax.parallel.processes import Processes
from mixtral_jax.training.loop import Outcome

# 75 is EX_TEMPFAIL: run the same command again.
EXIT_CODES: dict[Outcome, int] = {"finished": 0, "stopped": 75}


class StopSignal:
    """Makes SIGTERM and SIGINT wait for the step under way; a second one ends the process at once.

    Within `at_once`, where there is nothing to save, the first signal raises SystemExit with the
    code of a stopped run. With several processes jax listens for SIGTERM instead, from the moment
    they join, and they stop together; this class then only turns SIGINT into SIGTERM.
    """

    def __init__(self, processes: Processes | None = None) -> None:
        self.is_set = False
        self._processes = processes or Processes()
        self._is_at_once = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopSignal":
        if threading.current_thread() is not threading.main_thread():
            return self  # Python lets only the main thread handle signals.
        if self._processes.count == 1:
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._receive)
        else:
            self._previous[signal.SIGINT] = signal.signal(signal.SIGINT, self._pass_on)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def is_due(self) -> bool:
        """True if the run should stop now.

        All processes must ask equally often; the nth answer is the same on each.
        """
        return self.is_set or self._processes.is_stopping()

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """Lets the first signal end the process at once.

        Only for long work on the host: an exception while devices compute can crash the process.
        """
        self._is_at_once = True
        try:
            yield
        finally:
            self._is_at_once = False

    def _pass_on(self, number: int, _: Any) -> None:
        signal.signal(number, signal.SIG_DFL)
        signal.raise_signal(signal.SIGTERM)

    def _receive(self, number: int, _: Any) -> None:
        self.is_set = True
        signal.signal(number, signal.SIG_DFL)
        if self._is_at_once:
            raise SystemExit(EXIT_CODES["stopped"])

"""Steps that the devices may still be computing, and what the host reads of them later."""

import collections
import dataclasses
import time

import jax

from mixtral_jax.training.metrics import Record
from mixtral_jax.training.step import Metrics

# Steps that may be queued on the devices: enough that they never wait for the host. Each holds its
# batch in their memory.
MAX_QUEUED_STEPS = 2


@dataclasses.dataclass(frozen=True)
class _Queued:
    """A step that may be running; `fetched` are those of its metrics that the host will read."""

    step: int
    fetched: Metrics
    batch_hash: str
    has_record: bool


class StepQueue:
    """Reads the metrics of a step when later ones keep the devices busy, and counts its tokens.

    The metrics start on their way to the host as soon as they are computed. To read them waits for
    their step, and for no other.

    Args:
        tokens: the number of tokens trained on before the first step.
    """

    def __init__(self, tokens: int):
        self._queued: collections.deque[_Queued] = collections.deque()
        self._tokens = tokens
        self._new_tokens = 0
        self.restart_clock()

    def add(self, step: int, metrics: Metrics, batch_hash: str, *, has_record: bool) -> None:
        """Adds a step that the devices have been given; without a record, its tokens are counted
        and nothing else is read.
        """
        fetched = metrics if has_record else {"tokens": metrics["tokens"]}
        for value in fetched.values():
            value.copy_to_host_async()
        self._queued.append(_Queued(step, fetched, batch_hash, has_record))

    def read_earlier(self) -> list[Record]:
        """The records of the steps before one that the devices have just been given.

        If there are none, it only waits until few enough steps are queued.
        """
        has_records = any(queued.has_record for queued in self._queued)
        return self._read(0 if has_records else MAX_QUEUED_STEPS - 1)

    def read_all(self) -> list[Record]:
        """The records of all steps; waits for the last of them."""
        return self._read(0)

    def restart_clock(self) -> None:
        """Starts a new interval of the speed: what the devices did until now was not training."""
        self._since = time.monotonic()

    def _read(self, num_left: int) -> list[Record]:
        records = []
        while len(self._queued) > num_left:
            queued = self._queued.popleft()
            fetched = jax.device_get(queued.fetched)
            values = {name: value.tolist() for name, value in fetched.items()}
            self._new_tokens += values["tokens"]
            if queued.has_record:
                record = {"step": queued.step, **values, **self._count_tokens()}
                records.append(record | {"batch_hash": queued.batch_hash})
        return records

    def _count_tokens(self) -> dict[str, float]:
        """Tokens since the run began, and tokens per second of the interval that ends here."""
        now, new = time.monotonic(), self._new_tokens
        seconds = now - self._since
        self._tokens, self._new_tokens, self._since = self._tokens + new, 0, now
        return {"tokens": self._tokens, "tokens_per_second": new / seconds}

"""Texts of compiled programs, shortened from what XLA wrote for TPU and CPU.

Shapes and attributes are unchanged. The texts are in `tests/plan/hlo/`:

- `ragged.txt`: three layers, in a loop whose limit is a constant of its condition. Experts are
  sharded over 4 devices, weights over 2.
- `asynchronous.txt`: an asynchronous all-gather, and a reduce-scatter as XLA:TPU fuses it.
- `convolutions.txt`: values weighted by attention, over 8 groups of 4 heads and 4096 keys, and then
  a projection to 32 heads.
- `traffic.txt`: a slice that is multiplied in on-chip memory, and an in-place update.
- `copies.txt`: an asynchronous copy to on-chip memory, and an asynchronous all-gather.
- `overlapped.txt`: asynchronous collectives with matmuls between start and done, and others.
- `fused_gather.txt`: an all-gather that XLA:TPU fused with a matmul.
"""

from pathlib import Path

from mixtral_jax.plan.hlo import Program, parse_program

_FOLDER = Path(__file__).parent / "hlo"
RAGGED = (_FOLDER / "ragged.txt").read_text()


def ragged() -> Program:
    """The loop over layers with ragged all-to-alls."""
    return parse_program(RAGGED)


def asynchronous() -> Program:
    """A program with asynchronous and fused collectives."""
    return parse_program((_FOLDER / "asynchronous.txt").read_text())


def convolutions() -> Program:
    """Matmuls as XLA:TPU writes them."""
    return parse_program((_FOLDER / "convolutions.txt").read_text())


def traffic() -> Program:
    """A slice, a matmul, and an in-place update in a fusion."""
    return parse_program((_FOLDER / "traffic.txt").read_text())


def copies() -> Program:
    """Asynchronous reads and writes of memory."""
    return parse_program((_FOLDER / "copies.txt").read_text())


def overlapped() -> Program:
    """Collectives that matmuls hide, and collectives that nothing hides."""
    return parse_program((_FOLDER / "overlapped.txt").read_text())


def fused_gather() -> Program:
    """An all-gather in three fusions: its start, one with a matmul, and its done."""
    return parse_program((_FOLDER / "fused_gather.txt").read_text())

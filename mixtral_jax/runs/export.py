"""What a tuning leaves for other programs: a folder with the whole model, and adapters alone."""

import shutil
import time
from pathlib import Path

import jax

from mixtral_jax.checkpoint.export import write_folder
from mixtral_jax.checkpoint.files.new_folder import new_folder
from mixtral_jax.checkpoint.formats.adapters import write_mistral, write_peft
from mixtral_jax.checkpoint.weights import open_weights
from mixtral_jax.config import ConfigError
from mixtral_jax.runs.console import byte_progress
from mixtral_jax.runs.run import Run
from mixtral_jax.runs.workdir import wait_until_visible
from mixtral_jax.training.state import TrainState


def save_adapters(run: Run, state: TrainState, base: Path) -> None:
    """Writes the adapters of a state, if any, to `adapters/peft` and `adapters/mistral`."""
    finetune = run.config.finetune
    if finetune is None or not finetune.lora.rank:
        return
    folder, model = run.workdir / "adapters", state.model()
    with jax.set_mesh(run.mesh):
        write_peft(folder / "peft", model, finetune.lora, base=str(base))
        write_mistral(folder / "mistral", model, finetune.lora, dtype=run.config.model.param_dtype)
    run.console.print(f"adapters alone: {folder}/peft and {folder}/mistral")


def export_run(run: Run, to: Path) -> None:
    """Exports the newest checkpoint of a run to a Hugging Face folder, its adapters merged.

    An export of an earlier start is replaced. Process 0 writes; all return once it is there.

    Raises:
        ConfigError: `to` is not seen by this process.
    """
    start = time.monotonic()
    if run.is_writer:
        weights = open_weights(run.workdir)
        with new_folder(to) as folder, byte_progress("exporting", weights.nbytes) as report:
            write_folder(weights, folder, "hf", report)
            shutil.rmtree(to, ignore_errors=True)
    run.processes.share("exported", "")
    if not wait_until_visible(to):
        raise ConfigError(
            f"{to}, which process 0 has written, is not seen by this process: it must be on "
            "storage that all processes share"
        )
    seconds = time.monotonic() - start
    run.console.print(f"exported to {to} in {seconds:.0f} s: a Hugging Face folder")

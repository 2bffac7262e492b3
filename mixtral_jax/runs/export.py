"""What a tuning run leaves for other programs: a folder with the whole model, and adapters alone.
"""

import shutil
import time
from pathlib import Path

import jax

from mixtral_jax.checkpoint.formats.adapters import write_mistral, write_peft
from mixtral_jax.checkpoint.export import write_folder
from mixtral_jax.checkpoint.files.new_folder import new_folder
from mixtral_jax.checkpoint.weights import open_weights
from mixtral_jax.runs.byte_progress import byte_progress
from mixtral_jax.runs.run import Run
from mixtral_jax.runs.workdir import waits_for
from mixtral_jax.config import ConfigError
from mixtral_jax.train.state import TrainState


def save_adapters(run: Run, state: TrainState, base: Path) -> None:
    """Writes the adapters of a state, if it has any, into `adapters/peft` and `adapters/mistral` of
    the workdir.
    """
    finetune = run.config.finetune
    if finetune is None or not finetune.lora.rank:
        return
    folder, model = run.workdir / "adapters", state.model()
    with jax.set_mesh(run.mesh):
        write_peft(folder / "peft", model, finetune.lora, base=str(base))
        write_mistral(folder / "mistral", model, finetune.lora, dtype=run.config.model.param_dtype)
    run.console.print(f"adapters alone: {folder}/peft and {folder}/mistral")


def export_run(run: Run, to: Path) -> None:
    """Writes the newest checkpoint of a run as a Hugging Face folder, in the place of one that an
    earlier start wrote.

    Adapters are merged. Process 0 writes; all return once it is there.

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
    if not waits_for(to):
        raise ConfigError(f"{to}, which process 0 has written, is not seen by this one: it must be on shared storage")
    run.console.print(f"exported to {to} in {time.monotonic() - start:.0f} s: a Hugging Face folder")

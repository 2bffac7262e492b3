"""Pictures, for the report of an ablation, of what the routers of its arms do with held-out text.

An analysis is kept in the folder of its run, so that it is made once, however many tasks write the
report.
"""

import dataclasses
import hashlib
import json
from pathlib import Path

import jax

from mixtral_jax.checkpoint.run_parameters import find_steps
from mixtral_jax.config import BLIND_CHOICES
from mixtral_jax.lab.ablation.definition import Ablation, ArmRun
from mixtral_jax.lab.ablation.records import is_finished
from mixtral_jax.lab.pictures.routing import draw_side_by_side
from mixtral_jax.lab.pictures.style import Picture
from mixtral_jax.lab.routing.analysis import RoutingAnalysis
from mixtral_jax.lab.routing.analysis_json import from_json
from mixtral_jax.parallel.agreement import find_versions
from mixtral_jax.parallel.mesh import make_mesh, resolve_mesh
from mixtral_jax.parallel.processes import Processes
from mixtral_jax.runs.analysis import analyze_run
from mixtral_jax.whole_files import write_json

_KEPT_FILE = "routing.json"


def analyze_arms(ablation: Ablation, workdir: Path, processes: Processes) -> bool:
    """Analyses the first finished run of each arm and keeps the result; false if none was missing.

    All processes must call this: they route the text together.
    """
    runs = _first_finished(ablation, workdir)
    missing = [run.name for run in runs if _read_kept(run, workdir) is None]
    missing = processes.share("runs to analyse", missing)[0]
    for run in ablation.runs:
        if run.name in missing:
            folder, key = run.folder(workdir), _key(run, workdir)
            mesh = make_mesh(resolve_mesh(run.config, jax.device_count()).mesh)
            analysis = analyze_run(folder, mesh, processes)
            if processes.index == 0:
                write_json(folder / _KEPT_FILE, {"key": key, "analysis": analysis.to_json()})
    return bool(missing)


def picture_routing(ablation: Ablation, workdir: Path) -> list[Picture]:
    """Pictures of all arms with an analysis, side by side; they name the arms without a router."""
    analyses = {
        f"{run.arm.name}, seed {run.seed}": analysis
        for run in _first_finished(ablation, workdir)
        if (analysis := _read_kept(run, workdir))
    }
    train = ablation.arms[0].config.train  # The same in all arms.
    pictures = draw_side_by_side(analyses, train.batch_size * train.sequence_length)
    blind = [f'"{arm.name}"' for arm in ablation.arms if arm.config.router.choice in BLIND_CHOICES]
    left_out = f" Not shown: {', '.join(blind)}, where no router is asked." if blind else ""
    return [dataclasses.replace(each, words=each.words + left_out) for each in pictures]


def _first_finished(ablation: Ablation, workdir: Path) -> list[ArmRun]:
    """One finished run of each arm whose choice depends on its router."""
    routed = [run for run in ablation.runs if run.arm.config.router.choice not in BLIND_CHOICES]
    finished = {run.arm.name: run for run in reversed(routed) if is_finished(run, workdir)}
    return [finished[arm.name] for arm in ablation.arms if arm.name in finished]


def _read_kept(run: ArmRun, workdir: Path) -> RoutingAnalysis | None:
    """The analysis that was kept of this very run by this very code; None if there is none."""
    path = run.folder(workdir) / _KEPT_FILE
    if not path.exists():
        return None
    kept = json.loads(path.read_text("utf-8"))
    if kept["key"] != _key(run, workdir):
        return None
    return from_json(RoutingAnalysis, kept["analysis"])


def _key(run: ArmRun, workdir: Path) -> str:
    """A hash of all that an analysis is made from: the code, the checkpoints, and the run.

    The run is known by its metrics: each logged step has the hash of its rows and its speed.
    """
    folder = run.folder(workdir)
    parts = json.dumps([find_versions(), find_steps(folder / "checkpoints")])
    return hashlib.sha256(parts.encode() + (folder / "metrics.jsonl").read_bytes()).hexdigest()

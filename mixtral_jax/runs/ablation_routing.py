"""What the routers of finished arms do with held-out text, as pictures for the report of an
ablation.

An analysis is kept in the folder of its run, so that it is made once, however many tasks write the
report.
"""

import dataclasses
import hashlib
import json
from pathlib import Path

import jax

from mixtral_jax.checkpoint.run_parameters import find_steps
from mixtral_jax.cli.analyze import analyze_run
from mixtral_jax.runs.workdir import write_json
from mixtral_jax.config import BLIND_CHOICES
from mixtral_jax.lab.ablation.plan import Ablation, ArmRun
from mixtral_jax.lab.routing.analysis_json import from_json
from mixtral_jax.lab.ablation.records import is_finished
from mixtral_jax.lab.routing.analysis import RoutingAnalysis
from mixtral_jax.lab.pictures.routing import draw_side_by_side
from mixtral_jax.lab.pictures.style import Picture
from mixtral_jax.parallel.agreement import find_versions
from mixtral_jax.parallel.mesh import make_mesh, resolve_mesh
from mixtral_jax.parallel.processes import Processes

_KEPT = "routing.json"


def analyze_arms(ablation: Ablation, workdir: Path, processes: Processes) -> bool:
    """Keeps an analysis of the first finished run of each arm; whether there was any to make.

    All processes must ask: they route the text together.
    """
    wanted = [run.name for run in _first_finished(ablation, workdir) if _read_kept(run, workdir) is None]
    wanted = processes.share("runs to look at", wanted)[0]
    for run in ablation.runs:
        if run.name in wanted:
            key = _key(run, workdir)
            mesh = make_mesh(resolve_mesh(run.config, jax.device_count()).mesh)
            analysis = analyze_run(run.folder(workdir), mesh, processes)
            if processes.index == 0:
                write_json(run.folder(workdir) / _KEPT, {"key": key, "analysis": analysis.to_json()})
    return bool(wanted)


def picture_routing(ablation: Ablation, workdir: Path) -> list[Picture]:
    """Of the arms with an analysis, side by side, and a word on those without."""
    analyses = {
        f"{run.arm.name}, seed {run.seed}": analysis
        for run in _first_finished(ablation, workdir)
        if (analysis := _read_kept(run, workdir))
    }
    train = ablation.arms[0].config.train  # Of all arms.
    pictures = draw_side_by_side(analyses, train.batch_size * train.sequence_length)
    blind = ", ".join(f'"{arm.name}"' for arm in ablation.arms if arm.config.router.choice in BLIND_CHOICES)
    said = f" Not shown: {blind}, where no router is asked." if blind else ""
    return [dataclasses.replace(picture, words=picture.words + said) for picture in pictures]


def _first_finished(ablation: Ablation, workdir: Path) -> list[ArmRun]:
    """One run of each arm that has any and asks its router."""
    asking = [run for run in ablation.runs if run.arm.config.router.choice not in BLIND_CHOICES]
    finished = {run.arm.name: run for run in reversed(asking) if is_finished(run, workdir)}
    return [finished[arm.name] for arm in ablation.arms if arm.name in finished]


def _read_kept(run: ArmRun, workdir: Path) -> RoutingAnalysis | None:
    """What was kept of this very run, by this very code; None if nothing was."""
    path = run.folder(workdir) / _KEPT
    if not path.exists():
        return None
    said = json.loads(path.read_text("utf-8"))
    return from_json(RoutingAnalysis, said["analysis"]) if said["key"] == _key(run, workdir) else None


def _key(run: ArmRun, workdir: Path) -> str:
    """Of all that an analysis is made from: the code, the checkpoints, and this very run, of which
    each logged step has its rows and its speed.
    """
    folder = run.folder(workdir)
    parts = json.dumps([find_versions(), find_steps(folder / "checkpoints")])
    return hashlib.sha256(parts.encode() + (folder / "metrics.jsonl").read_bytes()).hexdigest()

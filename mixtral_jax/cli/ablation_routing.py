"""What the routers of finished arms do with held-out text, as pictures for the report of an ablation."""

import dataclasses
from pathlib import Path

import jax

from mixtral_jax.cli.analyze import analyze_run
from mixtral_jax.lab.ablation import Ablation, ArmRun
from mixtral_jax.lab.records import is_finished
from mixtral_jax.lab.routing_analysis import RoutingAnalysis
from mixtral_jax.lab.routing_pictures import draw_coactivation, draw_label, draw_saturation
from mixtral_jax.lab.style import Picture
from mixtral_jax.parallel.mesh import make_mesh, resolve_mesh
from mixtral_jax.parallel.processes import Processes


def picture_routing(ablation: Ablation, workdir: Path, processes: Processes) -> list[Picture]:
    """Of the first finished run of each arm: how early routes settled, who is chosen together, who is for what.

    All processes must ask: they route the text together.
    """
    finished = processes.share("runs to look at", [run.name for run in ablation.runs if is_finished(run, workdir)])[0]
    pictures: dict[str, list[Picture]] = {}
    for arm in ablation.arms:
        of_arm = [run for run in ablation.runs if run.arm is arm and run.name in finished]
        for picture in _draw(_analyze(of_arm[0], workdir, processes)) if of_arm else []:
            named = dataclasses.replace(picture, title=f"{picture.title}: {arm.name}")
            pictures.setdefault(picture.title, []).append(named)
    return [picture for of_kind in pictures.values() for picture in of_kind]


def _analyze(run: ArmRun, workdir: Path, processes: Processes) -> RoutingAnalysis:
    mesh = make_mesh(resolve_mesh(run.config, jax.device_count()).mesh)
    return analyze_run(run.folder(workdir), mesh, processes)


def _draw(analysis: RoutingAnalysis) -> list[Picture]:
    pictures = [draw_saturation(analysis)] if analysis.saturation else []
    if analysis.num_experts_per_token > 1:
        pictures.append(draw_coactivation(analysis))
    return pictures + [draw_label(analysis, shares) for shares in analysis.by_label[:1]]

"""The report of an ablation as files: index.html, report.md with PNGs, results.json.

Every file is written beside its place and renamed, so that it is whole whenever it is there,
however many processes write reports of the same runs.
"""

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path

from mixtral_jax.lab.ablation.results import Results
from mixtral_jax.lab.pictures.ablation import draw_pictures
from mixtral_jax.lab.pictures.style import Picture
from mixtral_jax.lab.report.markdown import make_markdown
from mixtral_jax.lab.report.page import make_page


def write_report(results: Results, folder: Path, more_pictures: Sequence[Picture] = ()) -> Path:
    """Writes the report into `folder`, and gives the path of its page; pictures of the last one
    that it lacks go.

    Args:
        more_pictures: go behind those that are drawn here.
    """
    folder.mkdir(parents=True, exist_ok=True)
    before = _list_pictures(folder / "report.md")
    pictures = [*draw_pictures(results), *more_pictures]
    for picture in pictures:
        _replace(folder / f"{picture.name}.png", picture.to_png())
    _replace(folder / "results.json", (json.dumps(results.to_json(), indent=2) + "\n").encode())
    _replace(folder / "report.md", make_markdown(results, pictures).encode())
    _replace(folder / "index.html", make_page(results, pictures).encode())
    for name in before - _list_pictures(folder / "report.md"):
        (folder / name).unlink(missing_ok=True)
    return folder / "index.html"


def _list_pictures(markdown: Path) -> set[str]:
    """The files that a report shows; whatever else lies beside it is not ours."""
    text = markdown.read_text("utf-8") if markdown.exists() else ""
    return set(re.findall(r"^!\[.*\]\(([\w.+=-]+\.png)\)$", text, re.MULTILINE))


def _replace(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_bytes(content)
    temporary.replace(path)

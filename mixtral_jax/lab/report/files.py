"""Writes the report of an ablation: index.html, report.md with PNGs, and results.json.

Every file is written under a temporary name and then renamed, so readers never see half a file,
even if several processes write reports of the same runs.
"""

import re
from collections.abc import Sequence
from pathlib import Path

from mixtral_jax.lab.ablation.results import Results
from mixtral_jax.lab.pictures.ablation import draw_ablation
from mixtral_jax.lab.pictures.style import Picture
from mixtral_jax.lab.report.markdown import make_markdown
from mixtral_jax.lab.report.page import make_page
from mixtral_jax.whole_files import write_json, write_whole


def write_report(results: Results, folder: Path, more_pictures: Sequence[Picture] = ()) -> Path:
    """Writes the report into `folder` and returns the path of its page.

    Pictures of an earlier report in `folder` that this one does not have are deleted.

    Args:
        more_pictures: shown after the pictures that are drawn here.
    """
    folder.mkdir(parents=True, exist_ok=True)
    earlier = _list_pictures(folder / "report.md")
    pictures = [*draw_ablation(results), *more_pictures]
    for picture in pictures:
        write_whole(folder / f"{picture.name}.png", picture.to_png())
    write_json(folder / "results.json", results.to_json())
    write_whole(folder / "report.md", make_markdown(results, pictures))
    write_whole(folder / "index.html", make_page(results, pictures))
    for name in earlier - _list_pictures(folder / "report.md"):
        (folder / name).unlink(missing_ok=True)
    return folder / "index.html"


def _list_pictures(markdown: Path) -> set[str]:
    """Lists the PNG files that a report shows. Other files in its folder are not ours to delete."""
    text = markdown.read_text("utf-8") if markdown.exists() else ""
    return set(re.findall(r"^!\[.*\]\(([\w.+=-]+\.png)\)$", text, re.MULTILINE))

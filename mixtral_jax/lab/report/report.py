"""The report of an ablation as files: index.html, report.md with PNGs, results.json.

Several processes may write reports of the same runs at once: every file appears whole.
"""

import re
from collections.abc import Sequence
from pathlib import Path

from mixtral_jax.lab.ablation.results import Results
from mixtral_jax.lab.pictures.ablation import draw_pictures
from mixtral_jax.lab.pictures.style import Picture
from mixtral_jax.lab.report.markdown import make_markdown
from mixtral_jax.lab.report.page import make_page
from mixtral_jax.whole_files import write_json, write_whole


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
        write_whole(folder / f"{picture.name}.png", picture.to_png())
    write_json(folder / "results.json", results.to_json())
    write_whole(folder / "report.md", make_markdown(results, pictures))
    write_whole(folder / "index.html", make_page(results, pictures))
    for name in before - _list_pictures(folder / "report.md"):
        (folder / name).unlink(missing_ok=True)
    return folder / "index.html"


def _list_pictures(markdown: Path) -> set[str]:
    """The files that a report shows; whatever else lies beside it is not ours."""
    text = markdown.read_text("utf-8") if markdown.exists() else ""
    return set(re.findall(r"^!\[.*\]\(([\w.+=-]+\.png)\)$", text, re.MULTILINE))

"""The report as files: they are complete, and words repeat what pictures show."""

import html.parser
import json
import re
import shutil
import subprocess
from pathlib import Path

import matplotlib
import pytest

from mixtral_jax.lab.ablation.records import FAILURE
from mixtral_jax.lab.ablation.results import read_results
from mixtral_jax.lab.pictures.ablation import draw_ablation
from mixtral_jax.lab.pictures.style import Picture, make_figure
from mixtral_jax.lab.report.files import write_report
from mixtral_jax.lab.report.markdown import make_markdown
from tests.lab.ablations import small_ablation, write_run


class Elements(html.parser.HTMLParser):
    """Lists the elements of a page with their attributes."""

    def __init__(self, page: str):
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.found if name == tag]


QUESTION = "Is <this> even & right?"


@pytest.fixture(scope="module")
def workdir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The workdir of an ablation with a report; all runs are done except one, which failed."""
    workdir = tmp_path_factory.mktemp("ablation")
    ablation = small_ablation(question=QUESTION)
    for run in ablation.runs:
        write_run(
            run, workdir, loss=4 + run.seed / 9, violation=2 if run.arm.name == "none" else 0.5
        )
    failed = ablation.runs[-2].folder(workdir)
    (failed / FAILURE).write_text(json.dumps({"reason": "MemoryError: <no> room"}))
    before = dict(matplotlib.rcParams)
    write_report(read_results(ablation, workdir), workdir / "report")
    assert dict(matplotlib.rcParams) == before, "other drawings of this process must not change"
    return workdir


@pytest.fixture(scope="module")
def page(workdir: Path) -> str:
    return (workdir / "report/index.html").read_text()


def test_the_page_needs_no_network_and_no_script(page: str) -> None:
    assert "http" not in page
    elements = Elements(page)
    assert not elements.of("script") and not elements.of("link")
    sources = [image["src"] for image in elements.of("img")]
    assert all(source and source.startswith("data:image/") for source in sources)
    assert "@import" not in page and "url(" not in page


def test_the_contents_at_the_top_link_to_every_section(page: str) -> None:
    links = re.findall(r'<a href="#(.+?)">(.+?)</a>', page)
    assert links == re.findall(r'<h2 id="(.+?)">(.+?)</h2>', page)
    assert [title for _, title in links][:2] == ["Failed and missing runs", "Arms"]
    assert len(links) == 3 + len(Elements(page).of("img"))


def test_every_picture_has_a_caption_and_an_alternative_text(page: str) -> None:
    elements = Elements(page)
    images, captions = elements.of("img"), re.findall(r"<figcaption>(.+?)</figcaption>", page)
    assert len(images) == len(captions) == len(elements.of("figure")) == 5
    assert all(image["alt"] and len(image["alt"]) > 20 for image in images)
    assert all(len(words) > 80 for words in captions)


def test_what_people_wrote_is_text_and_not_markup(page: str) -> None:
    assert "<h1>Is &lt;this&gt; even &amp; right?</h1>" in page
    assert "MemoryError: &lt;no&gt; room" in page
    assert "<no>" not in page


def test_failed_runs_and_where_figures_come_from_are_listed(workdir: Path, page: str) -> None:
    for text in (page, (workdir / "report/report.md").read_text()):
        for wanted in (
            "Failed and missing runs",
            "seed 2: MemoryError",
            "router.",
            "jax 1.2.3",
            "dddddddddddd",
            "ablate",
        ):
            assert wanted in text


def test_the_markdown_shows_pictures_that_are_there(workdir: Path) -> None:
    names = re.findall(r"!\[.+?\]\((.+?)\)", (workdir / "report/report.md").read_text())
    assert len(names) == 5
    for name in names:
        assert (workdir / "report" / name).read_bytes().startswith(b"\x89PNG")


def test_axes_have_names_with_units_and_legends_name_the_arms(workdir: Path) -> None:
    for picture in draw_ablation(read_results(small_ablation(), workdir)):
        assert all(panel.get_xlabel() for panel in picture.figure.axes), picture.name
        texts = [one.get_text() for legend in picture.figure.legends for one in legend.get_texts()]
        texts += [panel.get_title(loc="left") for panel in picture.figure.axes]
        for arm in ("none", "some"):
            assert any(text.startswith(arm) for text in texts), picture.name


def test_the_same_runs_give_the_same_bytes_and_only_their_own_pictures(
    workdir: Path, page: str, tmp_path: Path
) -> None:
    (tmp_path / "mine.png").touch()
    nothing = read_results(small_ablation(), tmp_path / "empty")
    gone = Picture("Saturation: gone (k=2)", "Words.", make_figure(1, 2.0)[0])
    write_report(nothing, tmp_path, [gone])
    assert (tmp_path / "saturation_gone_k=2.png").exists()
    write_report(read_results(small_ablation(question=QUESTION), workdir), tmp_path)
    assert (tmp_path / "index.html").read_text() == page
    names = {"mine.png", *re.findall(r"!\[.+?\]\((.+?)\)", (tmp_path / "report.md").read_text())}
    assert {file.name for file in tmp_path.glob("*.png")} == names
    assert not list(tmp_path.glob(".*"))


def test_more_pictures_follow_and_a_report_without_runs_is_one_too(tmp_path: Path) -> None:
    figure, (panel,) = make_figure(1, 2.0)
    panel.plot([0, 1], [0, 1])
    more = Picture("Saturation", "What it shows.", figure)
    page = write_report(
        read_results(small_ablation(), tmp_path), tmp_path / "report", [more]
    ).read_text()
    assert ">Saturation</h2>" in page and "No run is finished yet" in page
    assert (tmp_path / "report/saturation.png").exists()


def test_device_imbalance_is_shown_unless_another_figure_equals_it(
    workdir: Path, tmp_path: Path
) -> None:
    assert "device imbalance" not in (workdir / "report/report.md").read_text()
    ablation = small_ablation(seeds=(0,))
    for run in ablation.runs:
        write_run(
            run, tmp_path, loss=4, violation=1, imbalance=0.25 if run.arm.name == "none" else 1.0
        )
    text = make_markdown(read_results(ablation, tmp_path), [])
    heading, _, none, some = (
        line.split(" | ") for line in text.splitlines() if line.startswith("| ")
    )
    column = heading.index("balance, at the end of training: device imbalance")
    assert (none[column], some[column]) == ("0.25", "-")
    assert heading.index("maximum violation: running load") < column


@pytest.mark.full
def test_a_browser_shows_the_whole_page_at_1280_pixels(workdir: Path, tmp_path: Path) -> None:
    browser = (
        shutil.which("chromium")
        or shutil.which("chromium-browser")
        or shutil.which("google-chrome")
    )
    if browser is None:
        pytest.skip("no Chromium here")
    where = f"file://{workdir}/report/index.html"
    command = [
        browser,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--window-size=1280,3000",
        f"--screenshot={tmp_path / 'page.png'}",
        "--dump-dom",
        where,
    ]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert shown.stdout.count("<img") == 5
    assert (tmp_path / "page.png").stat().st_size > 50_000

"""The Markdown pages name files that exist, link to headings that exist, and map every file.

Reads files only: no page is rendered, and links to other sites are not followed.
"""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("launch/*.md")])
MAX_COLUMNS = 100

LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
# `model/moe.py`, `configs/pretrain/tiny.py`, `mixtral_jax/config/`: a path has a slash.
CODE_PATH = re.compile(r"`([\w.]+/[\w./]*)`")
# A path in a command or in a block of code.
SHIPPED_PATH = re.compile(
    r"(?<![\w/.])((?:configs|launch|tests|docs)/[\w/]+\.(?:py|sh|yaml|md|png))"
)
# Where a path may begin that is written without its first folders.
STARTS = (ROOT, ROOT / "mixtral_jax")


def find_headings(text: str) -> set[str]:
    """The anchors that GitHub gives to the headings of a page."""
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.strip().lower()).replace(" ", "-") for title in titles}


def find_broken_links(page: Path) -> Iterator[str]:
    """Relative links to a file or to a heading that does not exist."""
    for target in LINK.findall(page.read_text()):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, heading = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if not file.exists() or (heading and heading not in find_headings(file.read_text())):
            yield target


def find_missing_paths(page: Path) -> Iterator[str]:
    """Paths of our own files, in running text or in commands, that do not exist."""
    text = page.read_text()
    rooms = {path.name for start in STARTS for path in start.iterdir() if path.is_dir()}
    for path in {*CODE_PATH.findall(text), *SHIPPED_PATH.findall(text)}:
        is_in_room = path.split("/")[0] in rooms and (path.endswith("/") or "." in path)
        is_ours = is_in_room or path.endswith(".py")
        if is_ours and not any((start / path).exists() for start in (*STARTS, page.parent)):
            yield path


def read_map() -> set[str]:
    """The files that the map in docs/architecture.md lists, as paths below `mixtral_jax/`."""
    page = (ROOT / "docs/architecture.md").read_text()
    listed = set()
    for room, block in re.findall(r"^### `([\w/]+)/`\n.*?^```\n(.*?)^```", page, re.M | re.S):
        folder = Path(room) if room != "mixtral_jax" else Path()
        for line in block.splitlines():
            names = re.split(r"\s{2,}|(?<=\.py) ", line)[0]
            listed |= {str(folder / name) for name in re.findall(r"\w+\.py", names)}
    return listed


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_paths_of_a_page_exist(page: Path) -> None:
    assert [*find_broken_links(page), *find_missing_paths(page)] == []


def test_the_map_lists_every_file_of_the_package_and_no_other() -> None:
    package = ROOT / "mixtral_jax"
    files = {str(path.relative_to(package)) for path in package.rglob("*.py")}
    files = {path for path in files if not path.endswith("__init__.py")}
    listed = read_map()
    assert sorted(files - listed) == [], "not in the map of docs/architecture.md"
    assert sorted(listed - files) == [], (
        "in the map of docs/architecture.md, but not in the package"
    )


def test_prose_is_wrapped() -> None:
    """Tables and blocks of code may be wider, and so may a line without a space, such as a link."""
    too_wide = []
    for page in PAGES:
        is_code = False
        for number, line in enumerate(page.read_text().splitlines(), 1):
            is_code ^= line.lstrip().startswith("```")
            is_free = is_code or line.startswith("|") or " " not in line.strip()
            if len(line) > MAX_COLUMNS and not is_free:
                too_wide.append(f"{page.relative_to(ROOT)}:{number}")
    assert too_wide == []


# What a name in capitals stands for, by the flag that takes it.
PLACEHOLDERS = {
    "--workdir": {"RUN", "ABLATION"},
    "--checkpoint": {"MODEL", "RUN"},
    "--from": {"MODEL"},
    "--to": {"FOLDER", "RUN"},
    "--config": {"CONFIG"},
    "--config.finetune.base": {"MODEL", "BASE"},  # A config of a pod names it so.
    "--config.upcycle.base": {"MODEL"},
    "--config.data.path": {"TEXT", "CHATS"},
    "--data.path": {"TEXT", "REPO"},  # A repository, as text.
    "--tokenizer": {"RUN"},
}


@pytest.mark.parametrize("flag", PLACEHOLDERS)
def test_a_name_in_capitals_stands_for_one_thing(flag: str) -> None:
    named = re.compile(rf"(?<![\w.\-]){re.escape(flag)}[= ]([A-Z]+)\b")
    texts = [*PAGES, *ROOT.glob("*.py"), *ROOT.glob("configs/*/*.py"), *ROOT.glob("launch/*")]
    found = {name for text in texts for name in named.findall(text.read_text())}
    assert found and found <= PLACEHOLDERS[flag]


def test_a_missing_file_and_heading_are_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "# A page\n[one](page.md#a-page) [two](page.md#no) [three](gone.md) [site](https://a.b/c)\n"
        "`model/gone.py` `model/moe.py` `no_room/gone.py` `gs://bucket/x` `DIR/export/`\n"
        "```\npython train.py --config=configs/gone.py\n```\n"
    )
    assert list(find_broken_links(page)) == ["page.md#no", "gone.md"]
    assert sorted(find_missing_paths(page)) == [
        "configs/gone.py",
        "model/gone.py",
        "no_room/gone.py",
    ]

"""The report as Markdown, for terminals and code reviews; pictures are PNG files beside it."""

from collections.abc import Sequence

from mixtral_jax.lab.ablation.findings import describe_findings
from mixtral_jax.lab.ablation.results import Results
from mixtral_jax.lab.pictures.style import Picture
from mixtral_jax.lab.report.provenance import describe_provenance
from mixtral_jax.lab.report.table import make_columns


def make_markdown(results: Results, pictures: Sequence[Picture]) -> str:
    """Returns the text of report.md."""
    columns = make_columns(results)
    plain = ("arm", "size", "speed")
    headings = [
        one.heading if one.group in plain else f"{one.group}: {one.heading}" for one in columns
    ]
    rows = [[column.cell(result) for column in columns] for result in results.arms]
    lines = [f"# {results.ablation.question}", ""]
    for paragraph in describe_findings(results):
        lines += [paragraph, ""]
    lines += ["## Arms", ""]
    lines += [_row(headings), _row(["---"] * len(headings)), *map(_row, rows), ""]
    for picture in pictures:
        lines += [
            f"## {picture.title}",
            "",
            f"![{picture.alt}]({picture.name}.png)",
            "",
            picture.words,
            "",
        ]
    unfinished = [
        f"- {result.arm.name}, {reason}" for result in results.arms for reason in result.reasons
    ]
    if unfinished:
        lines += ["## Failed and missing runs", "", *unfinished, ""]
    lines += ["## Where these figures come from", ""]
    lines += [f"- {name}: {text}" for name, text in describe_provenance(results)]
    return "\n".join(lines) + "\n"


def _row(cells: Sequence[str]) -> str:
    escaped = (cell.replace("|", "\\|") for cell in cells)
    return f"| {' | '.join(escaped)} |"

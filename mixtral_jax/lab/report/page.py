"""The report as one HTML file that contains its images; it needs no network and no scripts."""

import html
import itertools
import re
from collections.abc import Sequence

from mixtral_jax.lab.ablation.findings import describe_findings
from mixtral_jax.lab.ablation.results import ArmResult, Results
from mixtral_jax.lab.pictures.style import Picture
from mixtral_jax.lab.report.provenance import describe_provenance, show_config
from mixtral_jax.lab.report.table import CHANGED_KEYS, ROUTING_GROUPS, Column, make_columns

_STYLE = """
:root { color-scheme: light; --ink: #222; --soft: #666; --line: #ddd; }
body { margin: 0 auto; max-width: 1180px; padding: 40px 32px 80px; background: #fff;
       color: var(--ink);
       font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
h1 { font-size: 30px; line-height: 1.2; margin: 0 0 4px; font-weight: 650;
     letter-spacing: -0.01em; }
h2 { font-size: 20px; margin: 52px 0 10px; font-weight: 650; }
p, figcaption, li { max-width: 80ch; }
.kind { color: var(--soft); margin: 0 0 24px; }
.findings p { margin: 0 0 10px; font-size: 17px; }
figure { margin: 0; }
figure img { width: 100%; height: auto; display: block; }
figcaption { margin-top: 10px; color: #444; font-size: 15px; }
nav ul { display: flex; flex-wrap: wrap; gap: 4px 22px; margin: 26px 0 0; padding: 0;
         list-style: none; }
nav li { max-width: none; }
a { color: #0060a0; text-decoration: none; }
a:hover { text-decoration: underline; }
b { white-space: nowrap; font-weight: 600; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; margin: 0 0 28px; font-size: 13px;
        line-height: 1.35; font-variant-numeric: tabular-nums; }
th { text-align: left; font-weight: 500; color: var(--soft); vertical-align: bottom;
     padding: 3px 9px; }
th.group { border-bottom: 1px solid var(--line); color: var(--ink); }
td { padding: 7px 9px; border-top: 1px solid var(--line); vertical-align: top; }
td.words { font-family: ui-monospace, "DejaVu Sans Mono", monospace; font-size: 12px;
           min-width: 190px; }
td.figure { white-space: pre; }
tr.reference td { background: #f6f6f3; }
.failed { color: #a33c00; font-weight: 600; }
.missing { color: #7a6000; }
dl { display: grid; grid-template-columns: 110px 1fr; gap: 6px 16px; font-size: 14px; }
dt { color: var(--soft); }
dd { margin: 0; overflow-wrap: anywhere; }
details { margin-top: 16px; font-size: 14px; }
pre { font-size: 12px; line-height: 1.4; }
@media print { body { padding: 0; max-width: none; } figure { break-inside: avoid; } }
"""


def make_page(results: Results, pictures: Sequence[Picture]) -> str:
    """Returns the text of index.html."""
    question = html.escape(results.ablation.question)
    findings = "".join(f"<p>{_make_words(text)}</p>" for text in describe_findings(results))
    count = len(results.ablation.seeds)
    seeds = f"{count} seed{'s' if count > 1 else ''}"
    reference = html.escape(results.ablation.reference)
    sections = _make_sections(results, pictures)
    links = "".join(
        f'<li><a href="#{number}">{html.escape(title)}</a></li>'
        for number, (title, _) in enumerate(sections)
    )
    body = "".join(
        f'<h2 id="{number}">{html.escape(title)}</h2>\n{content}\n'
        for number, (title, content) in enumerate(sections)
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{question}</title>
<style>{_STYLE}</style>
</head>
<body>
<h1>{question}</h1>
<p class="kind">An ablation of {len(results.arms)} arms with {seeds} each.
The reference arm is {reference}.</p>
<section class="findings">{findings}</section>
<nav><ul>{links}</ul></nav>
{body}</body>
</html>
"""


def _make_sections(results: Results, pictures: Sequence[Picture]) -> list[tuple[str, str]]:
    """Returns the heading and the HTML of each section."""
    unfinished = _make_unfinished(results)
    return [
        *([("Failed and missing runs", unfinished)] if unfinished else []),
        ("Arms", _make_tables(results)),
        *((picture.title, _make_picture(picture)) for picture in pictures),
        ("Where these figures come from", _make_provenance(results)),
    ]


def _make_words(text: str) -> str:
    """Escapes a text; quoted names of arms become bold, which also keeps their hyphens unbroken."""
    return re.sub(r"&quot;(.*?)&quot;", r"<b>\1</b>", html.escape(text))


def _make_picture(picture: Picture) -> str:
    return (
        f'<figure>\n<img src="{picture.to_data_url()}" alt="{html.escape(picture.alt)}">\n'
        f"<figcaption>{_make_words(picture.words)}</figcaption>\n</figure>"
    )


def _make_unfinished(results: Results) -> str:
    items = [
        f'<li class="{result.status}">{html.escape(result.arm.name)}, {html.escape(reason)}</li>'
        for result in results.arms
        for reason in result.reasons
    ]
    return f"<ul>{''.join(items)}</ul>" if items else ""


def _make_tables(results: Results) -> str:
    """Makes two tables, so that each fits the page: one on learning, one on routing."""
    columns = make_columns(results)
    names, routing = columns[:1], [column for column in columns if column.group in ROUTING_GROUPS]
    learning = [column for column in columns if column not in routing]
    return _make_table(results, learning) + _make_table(results, [*names, *routing])


def _make_table(results: Results, columns: Sequence[Column]) -> str:
    groups = [
        (name, len(list(members)))
        for name, members in itertools.groupby(columns, lambda column: column.group)
    ]
    above = "".join(
        f'<th class="group" colspan="{count}">{html.escape(name)}</th>' for name, count in groups
    )
    headings = "".join(f"<th>{_break_lines(column.heading, '<br>')}</th>" for column in columns)
    rows = "".join(_make_row(result, columns, results) for result in results.arms)
    return (
        f'<div class="wide"><table><thead><tr>{above}</tr><tr>{headings}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )


def _make_row(result: ArmResult, columns: Sequence[Column], results: Results) -> str:
    cells = []
    for column in columns:
        kind = {CHANGED_KEYS: "words", "status": result.status}.get(column.heading, "figure")
        text = _break_lines(column.cell(result), "\n")
        if kind == "words":
            text = text.replace(".", ".<wbr>")  # A browser may break dotted keys at their dots.
        cells.append(f'<td class="{kind}">{text}</td>')
    mark = ' class="reference"' if result is results.reference else ""
    return f"<tr{mark}>{''.join(cells)}</tr>"


def _break_lines(text: str, line_break: str) -> str:
    """Escapes a text, with a line break before each bracket."""
    return re.sub(r" (?=[\[(])", line_break, html.escape(text))


def _make_provenance(results: Results) -> str:
    entries = "".join(
        f"<dt>{html.escape(name)}</dt><dd>{html.escape(text)}</dd>"
        for name, text in describe_provenance(results)
    )
    config = html.escape(show_config(results))
    name = html.escape(results.ablation.reference)
    summary = f"<summary>The full config of {name}</summary>"
    return f"<dl>{entries}</dl>\n<details>{summary}<pre>{config}</pre></details>"

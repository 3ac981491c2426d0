"""A report's page, built of a few blocks, as Markdown with pictures beside it and as one HTML file that holds them."""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, "DejaVu Sans", sans-serif; color: #1b1f24; background: #fff; max-width: 1080px;
       margin: 2rem auto; padding: 0 1.2rem; }
h1 { font-size: 1.6rem; margin: 0 0 .4rem; } h2 { font-size: 1.2rem; margin: 2.2rem 0 .5rem; }
h3 { font-size: 1rem; margin: 1.5rem 0 .3rem; } p { margin: .5rem 0; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; margin: .6rem 0; font-size: .88rem; }
th, td { padding: .32rem .7rem; border-bottom: 1px solid #d8dee4; text-align: right; }
th { background: #f6f8fa; font-weight: 600; vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; white-space: nowrap; }
tr:hover td { background: #f6f8fa; } figure { margin: .8rem 0; } img { max-width: min(100%, 860px); height: auto; }
figcaption { color: #57606a; font-size: .86rem; }
"""


@dataclass(frozen=True)
class Heading:
    """A heading of level 1 to 3."""

    text: str
    level: int = 2


@dataclass(frozen=True)
class Table:
    """A table; the first column holds names, the others numbers."""

    titles: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Picture:
    """A picture: its file's name, what it shows, and its PNG bytes."""

    name: str
    caption: str
    png: bytes


Block = Heading | Table | Picture | str  # a string is a paragraph


def to_markdown(blocks: Sequence[Block]) -> str:
    """Return a page as Markdown; pictures are linked by their names."""
    parts = []
    for block in blocks:
        if isinstance(block, Heading):
            parts.append(f"{'#' * block.level} {block.text}")
        elif isinstance(block, Table):
            parts.append(table_lines(block))
        elif isinstance(block, Picture):
            parts.append(f"![{block.caption}]({block.name})")
        else:
            parts.append(block)
    return "\n\n".join(parts) + "\n"


def table_lines(table: Table) -> str:
    """Return a table as Markdown."""
    rule = ["---", *["---:"] * (len(table.titles) - 1)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (table.titles, rule, *table.rows))


def to_html(title: str, blocks: Sequence[Block]) -> str:
    """Return a page as HTML that needs no other file."""
    body = "\n".join(_html(block) for block in blocks)
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{escape(title)}</title>\n'
        f'<meta name="viewport" content="width=device-width">\n<style>{STYLE}</style>\n</head>\n<body>\n{body}\n'
        "</body>\n</html>\n"
    )


def _cell(text: str) -> str:
    """Return a cell that wraps between a value and its interval, if it must, and nowhere within them."""
    kept = re.sub(r"\[[^]]*\]|\S+ (?:%|points)", lambda found: found[0].replace(" ", "\N{NO-BREAK SPACE}"), text)
    return escape(kept)


def _html(block: Block) -> str:
    if isinstance(block, Heading):
        return f"<h{block.level}>{escape(block.text)}</h{block.level}>"
    if isinstance(block, Table):
        head = "".join(f"<th>{escape(title)}</th>" for title in block.titles)
        rows = "\n".join(f"<tr>{''.join(f'<td>{_cell(cell)}</td>' for cell in row)}</tr>" for row in block.rows)
        return f'<div class="scroll"><table>\n<tr>{head}</tr>\n{rows}\n</table></div>'
    if isinstance(block, Picture):
        data, caption = base64.b64encode(block.png).decode(), escape(block.caption)
        image = f'<img alt="{caption}" src="data:image/png;base64,{data}">'
        return f"<figure>{image}<figcaption>{caption}</figcaption></figure>"
    return f"<p>{escape(block)}</p>"

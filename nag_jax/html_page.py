"""The page that a report is written on: its style, and the few pieces of HTML it is made of, escaped in one place.

What a report says is `report.py`'s.
"""

from __future__ import annotations

import base64
import html
from collections.abc import Container, Iterable, Sequence

STYLE = """
:root { color-scheme: light dark; --ink: #1f2328; --soft: #59636e; --line: #d8dee4; --paper: #fff; --box: #f4f6f8;
  --accent: #0072b2; --warn: #fff4e0; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e7eb; --soft: #9aa4af; --line: #38404a; --paper: #15181c;
  --box: #1e2329; --accent: #56b4e9; --warn: #3a2d12; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 1rem/1.55 system-ui, sans-serif; }
main { max-width: 60rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .4rem; }
h2 { font-size: 1.25rem; margin: 2.8rem 0 .6rem; }
p { max-width: 46rem; margin: .5rem 0; }
.soft, figcaption, caption, small { color: var(--soft); }
.seen { background: var(--box); border-left: 4px solid var(--accent); padding: .8rem 1.2rem; margin: 1.5rem 0 1rem; }
.seen h2 { margin: 0 0 .3rem; } .seen p { max-width: none; }
.caveat { background: var(--warn); padding: .6rem 1.2rem; max-width: none; }
figure { margin: 1rem 0; break-inside: avoid; }
figure img { display: block; width: 100%; height: auto; background: #fff; border-radius: 6px; padding: .4rem; }
figcaption, caption, .note { font-size: .88rem; text-align: left; max-width: 46rem; }
figcaption { margin-top: .4rem; } caption { padding-bottom: .4rem; }
.scroll { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-size: .93rem; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem 1.1rem .35rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line); }
thead th { color: var(--soft); font-weight: 600; vertical-align: bottom; } tbody th { font-weight: 600; }
.n { text-align: right; white-space: nowrap; } td small { display: block; }
tfoot th, tfoot td { border-bottom: 0; font-weight: 600; } small { font-weight: 400; }
.beside { display: flex; flex-wrap: wrap; gap: 0 3rem; } .beside figure { flex: 1 1 24rem; margin: 0; }
.settings td, .settings th { font-family: ui-monospace, monospace; font-size: .82rem; overflow-wrap: anywhere;
  font-weight: 400; }
summary { cursor: pointer; color: var(--accent); margin: .5rem 0; }
pre { background: var(--box); padding: .7rem 1rem; overflow-x: auto; font-size: .85rem; }
@media print { :root { color-scheme: light; font-size: 11px; --ink: #000; --soft: #444; --line: #ccc;
    --paper: #fff; --box: #f4f4f4; --accent: #0072b2; --warn: #fff4e0; }
  main, p, figcaption, caption, .note { max-width: none; } main { padding: 0; } h2 { break-after: avoid; }
  tr, pre { break-inside: avoid; } .scroll, pre { overflow: visible; } pre { white-space: pre-wrap; } }
"""


class Html(str):
    """Text that is HTML already. Any other string is escaped where it enters the page."""


def document(title: str, sections: Sequence[str]) -> str:
    """A whole HTML file that needs no other."""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"{element('title', title)}\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(map(escaped, sections))
        + "\n</main>\n</body>\n</html>\n"
    )


def escaped(text: str) -> str:
    """`text` as HTML."""
    return text if isinstance(text, Html) else html.escape(str(text))


def element(tag: str, text: str, css_class: str = "") -> Html:
    """One element with text in it."""
    attribute = f' class="{css_class}"' if css_class else ""
    return Html(f"<{tag}{attribute}>{escaped(text)}</{tag}>")


def paragraph(text: str, css_class: str = "") -> Html:
    """A paragraph."""
    return element("p", text, css_class)


def section(title: str, *parts: str, css_class: str = "") -> Html:
    """A heading and what stands under it."""
    content = "\n".join([element("h2", title), *map(escaped, parts)])
    return element("section", Html(f"\n{content}\n"), css_class)


def details(summary: str, content: Html) -> Html:
    """Content that is folded away until it is asked for."""
    return element("details", Html(f"\n{element('summary', summary)}\n{content}\n"))


def side_by_side(*parts: str) -> Html:
    """Parts side by side where the page is wide enough."""
    return Html(f'<div class="beside">{"".join(map(escaped, parts))}</div>')


def image(png: bytes, description: str, caption: str) -> Html:
    """A PNG embedded in the page, described for those who cannot see it."""
    source = f"data:image/png;base64,{base64.b64encode(png).decode()}"
    shown = f'<img src="{source}" alt="{html.escape(description)}">'
    return Html(f"<figure>\n{shown}\n{element('figcaption', caption)}\n</figure>")


def table(
    header: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    caption: str = "",
    foot: Sequence[str] = (),
    numeric: Container[int] = (),
    css_class: str = "",
) -> Html:
    """A table whose first column names its rows.

    Args:
        header: names of the columns.
        rows: cells of each row.
        caption: what the table holds, with units.
        foot: a last row set apart.
        numeric: columns that are aligned to the right.
        css_class: a class of `STYLE`.
    """

    def row(cells: Sequence[str], tags: Sequence[str]) -> str:
        parts = []
        for column, (text, tag) in enumerate(zip(cells, tags, strict=True)):
            attribute = ' class="n"' if column in numeric else ""
            parts.append(f"<{tag}{attribute}>{escaped(text)}</{tag.split()[0]}>")
        return f"<tr>{''.join(parts)}</tr>"

    in_head = ['th scope="col"'] * len(header)
    in_body = ['th scope="row"'] + ["td"] * (len(header) - 1)
    parts: list[str] = [element("caption", caption)] if caption else []
    parts += [f"<thead>{row(header, in_head)}</thead>"]
    parts += ["<tbody>", *(row(cells, in_body) for cells in rows), "</tbody>"]
    parts += [f"<tfoot>{row(foot, in_body)}</tfoot>"] if foot else []
    content = Html("\n".join(parts))
    return Html(f'<div class="scroll">{element("table", content, css_class)}</div>')

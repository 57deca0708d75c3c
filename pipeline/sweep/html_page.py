"""The answer as one HTML file: picture, tables, nothing from elsewhere.

What MLflow knows is text of its users, and is escaped; a content security policy lets the page's
own script run, by its hash, and nothing else be run or loaded.
"""

from __future__ import annotations

import base64
import hashlib
import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import IO
from xml.etree import ElementTree as ET

from pipeline.sweep.trial_tables import Table

SVG, XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"

STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, "Segoe UI", Roboto, Helvetica, Arial, sans-serif; color: #1b1b1f;
  background: #fff; max-width: 1240px; margin: 0 auto; padding: 16px 20px 48px; }
h1 { font-size: 1.45rem; margin: .4em 0; } h2 { font-size: 1.1rem; margin: 1.8em 0 .4em; }
ul { margin: .3em 0; padding-left: 1.2em; } figure { margin: 12px 0; }
figcaption { color: #50505a; font-size: .87rem; }
figure { overflow-x: auto; } svg { width: 100%; min-width: 640px; height: auto; display: block; }
svg a { cursor: pointer; } svg a:focus { outline: none; }
svg a:focus use, svg a.on use { stroke: #d0006f !important; stroke-width: 3px !important; }
.wide { overflow-x: auto; border: 1px solid #d9d9e0; border-radius: 6px; max-height: 32rem; }
.wide:focus-visible { outline: 2px solid #1a5fb4; }
table { border-collapse: collapse; width: 100%; font-size: .87rem;
  font-variant-numeric: tabular-nums; }
th, td { padding: 5px 9px; border-bottom: 1px solid #e6e6ec; text-align: right; }
td { white-space: nowrap; } td.word { white-space: normal; min-width: 12em; }
th { background: #f3f3f7; position: sticky; top: 0; vertical-align: bottom; font-weight: 600; }
tbody th { position: static; background: none; vertical-align: middle; } .word { text-align: left; }
th button { font: inherit; color: inherit; background: none; border: 0; padding: 0; cursor: pointer;
  text-align: inherit; }
th button:hover { text-decoration: underline; }
th[aria-sort=ascending] button::after { content: " \\2191"; }
th[aria-sort=descending] button::after { content: " \\2193"; }
tbody tr:hover, tbody tr.on, tbody tr:target { background: #fdeaf4; }
"""

SCRIPT = """
"use strict";
const marks = {};
for (const mark of document.querySelectorAll("svg a")) {
  const row = mark.getAttribute("href").slice(1);
  (marks[row] = marks[row] || []).push(mark);
}
const show = (id, on) => {
  const row = document.getElementById(id);
  for (const each of [row, ...(marks[id] || [])]) if (each) each.classList.toggle("on", on);
};
const follow = (element, id) => {
  for (const kind of ["mouseenter", "focus"]) element.addEventListener(kind, () => show(id, true));
  for (const kind of ["mouseleave", "blur"]) element.addEventListener(kind, () => show(id, false));
};
for (const [id, own] of Object.entries(marks)) {
  for (const mark of own) {
    follow(mark, id);
    mark.addEventListener("click", (event) => {
      event.preventDefault();
      document.getElementById(id).scrollIntoView({ block: "center" });
    });
  }
  follow(document.getElementById(id), id);
}
const value = (row, column) => {
  const text = row.cells[column].textContent.trim(), number = parseFloat(text);
  return Number.isNaN(number) ? text : number;
};
const compare = (a, b) =>
  typeof a === typeof b ? (a < b ? -1 : a > b ? 1 : 0) : typeof a === "number" ? -1 : 1;
for (const head of document.querySelectorAll("thead th")) {
  const name = head.textContent, button = document.createElement("button");
  button.type = "button";
  button.textContent = name;
  button.title = "sort by " + name;
  head.replaceChildren(button);
  button.addEventListener("click", () => {
    const down = head.getAttribute("aria-sort") === "descending", column = head.cellIndex;
    for (const other of head.parentNode.cells) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", down ? "ascending" : "descending");
    const body = head.closest("table").tBodies[0], rows = [...body.rows];
    rows.sort((a, b) => (down ? 1 : -1) * compare(value(a, column), value(b, column)));
    body.append(...rows);
  });
}
"""


@dataclass(frozen=True)
class Picture:
    """A figure of the page.

    Attributes:
        draw: Writes it as SVG.
        marks: By the ids of its marks: the table row they lead to, and what they say.
    """

    name: str
    description: str
    draw: Callable[[IO[str]], None]
    marks: Mapping[str, tuple[str, str]]


def page(title: str, sections: Sequence[str]) -> str:
    """Put a page together; the sections are HTML, the title is text."""
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; "
    policy += f"script-src 'sha256-{digest}'"
    body = "\n".join(sections)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<main>
<h1>{escape(title)}</h1>
{body}
</main>
<script>{SCRIPT}</script>
</body>
</html>
"""


def list_section(title: str, lines: Sequence[str]) -> str:
    """Lay out sentences as a list, below a heading where there is one."""
    items = "\n".join(f"<li>{escape(line)}</li>" for line in lines)
    return (f"<h2>{escape(title)}</h2>\n" if title else "") + f"<ul>\n{items}\n</ul>"


def table_section(table: Table, ids: Mapping[str, str]) -> str:
    """Lay out a table below its heading.

    Args:
        ids: Of rows, by trial number.
    """
    heads = "".join(
        f'<th scope="col"{word(place, table)}>{escape(name)}</th>'
        for place, name in enumerate(table.header)
    )
    rows = []
    for place, cells in enumerate(table.rows):
        link = ids.get(table.links[place], "") if table.links else ""
        own = f' id="{escape(link)}"' if link else ""
        first = f'<th scope="row" class="word">{escape(cells[0])}</th>'
        rest = "".join(
            f"<td{word(at, table)}>{escape(cell)}</td>" for at, cell in enumerate(cells[1:], 1)
        )
        rows.append(f"<tr{own}>{first}{rest}</tr>")
    name = escape(table.title)
    notes = "".join(f"\n<p>{escape(note)}</p>" for note in table.notes)
    return (
        f'<h2>{name}</h2>{notes}\n<div class="wide" tabindex="0" role="region" '
        f'aria-label="{name}">\n<table>\n'
        f"<thead><tr>{heads}</tr></thead>\n<tbody>\n"
        + "\n".join(rows)
        + "\n</tbody>\n</table></div>"
    )


def word(place: int, table: Table) -> str:
    """Mark the columns that are words."""
    return ' class="word"' if table.header[place] in table.words else ""


def picture_section(picture: Picture) -> str:
    """Draw a picture into the page, each mark a link that says what it is."""
    drawn = io.StringIO()
    picture.draw(drawn)
    ET.register_namespace("", SVG)
    ET.register_namespace("xlink", XLINK)
    root = ET.fromstring(drawn.getvalue())
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag.endswith("metadata"):
                parent.remove(child)
    for name in ("width", "height"):
        root.attrib.pop(name, None)
    link_marks(root, picture.marks)
    set_apart(root, picture.name)
    root.set("role", "group")
    root.set("aria-label", picture.description)
    text = ET.tostring(root, encoding="unicode")
    caption = escape(picture.description)
    return f"<figure>\n{text}\n<figcaption>{caption}</figcaption>\n</figure>"


def link_marks(root: ET.Element, marks: Mapping[str, tuple[str, str]]) -> None:
    """Wrap each mark in a link with its text, which shows on hovering and is read aloud."""
    told: set[str] = set()
    for parent in list(root.iter(f"{{{SVG}}}g")):
        for place, child in enumerate(list(parent)):
            if (gid := child.get("id", "")) not in marks:
                continue
            row, text = marks[gid]
            link = ET.Element(f"{{{SVG}}}a", {"href": f"#{row}", "aria-label": text})
            if row in told:  # the tab key stops once at a trial
                link.set("tabindex", "-1")
            told.add(row)
            ET.SubElement(link, f"{{{SVG}}}title").text = text
            link.append(child)
            parent.remove(child)
            parent.insert(place, link)


def set_apart(root: ET.Element, name: str) -> None:
    """Give the ids of a picture, and what refers to them, a name of their own in the page."""
    for element in root.iter():
        for key, value in list(element.attrib.items()):
            if key == "id":
                element.set(key, f"{name}-{value}")
            elif key == f"{{{XLINK}}}href" and value.startswith("#"):
                element.set(key, f"#{name}-{value[1:]}")
            elif "url(#" in value:
                element.set(key, re.sub(r"url\(#", f"url(#{name}-", value))

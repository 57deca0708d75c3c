"""Tables of text for a terminal, Markdown and HTML, and records as CSV."""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.cli.console import aligned
from pipeline.presets.paper_grid import ROWS
from pipeline.report.grouping import ReportBlock, ResultRow
from pipeline.report.statistics import BOTH, EQUAL, IMAGES, SEEDS, Difference, Estimate

FOOT = {
    SEEDS: "s: over seeds, on the same images (Welch's t)",
    IMAGES: "i: over images, of single runs (Newcombe's, from Wilson intervals; it takes the two "
    "models' images for independent)",
    EQUAL: "e: no interval, since the seeds of either side are equal to each other",
    BOTH: "m: seeds of the one (t), images of the other (Wilson), by Newcombe's formula",
}
MARK = {SEEDS: "s", IMAGES: "i", EQUAL: "e", BOTH: "m"}
COSTS = ("cost/gmac", "cost/params", "cost/images_per_second")


@dataclass(frozen=True)
class TextTable:
    """Text in rows and columns.

    Attributes:
        notes: Lines on how to read it.
        words: Columns that hold words, not numbers.
        keys: What each row is of, such as the number of a trial; empty where that does not matter.
    """

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()
    words: tuple[str, ...] = ()
    keys: tuple[str, ...] = ()


def as_text(tables: Iterable[TextTable]) -> str:
    """Lay out tables for a terminal or a log."""
    return "\n\n".join(
        "\n".join((table.title, *table.notes, aligned([table.header, *table.rows])))
        for table in tables
    )


def as_markdown(
    tables: Iterable[TextTable],
    notes: Sequence[str],
    *,
    title: str = "",
    lead: Sequence[str] = (),
    picture: str = "",
) -> str:
    """Write tables as Markdown, each below its heading; text of runs cannot break it."""
    parts = [f"# {escaped(title)}"] if title else []
    parts += [_listed(lead)] if lead else []
    for table in tables:
        sides = ("---|" if name in table.words else "---:|" for name in table.header)
        lines = [_line(table.header), f"|{''.join(sides)}", *map(_line, table.rows)]
        parts += [f"## {escaped(table.title)}", *map(escaped, table.notes), "\n".join(lines)]
    parts += [f"![Robust accuracy over cost]({picture})"] if picture else []
    parts += ["## Notes", _listed(notes)] if notes else []
    return "\n\n".join(parts) + "\n"


def escaped(text: str) -> str:
    """Escape what Markdown or HTML would read as its own; line breaks become spaces."""
    flat = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;")
    return re.sub(r"([\\|`*\[\]])", r"\\\1", flat)


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(map(escaped, cells))} |"


def _listed(lines: Iterable[str]) -> str:
    return "\n".join(f"- {escaped(line)}" for line in lines)


def write_csv(path: Path, records: Iterable[Mapping[str, object]]) -> None:
    """Write records with full precision, shares as fractions of 1; the first has all columns."""
    rows = list(records)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]) if rows else [])
        writer.writeheader()
        writer.writerows(rows)


def share_columns(name: str, share: Estimate | None, ends: Sequence[str]) -> dict[str, object]:
    """Write a share as columns ``name_mean`` and so on; empty where there is none."""
    values = ("" if share is None else getattr(share, end) for end in ends)
    return {f"{name}_{end}": value for end, value in zip(ends, values, strict=True)}


def percent(share: Estimate | None, *, interval: bool = False) -> str:
    """Write a share in percent, with its interval or with the deviation over several seeds."""
    if share is None:
        return "-"
    text = f"{100 * share.mean:.1f}"
    if interval:
        ends = f" ({100 * share.low:.1f} to {100 * share.high:.1f})"
        return text + ("" if math.isnan(share.low) else ends)
    return text + (f" ± {100 * share.std:.1f}" if share.n > 1 else "")


def points(gain: Difference | None) -> str:
    """Write a difference in percentage points, with its interval and what that is over."""
    if gain is None:
        return "-"
    if gain.over == EQUAL:
        return f"{100 * gain.value:+.1f} (no interval){MARK[EQUAL]}"
    if math.isnan(gain.low):  # of a run without an interval
        return f"{100 * gain.value:+.1f}"
    ends = f"{100 * gain.low:+.1f} to {100 * gain.high:+.1f}"
    return f"{100 * gain.value:+.1f} ({ends}){MARK[gain.over]}"


def block_table(block: ReportBlock) -> TextTable:
    """Lay out a block: a line for each row, percent with the deviation over seeds.

    Where AutoAttack was run, ``adaptive`` is what the other attacks take beyond it, in points, as
    RobustBench's best known number stands beside AutoAttack's.
    """
    attacked = any(row.share("test/ra_aa") for row in block.rows)
    shares = {"SA": "test/sa", (ra := f"RA (PGD-{block.ra.removeprefix('test/ra_pgd')})"): block.ra}
    shares |= {"RA worst": "test/ra_worst"} | ({"RA-AA": "test/ra_aa"} if attacked else {})
    base = ROWS[block.over].title.removeprefix("AT (").removesuffix(")")
    gains = {f"{ra} - {base}": block.ra, f"RA worst - {base}": "test/ra_worst"}

    def cells(row: ResultRow) -> tuple[str, ...]:
        gmac, params, pace = map(row.mean, COSTS)
        return (
            row.title + ("*" if row.note else "") + ("†" if row.doubts else ""),
            str(len(row.runs)),
            *(percent(row.share(name)) for name in shares.values()),
            *((beyond_auto_attack(row),) if attacked else ()),
            "" if gmac is None else f"{gmac:.4f}",
            "" if params is None else f"{params / 1e6:.2f} M",
            "" if pace is None else f"{pace:.0f}",
            *(points(row.gain(name)) for name in gains.values()),
        )

    return TextTable(
        block.title,
        (
            "algorithm",
            "n",
            *shares,
            *(("adaptive",) if attacked else ()),
            "GMAC",
            "params",
            "images/s",
            *gains,
        ),
        tuple(map(cells, block.rows)),
        notes=(block.described(),),
        words=("algorithm",),
    )


def beyond_auto_attack(row: ResultRow) -> str:
    """Write by how many points the worst case of all attacks lies below AutoAttack."""
    alone, every = row.share("test/ra_aa"), row.share("test/ra_worst")
    return "-" if alone is None or every is None else f"{100 * (every.mean - alone.mean):+.1f}"


def foot(blocks: Sequence[ReportBlock], left_out: Mapping[str, int]) -> list[str]:
    """Say how the numbers came about, in what they differ, and what is not in them."""
    lines = [
        "Percent of test images, mean and standard deviation over n seeds; cost of one route, "
        "router included; differences in points, with 95% intervals."
    ]
    rows = [(block, row) for block in blocks for row in block.rows]
    gains = [row.gain(name) for block, row in rows for name in (block.ra, "test/ra_worst")]
    used = {gain.over for gain in gains if gain is not None}
    lines += [FOOT[over] for over in FOOT if over in used]
    for block, row in rows:
        who = f"{block.title}, {row.title}"
        if row.base and row.note:
            lines.append(f"* {who}: compared with {row.base.title} with {row.note}.")
        lines += [f"† {who}: {text}." for text in row.doubts]
    for name in dict.fromkeys(block.title for block in blocks if block.apart):
        same = [block.apart for block in blocks if block.title == name]
        lines.append(f"{name} has {len(same)} blocks, not averaged: {'; '.join(same)}.")
    if left_out:
        counts = "; ".join(f"{count} {reason}" for reason, count in sorted(left_out.items()))
        lines.append(f"Left out: {counts}.")
    return lines


def block_records(blocks: Iterable[ReportBlock]) -> list[dict[str, object]]:
    """Write every row as a record for CSV."""
    return [_record(block, row) for block in blocks for row in block.rows]


def _record(block: ReportBlock, row: ResultRow) -> dict[str, object]:
    record: dict[str, object] = {
        "backbone": block.backbone,
        "dataset": block.dataset,
        "conditions": block.described(),
        "algorithm": row.title,
        "n": len(row.runs),
        "seeds": " ".join(str(run.seed) for run in row.runs),
    }
    shares = {"sa": "test/sa", "ra": block.ra, "ra_worst": "test/ra_worst", "ra_aa": "test/ra_aa"}
    for name, metric in shares.items():
        record |= share_columns(name, row.share(metric), ("mean", "std", "low", "high"))
    record |= {name.removeprefix("cost/"): row.mean(name) for name in COSTS}
    for name in ("ra", "ra_worst"):
        gain, column = row.gain(shares[name]), f"{name}_minus_{block.over}"
        record[column] = "" if gain is None else gain.value
        for end in ("low", "high", "over"):
            record[f"{column}_{end}"] = "" if gain is None else getattr(gain, end)
    runs = " ".join(run.run_id for run in row.runs)
    return record | {"note": row.note, "doubts": "; ".join(row.doubts), "runs": runs}

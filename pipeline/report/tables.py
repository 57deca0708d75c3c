"""Blocks as text for a terminal, as Markdown and as CSV."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

from pipeline.cli.console import aligned
from pipeline.presets.paper_grid import ROWS
from pipeline.report.grouping import ReportBlock, ResultRow
from pipeline.report.statistics import BOTH, IMAGES, SEEDS, Difference, Estimate

FOOT = {
    SEEDS: "s: over seeds, on the same images (Welch's t)",
    IMAGES: "i: over images, of single runs (Newcombe's, from Wilson intervals; it takes the two "
    "models' images for independent)",
    BOTH: "m: seeds of the one (t), images of the other (Wilson), by Newcombe's formula",
}
MARK = {SEEDS: "s", IMAGES: "i", BOTH: "m"}


def header(block: ReportBlock) -> tuple[str, ...]:
    """Name the columns of a block."""
    ra = f"RA (PGD-{block.ra.removeprefix('test/ra_pgd')})"
    names = ["algorithm", "n", "SA", ra, "RA worst"]
    names += ["RA-AA"] if has_auto_attack(block) else []
    base = ROWS[block.over].title.removeprefix("AT (").removesuffix(")")
    return (*names, "GMAC", "params", "images/s", f"{ra} - {base}", f"RA worst - {base}")


def has_auto_attack(block: ReportBlock) -> bool:
    """Tell whether a run of the block knows its accuracy under AutoAttack."""
    return any(row.share("test/ra_aa") for row in block.rows)


def cells(block: ReportBlock, row: ResultRow) -> tuple[str, ...]:
    """Write a row: percent, with the standard deviation over seeds where there are several."""
    shares = ["test/sa", block.ra, "test/ra_worst"]
    shares += ["test/ra_aa"] if has_auto_attack(block) else []
    gmac, params = row.mean("cost/gmac"), row.mean("cost/params")
    pace = row.mean("cost/images_per_second")
    return (
        row.title + ("*" if row.note else "") + ("†" if row.doubts else ""),
        str(len(row.runs)),
        *(percent(row.share(name)) for name in shares),
        "" if gmac is None else f"{gmac:.4f}",
        "" if params is None else f"{params / 1e6:.2f} M",
        "" if pace is None else f"{pace:.0f}",
        *(points(row.gain(name)) for name in (block.ra, "test/ra_worst")),
    )


def percent(share: Estimate | None) -> str:
    """Write a share in percent."""
    if share is None:
        return "-"
    return f"{100 * share.mean:.1f}" + (f" ± {100 * share.std:.1f}" if share.n > 1 else "")


def points(gain: Difference | None) -> str:
    """Write a difference in percentage points, with its interval and what that is over."""
    if gain is None:
        return "-"
    if gain.low != gain.low:  # a run without an interval
        return f"{100 * gain.value:+.1f}"
    ends = f"{100 * gain.low:+.1f} to {100 * gain.high:+.1f}"
    return f"{100 * gain.value:+.1f} ({ends}){MARK[gain.over]}"


def foot(blocks: Sequence[ReportBlock], left_out: Mapping[str, int]) -> list[str]:
    """Say how the numbers came about, what differs, and what is not in them."""
    lines = [
        "Percent of test images, mean and standard deviation over n seeds; cost of one route, "
        "router included; differences in points, with 95% intervals."
    ]
    used = {
        gain.over
        for block in blocks
        for row in block.rows
        for gain in (row.gain(block.ra), row.gain("test/ra_worst"))
        if gain is not None
    }
    lines += [FOOT[over] for over in FOOT if over in used]
    for block in blocks:
        for row in block.rows:
            who = f"{block.title}, {row.title}"
            if row.base and row.note:
                lines.append(f"* {who}: compared with {row.base.title} with {row.note}.")
            lines += [f"† {who}: {text}." for text in row.doubts]
    for name in dict.fromkeys(block.title for block in blocks if block.apart):
        same = [block.apart for block in blocks if block.title == name]
        lines.append(f"{name} stands {len(same)} times, not averaged: {'; '.join(same)}.")
    if left_out:
        counts = "; ".join(f"{count} {reason}" for reason, count in sorted(left_out.items()))
        lines.append(f"Left out: {counts}.")
    return lines


def as_text(blocks: Sequence[ReportBlock], left_out: Mapping[str, int]) -> str:
    """Lay out all blocks for a terminal or a log."""
    parts = [
        f"{block.title}\n{block.described()}\n"
        + aligned([header(block), *(cells(block, row) for row in block.rows)])
        for block in blocks
    ]
    return "\n\n".join([*parts, "\n".join(foot(blocks, left_out))])


def as_markdown(blocks: Sequence[ReportBlock], left_out: Mapping[str, int], picture: str) -> str:
    """Write all blocks as Markdown, with the plot."""
    parts = []
    for block in blocks:
        names = header(block)
        lines = [f"## {block.title}", "", block.described(), ""]
        lines += [f"| {' | '.join(names)} |", f"|---|{'---:|' * (len(names) - 1)}"]
        lines += [f"| {' | '.join(cells(block, row))} |" for row in block.rows]
        parts.append("\n".join(lines))
    notes = "\n".join(f"- {line}" for line in foot(blocks, left_out))
    return "\n\n".join([*parts, f"![Robust accuracy over cost]({picture})", notes]) + "\n"


def write_csv(blocks: Sequence[ReportBlock], path: Path) -> None:
    """Write every row with full precision: shares and differences as fractions of 1."""
    shares = {"sa": "test/sa", "ra": "", "ra_worst": "test/ra_worst", "ra_aa": "test/ra_aa"}
    ends = ("mean", "std", "low", "high")
    over = blocks[0].over
    gains = [
        f"{name}_minus_{over}{end}"
        for name in ("ra", "ra_worst")
        for end in ("", "_low", "_high", "_over")
    ]
    names = ["backbone", "dataset", "conditions", "algorithm", "n", "seeds"]
    names += [f"{name}_{end}" for name in shares for end in ends]
    names += ["gmac", "params", "images_per_second", *gains, "note", "doubts", "runs"]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(names)
        for block in blocks:
            for row in block.rows:
                line: list[object] = [block.backbone, block.dataset, block.described(), row.title]
                line += [len(row.runs), " ".join(str(run.seed) for run in row.runs)]
                for name in shares.values():
                    found = row.share(name or block.ra)
                    line += ["" if found is None else getattr(found, end) for end in ends]
                costs = ("cost/gmac", "cost/params", "cost/images_per_second")
                line += [row.mean(name) for name in costs]
                for name in (block.ra, "test/ra_worst"):
                    gain = row.gain(name)
                    line += (
                        [""] * 4 if gain is None else [gain.value, gain.low, gain.high, gain.over]
                    )
                doubts = "; ".join(row.doubts)
                writer.writerow([*line, row.note, doubts, " ".join(run.run_id for run in row.runs)])

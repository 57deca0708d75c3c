"""Figure of docs/results.md: worst-case robust accuracy against cost, from its own tables.

``python docs/figures/five_rows.py`` reads the tables of "Five rows, three seeds" and writes
``five_rows.png`` next to itself.
"""

import re
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt

mpl.use("agg")
HERE = Path(__file__).parent
ROWS = ("AT (Dense)", "AT (S-Dense)", "AT (Sparse)", "AT (MoE)", "AdvMoE")
COLOURS = ("#444444", "#888888", "#c0a030", "#1f77b4", "#d62728")
NETWORKS = {"small net": "small residual net", "ResNet-18, width 16": "ResNet-18, width 16"}


def read_table(text: str, head: str) -> dict[str, tuple[float, float, float, float]]:
    """Read GMAC, and worst-case accuracy with its interval, of each row of one table."""
    table = text.split(f"| {head} |", 1)[1].split("\n\n", 1)[0]
    found = {}
    for line in table.splitlines()[2:]:
        name, _, _, worst, *_, gmac, _ = (cell.strip() for cell in line.strip("|").split("|"))
        mean, low, high = map(float, re.findall(r"\d+\.\d+", worst))
        found[name] = (float(gmac), mean, low, high)
    return found


def draw() -> None:
    """Draw one panel per network."""
    text = (HERE.parent / "results.md").read_text("utf-8")
    figure, axes = plt.subplots(1, 2, figsize=(8.4, 3.1), sharey=True, layout="constrained")
    for axis, (head, title) in zip(axes, NETWORKS.items(), strict=True):
        table = read_table(text, head)
        for name, colour in zip(ROWS, COLOURS, strict=True):
            gmac, mean, low, high = table[name]
            share = gmac / table["AT (Dense)"][0]
            spread = [[mean - low], [high - mean]]
            shift = 1.04 if name in ("AT (Sparse)", "AdvMoE") else 1.0  # equal costs
            axis.errorbar(share * shift, mean, spread, fmt="o", capsize=3, color=colour, label=name)
        axis.set(xscale="log", title=title, xlabel="multiply-accumulates over the dense net's")
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_xticks([], minor=True)
        axis.set_xticks([0.25, 0.5, 1], ["0.25", "0.5", "1"])
    axes[0].set_ylabel("RA, worst case (%)")
    axes[1].legend(frameon=False, fontsize=8, loc="center")
    figure.savefig(HERE / "five_rows.png", dpi=120)


if __name__ == "__main__":
    draw()

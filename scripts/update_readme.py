"""Writes the results table of README.md from the rows of stage `readme` in experiments/results.csv.

    python scripts/update_readme.py            # after: for SEED in 1 2 3; do STAGE=readme VARIANT=... torchrun ...; done
"""

import csv
import re
import statistics
import sys
from collections import defaultdict

from train_gpt import ROOT, write_whole

COLUMNS = "final_loss", "bits_per_byte", "train_time"
BLOCK = re.compile(r"(<!-- results: .*?-->\n).*?(<!-- /results -->)", re.S)


def table(rows):
    """Markdown: a line per variant with mean and standard deviation over seeds of the finished runs, best loss first."""
    groups = defaultdict(list)
    for row in rows:
        if row["stage"] == "readme" and row["status"] == "ok":
            groups[row["variant"]].append(row)
    lines = []
    for variant, runs in groups.items():
        loss, bits, seconds = ([float(run[column]) for run in runs] for column in COLUMNS)
        lines.append((statistics.mean(loss), f"| {variant} | {len(runs)} | {statistics.mean(loss):.4f} | "
                      f"{statistics.stdev(loss):.4f} | {statistics.mean(bits):.4f} | {statistics.mean(seconds):.0f} s |"))
    device = " / ".join(sorted({f"{run['device_name']}, torch {run['torch']}" for runs in groups.values() for run in runs}))
    head = ["| `PRESET=quickstart` with | seeds | val loss | sd | bits per byte | train time |", "|-|-|-|-|-|-|"]
    return "\n".join([*head, *(line for _, line in sorted(lines)), "", f"Measured on {device}.", ""])


def main():
    with open(ROOT / "experiments" / "results.csv", newline="") as file:
        block = table(csv.DictReader(file))
    readme = ROOT / "README.md"
    write_whole(readme, BLOCK.sub(lambda found: found[1] + block + found[2], readme.read_text()))
    return 0


if __name__ == "__main__":
    sys.exit(main())

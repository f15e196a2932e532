"""Writes the results table of README.md from the rows of stage `readme` in experiments/results.csv.

    export PRESET=quickstart STAGE=readme
    for SEED in 1 2 3; do export SEED; VARIANT='no gate' python train_gpt.py; done
    python scripts/update_readme.py
"""

import csv
import re
import statistics
import sys
from collections import defaultdict

from train_gpt import ROOT, write_whole

BLOCK = re.compile(r"(<!-- results: .*?-->\n).*?(<!-- /results -->)", re.S)


def table(rows):
    """Markdown: mean and standard deviation over the seeds of each variant, best loss first."""
    groups, lines = defaultdict(list), []
    for row in rows:
        if row["stage"] == "readme" and row["status"] == "ok":
            groups[row["variant"]].append(row)
    for variant, runs in groups.items():
        loss, bits = ([float(run[column]) for run in runs] for column in ("final_loss", "bits_per_byte"))
        lines.append((statistics.mean(loss), f"| {variant} | {len(runs)} | {int(runs[0]['params_total']):,} | "
                      f"{statistics.mean(loss):.4f} | {statistics.stdev(loss):.4f} | {statistics.mean(bits):.4f} |"))
    if not lines:
        sys.exit("update_readme.py: experiments/results.csv has no finished run of STAGE=readme")
    devices = sorted({f"{run['device_name']}, torch {run['torch']}" for runs in groups.values() for run in runs})
    head = ["| `PRESET=quickstart` with | seeds | parameters | val loss | sd | bits per byte |", "|-|-|-|-|-|-|"]
    return "\n".join([*head, *(line for _, line in sorted(lines)), "", f"Measured on {' / '.join(devices)}.", ""])


def updated(readme):
    """The text of README.md with the block made anew from the table of results."""
    with open(ROOT / "experiments" / "results.csv", newline="") as file:
        block = table(csv.DictReader(file))
    return BLOCK.sub(lambda found: found[1] + block + found[2], readme)


if __name__ == "__main__":
    write_whole(ROOT / "README.md", updated((ROOT / "README.md").read_text()))
    sys.exit(0)

"""Rebuilds the results table from the summaries that runs left, or merges them into it.

    python scripts/rebuild_results.py [--log-dir logs] [--results experiments/results.csv]

A row whose summary is gone is kept. New rows come in the order in which their runs started.
"""

import require_packages  # noqa: F401  first: it says what to run where one is missing
import argparse
import json
import sys
from pathlib import Path

from store.contract import ConfigError
from store.files import regular
from store.tables import update_results
from train_gpt import Config


def read_summaries(files: list[Path]) -> list[dict]:
    """The summaries of runs among JSON files; says which hold no JSON."""
    rows = []
    for file in files:
        try:
            row = json.loads(regular(file).read_text("utf-8"))
        except (OSError, ValueError) as error:
            print(
                f"rebuild_results.py: {file} is skipped, it holds no JSON: {error}", file=sys.stderr
            )
            continue
        if isinstance(row, dict) and row.get("run_id"):
            rows.append(row)
        else:
            print(f"rebuild_results.py: {file} is skipped, it is no summary", file=sys.stderr)
    return rows


def main(argv: list[str] | None = None) -> int:
    """Merge all summaries and say how many; exit code 0, or 3 with one sentence where there is
    none."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument(
        "--log-dir", type=Path, default=Config.log_dir, help="folder of the summaries"
    )
    parser.add_argument("--results", default=Config.results_csv, help="the table")
    args = parser.parse_args(argv)
    files = sorted(Path(args.log_dir).glob("[!.]*.json"))
    rows = read_summaries(files)
    if not rows:
        print(
            f"rebuild_results.py: error: no summary of a run in {args.log_dir}; name its --log-dir",
            file=sys.stderr,
        )
        return 3
    rows.sort(key=lambda row: str(row.get("started")))
    try:
        update_results(args.results, rows)
    except ConfigError as error:
        print(f"rebuild_results.py: error: {error}", file=sys.stderr)
        return 2
    print(f"{args.results}: {len(rows)} runs of {len(files)} files")
    return 0


if __name__ == "__main__":
    sys.exit(main())

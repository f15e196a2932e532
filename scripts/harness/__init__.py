"""What keeps a run: settings, checkpoints, records, clocks, signals. Knows no model; never run by itself."""

"""What keeps a run: settings, provenance, records, checkpoints, clocks, signals, failures.

It knows no model. It is given a dataclass of settings, `{key: (tensor, kind)}` and named numbers. A
program that trains talks to one object, `harness.run.Run`; scripts use the modules. Nothing here is
run by itself.
"""

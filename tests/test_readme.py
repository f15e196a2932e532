"""The README's way from a text to a model that writes, as it is printed there."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_text_in_text_out(tmp_path):
    """Every command in a folder that has the program alone; the model is small, training short."""
    section = (ROOT / "README.md").read_text().partition("## Text in, text out")[2]
    commands = re.search(r"```bash\n(.*?)```", section, re.S)[1].splitlines()
    shutil.copy(ROOT / "train_gpt.py", tmp_path)
    for folder in ("scripts", "experiments/presets"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=ignored)
    parts = [path.read_text() for path in sorted((ROOT / "scripts").glob("*.py"))]
    book = "".join(parts).encode("ascii", "ignore")[:140_000]
    (tmp_path / "book.txt").write_bytes(book)
    env = {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "HOME": str(tmp_path),
        "NUM_ITERATIONS": "20",
        "WARMDOWN_ITERS": "10",
        "N_LAYER": "1",
        "N_EMBD": "48",
        "SAMPLE_EVERY": "20",
        "OMP_NUM_THREADS": "1",
    }
    printed = []
    for command in commands:
        command = command.replace(" SAMPLE_EVERY=100", "")
        done = subprocess.run(
            ["bash", "-c", command], cwd=tmp_path, env=env, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
        printed.append(done.stdout)
    tokenizer, data, training, text, figures, export = printed
    assert "vocabulary: 1,024" in tokenizer and "next: PRESET=quickstart" in data
    assert "step:20/20 sample:\n| " in training and "status: ok" in training
    assert re.search(r"bits_per_byte: [\d.]+\n", training)
    assert text.count("--- sample ") == 2 and len(text) > 300
    assert f"\nbytes: {len(book)}\n" in figures
    assert "AutoModelForCausalLM.from_pretrained('book_hf')" in export

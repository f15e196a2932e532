"""Scripts under a Python that lacks something, and the trainer that they find."""

import errno
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted(
    path.name
    for path in (ROOT / "scripts").glob("*.py")
    if 'if __name__ == "__main__"' in path.read_text()
    and path.name != "bench_worker.py"  # which bench.py starts, that has said it
)


def test_every_script_without_packages_is_one_sentence(tmp_path):
    """As under the system's Python: -S hides all packages."""
    assert len(SCRIPTS) > 10
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    started = [
        subprocess.Popen(
            [sys.executable, "-S", ROOT / "scripts" / name, "--help"],
            cwd=tmp_path,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for name in SCRIPTS
    ]
    for name, process in zip(SCRIPTS, started):
        out, err = process.communicate()
        assert (process.returncode, out) == (2, ""), (name, err)
        assert err.startswith(f"{name}: expected Python 3.11 or newer with the project's packages")
        assert "without numpy, torch, tqdm, filelock: " in err and err.count("\n") == 1


def test_a_script_finds_the_trainer_above_it(tmp_path):
    """From any folder, without an installation, and before one of another version."""
    (tmp_path / "train_gpt.py").write_text("raise SystemExit('another trainer')")
    code = f"""
import sys
sys.path = [{str(ROOT / "scripts")!r}] + [p for p in sys.path if p != {str(ROOT)!r}]
sys.path.append({str(tmp_path)!r})
sys.meta_path = [f for f in sys.meta_path if "editable" not in repr(f)]
import require_packages
import train_gpt
print(train_gpt.__file__)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.stdout.strip() == str(ROOT / "train_gpt.py"), done.stderr


def test_a_reader_that_has_gone_away_is_nothing_to_tell():
    """Whether the output is longer than a buffer or not; a full disk, or quota, is a sentence."""
    full = OSError(errno.EDQUOT, "Quota")
    begin = f'{sys.executable} -c \'import sys; sys.path[:0] = ["scripts"]; import require_packages'
    for action, err in {
        "print(1)": "",
        "[print(i) for i in range(100_000)]": "",
        'raise OSError(28, "No space left")': "-c: error: [Errno 28] No space left; make room\n",
        'import errno; raise OSError(errno.EDQUOT, "Quota")': f"-c: error: {full}; make room\n",
    }.items():
        command = ["bash", "-c", f"{begin}; {action}' | true"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.stderr == err, action


def test_ctrl_c_is_no_traceback(tmp_path):
    """Whenever it comes, here while a script's other packages load; other errors have theirs."""
    for name, (code, err) in {"INT": (-2, "interrupted\n"), "KeyError": (1, "Traceback")}.items():
        action = "signal.raise_signal(signal.SIGINT)" if name == "INT" else "raise KeyError"
        (tmp_path / "tqdm.py").write_text(f"import signal\n{action}\n")
        command = (
            f"import require_packages, sys; sys.path.insert(0, {str(tmp_path)!r}); import tqdm"
        )
        done = subprocess.run(
            [sys.executable, "-c", command], cwd=ROOT / "scripts", capture_output=True, text=True
        )
        assert done.returncode == code and done.stderr.startswith(err), done.stderr

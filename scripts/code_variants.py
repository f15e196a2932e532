"""Finds the code that a variant of a stage names in git, and puts it into a folder of its own.

    CODE = "main"        # a branch, tag or commit: as it is there
    CODE = "idea.patch"  # the code of the working tree, committed or not, and this patch on it
    CODE = "."           # the working tree, as without CODE; so is "tree"

The folders are worktrees of git below logs/.code/, a few MB each, one for a commit or patch. They
are made once, made anew where a file in them was changed, and may all be removed while no stage
runs.
"""

import contextlib
import functools
import hashlib
import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

from harness.settings import ROOT
from store.contract import ConfigError
from store.files import locked, write_whole
from store.source import modules_text, text_hash

FOLDER = Path("logs/.code")
TRAINER = "train_gpt.py"
PATCHES = (".patch", ".diff")
PATHS = (TRAINER, "scripts", "experiments/presets")  # of a tree, what a run depends on
COMPILED = ":(exclude,glob)**/__pycache__/**"  # by runs
# Of a git around this process, as one that runs a hook.
FOREIGN = "GIT_DIR GIT_WORK_TREE GIT_INDEX_FILE GIT_PREFIX GIT_COMMON_DIR GIT_OBJECT_DIRECTORY"


class Code(NamedTuple):
    """What CODE names, as git has it."""

    name: str  # as the stage says it
    commit: str  # hash
    key: str  # names its folder: the commit, and for a patch what is changed
    patch: Path | None = None
    tree: str = ""  # hash of the working tree's code, which a patch is for

    @property
    def folder(self) -> Path:
        """Its worktree, whether it is there yet or not."""
        return FOLDER.resolve() / self.key

    @property
    def about(self) -> Path:
        """What is known of its worktree; written once that is whole."""
        return FOLDER.resolve() / f"{self.key}.json"

    def __str__(self) -> str:
        return f"{self.name} ({self.commit[:10]}{' and the patch' if self.patch else ''})"


def git(*words: str | Path, at: Path, index: Path | None = None) -> str:
    """What git prints, run in a folder, with an index of its own where one is given. Raises
    ConfigError with the first line of its complaint."""
    env = {name: text for name, text in os.environ.items() if name not in FOREIGN.split()}
    env |= {"LC_ALL": "C", "GIT_TERMINAL_PROMPT": "0"}
    env |= {"GIT_INDEX_FILE": str(index)} if index else {}
    command = ["git", "-c", "core.hooksPath=/dev/null", "-C", at, *words]
    try:
        done = subprocess.run(
            command, env=env, capture_output=True, encoding="utf-8", errors="replace"
        )
    except FileNotFoundError:
        raise ConfigError("git is not installed") from None
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        told = [line for line in lines if line.startswith(("error:", "fatal:"))] or lines
        raise ConfigError((told or [f"git {words[0]} ended with {done.returncode}"])[0])
    return done.stdout.strip()


def tree_of(folder: Path) -> str:
    """The hash of a tree of git: that of the folder's HEAD, with the code as the folder has it. Its
    index stays as it is."""
    gone = [path for path in PATHS if not (folder / path).exists()]
    there = [path for path in PATHS if path not in gone]
    with tempfile.TemporaryDirectory() as scratch:
        index = Path(scratch) / "index"
        git("read-tree", "HEAD", at=folder, index=index)
        if gone:
            git("rm", "-rq", "--cached", "--ignore-unmatch", "--", *gone, at=folder, index=index)
        if there:
            git("add", "--all", "--", *there, COMPILED, at=folder, index=index)
        return git("write-tree", at=folder, index=index)


def commit_of(ref: str) -> str:
    """The hash of the commit that a ref names. Raises ConfigError."""
    try:
        git("rev-parse", "--git-dir", at=ROOT)
    except ConfigError as error:
        raise ConfigError(
            f"needs a git checkout, which {ROOT} is not ({error}); git clone makes one"
        ) from None
    words = ("rev-parse", "--verify", "--quiet", "--end-of-options", f"{ref}^{{commit}}")
    try:
        return git(*words, at=ROOT)
    except ConfigError:
        raise ConfigError(
            "git here has no such branch, tag or commit; git branch -a and git log --oneline list "
            "them, and the name of a patch ends in .patch"
        ) from None


@functools.cache
def found(name: str) -> Code:
    """The code of this name, as it is when it is first asked for. Raises ConfigError."""
    try:
        if not name.endswith(PATCHES):
            commit = commit_of(name)
            return Code(name, commit, commit[:12])
        patch = Path(name).resolve()
        if not patch.is_file():
            raise ConfigError("no such file; git diff > idea.patch makes one of your changes")
        commit, tree = commit_of("HEAD"), tree_of(ROOT)
    except ConfigError as error:
        raise ConfigError(f"CODE={name}: {error}") from None
    digest = hashlib.sha256(tree.encode() + patch.read_bytes()).hexdigest()
    return Code(name, commit, f"{commit[:12]}-{digest[:8]}", patch, tree)


@functools.cache
def root_of(code: Code) -> Path:
    """The folder with the train_gpt.py of this code, which is made where it is not there or not
    whole. Raises ConfigError."""
    try:
        with locked(FOLDER / "made.lock"):
            if not is_whole(code):
                make(code)
        root = project_in(code.folder)
        trainer = root / TRAINER
        if not trainer.is_file() or "dry_run" not in trainer.read_text("utf-8"):
            raise ConfigError(
                "its train_gpt.py does not know DRY_RUN, or is not there, so nothing is known of "
                "what it would do; name a later commit"
            )
    except ConfigError as error:
        raise ConfigError(f"CODE={code.name}: {error}") from None
    return root


def prefix() -> str:
    """The project's place in its repository, as `part/`; "" where it is the repository."""
    return git("rev-parse", "--show-prefix", at=ROOT)


def project_in(worktree: Path) -> Path:
    """The folder of the project in a worktree."""
    return worktree / prefix()


def known_of(code: Code) -> dict:
    """What is known of a worktree that was made once; {} of one that was not."""
    with contextlib.suppress(OSError, ValueError):
        about = json.loads(code.about.read_text("utf-8"))
        return about if isinstance(about, dict) else {}
    return {}


def is_whole(code: Code) -> bool:
    """Whether the worktree is there as it was made."""
    about = known_of(code)
    if not about:
        return False
    with contextlib.suppress(ConfigError):
        if git("rev-parse", "HEAD", at=code.folder) == code.commit:
            return tree_of(project_in(code.folder)) == about.get("tree")
    return False


def make(code: Code) -> None:
    """Makes the worktree, and removes those that were not made to the end. Raises ConfigError."""
    remove(code.folder, code.about)
    for folder in FOLDER.resolve().iterdir():
        if folder.is_dir() and not folder.with_name(f"{folder.name}.json").exists():
            remove(folder)
    # Forced twice: one of this name may be known to git, and locked, though its folder is gone.
    forced = ("--force", "--force", "--detach", "--quiet")
    git("worktree", "add", *forced, code.folder, code.commit, at=ROOT)
    try:
        if code.patch:
            apply(code)
    except ConfigError:
        remove(code.folder)
        raise
    tree = tree_of(project_in(code.folder))
    about = {"commit": code.commit, "tree": tree, "sources": {}}
    write_whole(code.about, json.dumps(about, indent=1) + "\n")


def apply(code: Code) -> None:
    """Gives a new worktree the code of the working tree, and what the patch says of it: other
    files, as notes, may be in the patch, and are as committed here. Raises ConfigError."""
    git("restore", f"--source={code.tree}", "--worktree", "--", ".", at=code.folder)
    only = [f"--include={prefix()}{path}{'' if path == TRAINER else '/*'}" for path in PATHS]
    try:
        git("apply", "--whitespace=nowarn", *only, code.patch, at=code.folder)
    except ConfigError as error:
        reason = (
            f"does not apply to the working tree: {error}; git diff --no-color --binary makes "
            "patches that do"
        )
        with contextlib.suppress(ConfigError):
            git("apply", "--check", "--reverse", *only, code.patch, at=code.folder)
            reason = (
                "is in the working tree already, which is what the other variants run; give "
                'those CODE = "HEAD", or take the change out: git apply --reverse'
            )
        raise ConfigError(reason) from None
    if tree_of(project_in(code.folder)) == code.tree:
        raise ConfigError(
            f"changes nothing of what runs depend on, {', '.join(PATHS)}; git diff in {ROOT}, with "
            "no options that change its paths, makes patches that do"
        )


def remove(folder: Path, about: Path | None = None) -> None:
    """Removes a worktree, which need not be whole, or there."""
    if about:
        about.unlink(missing_ok=True)
    with contextlib.suppress(ConfigError):
        git("worktree", "remove", "--force", "--force", folder, at=ROOT)
    shutil.rmtree(folder, ignore_errors=True)


def keep_source(code: Code, program: str, source_sha: str) -> None:
    """Notes how rows name the source of a program of this code, which only that code itself says,
    for those who read rows."""
    about = known_of(code)
    if about and about.get("sources", {}).get(program) != source_sha:
        about["sources"] = about.get("sources", {}) | {program: source_sha}
        write_whole(code.about, json.dumps(about, indent=1) + "\n")


@functools.cache
def source_in_git(commit: str) -> str:
    """The source_sha of the trainer in a commit, which need not be here as files. Raises
    ConfigError."""

    def python_files(folder: str) -> list[str]:
        names = git("ls-tree", "--name-only", commit, folder, at=ROOT).splitlines()
        return sorted(name for name in names if name.endswith(".py"))

    def text_of(*names: str) -> str:
        return "\n".join(git("show", f"{commit}:./{name}", at=ROOT) for name in names)

    def read(module: str) -> str:
        for place in (f"scripts/{module}", module):
            if python_files(f"{place}.py"):
                return text_of(f"{place}.py")
            if f"{place}/__init__.py" in python_files(f"{place}/"):
                return text_of(*python_files(f"{place}/"))
        return ""

    source = text_of(TRAINER)
    own = [source, text_of(*python_files("scripts/ops/")), modules_text(source, read)]
    return text_hash("\n".join(own))


def source_of(name: str, program: str) -> str:
    """The source_sha that rows of this code have; "" where it is not known here."""
    try:
        code = found(name)
        said = known_of(code).get("sources", {}).get(program, "")
        if said or code.patch or program != TRAINER:
            return said
        return source_in_git(code.commit)
    except (ConfigError, OSError):
        return ""

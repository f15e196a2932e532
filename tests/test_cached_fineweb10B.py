"""cached_fineweb10B.py with the hub's own client, against a small hub and CDN on the loopback."""

import collections
import hashlib
import http.server
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock

ROOT = Path(__file__).resolve().parent.parent
REPO = "kjj0/fineweb10B-gpt2"
VAL, TRAIN = "fineweb_val_000000.bin", "fineweb_train_000001.bin"
COMMIT, NEWER = "a" * 40, "b" * 40
TOKEN = "hf_secretsecretsecret"

# One process runs many jobs, because importing PyTorch takes seconds: a job is a line of JSON, and
# so is its result.
WORKER = """
import contextlib, io, json, os, sys
from unittest import mock
import cached_fineweb10B as script
heavy = [name for name in ("torch", "huggingface_hub") if name in sys.modules]
print(json.dumps(heavy), flush=True)
script.BACKOFF_S, script.SHARD_BYTES = 0.01, 10_000
for line in sys.stdin:
    job = json.loads(line)
    out = io.StringIO()
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stdout(out))
        stack.enter_context(contextlib.redirect_stderr(out))
        stack.enter_context(mock.patch.dict(os.environ, job["env"]))
        if "free" in job:
            usage = mock.Mock(free=job["free"])
            stack.enter_context(mock.patch("shutil.disk_usage", return_value=usage))
        if "vocabulary" in job:
            import train_gpt
            import tokenization
            gpt2 = {"gpt2": tokenization.BytesTokenizer()}.__getitem__
            stack.enter_context(mock.patch("tokenization.named", gpt2))
        if "patience" in job:
            import train_gpt, text_sources
            patience = mock.patch.object(text_sources, "STALL_S", job["patience"])
            stack.enter_context(patience)
        if "read_only" in job:
            stack.enter_context(mock.patch("os.access", return_value=False))
        try:
            code = script.main(job["argv"])
        except SystemExit as stop:
            code = stop.code
    print(json.dumps([code, out.getvalue()]), flush=True)
"""


def shard(seed, tokens=1000, magic=20240520):
    """Bytes of a shard with random tokens."""
    header = np.zeros(256, "<i4")
    header[:3] = magic, 1, tokens
    return (
        header.tobytes()
        + np.random.default_rng(seed).integers(0, 50257, tokens).astype("<u2").tobytes()
    )


def sha256(data):
    return hashlib.sha256(data).hexdigest()


class Hub:
    """A hub with one dataset, and a CDN on another port; `faults` are used up one per request."""

    def __init__(self):
        self.servers = [self.serve(answer) for answer in (self.answer_hub, self.answer_cdn)]
        self.endpoint, self.cdn = (
            f"http://127.0.0.1:{server.server_port}" for server in self.servers
        )
        self.reset()

    def reset(self):
        self.files = {VAL: shard(0), TRAIN: shard(1), "fineweb_train_000002.bin": shard(2)}
        self.revisions = {"main": COMMIT, COMMIT: COMMIT, NEWER: NEWER}
        self.faults = collections.defaultdict(
            list
        )  # (method, file name or "api"): statuses, "cut", "drop", ...
        self.log = []  # (method, "api" or "hub" or "cdn", path, headers)
        self.stalled, self.resume = threading.Event(), threading.Event()

    def serve(self, answer):
        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                answer(self)

            do_HEAD = do_GET

            def log_message(self, *_):
                pass

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return server

    def close(self):
        for server in self.servers:
            server.shutdown()
            server.server_close()

    def requests(self, *kinds):
        """Paths' last parts, in order, of the requests of some kinds, such as "GET cdn"."""
        return [
            path.split("/")[-1] for method, host, path, _ in self.log if f"{method} {host}" in kinds
        ]

    def reply(self, request, status, body=b"", **headers):
        request.send_response(status)
        for name, value in {"Content_Length": len(body), **headers}.items():
            request.send_header(name.replace("_", "-"), str(value))
        request.end_headers()
        if request.command == "GET":
            request.wfile.write(body)

    def fault(self, request, key):
        """The next fault of a key, or None; "done" if a status or a dropped connection was all."""
        fault = self.faults[key].pop(0) if self.faults[key] else None
        if fault == "drop":
            request.close_connection = True
            return "done"
        if isinstance(fault, int):
            self.reply(request, fault, **({"Retry_After": 86400} if fault == 429 else {}))
            return "done"
        return fault

    def answer_hub(self, request):
        path = request.path.split("?")[0]
        name, is_api = path.split("/")[-1], path.startswith("/api/")
        self.log.append((request.command, "api" if is_api else "hub", path, dict(request.headers)))
        if self.fault(request, (request.command, "api" if is_api else name)) == "done":
            return
        revision = path.split("/")[-1 if is_api else -2]
        if revision not in self.revisions:
            self.reply(request, 404, X_Error_Code="RevisionNotFound")
        elif is_api:
            assert path == f"/api/datasets/{REPO}/revision/{revision}", path
            siblings = [
                {
                    "rfilename": name,
                    "size": len(data),
                    "blobId": "0",
                    "lfs": {"size": len(data), "sha256": sha256(data), "pointerSize": 1},
                }
                for name, data in self.files.items()
            ]
            info = {"id": REPO, "sha": self.revisions[revision], "siblings": siblings}
            self.reply(request, 200, json.dumps(info).encode(), Content_Type="application/json")
        elif name not in self.files:
            self.reply(
                request, 404, X_Error_Code="EntryNotFound", X_Repo_Commit=self.revisions[revision]
            )
        else:
            assert path == f"/datasets/{REPO}/resolve/{revision}/{name}", path
            etag = f'"{sha256(self.files[name])}"'
            self.reply(
                request,
                302,
                Location=f"{self.cdn}/cdn/{name}",
                X_Repo_Commit=self.revisions[revision],
                X_Linked_Size=len(self.files[name]),
                X_Linked_ETag=etag,
                ETag=etag,
            )

    def answer_cdn(self, request):
        name = request.path.split("/")[-1]
        self.log.append((request.command, "cdn", request.path, dict(request.headers)))
        fault = self.fault(request, (request.command, "cdn " + name))
        if fault == "done":
            return
        data = self.files[name]
        if fault == "flip":
            data = data[:-1] + bytes([data[-1] ^ 1])
        start = int(request.headers.get("Range", "bytes=0-").removeprefix("bytes=").rstrip("-"))
        headers = {"Content_Range": f"bytes {start}-{len(data) - 1}/{len(data)}"} if start else {}
        if fault in ("cut", "stall"):
            headers["Content_Length"] = len(data) - start
            self.reply(request, 206 if start else 200, data[start : len(data) // 2], **headers)
            request.wfile.flush()
            if fault == "stall":
                self.stalled.set()
                self.resume.wait(20)
            request.close_connection = True
        else:
            self.reply(request, 206 if start else 200, data[start:], **headers)


class Worker:
    """A process that runs the script's main once per job, with an environment of its own."""

    def __init__(self, endpoint, home, **env):
        kept = {
            key: value
            for key, value in os.environ.items()
            if not key.startswith(("HF_", "HUGGING_FACE"))
        }
        kept.pop("DATA_DIR", None), kept.pop("REVISION", None)
        self.env = {
            **kept,
            "HF_ENDPOINT": endpoint,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "PYTHONPATH": str(ROOT),
            "NO_PROXY": "127.0.0.1",
            # nothing else may be reached, such as GPT-2's vocabulary
            "HTTPS_PROXY": "http://127.0.0.1:9",
            "TIKTOKEN_CACHE_DIR": str(home / "tiktoken"),
            **env,
        }
        self.process = subprocess.Popen(
            [sys.executable, "-c", WORKER],
            cwd=home,
            env=self.env,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        self.loaded = json.loads(
            self.process.stdout.readline()
        )  # heavy modules that importing the script loaded

    def start(self, folder, *argv, job=None, **env):
        job = {"argv": list(argv), "env": {"DATA_DIR": str(folder), **env}, **(job or {})}
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()

    def answers_within(self, seconds):
        return bool(select.select([self.process.stdout], [], [], seconds)[0])

    def result(self):
        assert self.answers_within(20), "the script does not end"
        return json.loads(self.process.stdout.readline())

    def run(self, folder, *argv, **kwargs):
        """(exit code, all that was printed) of one run."""
        self.start(folder, *argv, **kwargs)
        return self.result()

    def close(self):
        self.process.stdin.close()
        self.process.wait(20)
        self.process.stdout.close()


@pytest.fixture(scope="module")
def the_hub():
    hub = Hub()
    yield hub
    hub.close()


@pytest.fixture
def hub(the_hub):
    the_hub.reset()
    yield the_hub
    the_hub.resume.set()


@pytest.fixture(scope="module")
def worker(the_hub, tmp_path_factory):
    worker = Worker(the_hub.endpoint, tmp_path_factory.mktemp("home"))
    yield worker
    worker.close()


def index_of(folder):
    return json.loads((folder / "index.json").read_text())


def put(folder, hub, *names):
    """Put whole shards into a folder as if they had been copied there."""
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / name).write_bytes(hub.files[name])


def assert_sentence(output, *parts):
    """The last line of the output is one error sentence with these parts; there is no traceback."""
    assert "Traceback" not in output
    last = output.strip().splitlines()[-1]
    assert "error: " in last and all(part in last for part in parts), output


def test_import_is_quick_and_without_effects(worker):
    assert worker.loaded == []


def test_fresh_fetch_gives_the_bytes_and_an_index(hub, worker, tmp_path):
    code, output = worker.run(tmp_path / "new" / "data", "1")
    folder = tmp_path / "new" / "data"
    assert code == 0, output
    for name in (VAL, TRAIN):
        assert (folder / name).read_bytes() == hub.files[name]
    assert hub.requests("GET cdn") == [VAL, TRAIN] and not hub.requests("GET hub")
    stats = {name: (folder / name).stat() for name in (VAL, TRAIN)}
    assert index_of(folder) == {
        "source": REPO,
        "commit": COMMIT,
        "tokenizer": "gpt2",
        "tokenizer_sha256": None,
        "vocab_size": 50257,
        "eot_id": 50256,
        "split": "by shard, as published",
        "bytes_per_token": None,
        "token_bytes": None,
        "shards": [
            {
                "name": name,
                "split": split,
                "tokens": 1000,
                "bytes": 3024,
                "mtime_ns": stats[name].st_mtime_ns,
                "ctime_ns": stats[name].st_ctime_ns,
                "sha256": sha256(hub.files[name]),
            }
            for name, split in ((TRAIN, "train"), (VAL, "val"))
        ],
    }
    assert json.loads((folder / "tokenizer.json").read_text()) == {
        "kind": "gpt2",
        "vocab_size": 50257,
        "eot_id": 50256,
    }
    assert not list(folder.rglob("*.tmp")) and not list(folder.rglob("*.incomplete"))
    assert f"1/2 {VAL}\n2/2 {TRAIN}\n" in output
    assert f"2 shards fetched, 0 skipped: 0.00 GB in {folder}, commit {COMMIT}\n" in output
    assert output.endswith("torchrun --standalone --nproc_per_node=8 train_gpt.py\n")


def test_the_vocabulary_is_written_once_it_can_be_had(hub, worker, tmp_path):
    worker.run(tmp_path, "1")
    shards = index_of(tmp_path)["shards"]
    code, output = worker.run(tmp_path, "1", job={"vocabulary": True})
    assert code == 0 and "0 shards fetched" in output
    index, text = index_of(tmp_path), (tmp_path / "tokenizer.json").read_text()
    assert index["token_bytes"] == [1] * 256 + [0] and index["shards"] == shards
    assert index["tokenizer_sha256"] == sha256(text.encode())
    assert len((tmp_path / "index.json").read_text().splitlines()) < 40
    worker.run(tmp_path, "2")
    assert index_of(tmp_path)["token_bytes"] == index["token_bytes"]
    assert (tmp_path / "tokenizer.json").read_text() == text


def test_second_run_uses_no_network_and_hashes_nothing_again(hub, worker, tmp_path):
    worker.run(tmp_path, "1")
    hub.log.clear()
    index = index_of(tmp_path)
    index["shards"][0]["sha256"] = "recorded"
    (tmp_path / "index.json").write_text(json.dumps(index))
    code, output = worker.run(tmp_path, "1")
    assert code == 0 and "0 shards fetched, 2 skipped without network" in output and hub.log == []
    assert index_of(tmp_path) == index
    os.utime(tmp_path / TRAIN, ns=(1, 1))
    worker.run(tmp_path, "1")
    assert index_of(tmp_path)["shards"][0]["sha256"] == sha256(hub.files[TRAIN])


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:-2],
        lambda data: shard(1, magic=1),
        lambda data: b"",
        lambda data: shard(7),
    ],
    ids=["truncated", "wrong magic", "empty", "other tokens"],
)
def test_damaged_local_file_is_fetched_again(hub, worker, tmp_path, damage):
    worker.run(tmp_path, "1")
    (tmp_path / TRAIN).write_bytes(damage(hub.files[TRAIN]))
    hub.log.clear()
    code, output = worker.run(
        tmp_path, "2"
    )  # the second shard is new, so that the hub is asked in any case
    assert code == 0, output
    assert hub.requests("GET cdn") == [TRAIN, "fineweb_train_000002.bin"]
    assert (tmp_path / TRAIN).read_bytes() == hub.files[TRAIN]
    assert [entry["sha256"] for entry in index_of(tmp_path)["shards"]] == [
        sha256(hub.files[entry["name"]]) for entry in index_of(tmp_path)["shards"]
    ]


def test_a_flipped_byte_is_no_new_truth(hub, worker, tmp_path):
    """Although no other shard is missing, nobody has asked the hub, and the file has its time."""
    worker.run(tmp_path, "1")
    shards, stat = index_of(tmp_path)["shards"], (tmp_path / TRAIN).stat()
    with open(tmp_path / TRAIN, "r+b") as file:
        file.seek(1024)
        file.write(bytes([hub.files[TRAIN][1024] ^ 1]))
    os.utime(tmp_path / TRAIN, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    hub.log.clear()
    code, output = worker.run(tmp_path, "1")
    assert code == 0 and f"damaged, is fetched again: {tmp_path / TRAIN}" in output, output
    assert hub.requests("GET cdn") == [TRAIN]
    assert (tmp_path / TRAIN).read_bytes() == hub.files[TRAIN]
    hashes = [shard["sha256"] for shard in shards]
    assert [shard["sha256"] for shard in index_of(tmp_path)["shards"]] == hashes


def test_connection_cut_in_the_middle(hub, worker, tmp_path):
    hub.files[VAL] = shard(
        0, tokens=12_000_000
    )  # the first half is more than the client's unit of 10 MiB
    hub.faults["GET", "cdn " + VAL] = ["cut"]
    code, output = worker.run(tmp_path, "1")
    assert code == 0, output
    assert (tmp_path / VAL).read_bytes() == hub.files[VAL]
    ranges = [
        headers.get("Range")
        for method, host, _, headers in hub.log
        if (method, host) == ("GET", "cdn")
    ]
    assert hub.requests("GET cdn") == [VAL, VAL, TRAIN] and ranges == [
        None,
        "bytes=10485760-",
        None,
    ]


@pytest.mark.parametrize(
    "request_kind", [("GET", "api"), ("HEAD", VAL), ("GET", "cdn " + VAL)], ids=" ".join
)
def test_server_errors_are_survived(hub, worker, tmp_path, request_kind):
    hub.faults[request_kind] = [503, 503]
    code, output = worker.run(tmp_path, "1")
    assert code == 0, output
    assert (tmp_path / VAL).read_bytes() == hub.files[VAL] and not hub.faults[request_kind]


def test_server_errors_end_after_five_attempts(hub, worker, tmp_path):
    hub.faults["GET", "cdn " + VAL] = [500] * 9
    code, output = worker.run(tmp_path, "1")
    assert code == 1 and hub.requests("GET cdn") == [VAL] * 5
    assert_sentence(output, VAL, "HTTP 500", "later")


@pytest.mark.parametrize(
    "status, advice", [(404, "REVISION"), (401, "HF_TOKEN"), (403, "HF_TOKEN")]
)
def test_refusals_are_not_retried(hub, worker, tmp_path, status, advice):
    hub.faults["HEAD", VAL] = [status] * 9
    code, output = worker.run(tmp_path, "1")
    assert code == 1 and hub.requests("HEAD hub") == [VAL]
    assert_sentence(output, VAL, f"HTTP {status}", advice)
    assert not list(tmp_path.glob("*.bin"))


def test_file_and_revision_that_the_hub_lacks(hub, worker, tmp_path):
    del hub.files[TRAIN]
    code, output = worker.run(tmp_path, "1")
    assert code == 1 and [path.name for path in tmp_path.glob("*.bin")] == [VAL]
    assert_sentence(output, TRAIN, "HTTP 404")
    code, output = worker.run(tmp_path / "other", "1", REVISION="nowhere")
    assert code == 1
    assert_sentence(output, "nowhere", "HTTP 404", "REVISION")


def test_wrong_shard_from_the_hub(hub, worker, tmp_path):
    hub.files[TRAIN] = shard(1, magic=7)
    code, output = worker.run(tmp_path, "1")
    assert code == 1 and hub.requests("GET cdn") == [VAL, TRAIN, TRAIN]
    assert_sentence(output, TRAIN, "magic 20240520", "found 7")
    assert not (tmp_path / TRAIN).exists()
    assert [entry["name"] for entry in index_of(tmp_path)["shards"]] == [VAL]


def test_bit_flipped_on_the_way(hub, worker, tmp_path):
    hub.faults["GET", "cdn " + TRAIN] = ["flip"]
    code, output = worker.run(tmp_path, "1")
    assert code == 0 and (tmp_path / TRAIN).read_bytes() == hub.files[TRAIN]
    hub.faults["GET", "cdn " + TRAIN] = ["flip", "flip"]
    code, output = worker.run(tmp_path / "other", "1")
    assert code == 1 and not (tmp_path / "other" / TRAIN).exists()
    assert_sentence(output, TRAIN, sha256(hub.files[TRAIN]))


def test_no_network(hub, worker, tmp_path):
    hub.faults["GET", "api"] = ["drop"] * 9
    code, output = worker.run(tmp_path, "1")
    assert code == 3 and len(hub.log) == 5
    assert_sentence(output, "copy the folder", "HF_ENDPOINT", "scripts/quickstart.sh")


def test_offline_mode(hub, tmp_path):
    offline = Worker(hub.endpoint, tmp_path, HF_HUB_OFFLINE="1")
    code, output = offline.run(tmp_path / "empty", "1")
    assert code == 3
    assert_sentence(output, "HF_HUB_OFFLINE", "copy the folder", "scripts/quickstart.sh")
    put(tmp_path / "full", hub, VAL, TRAIN)
    code, output = offline.run(tmp_path / "full", "1")
    offline.close()
    assert code == 0 and "2 skipped without network" in output and "commit unknown" in output
    assert len(index_of(tmp_path / "full")["shards"]) == 2 and hub.log == []


@pytest.mark.parametrize("count", ["0", "104", "-1"])
def test_count_out_of_range(hub, worker, tmp_path, count):
    code, output = worker.run(tmp_path, count)
    assert code == 2 and hub.log == []
    assert_sentence(output, "1 to 103", f"found {count}")


def test_all_shards_without_argument(hub, worker, tmp_path):
    code, output = worker.run(tmp_path, job={"free": 0})
    assert code == 1 and "104 shards" in output


def test_disk_too_small(hub, worker, tmp_path):
    put(tmp_path, hub, VAL)
    code, output = worker.run(
        tmp_path, "2", job={"free": 19_999}
    )  # of 10,000 bytes a shard, as the worker sets it
    assert code == 1 and hub.log == [] and not (tmp_path / TRAIN).exists()
    assert_sentence(output, "2 shards", str(tmp_path), "DATA_DIR")
    code, output = worker.run(tmp_path, "2", job={"free": 20_000})
    assert code == 0, output


def test_folder_behind_a_link(hub, worker, tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "real")
    code, output = worker.run(tmp_path / "link", "1")
    assert code == 1 and hub.log == []
    assert_sentence(output, str(tmp_path / "link"), f"make {tmp_path / 'real'}")
    (tmp_path / "real").mkdir()
    code, output = worker.run(tmp_path / "link", "1")
    assert code == 0 and (tmp_path / "real" / VAL).read_bytes() == hub.files[VAL]
    assert (tmp_path / "link").is_symlink()


def test_folder_that_is_a_file(worker, tmp_path):
    (tmp_path / "file").write_text("")
    code, output = worker.run(tmp_path / "file", "1")
    assert code == 1
    assert_sentence(output, str(tmp_path / "file"), "DATA_DIR")


def test_whole_read_only_folder(hub, worker, tmp_path):
    worker.run(tmp_path, "1")
    (tmp_path / ".fetch.lock").unlink(missing_ok=True)
    before = sorted(tmp_path.iterdir())
    code, output = worker.run(tmp_path, "1", job={"read_only": True})
    assert code == 0, output
    assert sorted(tmp_path.iterdir()) == before


def test_revision_pins_and_a_folder_keeps_its_commit(hub, worker, tmp_path):
    worker.run(tmp_path, "1")
    hub.revisions["main"] = NEWER
    hub.log.clear()
    code, output = worker.run(tmp_path, "2")
    assert code == 0 and all(COMMIT in path for _, host, path, _ in hub.log if host != "cdn")
    code, output = worker.run(tmp_path, "3", REVISION="main")
    assert code == 1 and index_of(tmp_path)["commit"] == COMMIT
    assert_sentence(output, COMMIT, NEWER, "REVISION")
    hub.log.clear()
    code, output = worker.run(
        tmp_path, "2", REVISION=NEWER
    )  # nothing is missing, so the hub is not asked
    assert code == 1 and hub.log == []
    assert_sentence(output, COMMIT, NEWER, "REVISION")
    code, output = worker.run(tmp_path / "other", "1", REVISION="main")
    assert code == 0 and index_of(tmp_path / "other")["commit"] == NEWER
    assert all(f"/resolve/{NEWER}/" in path for _, host, path, _ in hub.log if host == "hub")


def test_index_of_another_dataset_is_kept(hub, worker, tmp_path):
    for text in ('{"source": "package:sympy", "commit": null, "shards": []}', "{", "[]"):
        (tmp_path / "index.json").write_text(text)
        code, output = worker.run(tmp_path, "1")
        assert code == 1 and (tmp_path / "index.json").read_text() == text
        assert_sentence(output, "index.json", REPO)


def test_interrupt(hub, worker, tmp_path):
    hub.faults["GET", "cdn " + TRAIN] = ["stall"]
    worker.start(tmp_path, "1")
    assert hub.stalled.wait(20)
    worker.process.send_signal(signal.SIGINT)
    code, output = worker.result()
    assert code == 130 and "start it again" in output and "Traceback" not in output
    assert [path.name for path in tmp_path.glob("*.bin")] == [VAL] and not list(
        tmp_path.rglob("*.incomplete")
    )
    hub.resume.set()
    assert worker.run(tmp_path, "1")[0] == 0 and (tmp_path / TRAIN).read_bytes() == hub.files[TRAIN]


@pytest.mark.parametrize("fault", [429, "stall"])
def test_a_hub_that_sends_nothing_is_given_up(hub, worker, tmp_path, fault):
    """Also where it asks to come again tomorrow; the next run goes on."""
    hub.faults["GET", "cdn " + TRAIN] = [fault] * 9
    code, output = worker.run(tmp_path, "1", job={"patience": 1.5})
    assert code == 3
    assert_sentence(output, TRAIN, "found nothing for 2 s: start again later, which goes on")
    assert [path.name for path in tmp_path.glob("*.bin")] == [VAL]
    assert not list(tmp_path.rglob("*.incomplete"))
    hub.faults.clear()
    hub.resume.set()
    shutil.rmtree(tmp_path / ".cache")  # a new process would find its locks free
    code, output = worker.run(tmp_path, "1")
    assert code == 0 and (tmp_path / TRAIN).read_bytes() == hub.files[TRAIN], output


def test_an_endpoint_that_is_no_address(hub, worker, tmp_path):
    code, output = worker.run(tmp_path, "1", HF_ENDPOINT="http://[::")
    assert code == 2
    assert_sentence(output, "HF_ENDPOINT=http://[::: expected an address such as https://hugg")


def test_waits_for_another_fetch_into_the_folder(hub, worker, tmp_path):
    worker.run(tmp_path, "1")  # the first run of a process spends seconds on imports
    (tmp_path / TRAIN).unlink()
    hub.log.clear()
    with FileLock(tmp_path / ".fetch.lock"):
        worker.start(tmp_path, "1")
        assert not worker.answers_within(0.5) and hub.log == []
    assert worker.result()[0] == 0


def test_token_goes_to_the_hub_alone(hub, worker, tmp_path):
    code, output = worker.run(tmp_path, "1", HF_TOKEN=TOKEN)
    assert code == 0, output
    sent = {
        host: {headers.get("authorization") for _, kind, _, headers in hub.log if kind == host}
        for host in ("api", "hub", "cdn")
    }
    assert sent == {"api": {f"Bearer {TOKEN}"}, "hub": {f"Bearer {TOKEN}"}, "cdn": {None}}
    assert TOKEN not in output
    assert not any(
        TOKEN.encode() in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()
    )
    assert "%|" not in output  # no progress bar into a pipe

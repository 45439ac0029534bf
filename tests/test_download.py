"""Statements about `data/download.py`, against a server on this machine that cuts, forges and
forgets as the test asks."""

import hashlib
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from helpers import ROOT

from data import download, tasks

MATH, GSM8K = "ft-training_set/math_10k.json", "dataset/gsm8k/test.json"


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        file, wanted, server = self.path[1:], self.headers["Range"], self.server
        server.requests.append((file, wanted))
        content = server.content.get(file)
        if content is None:
            return self.send_error(404)
        start = int(re.fullmatch(r"bytes=(\d+)-", wanted)[1]) if wanted and server.ranges else 0
        if start and start >= len(content):
            return self.send_error(416)
        cut = server.cut.get(file, len(content))
        self.send_response(206 if start else 200)
        if file in server.chunked:
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            self.wfile.write(
                b"%x\r\n%s\r\n" % (cut - start, content[start:cut])
                + b"0\r\n\r\n" * (cut == len(content))
            )
        else:
            self.send_header("Content-Length", str(len(content) - start))
            self.end_headers()
            self.wfile.write(content[start:cut])
        if file in server.silent:
            server.closing.wait(10)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A server with made-up files, whose ids are in place of the real ones; the working directory
    is empty."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.content = {
        file: f'["{file}"]'.encode() * (5000 + i) for i, file in enumerate(download.BLOB_IDS)
    }
    server.requests, server.ranges, server.closing = [], True, threading.Event()
    server.cut, server.chunked, server.silent = {}, set(), set()
    server.url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(
        download, "BLOB_IDS", {file: git_id(content) for file, content in server.content.items()}
    )
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.chdir(tmp_path)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}).start()
    yield server
    server.closing.set()
    server.shutdown()
    server.server_close()


def git_id(content):
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()


def run(server, capsys, *arguments):
    """(exit status, lines of stdout, lines of stderr) of the script."""
    status = 0
    try:
        download.run(["--url", server.url, *arguments])
    except SystemExit as stopped:
        status = stopped.code
    printed = capsys.readouterr()
    return status, printed.out.splitlines(), printed.err.splitlines()


def succeeds(server, capsys):
    """The same command again gets all that is missing."""
    assert run(server, capsys, "arithmetic")[0] == 0
    assert_complete(server, "arithmetic")


def files_in(directory):
    return {
        path.relative_to(directory).as_posix()
        for path in Path(directory).rglob("*")
        if path.is_file()
    }


def assert_complete(server, task, directory="LLM-Adapters"):
    """The directory holds the task's files, each with its content, and nothing else."""
    assert files_in(directory) == set(download.files_of(task))
    for file in download.files_of(task):
        assert Path(directory, file).read_bytes() == server.content[file]


def fails(server, capsys, file, what):
    """Exit status 1, one line about the one file that failed and why, one about what to do; the
    others are there."""
    status, out, err = run(server, capsys, "arithmetic")
    assert status == 1 and len(out) == 7 and not any("next" in line for line in out)
    assert err[0].startswith(f"download.py: {file}: ") and what in err[0]
    assert err[1:] == [
        "download.py: 1 of 8 files failed; the same command again resumes what is missing"
    ]
    assert {*download.files_of("arithmetic")} - files_in("LLM-Adapters") <= {file}


def assert_part(server, count):
    """So many bytes have come."""
    part = Path("LLM-Adapters", f"{MATH}.partial")
    assert part.read_bytes() == server.content[MATH][:count] and MATH not in files_in(
        "LLM-Adapters"
    )


# --- which files ---


def test_the_table_names_every_file_of_every_task_that_is_fetched():
    assert download.FETCHED == ["arithmetic", "commonsense"]
    train_files = [*(tasks.TRAIN_FILES[task] for task in download.FETCHED), "commonsense_170k.json"]
    names = [name for task in download.FETCHED for name in tasks.TASKS[task]]
    assert len(names) == 15
    paths = [f"ft-training_set/{name}" for name in train_files] + [
        f"dataset/{name}/test.json" for name in names
    ]
    assert set(download.BLOB_IDS) == set(paths)
    assert len(set(download.BLOB_IDS.values())) == len(download.BLOB_IDS) == 18
    assert all(re.fullmatch("[0-9a-f]{40}", blob_id) for blob_id in download.BLOB_IDS.values())
    assert re.fullmatch(
        r"https://raw\.githubusercontent\.com/AGI-Edgerunners/LLM-Adapters/[0-9a-f]{40}",
        download.URL,
    )


def test_a_blob_id_is_what_git_says(tmp_path):
    (tmp_path / "file").write_bytes(b"hello\n")
    assert (
        download.blob_id(tmp_path / "file")
        == git_id(b"hello\n")
        == "ce013625030ba8dba906f756967f9e9ca394464a"
    )


@pytest.mark.parametrize("task, count", [("arithmetic", 8), ("commonsense", 9), ("all", 18)])
def test_a_task_is_its_training_file_and_its_test_sets(server, capsys, task, count):
    following = ["arithmetic", "commonsense"] if task == "all" else [task]
    status, out, err = run(server, capsys, task)
    assert (status, err) == (0, [])
    assert_complete(server, task)
    assert len(files_in("LLM-Adapters")) == count and len(server.requests) == count
    for line, file in zip(out, download.files_of(task)):
        assert line.split() == [file, f"{len(server.content[file]):,}", "bytes"]
    assert out[count:] == [
        f"next: python train.py --ckpt CHECKPOINT --task {name}" for name in following
    ]


def test_the_files_lie_where_the_tasks_look_for_them(server, capsys):
    example = b'[{"instruction": "1 + 1?", "input": "", "output": "2", "answer": "2"}]'
    server.content = {
        file: example.replace(b'"2"}', b'"A"}') if "AQuA" in file else example
        for file in server.content
    }
    download.BLOB_IDS.update({file: git_id(content) for file, content in server.content.items()})
    run(server, capsys, "arithmetic")
    for name in tasks.TASKS["arithmetic"]:
        assert len(tasks.test_examples(name, tasks.DATA_DIR)) == 1
    assert len(tasks.train_examples("arithmetic", tasks.DATA_DIR)) == 1


def test_another_directory_is_named_in_what_to_type_next(server, capsys):
    status, out, _ = run(server, capsys, "arithmetic", "--dir", "my data")
    assert status == 0 and out[-1].endswith("--task arithmetic --data-dir 'my data'")
    assert_complete(server, "arithmetic", "my data")
    assert list(Path().iterdir()) == [Path("my data")]


# --- what is there already ---


def test_a_second_run_downloads_nothing(server, capsys):
    succeeds(server, capsys)
    server.requests.clear()
    status, out, err = run(server, capsys, "arithmetic")
    assert (status, err, server.requests) == (0, [], []) and sum(
        "already there" in line for line in out
    ) == 8
    assert_complete(server, "arithmetic")


def test_a_file_with_other_content_is_left_alone_and_reported(server, capsys):
    mine = Path("LLM-Adapters", GSM8K)
    mine.parent.mkdir(parents=True)
    mine.write_bytes(b"mine")
    fails(
        server,
        capsys,
        GSM8K,
        f"is there, with blob id {git_id(b'mine')}: delete it, or choose another --dir",
    )
    assert mine.read_bytes() == b"mine" and GSM8K not in dict(server.requests)


# --- what goes wrong on the way ---


def test_a_corrupted_file_never_takes_its_name(server, capsys):
    right = server.content[GSM8K]
    server.content[GSM8K] = forged = right[:-1] + b"!"
    fails(server, capsys, GSM8K, f"expected blob id {git_id(right)}, found {git_id(forged)}")
    assert files_in("LLM-Adapters") == set(download.files_of("arithmetic")) - {GSM8K}
    server.content[GSM8K] = right
    succeeds(server, capsys)


def test_a_file_that_the_server_lacks_does_not_stop_the_others(server, capsys):
    del server.content[GSM8K]
    fails(server, capsys, GSM8K, "404")
    assert files_in("LLM-Adapters") == set(download.files_of("arithmetic")) - {GSM8K}


def test_a_cut_connection_leaves_a_part_that_the_next_runs_complete(server, capsys):
    cuts = 100, 200, 150000  # bytes
    size = len(server.content[MATH])
    for server.cut[MATH] in cuts:
        fails(server, capsys, MATH, f"cut after {server.cut[MATH]:,} of {size:,} bytes")
        assert_part(server, server.cut[MATH])
    server.cut.clear()
    succeeds(server, capsys)
    assert [wanted for file, wanted in server.requests if file == MATH] == [
        None,
        *(f"bytes={n}-" for n in cuts),
    ]
    assert len(server.requests) == 8 + len(cuts)  # what is there is not asked for again


def test_a_cut_is_noticed_where_the_length_was_never_told(server, capsys):
    server.chunked |= {MATH, GSM8K}
    server.cut[MATH] = 1000
    fails(server, capsys, MATH, "IncompleteRead")
    assert_part(server, 1000)
    server.cut.clear()
    succeeds(server, capsys)


def test_silence_is_a_failure_that_keeps_what_has_come(server, capsys, monkeypatch):
    monkeypatch.setattr(download, "TIMEOUT", 0.3)
    server.cut[MATH] = 1000
    server.silent.add(MATH)
    fails(server, capsys, MATH, "timed out")
    assert_part(server, 1000)


def leave_part(content):
    partial = Path("LLM-Adapters", f"{MATH}.partial")
    partial.parent.mkdir(parents=True)
    partial.write_bytes(content)


def test_a_server_without_ranges_starts_over(server, capsys):
    server.ranges = False
    leave_part(server.content[MATH][:1000])
    succeeds(server, capsys)
    assert server.requests[0] == (MATH, "bytes=1000-")


def test_a_part_with_nothing_left_to_add_starts_over(server, capsys):
    size = len(server.content[MATH])
    leave_part(b"x" * size)
    succeeds(server, capsys)
    assert server.requests[:2] == [(MATH, f"bytes={size}-"), (MATH, None)]


def test_no_room_is_one_line_a_file(server, capsys):
    Path("a file").write_text("")
    status, _, err = run(server, capsys, "arithmetic", "--dir=a file")
    assert status == 1 and len(err) == 9 and "8 of 8 files failed" in err[-1]
    for line, file in zip(err, download.files_of("arithmetic")):
        assert line.startswith(f"download.py: {file}: ") and "a file" in line


def test_no_server_is_one_line(server, capsys):
    status, out, err = run(server, capsys, "all", "--url=http://127.0.0.1:1")
    assert (status, out, len(err)) == (1, [], 1) and "urlopen" not in err[0]
    assert (
        err[0].startswith("download.py: http://127.0.0.1:1 cannot be reached (")
        and "a network?" in err[0]
    )
    assert not list(Path().iterdir())


# --- a user's mistakes ---

URL_MISTAKE = "--url must begin with https:// or http://, not 'ftp://x'"


@pytest.mark.parametrize(
    "arguments, message", [("algebra", "invalid choice"), ("all --url ftp://x", URL_MISTAKE)]
)
def test_a_mistake_is_one_line_and_nothing_is_left_behind(server, capsys, arguments, message):
    status, _, err = run(server, capsys, *arguments.split())
    assert (
        status == 2 and len(err) == 1 and err[0].startswith("download.py: ") and message in err[0]
    )
    assert not list(Path().iterdir())


def test_stopping_it_by_hand_is_one_line(server, capsys, monkeypatch):
    def stop(path):
        raise KeyboardInterrupt

    monkeypatch.setattr(download, "blob_id", stop)
    status, _, err = run(server, capsys, "arithmetic")
    assert status == 130 and err == [
        "download.py: stopped: the same command again goes on from here"
    ]
    assert files_in("LLM-Adapters") == {f"{MATH}.partial"}


def test_it_runs_as_a_script_from_anywhere(tmp_path):
    command = [sys.executable, ROOT / "data" / "download.py", "--help"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (
        done.returncode == 0 and "{arithmetic,commonsense,all}" in done.stdout and not done.stderr
    )

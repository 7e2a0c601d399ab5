"""What callers hand to the decoder, looked at before anything is computed: what does not fit is named in one line."""

from __future__ import annotations

import torch
from torch import Tensor

from tandem.spec.errors import SpecError


def check_ids(name: str, ids: object, vocab_size: int) -> None:
    """Raise a SpecError unless these are token ids [batch, time], at least one."""
    if not isinstance(ids, Tensor):
        raise SpecError(f"{name} is a {type(ids).__name__}: must be a tensor of integers [batch, time]")
    if ids.dim() != 2 or ids.dtype not in (torch.int64, torch.int32):
        raise SpecError(f"{name} is {ids.dtype} of shape {tuple(ids.shape)}: must be int64 or int32 [batch, time]")
    if not ids.numel():
        raise SpecError(f"{name} has shape {tuple(ids.shape)}: needs at least one token")
    if ids.device.type == "cpu":
        low, high = ids.aminmax()
        if low < 0 or high >= vocab_size:
            raise SpecError(f"{name} holds {int(low) if low < 0 else int(high)}: must be from 0 to {vocab_size - 1}")


def check_next_ids(ids: object, rows: int) -> None:
    """Raise a SpecError unless this is one token for each of `rows` sequences, [batch] or [batch, 1]."""
    if not isinstance(ids, Tensor):
        raise SpecError(f"next_ids is a {type(ids).__name__}: must be a tensor of integers [batch] or [batch, 1]")
    if ids.dim() not in (1, 2) or (ids.dim() == 2 and ids.shape[1] != 1):
        raise SpecError(f"next_ids has shape {tuple(ids.shape)}: must be [batch] or [batch, 1]")
    if len(ids) != rows:
        raise SpecError(f"next_ids has {len(ids)} rows: the state has {rows} sequences")


def check_beside(name: str, given: object, ids: Tensor) -> None:
    """Raise a SpecError unless this is None or a tensor of the shape of `input_ids`."""
    if given is not None and (not isinstance(given, Tensor) or given.shape != ids.shape):
        found = f"has shape {tuple(given.shape)}" if isinstance(given, Tensor) else f"is a {type(given).__name__}"
        raise SpecError(f"{name} {found}: must be a tensor of shape {tuple(ids.shape)}, as input_ids")


def known_device(device: torch.device | str) -> torch.device:
    """The device. Raises SpecError for a name that is none and for a GPU that is not there."""
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError):
        raise SpecError(f"device={device!r}: must be a device of torch, such as 'cpu' or 'cuda'") from None
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise SpecError(f"device={str(found)!r}: torch finds {torch.cuda.device_count()} GPUs here; 'cpu' will do")
    return found

"""What callers give that does not fit: one line that names the argument, as users get it, without the tests' type checks."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from specs import build

from tandem.model.hybrid import Decoder
from tandem.model.load import load_model
from tandem.spec.errors import SpecError
from tandem.spec.mixers import Attention, Mamba2
from tandem.spec.model import ModelSpec

SPEC = ModelSpec(
    name="tiny",
    vocab_size=9,
    hidden_size=8,
    layers=(Mamba2(num_heads=2, head_dim=4, state_dim=3, groups=1), Attention(num_heads=2, num_kv_heads=1, head_dim=4)),
)
EXPECTED = {
    "model([[1, 2]])": "input_ids is a list: must be a tensor of integers [batch, time]",
    "model(ids[0])": "input_ids is torch.int64 of shape (3,): must be int64 or int32 [batch, time]",
    "model(ids.float())": "input_ids is torch.float32 of shape (2, 3): must be int64 or int32 [batch, time]",
    "model(ids.bool())": "input_ids is torch.bool of shape (2, 3): must be int64 or int32 [batch, time]",
    "model(ids, attention_mask=mask[:, :2])": "attention_mask has shape (2, 2): must be a tensor of shape (2, 3), as input_ids",
    "model(ids, attention_mask=[[1]])": "attention_mask is a list: must be a tensor of shape (2, 3), as input_ids",
    "model(ids, documents=mask[:1])": "documents has shape (1, 3): must be a tensor of shape (2, 3), as input_ids",
    "model.prefill(ids[0])": "input_ids is torch.int64 of shape (3,): must be int64 or int32 [batch, time]",
    "model.prefill(ids, attention_mask=[1])": "attention_mask is a list: must be a tensor of shape (2, 3), as input_ids",
    "Decoder(model.spec, dtype=torch.int8)": "dtype=torch.int8: must be torch.float32, torch.float16 or torch.bfloat16",
    "model.prefill(ids, logits_to_keep=-1)": "logits_to_keep=-1: must be a whole number from 0 to 1,000,000,000",
    "model.prefill(ids[:0])": "input_ids has shape (0, 3): needs at least one token",
    "model.decode([1, 2], state)": "next_ids is a list: must be a tensor of integers [batch] or [batch, 1]",
    "model.decode(ids, state)": "next_ids has shape (2, 3): must be [batch] or [batch, 1]",
    "model.decode(ids[0, 0], state)": "next_ids has shape (): must be [batch] or [batch, 1]",
    "model.decode(ids[:, 0].float(), state)": "next_ids is torch.float32 of shape (2, 1): must be int64 or int32 [batch, time]",
    "model.hidden_states(ids[0], state=state)": "input_ids is torch.int64 of shape (3,): must be int64 or int32 [batch, time]",
}
PROGRAM = """
import sys
import torch
from tandem.model.hybrid import Decoder
from tandem.spec.errors import SpecError
from tandem.spec.model import ModelSpec

model = Decoder(ModelSpec.from_json({spec!r})).eval()
ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
state = model.prefill(ids)[1]
before = state.to_bytes()
for call in {calls!r}:
    try:
        eval(call)
        print("taken")
    except SpecError as refused:
        print(refused)
assert state.to_bytes() == before
"""


def test_what_does_not_fit_is_named_in_one_line() -> None:
    program = PROGRAM.format(spec=SPEC.to_json(), calls=list(EXPECTED))
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stdout.splitlines() == list(EXPECTED.values()), done.stderr


@pytest.mark.parametrize("device", ["cuda", "cuda:7", "gpu"])
def test_a_device_that_is_not_there_is_refused(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    for call in (lambda: Decoder(SPEC, device=device), lambda: load_model("anything", device=device)):
        with pytest.raises(SpecError, match=f"^device='{device}': [^\\n]*$"):
            call()


def test_int32_ids_are_ids() -> None:
    model, ids = build(SPEC), torch.tensor([[1, 2, 3], [4, 5, 6]])
    assert torch.equal(model(ids.int()), model(ids))
    _, state = model.prefill(ids.int())
    again = state.clone()
    assert torch.equal(model.decode(ids[:, 0].int(), state)[0], model.decode(ids[:, 0], again)[0])

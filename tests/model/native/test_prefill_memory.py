"""Memory of a long prefill: the state, and the activations of one piece, however long the prompt."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tandem.model.hybrid import PREFILL_TOKENS
from tandem.model.native.build import available
from tandem.spec.mixers import Mamba2

HIDDEN = 256
MIXER = Mamba2(num_heads=16, head_dim=32, state_dim=64, groups=8)

PROGRAM = f"""
import resource, torch
from tandem.model.hybrid import Decoder
from tandem.spec.mixers import MLP, Attention, Mamba2
from tandem.spec.model import ModelSpec

mamba = Mamba2(num_heads=16, head_dim=32, state_dim=64, groups=8)
layers = (mamba, MLP(ffn_size=1024, gated=False), Attention(num_heads=4, num_kv_heads=2, head_dim=32))
model = Decoder(ModelSpec(name="long", vocab_size=512, hidden_size={HIDDEN}, layers=layers)).eval()

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

with torch.no_grad():
    model.prefill(torch.ones(1, 64, dtype=torch.int64))
    before = peak()
    _, state = model.prefill(torch.ones(1, 32768, dtype=torch.int64))
print(peak() - before, state.nbytes)
"""


@pytest.mark.slow
@pytest.mark.skipif(available() is not True, reason="no C compiler")
def test_prefill_of_32k_tokens_holds_the_state_and_one_piece() -> None:
    """Activations of a piece: for each of its tokens the residual stream, a layer's input and its output, and the numbers
    inside the widest layer, here Mamba-2's: in_proj's output, x, B and C after the convolution, the input of out_proj.

    With the C library's own settings: `return_freed_memory` keeps its holes small.
    """
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=True)
    grown, state = (int(word) for word in done.stdout.split())
    piece = 4 * PREFILL_TOKENS * (3 * HIDDEN + MIXER.in_width + MIXER.conv_width + MIXER.d_inner)
    assert grown <= state + 1.2 * piece, (grown, state, piece)

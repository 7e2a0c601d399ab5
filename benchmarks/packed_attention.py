"""Attention of packed documents on a CPU: one call a document (what the decoder does) against a mask over the whole row.

    OMP_NUM_THREADS=1 python benchmarks/packed_attention.py

Forward and backward pass at the sizes of nano-hybrid (6 heads of 32, 2 of keys and values), taking turns; medians.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial

import torch
from fp8_error import in_turns
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from tandem.model.attention import attend_each

TOKENS = 4096
"""Of a step: rows of 512 come eight at a time, rows of 2,048 two."""


def masked(q: Tensor, k: Tensor, v: Tensor, documents: Tensor) -> Tensor:
    """The peer: torch's attention with a mask that hides other documents and later tokens."""
    same = documents[:, :, None] == documents[:, None, :]
    mask = (same & torch.ones_like(same[0]).tril())[:, None]
    return scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)


def ways_of(length: int, document: int) -> dict[str, Callable[[], Tensor]]:
    rows = TOKENS // length
    q, k, v = (torch.randn(rows, heads, length, 32, requires_grad=True) for heads in (6, 2, 2))
    documents = (torch.arange(length) // document).expand(rows, length)
    lengths = [min(document, length - begin) for begin in range(0, length, document)] * rows
    return {"each": lambda: attend_each(q, k, v, lengths), "mask": lambda: masked(q, k, v, documents)}


def both_passes(way: Callable[[], Tensor]) -> None:
    way().sum().backward()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--document", type=int, default=100, help="Tokens of a document.")
    options = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, documents of {options.document} tokens")
    for length in (512, 2048):
        ways = ways_of(length, options.document)
        torch.testing.assert_close(ways["each"](), ways["mask"](), rtol=1e-4, atol=1e-5)
        took = in_turns({name: partial(both_passes, way) for name, way in ways.items()}, options.rounds)
        print(f"rows of {length:,}: a mask takes {took['mask'] / took['each']:.1f} times as long")


if __name__ == "__main__":
    main()

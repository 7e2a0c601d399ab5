"""What tests of the decoder share: one thread, and both ways of computing on CPUs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tandem.model.hybrid import Decoder
from tandem.model.native import tasks

torch.set_num_threads(1)  # these models are tiny, and two threads on a busy machine wait for each other


@pytest.fixture(scope="module", params=["native", "torch"])
def arithmetic(request: pytest.FixtureRequest) -> Iterator[None]:
    """With the C code, where there is a compiler, and with torch alone."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "torch":
            patch.setattr(tasks, "usable", lambda *tensors: False)
            patch.setattr(Decoder, "_native_program", lambda self: None)
        yield

"""One thread: these models are tiny, and two threads on a busy machine wait for each other."""

from __future__ import annotations

import torch

torch.set_num_threads(1)

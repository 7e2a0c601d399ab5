"""The releases whose options the exported files use; `tools/read_serving_flags.py` reads those out of the published wheels."""

from __future__ import annotations

VLLM = "0.33.0"
VLLM_ROUTER = "0.1.17"
SGLANG = "0.5.23"
SGLANG_ROUTER = "0.3.2"
DYNAMO = "1.6.1"
RAY = "2.60.0"
AIPERF = "0.13.0"
GUIDELLM = "0.8.1"
INSIDE_DYNAMO = {"vllm": "0.31.0", "sglang": "0.5.21"}
"""The engines that this release of Dynamo demands: their options are older than those of the engines' own releases."""
INSIDE_RAY = {"vllm": "0.29.0"}
"""The engine that this release of Ray demands."""

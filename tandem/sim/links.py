"""Links between workers: states go out of a node and into another, one after another on each link."""

from __future__ import annotations


class Links:
    """FIFO links, one out of and one into each node of `workers_per_link` workers.

    A state leaves layer by layer while later layers are still prefilled (paper B, section 3.2), so its transfer may begin after
    the first layer, and its last layer's share cannot leave before the prefill's end; what a busy link delays comes on top.
    """

    def __init__(self, workers_per_link: int) -> None:
        self._share = workers_per_link
        self._out_free_s: dict[int, float] = {}
        self._in_free_s: dict[int, float] = {}
        self.bytes = 0.0

    def send(
        self, source: int, target: int, state_bytes: float, bytes_per_s: float, start_s: float, end_s: float, last_layer: float
    ) -> float:
        """When the state of a prefill from `start_s` to `end_s` on worker `source` is on worker `target`, in seconds."""
        out, into = source // self._share, target // self._share
        seconds = state_bytes / bytes_per_s
        free_s = max(self._out_free_s.get(out, 0.0), self._in_free_s.get(into, 0.0))
        begin_s = max(start_s + (end_s - start_s) * last_layer, free_s)
        there_s = max(end_s + seconds * last_layer, begin_s + seconds)
        self._out_free_s[out] = self._in_free_s[into] = there_s
        self.bytes += state_bytes
        return there_s

"""Feed-forward mixers: MLP (gated SiLU, or squared ReLU without a gate) and mixture of experts with a sigmoid router."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from tandem.model.kernels import squared_relu
from tandem.model.linear import Linear
from tandem.model.span import Span
from tandem.spec.model import MLP, MoE


class MLPMixer(nn.Module):
    """down(silu(gate(x)) * up(x)) with a gate, else down(relu(up(x))^2)."""

    def __init__(self, m: MLP, hidden: int) -> None:
        super().__init__()
        self.gate_proj = Linear(hidden, m.ffn_size, bias=m.bias) if m.gated else None
        self.up_proj = Linear(hidden, m.ffn_size, bias=m.bias)
        self.down_proj = Linear(m.ffn_size, hidden, bias=m.bias)

    def forward(self, x: Float[Tensor, "*b d"], span: Span | None = None, state: None = None) -> Float[Tensor, "*b d"]:
        """Every token on its own; span and state are those of all mixers and not used."""
        if self.gate_proj is None:
            return self.down_proj(squared_relu(self.up_proj(x)))
        return self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))


class Router(nn.Module):
    """Scores of the experts, and which ones a token goes to (DeepSeek-V3's rule, which Nemotron-3 shares)."""

    def __init__(self, m: MoE, hidden: int) -> None:
        super().__init__()
        self.m = m
        self.weight = nn.Parameter(torch.empty(m.num_experts, hidden))
        self.e_score_correction_bias: Tensor
        self.register_buffer("e_score_correction_bias", torch.zeros(m.num_experts, dtype=torch.float32))

    def forward(self, x: Float[Tensor, "tokens d"]) -> tuple[Int[Tensor, "tokens k"], Float[Tensor, "tokens k"]]:
        """Chosen experts and their weights, fp32. Chosen by score plus correction, weighed by score alone."""
        m = self.m
        scores = functional.linear(x.float(), self.weight.float()).sigmoid()
        ranked = scores + self.e_score_correction_bias
        if m.groups > 1:
            by_group = ranked.unflatten(-1, (m.groups, -1))
            best = by_group.topk(min(2, by_group.shape[-1]), -1).values.sum(-1)
            kept = torch.zeros_like(best).scatter(-1, best.topk(m.top_groups, -1, sorted=False).indices, 1.0)
            ranked = by_group.masked_fill(kept[..., None] == 0, -torch.inf).flatten(-2)
        chosen = ranked.topk(m.top_k, -1, sorted=False).indices
        weights = scores.gather(-1, chosen)
        if m.normalise:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return chosen, weights * m.score_scale


class Experts(nn.Module):
    """Weights of all routed experts, stacked: up [experts, ffn, width], down [experts, width, ffn]."""

    def __init__(self, m: MoE, width: int) -> None:
        super().__init__()
        self.up_proj = nn.Parameter(torch.empty(m.num_experts, m.ffn_size, width))
        self.down_proj = nn.Parameter(torch.empty(m.num_experts, width, m.ffn_size))

    def forward(
        self, x: Float[Tensor, "tokens w"], chosen: Int[Tensor, "tokens k"], weights: Float[Tensor, "tokens k"]
    ) -> Float[Tensor, "tokens w"]:
        """Weighted sum of the chosen experts of each token."""
        out = torch.zeros_like(x)
        for expert in chosen.unique().tolist():
            token, place = (chosen == expert).nonzero(as_tuple=True)
            up = functional.linear(x[token], self.up_proj[expert].to(x.dtype))
            down = functional.linear(squared_relu(up), self.down_proj[expert].to(x.dtype))
            out = out.index_add(0, token, down * weights[token, place, None].to(x.dtype))
        return out


class SharedExpert(nn.Module):
    """The expert that every token uses."""

    def __init__(self, hidden: int, ffn_size: int) -> None:
        super().__init__()
        self.up_proj = Linear(hidden, ffn_size, bias=False)
        self.down_proj = Linear(ffn_size, hidden, bias=False)

    def forward(self, x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b d"]:
        """down(relu(up(x))^2)."""
        return self.down_proj(squared_relu(self.up_proj(x)))


class MoEMixer(nn.Module):
    """Routed experts, by way of a narrower latent where the spec has one, plus the shared expert."""

    def __init__(self, m: MoE, hidden: int) -> None:
        super().__init__()
        self.gate = Router(m, hidden)
        self.experts = Experts(m, m.expert_width(hidden))
        self.shared_experts = SharedExpert(hidden, m.shared_ffn_size) if m.shared_ffn_size else None
        self.fc1_latent_proj = Linear(hidden, m.latent_size, bias=False) if m.latent_size else None
        self.fc2_latent_proj = Linear(m.latent_size, hidden, bias=False) if m.latent_size else None

    def forward(self, x: Float[Tensor, "b t d"], span: Span | None = None, state: None = None) -> Float[Tensor, "b t d"]:
        """Every token on its own; span and state are those of all mixers and not used."""
        tokens = x.flatten(0, 1)
        chosen, weights = self.gate(tokens)
        inside = tokens if self.fc1_latent_proj is None else self.fc1_latent_proj(tokens)
        routed = self.experts(inside, chosen, weights)
        routed = routed if self.fc2_latent_proj is None else self.fc2_latent_proj(routed)
        routed = routed.view_as(x)
        return routed if self.shared_experts is None else routed + self.shared_experts(x)

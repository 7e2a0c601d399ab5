from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from compress_cases import HYBRID, LLAMA, samples, shaken
from torch import Tensor
from torch.nn import functional

from tandem.compress.calibration import Calibration, Scoring
from tandem.compress.depth import DepthScores, candidates_of, score_depth
from tandem.compress.layers import LoadedLayers, StreamedLayers
from tandem.compress.streams import working_bytes
from tandem.compress.width import WidthScores, score_width
from tandem.model.hybrid import Decoder, Layer
from tandem.model.load import load_model, save_model
from tandem.spec.errors import SpecError
from tandem.spec.model import Attention, ModelSpec
from tandem.train.data.packing import IGNORED
from tandem.train.ranks import Ranks

ROOM = (6 + 2) * 24 * 32 * 4 + working_bytes(HYBRID, 24)
"""Bytes beside the weights in which one sample at a time goes through the layers."""


def without(decoder: Decoder, gone: tuple[int, ...]) -> Decoder:
    left = tuple(i for i in range(len(decoder.spec.layers)) if i not in gone)
    other = Decoder(replace(decoder.spec, layers=tuple(decoder.spec.layers[i] for i in left)), device="meta")
    state = {name: value for name, value in decoder.state_dict().items() if ".layers." not in name}
    for new, old in enumerate(left):
        prefix = f"backbone.layers.{old}."
        state |= {
            name.replace(prefix, f"backbone.layers.{new}."): value
            for name, value in decoder.state_dict().items()
            if name.startswith(prefix)
        }
    other.load_state_dict(state, assign=True)
    return other


@torch.no_grad()
def logits(decoder: Decoder, given: Calibration) -> Tensor:
    return decoder(given.input_ids, documents=given.documents).double()


def packed() -> Calibration:
    """Documents packed into rows; some tokens are not learned."""
    plain = samples(HYBRID)
    documents = torch.arange(24).div(7, rounding_mode="floor").expand(3, -1)
    return Calibration(
        input_ids=plain.input_ids, labels=plain.labels.masked_fill(plain.input_ids < 9, IGNORED), documents=documents
    )


@pytest.mark.parametrize("given", [samples(HYBRID), packed()])
def test_scores_of_layers_are_those_of_models_without_them(given: Calibration) -> None:
    decoder = shaken(HYBRID)
    found = score_depth(LoadedLayers(decoder), given, drop=2, metric="logit-mse")
    full = logits(decoder, given)
    for gone, scores in zip([(), found.order[:1]], found.rounds, strict=True):
        assert [one.layer for one in scores] == [i for i in range(6) if i not in gone]
        for one in scores:
            other = without(decoder, (*gone, one.layer))
            out = logits(other, given)
            assert one.logit_mse == pytest.approx((out - full).square().mean().item(), rel=1e-4)
            assert one.relative_mse == pytest.approx(((out - full).square().sum() / full.square().sum()).item(), rel=1e-4)
            nll = functional.cross_entropy(out.flatten(0, 1), given.labels.flatten(), ignore_index=IGNORED)
            assert one.perplexity == pytest.approx(nll.exp().item(), rel=1e-4)
            hidden = [m.hidden_states(given.input_ids, documents=given.documents).detach().double() for m in (other, decoder)]
            assert one.hidden_mse == pytest.approx((hidden[0] - hidden[1]).square().mean().item(), rel=1e-4)
        assert found.order[len(gone)] == min(scores, key=lambda one: one.logit_mse).layer
    nll = functional.cross_entropy(full.flatten(0, 1), given.labels.flatten(), ignore_index=IGNORED)
    assert found.perplexity == pytest.approx(nll.exp().item(), rel=1e-4)


def test_greedy_is_as_good_as_every_pair_here() -> None:
    """On this model the two layers that go one after the other are the pair that is missed least of all pairs."""
    decoder, given = shaken(HYBRID), samples(HYBRID)
    full = logits(decoder, given)
    worth = {
        pair: (logits(without(decoder, pair), given) - full).square().mean().item()
        for pair in itertools.combinations(range(6), 2)
    }
    found = score_depth(LoadedLayers(decoder), given, drop=2)
    assert tuple(sorted(found.order)) == min(worth, key=lambda pair: worth[pair])


def test_block_influence_is_the_angle_that_a_layer_turns() -> None:
    decoder, given, seen = shaken(HYBRID), samples(HYBRID), []
    for layer in decoder.backbone.layers:
        layer.register_forward_hook(lambda _, ins, out: seen.append((ins[0].detach(), out.detach())))
    logits(decoder, given)
    expected = [1 - functional.cosine_similarity(a, b, -1).mean().item() for a, b in seen]
    found = score_depth(LoadedLayers(decoder), given, drop=3, metric="block-influence")
    assert [one.block_influence for one in found.rounds[0]] == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert len(found.rounds) == 1
    assert list(found.order) == sorted(range(6), key=lambda i: expected[i])[:3]


def test_attention_layers_remain_as_many_as_are_asked_for() -> None:
    spec = replace(HYBRID, layers=(*HYBRID.layers, HYBRID.layers[2], HYBRID.layers[1]))
    decoder, given = shaken(spec), samples(spec, rows=1, time=8)
    for attention in (0, 1, 2):
        found = score_depth(LoadedLayers(decoder), given, drop=3, attention=attention)
        kept = [spec.layers[i] for i in found.kept(8)]
        assert sum(isinstance(layer, Attention) for layer in kept) == attention
        assert len(kept) == 5
    assert candidates_of(spec, (0,), 2, 1) == (2, 6)
    assert found.kept(8, 1) == tuple(i for i in range(8) if i != found.order[0])


@torch.no_grad()
def test_scores_of_units_are_the_formula() -> None:
    decoder, given = shaken(HYBRID), samples(HYBRID)
    seen: dict[str, Tensor] = {}
    for i, layer in enumerate(decoder.backbone.layers):
        for name, module in layer.named_modules():
            if name in ("norm", "mixer.in_proj", "mixer.down_proj", "mixer.o_proj", "mixer.experts", "mixer.gate"):
                module.register_forward_hook(
                    lambda _, ins, out, name=f"{i}.{name}": seen.update({name + ".in": ins, name + ".out": out})
                )
    decoder.backbone.norm_f.register_forward_hook(lambda _, ins, out: seen.update({"final": out}))
    logits(decoder, given)
    found = score_width(LoadedLayers(decoder), given)

    def length(values: Tensor) -> Tensor:
        return values.double().abs().mean(1).square().sum(0).sqrt()

    sites = [*(seen[f"{i}.norm.out"] for i in range(6)), seen["final"]]
    assert torch.allclose(found.hidden, torch.stack([length(site) for site in sites]))
    assert torch.allclose(found.ffn[1], length(seen["1.mixer.down_proj.in"][0]))
    x = seen["0.mixer.in_proj.out"][..., 32:64].unflatten(-1, (4, 8))
    assert torch.allclose(found.mamba[0], length(x))
    heads = seen["2.mixer.o_proj.in"][0].unflatten(-1, (4, 8)).norm(dim=-1)
    assert torch.allclose(found.attention[2], length(heads))
    inside, chosen, weights = seen["4.mixer.experts.in"]
    experts = decoder.backbone.layers[4].mixer.experts
    for e in range(6):
        up = functional.relu(inside @ experts.up_proj[e].T).square()
        part = (weights * (chosen == e)).sum(-1)
        added = ((up @ experts.down_proj[e].T).norm(dim=-1) * part).unflatten(0, (3, 24))
        assert found.experts[4][e] == pytest.approx(length(added[..., None]).item(), rel=1e-5)
        sees = (chosen == e).any(-1).unflatten(0, (3, 24))
        mean = (up.unflatten(0, (3, 24)) * sees[..., None]).sum(1) / sees.sum(1).clamp(min=1)[:, None]
        assert torch.allclose(found.expert_ffn[4][e], mean.double().square().sum(0).sqrt())
    assert {*found.ffn, *found.mamba, *found.attention, *found.experts} == set(range(6))


def same_width(a: WidthScores, b: WidthScores) -> bool:
    parts = [(a.hidden, b.hidden)]
    for kind in ("ffn", "mamba", "attention", "experts", "expert_ffn"):
        ours, theirs = getattr(a, kind), getattr(b, kind)
        assert ours.keys() == theirs.keys()
        parts += [(ours[i], theirs[i]) for i in ours]
    return all(torch.allclose(x, y, rtol=1e-5) for x, y in parts)


def same_depth(a: DepthScores, b: DepthScores) -> bool:
    def numbers(scores: DepthScores) -> list[float]:
        return [one.of(m) for part in scores.rounds for one in part for m in ("logit-mse", "hidden-mse", "perplexity")]

    return a.order == b.order and numbers(a) == pytest.approx(numbers(b), rel=1e-4)


@pytest.mark.parametrize("spec", [HYBRID, LLAMA])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_checkpoint_is_scored_as_a_model_in_memory_is(tmp_path: Path, spec: ModelSpec, dtype: torch.dtype) -> None:
    save_model(shaken(spec).to(dtype), tmp_path / "model", max_shard_bytes=30_000)
    decoder, given = load_model(tmp_path / "model", dtype="auto"), samples(spec)
    streamed = StreamedLayers(tmp_path / "model")
    assert streamed.held_bytes < sum(p.nbytes for p in decoder.parameters()) / 2
    assert same_width(score_width(streamed, given), score_width(LoadedLayers(decoder), given))
    assert same_depth(score_depth(streamed, given, drop=2), score_depth(LoadedLayers(decoder), given, drop=2))


def test_memory_bounds_what_is_held_and_changes_nothing(tmp_path: Path) -> None:
    """From all at once, over sample by sample, to hidden states on the disk."""
    decoder, given = shaken(HYBRID), samples(HYBRID)
    save_model(decoder, tmp_path / "model")
    streamed, free = StreamedLayers(tmp_path / "model"), score_depth(LoadedLayers(decoder), given, drop=2)
    disk = []
    write_bytes = Path.write_bytes
    for i, memory in enumerate((10**9, streamed.held_bytes + ROOM, streamed.held_bytes + ROOM - 4 * 24 * 32 * 4)):
        folder = tmp_path / str(i)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Path, "write_bytes", lambda file, data: disk.append(file) or write_bytes(file, data))
            found = score_depth(streamed, given, drop=2, scoring=Scoring(folder=folder, memory_bytes=memory))
        assert same_depth(found, free)
        chunks = sorted(file.name for file in (folder / "round-0").iterdir())
        assert len(chunks) == (1 if i == 0 else 3)
        assert bool(disk) == (i == 2)
        assert not list(folder.glob(".streams.*"))
    with pytest.raises(SpecError, match=r"memory=1,000 bytes: the weights held at once take .* give "):
        score_width(streamed, given, scoring=Scoring(memory_bytes=1000))


class Interrupted(Exception):
    pass


class Breaking(LoadedLayers):
    """Layers that break off after so many were read."""

    def __init__(self, decoder: Decoder, after: int) -> None:
        super().__init__(decoder)
        self.left = after
        self.read = 0

    @contextmanager
    def layer(self, number: int) -> Iterator[Layer]:
        self.read += 1
        if self.read > self.left:
            raise Interrupted
        with super().layer(number) as found:
            yield found


def scores_of(decoder: Decoder, given: Calibration, scoring: Scoring, after: int = 10**9) -> tuple[Any, int]:
    layers = Breaking(decoder, after)
    return score_depth(layers, given, drop=2, scoring=scoring), layers.read


def test_a_scoring_that_was_stopped_is_gone_on_with(tmp_path: Path) -> None:
    decoder, given = shaken(HYBRID), samples(HYBRID)
    held = LoadedLayers(decoder).held_bytes + ROOM
    whole, all_reads = scores_of(decoder, given, Scoring(folder=tmp_path / "whole", memory_bytes=held))
    stopped = Scoring(folder=tmp_path / "stopped", memory_bytes=held)
    with pytest.raises(Interrupted):
        scores_of(decoder, given, stopped, after=all_reads // 2 + 2)
    again, reads = scores_of(decoder, given, stopped)
    assert again == whole
    assert reads < all_reads / 2 + 6
    assert scores_of(decoder, given, stopped) == (whole, 0)
    with pytest.raises(SpecError, match="holds a scoring with another samples"):
        scores_of(decoder, samples(HYBRID, time=23), stopped)
    with pytest.raises(SpecError, match="holds a scoring with another what"):
        score_width(LoadedLayers(decoder), given, scoring=stopped)


class Threads(Ranks):
    """Ranks that are threads of this process."""

    meeting: Any = None

    def barrier(self) -> None:
        type(self).meeting.wait()

    def by_first(self, work: Any) -> None:
        if self.first:
            work()
        self.barrier()


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_share_the_samples_and_all_know_the_same(tmp_path: Path, world: int) -> None:
    decoder, given = shaken(HYBRID), samples(HYBRID)
    held = LoadedLayers(decoder).held_bytes + ROOM
    alone = score_depth(LoadedLayers(decoder), given, drop=2, scoring=Scoring(memory_bytes=held))
    Threads.meeting = threading.Barrier(world)
    found: dict[int, Any] = {}

    def run(rank: int) -> None:
        layers = Breaking(decoder, 10**9)
        scoring = Scoring(folder=tmp_path, memory_bytes=held, ranks=Threads(rank=rank, world=world))
        found[rank] = (score_depth(layers, given, drop=2, scoring=scoring), layers.read)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(scores == alone for scores, _ in found.values())
    assert sum(reads for _, reads in found.values()) == 2 * 3 * 6
    assert all(reads < 2 * 3 * 6 for _, reads in found.values())


def test_settings_that_cannot_be_are_refused() -> None:
    layers, given = LoadedLayers(shaken(HYBRID)), samples(HYBRID)
    for asked, message in (
        ({"drop": 6}, "drop=6: must be"),
        ({"drop": 0}, "drop=0: must be"),
        ({"drop": 1, "attention": 2}, "attention=2: must be"),
        ({"drop": 1, "metric": "cosine"}, "metric='cosine': must be one of logit-mse"),
    ):
        with pytest.raises(SpecError, match=message):
            score_depth(layers, given, **asked)
    with pytest.raises(SpecError, match="folder=None: ranks meet in a folder"):
        Scoring(ranks=Ranks(rank=0, world=2))
    with pytest.raises(SpecError, match=r"labels=\[3, 23\]: must be shaped as input_ids, \[3, 24\]"):
        Calibration(input_ids=given.input_ids, labels=given.labels[:, 1:])


def test_what_is_beyond_all_numbers_is_no_number() -> None:
    """JSON knows no infinity: a model that is certain of the wrong token, and samples without labels."""
    decoder, given = shaken(HYBRID), samples(HYBRID)
    unlabelled = Calibration(input_ids=given.input_ids, labels=torch.full_like(given.labels, IGNORED))
    found = score_depth(LoadedLayers(decoder), unlabelled, drop=1)
    assert (found.perplexity, found.rounds[0][0].perplexity) == (None, None)
    with torch.no_grad():
        decoder.lm_head.weight *= 1e5
    found = score_depth(LoadedLayers(decoder), given, drop=1)
    assert found.perplexity is None
    assert found.rounds[0][0].of("perplexity") == float("inf")

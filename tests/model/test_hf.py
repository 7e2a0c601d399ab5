"""The decoder as a transformers model: generate, loss, masks, packed documents, recomputed layers."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from specs import TOLERANCE, any_models, build, hybrids, llama, nemotron_h, qwen3, tokens
from specs import transformers as blocks
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from tandem.model.hf import TandemCache, TandemForCausalLM
from tandem.model.hybrid import Decoder
from tandem.spec.errors import SpecError
from tandem.spec.model import MLP, Attention, Mamba2, ModelSpec, MoE, Rope

CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"
FEW = settings(deadline=None, max_examples=5, derandomize=True)
ATTENTION = Attention(num_heads=4, num_kv_heads=2, head_dim=8)
MAMBA = Mamba2(num_heads=4, head_dim=8, state_dim=8, groups=2)
EXPERTS = MoE(num_experts=4, top_k=2, ffn_size=16, gated=False, shared_ffn_size=16, router_bias=True, score="sigmoid")
HYBRID = ModelSpec(
    name="hybrid",
    vocab_size=60,
    hidden_size=32,
    layers=(MAMBA, ATTENTION, MLP(ffn_size=64, gated=False), MAMBA, EXPERTS),
)
ROTARY = replace(HYBRID, layers=(MAMBA, replace(ATTENTION, rope=Rope(theta=100.0)), MAMBA), tied_embeddings=True)


def adapter(spec: ModelSpec, seed: int = 0) -> TandemForCausalLM:
    return TandemForCausalLM.from_decoder(build(spec, seed))


def greedy(model: PreTrainedModel, ids: Tensor, new: int = 6, **options: object) -> Tensor:
    """`new` further tokens; token 0 ends a row and fills it, as it fills the left of a padded one."""
    asked = {"do_sample": False, "eos_token_id": 0, "pad_token_id": 0, "attention_mask": torch.ones_like(ids), **options}
    return model.generate(ids, max_new_tokens=new, **asked)


def left_padded(ids: Tensor, pads: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Rows shortened to the right of `pads[row]` columns of padding, and their mask."""
    mask = (torch.arange(ids.shape[1]) >= torch.tensor(pads)[:, None]).long()
    return ids * mask, mask


def gradients(model: PreTrainedModel, ids: Tensor, **options: object) -> Tensor:
    model.zero_grad()
    model(ids, **options).logits.square().mean().backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


@FEW
@given(hybrids() | blocks("llama") | blocks("qwen3"), st.integers(1, 12), st.integers(0, 99))
def test_greedy_generate_is_the_same_with_a_cache_without_one_and_in_transformers(
    spec: ModelSpec, time: int, seed: int
) -> None:
    ours = adapter(spec, seed)
    first, reference = spec.layers[0], nemotron_h
    if isinstance(first, Attention) and first.rope is not None:
        reference = qwen3 if first.qk_norm == "head" else llama
    ids = tokens(spec, 2, time, seed)
    cached = greedy(ours, ids)
    assert torch.equal(cached, greedy(ours, ids, use_cache=False))
    assert torch.equal(cached, greedy(reference(ours.decoder), ids))


@pytest.mark.parametrize("spec", [HYBRID, ROTARY])
def test_rows_of_a_left_padded_batch_generate_as_alone(spec: ModelSpec) -> None:
    model, pads = adapter(spec), (0, 3, 7)
    ids, mask = left_padded(tokens(spec, 3, 8).clamp(min=1), pads)
    together = greedy(model, ids, attention_mask=mask)
    assert torch.equal(together, greedy(model, ids, attention_mask=mask, use_cache=False))
    for row, pad in enumerate(pads):
        alone = greedy(model, ids[row : row + 1, pad:])
        assert torch.equal(together[row, pad : pad + alone.shape[1]], alone[0])


def test_beam_search_reorders_the_state() -> None:
    model, ids = adapter(HYBRID), tokens(HYBRID, 2, 5)
    beams = {"num_beams": 3, "num_return_sequences": 2}
    found = greedy(model, ids, **beams)
    assert found.shape[0] == 4
    assert torch.equal(found, greedy(model, ids, use_cache=False, **beams))
    assert torch.equal(found, greedy(nemotron_h(model.decoder), ids, **beams))


def test_sampling_draws_the_same_tokens_with_a_cache_and_without() -> None:
    model, ids = adapter(ROTARY), tokens(ROTARY, 2, 5)
    drawn = []
    for use_cache in (True, False):
        torch.manual_seed(3)
        drawn.append(greedy(model, ids, do_sample=True, num_return_sequences=3, use_cache=use_cache))
    assert drawn[0].shape[0] == 6
    assert torch.equal(*drawn)


def test_generate_prefills_once_and_then_decodes(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    for name in ("prefill", "decode", "hidden_states"):
        method = getattr(Decoder, name)
        monkeypatch.setattr(Decoder, name, lambda *a, _f=method, _n=name, **k: calls.append(_n) or _f(*a, **k))
    greedy(adapter(ROTARY), tokens(ROTARY, 2, 5), new=4, eos_token_id=None)
    assert calls == ["prefill", "decode", "decode", "decode"]


def test_a_conversation_goes_on_from_its_cache() -> None:
    model, ids = adapter(HYBRID), tokens(HYBRID, 2, 9)
    with torch.no_grad():
        cache = model(ids[:, :4], use_cache=True).past_key_values
        begun = model(ids[:, 4:6], past_key_values=cache, attention_mask=torch.ones(2, 6)).past_key_values
    assert begun is cache
    assert cache.get_seq_length() == 6
    assert torch.equal(greedy(model, ids, **{CACHE: cache}), greedy(model, ids))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_generate_follows_weights_that_change(dtype: torch.dtype) -> None:
    model = TandemForCausalLM.from_decoder(build(HYBRID).to(dtype))
    ids = tokens(HYBRID, 1, 5)
    before = greedy(model, ids)
    other = TandemForCausalLM.from_decoder(build(HYBRID, seed=5).to(dtype))
    model.load_state_dict(other.state_dict())
    after = greedy(model, ids)
    assert not torch.equal(before, after)
    assert torch.equal(after, greedy(other, ids))


def test_assisted_decoding_is_refused() -> None:
    with pytest.raises(ValueError, match="stateful"):
        greedy(adapter(ROTARY), tokens(ROTARY, 1, 5), prompt_lookup_num_tokens=2)


@pytest.mark.parametrize("items", [None, 7])
def test_loss_is_that_of_transformers(items: int | None) -> None:
    model = adapter(HYBRID)
    ids = tokens(HYBRID, 2, 11)
    labels = ids.masked_fill(tokens(HYBRID, 2, 11, seed=1) < 20, -100)
    ours = model(ids, labels=labels, num_items_in_batch=items)
    theirs = nemotron_h(model.decoder)(ids, labels=labels, num_items_in_batch=items)
    assert abs(ours.loss - theirs.loss) < TOLERANCE
    assert ours.past_key_values is None


@FEW
@given(any_models(), st.data())
def test_padding_on_either_side_leaves_the_loss_as_it_is(spec: ModelSpec, data: st.DataObject) -> None:
    model = adapter(spec).train()
    ids, pads = tokens(spec, 2, 9), data.draw(st.tuples(st.integers(0, 7), st.integers(0, 7)))
    left, mask = left_padded(ids, pads)
    labels = left.masked_fill(mask.cumsum(1) < 2, -100)  # nothing foretells a row's first token
    losses = [
        model(rows, attention_mask=seen, labels=wanted).loss
        for rows, seen, wanted in ((left, mask, labels), [rolled(each, pads) for each in (left, mask, labels)])
    ]
    assert abs(losses[0] - losses[1]) < TOLERANCE


def rolled(rows: Tensor, pads: tuple[int, ...]) -> Tensor:
    return torch.stack([row.roll(-pad) for row, pad in zip(rows, pads, strict=True)])


@pytest.mark.parametrize("spec", [HYBRID, ROTARY])
def test_packed_documents_are_told_by_number_or_by_position(spec: ModelSpec) -> None:
    model = adapter(spec)
    first, second = tokens(spec, 1, 5), tokens(spec, 1, 7, seed=1)
    packed = torch.cat([first, second], 1)
    wanted = torch.cat([model(first).logits, model(second).logits], 1)
    numbers = torch.tensor([[4] * 5 + [2] * 7])
    positions = torch.cat([torch.arange(5), torch.arange(7)])[None]
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            assert (model(packed, documents=numbers).logits - wanted).abs().max() < TOLERANCE
            assert (model(packed, position_ids=positions).logits - wanted).abs().max() < TOLERANCE
            assert (model(packed).logits - wanted).abs().max() > TOLERANCE


@pytest.mark.parametrize("grad", [True, False])
def test_packed_documents_leave_no_cache(grad: bool) -> None:
    model, ids = adapter(HYBRID), tokens(HYBRID, 1, 8)
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4]])
    cache = TandemCache.fresh(model.decoder, 1)
    with torch.set_grad_enabled(grad):
        assert model(ids, position_ids=positions).past_key_values is None
        for options in ({"use_cache": True}, {CACHE: cache}):
            for ours in (model, model.model):
                with pytest.raises(SpecError, match="packed documents leave no cache"):
                    ours(ids, position_ids=positions, **options)
    assert cache.get_seq_length() == 0


def test_a_cache_is_continued_with_gradients_again_and_again() -> None:
    """Each pass learns from its own tokens, as after a past that was read without gradients."""
    model, ids = adapter(HYBRID), tokens(HYBRID, 1, 9)
    cache = model(ids[:, :4], use_cache=True)[CACHE]
    model(ids[:, 4:6], **{CACHE: cache})
    found = gradients(model, ids[:, 6:], **{CACHE: cache})
    with torch.no_grad():
        past = model(ids[:, :6], use_cache=True)[CACHE]
    assert (found - gradients(model, ids[:, 6:], **{CACHE: past})).abs().max() < TOLERANCE


def test_positions_that_skip_padding_are_no_documents() -> None:
    model = adapter(ROTARY)
    ids, mask = left_padded(tokens(ROTARY, 2, 8), (0, 3))
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    told = model(ids, attention_mask=mask, position_ids=positions).logits
    assert torch.equal(told, model(ids, attention_mask=mask).logits)


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("use_cache", [True, False])
def test_logits_to_keep_picks_columns(grad: bool, use_cache: bool) -> None:
    model, ids = adapter(HYBRID), tokens(HYBRID, 2, 8)
    with torch.set_grad_enabled(grad):
        full = model(ids, use_cache=use_cache).logits
        for kept in (1, 3, torch.tensor([0, 5])):
            columns = slice(-kept, None) if isinstance(kept, int) else kept
            some = model(ids, use_cache=use_cache, logits_to_keep=kept).logits
            assert (some - full[:, columns]).abs().max() < TOLERANCE


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_:FutureWarning")  # renamed in transformers 5.24
@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputing_layers_gives_the_same_gradients(reentrant: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = adapter(HYBRID).train(), tokens(HYBRID, 2, 9)
    plain = gradients(model, ids)
    runs: list[object] = []
    mixer = type(model.model.layers[0].mixer)
    forward = mixer.forward
    monkeypatch.setattr(mixer, "forward", lambda self, *a: runs.append(self) or forward(self, *a))
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert torch.equal(gradients(model, ids), plain)
    assert len(runs) == 4  # two Mamba layers, twice
    assert model.decoder.backbone.checkpoint is None
    model.gradient_checkpointing_disable()
    assert torch.equal(gradients(model, ids), plain)
    assert len(runs) == 6


@pytest.mark.parametrize("time", [1, 9])
def test_a_first_pass_that_keeps_a_cache_keeps_gradients(time: int) -> None:
    model, ids = adapter(HYBRID), tokens(HYBRID, 2, time)
    assert torch.equal(gradients(model, ids, use_cache=True), gradients(model, ids, use_cache=False))


@pytest.mark.parametrize("spec", [HYBRID, ROTARY])
@pytest.mark.parametrize("size", [64, 50])
def test_vocabulary_can_be_resized(spec: ModelSpec, size: int) -> None:
    model, ids, both = adapter(spec), tokens(spec, 2, 6) % 50, min(size, spec.vocab_size)
    before = model(ids).logits
    model.resize_token_embeddings(size, mean_resizing=False)
    assert model.config.vocab_size == model.decoder.spec.vocab_size == model.config.to_spec().vocab_size == size
    assert torch.equal(model(ids).logits[..., :both], before[..., :both])
    assert torch.equal(model.decoder(ids), model(ids).logits)
    assert (model.lm_head.weight is model.model.embeddings.weight) == spec.tied_embeddings
    assert torch.equal(greedy(model, ids), greedy(model, ids, use_cache=False))


def test_parameters_are_those_of_the_decoder_under_the_names_of_transformers() -> None:
    decoder = build(HYBRID)
    model = TandemForCausalLM.from_decoder(decoder)
    assert model.decoder is decoder
    assert {id(p) for p in model.parameters()} == {id(p) for p in decoder.parameters()}
    assert set(model.state_dict()) == set(nemotron_h(decoder).state_dict())
    assert sum(tensor.numel() for tensor in model.state_dict().values()) == HYBRID.parameters


def test_a_copy_shares_nothing_and_is_whole() -> None:
    model, ids = adapter(ROTARY), tokens(ROTARY, 1, 5)
    before = model(ids).logits
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    assert torch.equal(model(ids).logits, before)
    assert not torch.equal(other(ids).logits, before)
    assert torch.equal(other.decoder(ids), other(ids).logits)


def test_configuration_answers_from_the_specification() -> None:
    config = adapter(HYBRID).config
    asked = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "intermediate_size")
    assert [getattr(config, name) for name in asked] == [32, 5, 4, 2, 8, 64]
    assert config.max_position_embeddings == HYBRID.max_context
    assert config.to_spec() == HYBRID
    alone = adapter(replace(HYBRID, layers=(MAMBA,))).config
    assert [getattr(alone, name) for name in asked] == [32, 1, 4, 4, 8, 0]


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"inputs_embeds": torch.zeros(1, 2, 32)}, "inputs_embeds"),
        ({"output_hidden_states": True}, "output_hidden_states"),
        ({"input_ids": None}, "input_ids"),
        ({"attention_mask": torch.ones(1, 1)}, "attention_mask"),
    ],
)
def test_what_is_not_built_is_refused_by_name(options: dict[str, object], word: str) -> None:
    with pytest.raises(SpecError, match=word):
        adapter(HYBRID)(**{"input_ids": tokens(HYBRID, 1, 2), **options})


def test_cache_reorders_rows_and_counts_columns() -> None:
    decoder = build(HYBRID)
    cache = TandemCache.fresh(decoder, 3)
    decoder.prefill(tokens(HYBRID, 3, 4), cache.take(4))
    before = cache.state
    cache.reorder_cache(torch.tensor([0, 1, 2]))
    assert cache.state is before
    cache.reorder_cache(torch.tensor([2, 2, 0]))
    assert torch.equal(cache.state.layers[0].ssm, before.layers[0].ssm[[2, 2, 0]])
    assert cache.get_seq_length() == 4

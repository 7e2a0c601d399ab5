"""What the C step must not compute: states of other models, and decoders that are no longer the one it was made for."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from dataclasses import replace
from threading import Thread

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import parametrizations, parametrize

from tandem.model import native
from tandem.model.hybrid import Decoder
from tandem.model.linear import Linear
from tandem.model.native.program import Program
from tandem.model.state import MambaState, SequenceState
from tandem.spec.errors import Infeasible, SpecError
from tandem.spec.mixers import MLP, Attention, Mamba2, MoE, Rope
from tandem.spec.model import ModelSpec

pytestmark = pytest.mark.skipif(not native.available(), reason="no C compiler")

MAMBA = Mamba2(num_heads=4, head_dim=8, state_dim=16, groups=2)
ATTENTION = Attention(num_heads=4, num_kv_heads=2, head_dim=8, rope=Rope(theta=1e4))
SPEC = ModelSpec(
    name="hybrid",
    vocab_size=50,
    hidden_size=32,
    layers=(
        MAMBA,
        ATTENTION,
        MLP(ffn_size=64, gated=True),
        MoE(num_experts=4, top_k=2, ffn_size=16, gated=False, shared_ffn_size=16, router_bias=True, score="sigmoid"),
    ),
)


def changed(index: int, **fields: object) -> ModelSpec:
    """SPEC with another layer."""
    layers = list(SPEC.layers)
    layers[index] = replace(layers[index], **fields)  # type: ignore[arg-type]
    return replace(SPEC, layers=tuple(layers))


def decoder(spec: ModelSpec = SPEC, **options: torch.dtype) -> Decoder:
    return Decoder(spec, **options).requires_grad_(False)


def program_of(model: Decoder) -> Program:
    program = native.program_for(model)
    assert isinstance(program, Program), program
    return program


def drawn(rows: int, length: int) -> Tensor:
    return torch.randint(SPEC.vocab_size, (rows, length), generator=torch.Generator().manual_seed(1))


def assert_decodes_as_forward(model: Decoder, tolerance: float = 2e-6) -> None:
    """One token after a prefill gives what the full pass gives."""
    ids = drawn(2, 6)
    _, state = model.prefill(ids[:, :5])
    logits, _ = model.decode(ids[:, 5], state)
    with torch.no_grad():
        assert (logits - model(ids)[:, -1]).abs().max() <= tolerance


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (changed(0, num_heads=2), "layer 0 has shape"),
        (changed(0, state_dim=8), "layer 0 has shape"),
        (changed(0, conv_kernel=2), "layer 0 has shape"),
        (changed(1, num_kv_heads=1), "layer 1 has shape"),
        (changed(1, head_dim=4), "layer 1 has shape"),
        (replace(SPEC, layers=SPEC.layers[:3]), "state has 3 layers: this model has 4"),
        (replace(SPEC, layers=(MAMBA, MAMBA, *SPEC.layers[2:])), "layer 1 is MambaState: this model needs AttentionState"),
        (replace(SPEC, layers=(*SPEC.layers[2:], ATTENTION, MAMBA)), "layer 0 is None: this model needs MambaState"),
    ],
)
def test_a_state_of_another_model_is_refused(other: ModelSpec, message: str) -> None:
    model = decoder()
    program, state = program_of(model), SequenceState.zeros(other, 1, capacity=9)
    with pytest.raises(SpecError, match=message):
        program.decode(torch.tensor([1]), state)


def _half_ssm(state: SequenceState) -> None:
    assert isinstance(state.layers[0], MambaState)
    state.layers[0].ssm = state.layers[0].ssm.half()


def _double(state: SequenceState) -> None:
    for layer in state.layers:
        if layer is not None:
            for name in layer.__slots__:
                setattr(layer, name, getattr(layer, name).double())


def _two_dtypes(state: SequenceState) -> None:
    state.layers[1].values = state.layers[1].values.half()  # type: ignore[union-attr]


def _transposed(state: SequenceState) -> None:
    state.layers[1].keys = state.layers[1].keys.transpose(2, 3).contiguous().transpose(2, 3)  # type: ignore[union-attr]


def _one_row_less(state: SequenceState) -> None:
    state.layers[1].values = state.layers[1].values[1:]  # type: ignore[union-attr]


def _negative(state: SequenceState) -> None:
    state.lengths -= 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_half_ssm, "layer 0 is of torch.float16: this model needs torch.float32"),
        (_double, "layer 0 is of torch.float64"),
        (_two_dtypes, "layer 1 is of torch.float16"),
        (_transposed, "contiguous"),
        (_one_row_less, "layer 1 has shape"),
        (_negative, "lengths holds -1"),
    ],
)
def test_a_state_that_c_would_misread_is_refused(change: Callable[[SequenceState], None], message: str) -> None:
    model = decoder()
    program, state = program_of(model), SequenceState.zeros(SPEC, 2, capacity=9)
    change(state)
    with pytest.raises(SpecError, match=message):
        program.decode(torch.tensor([1, 2]), state)


def test_threads_are_at_least_one() -> None:
    model = decoder()
    with pytest.raises(SpecError, match="threads=0"):
        program_of(model).decode(torch.tensor([1]), SequenceState.zeros(SPEC, 1), threads=0)
    with pytest.raises(SpecError, match="threads=-1"):
        native.linear(torch.ones(1, 2), torch.ones(3, 2), threads=-1)


@pytest.mark.parametrize("models", [1, 2])
def test_python_threads_decode_at_the_same_time(models: int) -> None:
    decoders = [decoder(replace(SPEC, layers=SPEC.layers * 4)) for _ in range(models)] * (3 - models)
    programs = [program_of(model) for model in decoders]
    ids, wrong = drawn(2, 40), []

    def run(row: int) -> Tensor:
        state = SequenceState.zeros(programs[row].spec, 1)
        return torch.cat([programs[row].decode(ids[row : row + 1, i], state, threads=2) for i in range(ids.shape[1])])

    expected = [run(0), run(1)]

    def repeat(row: int) -> None:
        wrong.extend(row for _ in range(10) if not torch.equal(run(row), expected[row]))

    threads = [Thread(target=repeat, args=(row,)) for row in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


class Doubled(Linear):
    """A Linear that is not one."""

    def forward(self, x: Tensor) -> Tensor:
        """Twice the product."""
        return 2 * super().forward(x)


class Twice(nn.Module):
    """Parametrisation, mixer or embedding of another library."""

    def forward(self, x: Tensor, *_: object) -> Tensor:
        """2 x."""
        return 2 * x


def _subclass(model: Decoder) -> None:
    linear = Doubled(32, 32, bias=False)
    linear.weight = model.backbone.layers[1].mixer.q_proj.weight
    model.backbone.layers[1].mixer.q_proj = linear


def _weight_norm(model: Decoder) -> None:
    head = parametrizations.weight_norm(model.lm_head)
    head.parametrizations.weight.original0.data *= 2


def _parametrised(model: Decoder) -> None:
    parametrize.register_parametrization(model.backbone.layers[0].norm, "weight", Twice())


def _no_norm(model: Decoder) -> None:
    model.backbone.layers[3].norm = nn.Identity()


def _other_mixer(model: Decoder) -> None:
    model.backbone.layers[2].mixer = Twice()


def _wrapped_embeddings(model: Decoder) -> None:
    model.backbone.embeddings = nn.Sequential(model.backbone.embeddings, Twice())
    model.backbone.embeddings.weight = model.backbone.embeddings[0].weight


def _hook(model: Decoder) -> None:
    model.backbone.layers[3].mixer.experts.register_forward_hook(lambda module, inputs, output: output * 2)


def _hook_before(model: Decoder) -> None:
    model.backbone.layers[0].register_forward_pre_hook(lambda module, inputs: (inputs[0] * 2, *inputs[1:]))


def _own_forward(model: Decoder) -> None:
    layer = model.backbone.layers[2].mixer
    layer.forward = Twice().forward


def _narrower(model: Decoder) -> None:
    mlp = model.backbone.layers[2].mixer
    for linear in (mlp.up_proj, mlp.gate_proj):
        linear.weight = nn.Parameter(linear.weight[:32].clone())
    mlp.down_proj.weight = nn.Parameter(mlp.down_proj.weight[:, :32].clone())


def _wrong_eps(model: Decoder) -> None:
    model.backbone.layers[0].mixer.norm.eps = 0.5


def _transposed_weight(model: Decoder) -> None:
    linear = model.backbone.layers[1].mixer.o_proj
    linear.weight = nn.Parameter(linear.weight.t().contiguous().t())


CHANGES = [
    (_subclass, "q_proj is a Doubled"),
    (_weight_norm, "lm_head is a ParametrizedLinear"),
    (_parametrised, "norm is a ParametrizedRMSNorm"),
    (_no_norm, "norm is a Identity"),
    (_other_mixer, "mixer is a Twice"),
    (_wrapped_embeddings, "embeddings is a Sequential"),
    (_hook, "experts has a forward hook"),
    (_hook_before, "0 has a forward hook"),
    (_own_forward, "mixer has a forward hook"),
    (_narrower, "weight has shape"),
    (_wrong_eps, "norm.eps=0.5"),
    (_transposed_weight, "contiguous"),
]


@pytest.mark.parametrize(("change", "reason"), CHANGES)
@pytest.mark.parametrize("decoded_before", [False, True])
def test_a_changed_decoder_is_refused_and_torch_computes_it(
    change: Callable[[Decoder], None], reason: str, decoded_before: bool
) -> None:
    model = decoder()
    if decoded_before and change not in (_own_forward, _wrong_eps):  # these two are looked at when a program is made
        assert_decodes_as_forward(model)
    change(model)
    refusal = native.program_for(model)
    assert isinstance(refusal, Infeasible)
    assert reason in refusal.reason
    assert_decodes_as_forward(model)


@pytest.mark.parametrize("options", [{"target_modules": ["embeddings"]}, {"target_parameters": ["experts.up_proj"]}])
def test_adapters_of_peft_on_embeddings_and_experts_are_computed_by_torch(options: dict[str, list[str]]) -> None:
    peft = pytest.importorskip("peft")
    model = decoder()
    assert_decodes_as_forward(model)
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, **{"target_modules": [], **options}), model)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn_like(parameter) * 0.05
    assert isinstance(native.program_for(model), Infeasible)
    assert_decodes_as_forward(model)


def test_a_hook_on_all_modules_is_called_until_it_is_removed() -> None:
    model, seen = decoder(), []
    program = program_of(model)
    for register in (register_module_forward_hook, model.lm_head.register_forward_hook):
        handle = register(lambda module, inputs, output: seen.append(module))
        model.decode(torch.tensor([1]), model.new_state(1))
        assert seen
        handle.remove()
        seen.clear()
        assert program.current or isinstance(native.program_for(model), Program)
        model.decode(torch.tensor([1]), model.new_state(1))
        assert not seen


def _assigned(model: Decoder) -> None:
    model.load_state_dict({name: value * 1.1 for name, value in model.state_dict().items()}, assign=True)


def _data(model: Decoder) -> None:
    weight = model.backbone.layers[1].mixer.q_proj.weight
    weight.data = weight.data * 2


def _biased(model: Decoder) -> None:
    model.backbone.layers[1].mixer.q_proj.bias = nn.Parameter(torch.ones(32))


def _correction(model: Decoder) -> None:
    model.backbone.layers[3].mixer.gate.e_score_correction_bias = torch.tensor([9.0, 0.0, 0.0, 9.0])


def _other_layer(model: Decoder) -> None:
    model.backbone.layers[2] = Decoder(SPEC, seed=7).requires_grad_(False).backbone.layers[2]


@pytest.mark.parametrize("change", [_assigned, _data, _biased, _correction, _other_layer])
def test_a_change_that_c_can_compute_is_noticed(change: Callable[[Decoder], None]) -> None:
    model = decoder()
    program = program_of(model)
    assert_decodes_as_forward(model)
    assert native.program_for(model) is program
    change(model)
    assert isinstance(native.program_for(model), Program)
    assert native.program_for(model) is not program
    assert_decodes_as_forward(model)


def test_replaced_weights_are_freed_at_once() -> None:
    model = decoder()
    model.decode(torch.tensor([1]), model.new_state(1))
    old = [weakref.ref(model.backbone.layers[1].mixer.q_proj), weakref.ref(model.backbone.layers[3].mixer)]
    native.quantise(model)
    model.backbone.layers[3].mixer = nn.Identity()
    gc.collect()
    assert [reference() for reference in old] == [None, None]


def test_a_program_does_not_outlive_its_decoder() -> None:
    program = program_of(decoder())
    gc.collect()
    with pytest.raises(SpecError, match="decoder of this program is gone"):
        program.decode(torch.tensor([1]), SequenceState.zeros(SPEC, 1))


def test_a_gate_alone_may_be_int8() -> None:
    model = decoder()
    mlp = model.backbone.layers[2].mixer
    mlp.gate_proj = native.Int8Linear(mlp.gate_proj)
    assert program_of(model)
    assert_decodes_as_forward(model)


def test_a_convolution_of_two_formats_is_refused() -> None:
    model = decoder()
    model.backbone.layers[0].mixer.conv1d.bias.data = model.backbone.layers[0].mixer.conv1d.bias.data.half()
    refusal = native.program_for(model)
    assert isinstance(refusal, Infeasible)
    assert "conv1d.bias is torch.float16: must be torch.float32" in refusal.reason


def test_bf16_weights_and_states_are_decoded_in_c_where_torch_computes_in_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tandem.model.precision.cpu_has_fast_bf16", lambda: True)
    model, ids = decoder(dtype=torch.bfloat16), drawn(2, 6)
    _, state = model.prefill(ids[:, :5])
    assert {t.dtype for layer in state.layers if layer for t in layer.tensors} == {torch.bfloat16, torch.float32}
    logits = program_of(model).decode(ids[:, 5], state)
    with torch.no_grad():
        assert (logits - model(ids)[:, -1]).abs().max() <= 0.02

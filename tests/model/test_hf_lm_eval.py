"""lm-eval's HFLM over a model object: the numbers of the model itself."""

from __future__ import annotations

import pytest
import torch
from specs import build

from tandem.model.hf import TandemForCausalLM
from tandem.spec.model import Attention, Mamba2, ModelSpec

pytest.importorskip("lm_eval", reason="pip install tandem-lm[eval]")
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from toy_tokenizer import toy_tokenizer

TOKENIZER = toy_tokenizer()
SPEC = ModelSpec(
    name="small",
    vocab_size=len(TOKENIZER),
    hidden_size=16,
    layers=(Mamba2(num_heads=2, head_dim=8, state_dim=4, groups=1), Attention(num_heads=2, num_kv_heads=1, head_dim=8)),
    max_context=256,
)


@pytest.fixture(scope="module")
def evaluated() -> HFLM:
    return HFLM(pretrained=TandemForCausalLM.from_decoder(build(SPEC)), tokenizer=TOKENIZER, batch_size=2)


def ask(kind: str, *arguments: object) -> Instance:
    return Instance(request_type=kind, doc={}, arguments=arguments, idx=0)


def test_loglikelihood_is_that_of_the_model(evaluated: HFLM) -> None:
    pairs = [("one and", " two"), ("a", " bc"), ("longer than the others", " x")]
    found = evaluated.loglikelihood([ask("loglikelihood", *pair) for pair in pairs], disable_tqdm=True)
    for (context, continuation), (value, _) in zip(pairs, found, strict=True):
        start, ids = len(TOKENIZER(context).input_ids), torch.tensor([TOKENIZER(context + continuation).input_ids])
        logs = evaluated.model(ids).logits.log_softmax(-1)[0, start - 1 : -1]
        assert value == pytest.approx(logs.gather(-1, ids[0, start:, None]).sum().item(), abs=1e-4)


def test_generate_until_goes_on_as_generate_does(evaluated: HFLM) -> None:
    settings = {"until": ["\n\n"], "max_gen_toks": 5, "do_sample": False}
    contexts = ["one and", "a much longer context"]
    found = evaluated.generate_until([ask("generate_until", each, settings) for each in contexts], disable_tqdm=True)
    for context, text in zip(contexts, found, strict=True):
        ids = torch.tensor([TOKENIZER(context).input_ids])
        alone = evaluated.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False)
        assert text == TOKENIZER.decode(alone[0, ids.shape[1] :], skip_special_tokens=True)


def test_context_length_is_that_of_the_specification(evaluated: HFLM) -> None:
    assert evaluated.max_length == 256

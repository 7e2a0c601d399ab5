from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from small_models import small_model
from torch import Tensor
from torch.nn import functional

pytest.importorskip("trl", reason="pip install tandem-lm[train]")
from trl.trainer import base_trainer
from trl.trainer.sft_trainer import SFTTrainer

from tandem.align import trl as glue
from tandem.align.encode import Packed, encode_sample, pack
from tandem.align.sample import Sample
from tandem.align.sft import SftSettings, collate, run_sft, sft_trainer, train_packed
from tandem.model.hybrid import Decoder
from tandem.model.linear import Linear
from tandem.spec.errors import SpecError
from tandem.train.data.bpe import train_bpe
from tandem.train.data.packing import IGNORED
from tandem.train.loop import Diverged

TOKENIZER = train_bpe([f"What is {a} + {b}? It is {a + b}." for a in range(9) for b in range(9)], 320)
PAIRS = [(a, b) for a in range(4) for b in range(5)]
SETTINGS = SftSettings(steps=6, rows=4, length=160, lr=1e-2, checkpoint_every=1)


def sample(a: int, b: int) -> Sample:
    question = {"role": "user", "content": f"What is {a} + {b}?"}
    answer = {"role": "assistant", "content": f"It is {a + b}.", "reasoning_content": f"{a} and {b}"}
    return Sample(kind="reasoning", messages=(question, answer))


SAMPLES = [sample(a, b) for a, b in PAIRS]
ENCODED = [encode_sample(s, TOKENIZER) for s in SAMPLES]


def decoder_of(seed: int = 0) -> Decoder:
    return small_model("hybrid", vocabulary=TOKENIZER.backend.get_vocab_size(), seed=seed)


def plain_loss(decoder: Decoder, some: list[int]) -> Tensor:
    """Each sample by itself through the decoder; torch's cross-entropy of the learned tokens."""
    total, count = torch.zeros(()), 0
    for i in some:
        ids, learned = torch.tensor(ENCODED[i].ids), torch.tensor(ENCODED[i].learned)
        losses = functional.cross_entropy(decoder(ids[None])[0, :-1], ids[1:], reduction="none")
        total, count = total + losses[learned[1:]].sum(), count + int(learned[1:].sum())
    return total / count


def gradients(decoder: Decoder, loss: Tensor) -> Tensor:
    decoder.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in decoder.parameters() if p.grad is not None])


def trained(decoder: Decoder, out: Path, settings: SftSettings = SETTINGS, seed: int = 1, **options: Any) -> dict[str, Any]:
    return run_sft(decoder, TOKENIZER, SAMPLES, settings, out, seed=seed, **options)


def same_weights(one: Decoder, other: Decoder) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("concatenate", [True, False])
def test_the_loss_is_that_of_the_assistants_tokens_of_each_conversation_alone(tmp_path: Path, concatenate: bool) -> None:
    decoder = decoder_of()
    packed = pack(ENCODED, 160, concatenate=concatenate)
    assert concatenate == (len(packed.samples) < len(SAMPLES))
    with glue.contained():
        trainer = sft_trainer(decoder, TOKENIZER, packed, SETTINGS, tmp_path, seed=0)
    rows = [0, 2, 3]
    some = [i for row in rows for i in packed.samples[row]]
    ours = trainer.compute_loss(trainer.model, collate(packed, rows))
    theirs = SFTTrainer.compute_loss(trainer, trainer.model, collate(packed, rows))
    expected = plain_loss(decoder, some)
    assert ours.item() == pytest.approx(expected.item(), abs=1e-5)
    assert theirs.item() == pytest.approx(expected.item(), abs=1e-5)
    assert torch.allclose(gradients(decoder, ours), gradients(decoder, expected), atol=1e-5)


def test_what_is_not_learned_has_no_part_in_the_gradients(tmp_path: Path) -> None:
    decoder = decoder_of()
    packed = pack(ENCODED, 160)
    with glue.contained():
        trainer = sft_trainer(decoder, TOKENIZER, packed, SETTINGS, tmp_path, seed=0)
    one, other = collate(packed, [0, 1]), collate(packed, [0, 1])
    place = int((one["labels"][0] != IGNORED).nonzero()[-1])
    other["input_ids"][0, place + 1 :] = 99  # behind the last learned token of the row: nothing learned sees it
    assert not torch.equal(one["input_ids"], other["input_ids"])
    first = gradients(decoder, trainer.compute_loss(trainer.model, one))
    second = gradients(decoder, trainer.compute_loss(trainer.model, other))
    assert torch.allclose(first, second, atol=1e-6)
    other["labels"][0, 5] = 7
    assert not torch.allclose(first, gradients(decoder, trainer.compute_loss(trainer.model, other)), atol=1e-6)


def test_batches_are_no_wider_than_their_rows() -> None:
    packed = pack(ENCODED, 160, concatenate=False)
    batch = collate(packed, [1, 4])
    lengths = [len(ENCODED[1].ids), len(ENCODED[4].ids)]
    assert batch["attention_mask"].sum(1).tolist() == lengths
    assert max(lengths) <= batch["input_ids"].shape[1] <= max(lengths) + 31
    assert "documents" not in batch
    assert batch["input_ids"][1, : lengths[1]].tolist() == list(ENCODED[4].ids)


def test_it_learns(tmp_path: Path) -> None:
    decoder, events = decoder_of(), []
    before = plain_loss(decoder, [0, 7]).item()
    found = trained(decoder, tmp_path, SftSettings(epochs=15, rows=4, length=160, lr=1e-2), listen=events.append)
    assert plain_loss(decoder, [0, 7]).item() < before / 3
    assert found["steps"] == len(events) == 15 * math.ceil(found["rows"] / 4)
    assert found["samples"] == len(SAMPLES)
    assert found["too_long"] == 0
    learned = sum(sum(e.learned) for e in ENCODED) / sum(len(e.ids) for e in ENCODED)
    assert found["learned"] == pytest.approx(learned)
    assert [event["step"] for event in events] == list(range(1, found["steps"] + 1))
    assert {"kind", "stage", "step", "steps", "loss", "tokens", "tokens_per_s", "lr", "grad_norm", "seconds"} <= set(events[0])
    assert sum(event["tokens"] for event in events) == found["tokens"] == 15 * sum(len(e.ids) for e in ENCODED)


@pytest.mark.parametrize("interrupted", [2, 4])
def test_an_interrupted_run_ends_as_one_that_was_not(tmp_path: Path, interrupted: int) -> None:
    """An epoch has three steps: one run goes on within it, one at its end."""
    settings = SftSettings(steps=6, rows=4, length=160, lr=1e-2, checkpoint_every=1)

    def stop(event: dict[str, Any]) -> None:
        if event["step"] == interrupted:
            raise KeyboardInterrupt

    assert math.ceil(len(pack(ENCODED, 160).samples) / 4) == 3
    whole, events = decoder_of(), []
    expected = trained(whole, tmp_path / "whole", settings, listen=events.append)
    with pytest.raises(KeyboardInterrupt):
        trained(decoder_of(), tmp_path / "cut", settings, listen=stop)
    again, rest = decoder_of(), []
    found = trained(again, tmp_path / "cut", settings, listen=rest.append)
    assert same_weights(again, whole)
    assert [e["loss"] for e in rest] == [e["loss"] for e in events[interrupted - 1 :]]
    for metrics in (expected, found):
        del metrics["seconds"]
    assert found == expected
    over = decoder_of()
    ended = trained(over, tmp_path / "cut", settings, listen=rest.append)
    assert same_weights(over, whole)
    assert {**ended, "seconds": 0} == {**expected, "seconds": 0}
    assert [point["step"] for point in expected["course"]] == list(range(1, 7))
    assert len(rest) == 6 - interrupted + 1, "a run at its end makes no step more"


@pytest.mark.parametrize("steps", [1, 2, 49, 50, 51, 99, 100, 101, 1234])
def test_a_course_is_all_of_a_run_in_a_few_points(steps: int) -> None:
    history = [{"step": i, "loss": 1.0 / i, **({"rewards/kl": float(i)} if i % 3 == 1 else {})} for i in range(1, steps + 1)]
    state = SimpleNamespace(log_history=[*history, {"train_runtime": 1.0}], global_step=steps, num_input_tokens_seen=7)
    heard = glue.ListenCallback("s", lambda event: None, {"rewards/kl": "kl", "grad": "norm"})
    found = glue.run_metrics(SimpleNamespace(state=state), heard, course=("kl", "norm"))
    points = found["course"]
    assert min(steps, 25) <= len(points) <= 50
    ends = [0, *(point["step"] for point in points)]
    assert ends[-1] == steps
    for begin, point in zip(ends, points, strict=False):
        some = history[begin : point["step"]]
        assert point["loss"] == pytest.approx(sum(entry["loss"] for entry in some) / len(some))
        measured = [entry["rewards/kl"] for entry in some if "rewards/kl" in entry]
        assert point.get("kl") == (pytest.approx(sum(measured) / len(measured)) if measured else None)
        assert "norm" not in point
    if steps <= 50:
        assert [point["loss"] for point in points] == [entry["loss"] for entry in history]
    assert found["kl"] == max(i for i in range(1, steps + 1) if i % 3 == 1)


def test_seeds_decide_alone(tmp_path: Path) -> None:
    runs = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        torch.manual_seed(len(runs))
        runs.append(decoder_of())
        trained(runs[-1], tmp_path / name, seed=seed)
    assert same_weights(runs[0], runs[1])
    assert not same_weights(runs[0], runs[2])


def test_micro_batches_add_up(tmp_path: Path) -> None:
    settings = {"steps": 3, "rows": 4, "length": 60, "concatenate": False}
    whole, parts = decoder_of(), decoder_of()
    trained(whole, tmp_path / "a", SftSettings(**settings))
    trained(parts, tmp_path / "b", SftSettings(**settings, micro=1))
    # Adam moves an entry by its whole step whatever its gradient, so where that is rounding noise the two may part.
    pairs = list(zip(whole.parameters(), parts.parameters(), strict=True))
    apart = sum(int(((one - other).abs() > 1e-5 * (1 + one.abs())).sum()) for one, other in pairs)
    assert apart <= 1e-3 * sum(one.numel() for one, _ in pairs)
    with torch.no_grad():
        losses = [float(plain_loss(decoder, list(range(len(ENCODED))))) for decoder in (whole, parts)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_a_half_written_checkpoint_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = decoder_of()
    trained(whole, tmp_path / "whole")
    write = glue.write_whole

    def fail(file: Path, content: str) -> None:
        if file.parent.name == "checkpoint-3":
            raise OSError("no space left")
        write(file, content)

    monkeypatch.setattr(glue, "write_whole", fail)
    with pytest.raises(OSError, match="no space"):
        trained(decoder_of(), tmp_path / "cut")
    monkeypatch.undo()
    assert (tmp_path / "cut" / "checkpoints" / "checkpoint-3").is_dir()
    assert glue.last_checkpoint(tmp_path / "cut") == tmp_path / "cut" / "checkpoints" / "checkpoint-2"
    assert not (tmp_path / "cut" / "checkpoints" / "checkpoint-3").exists()
    again = decoder_of()
    trained(again, tmp_path / "cut")
    assert same_weights(again, whole)


def test_a_folder_holds_one_run(tmp_path: Path) -> None:
    trained(decoder_of(), tmp_path)
    trained(decoder_of(), tmp_path, SftSettings(**{**SETTINGS.to_json(), "micro": 2, "checkpoint_every": 9}))
    for other in (
        lambda: trained(decoder_of(), tmp_path, seed=2),
        lambda: trained(decoder_of(1), tmp_path),
        lambda: trained(decoder_of(), tmp_path, SftSettings(**{**SETTINGS.to_json(), "lr": 1e-3})),
        lambda: run_sft(decoder_of(), TOKENIZER, SAMPLES[1:], SETTINGS, tmp_path, seed=1),
    ):
        with pytest.raises(SpecError, match=r"holds a run with another (seed|model|lr|data); name another folder$"):
            other()
    (tmp_path / "run.json").unlink()
    with pytest.raises(SpecError, match=r"holds a run without its run\.json"):
        trained(decoder_of(), tmp_path)


def test_losses_and_gradients_that_are_no_numbers_end_the_run_unsaved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = decoder_of()
    with torch.no_grad():
        decoder.backbone.norm_f.weight[0] = math.nan
    before = decoder.backbone.embeddings.weight.clone()
    with pytest.raises(Diverged, match="loss=nan: is not a number"):
        trained(decoder, tmp_path / "loss")
    assert torch.equal(decoder.backbone.embeddings.weight, before), "no step was made of it"
    assert not list((tmp_path / "loss").glob("checkpoints/*"))
    step = glue.Trainer._clip_grad_norm
    monkeypatch.setattr(glue.Trainer, "_clip_grad_norm", lambda *args: step(*args) * math.inf)
    with pytest.raises(Diverged, match=r"step=1: .*gradient norm inf"):
        trained(decoder_of(), tmp_path / "norm")
    assert not list((tmp_path / "norm").glob("checkpoints/*"))


def test_nothing_is_sent_printed_or_left_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("telemetry")

    monkeypatch.setattr(base_trainer, "send_telemetry", refuse)
    monkeypatch.delenv("CI", raising=False)
    states = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state())
    decoder = decoder_of()
    decoder.train()
    trained(decoder, tmp_path)
    assert decoder.training
    out, err = capfd.readouterr()
    assert out == err == ""
    assert random.getstate() == states[0]
    assert np.random.get_state()[1].tolist() == states[1]
    assert torch.equal(torch.get_rng_state(), states[2])
    assert not list(tmp_path.rglob("README.md"))


@pytest.mark.parametrize("linears", ["bf16", "fp32"])
def test_number_formats_are_those_of_pretraining_and_end_with_the_run(tmp_path: Path, linears: Any) -> None:
    decoder, kinds = decoder_of(), set()

    def look(event: dict[str, Any]) -> None:
        kinds.update(type(m).__name__ for m in decoder.modules() if isinstance(m, Linear))

    trained(decoder, tmp_path, SftSettings(**{**SETTINGS.to_json(), "linears": linears}), listen=look)
    assert kinds == {"Bf16Linear" if linears == "bf16" else "Linear"}
    assert {type(m) for m in decoder.modules() if isinstance(m, Linear)} == {Linear}
    assert all(p.dtype == torch.float32 for p in decoder.parameters())


def test_weight_decay_acts_on_matrices_alone(tmp_path: Path) -> None:
    with glue.contained():
        trainer = sft_trainer(decoder_of(), TOKENIZER, pack(ENCODED, 160), SETTINGS, tmp_path, seed=0)
    decayed = set(trainer.get_decay_parameter_names(trainer.model))
    free = {name.rpartition("layers.")[2] for name, _ in trainer.model.named_parameters() if name not in decayed}
    leaves = {name.partition(".")[2].removeprefix("mixer.") for name in free if name[0].isdigit()}
    assert leaves == {"norm.weight", "A_log", "D", "dt_bias", "conv1d.weight", "conv1d.bias"}


def nothing_learned() -> Packed:
    packed = pack(ENCODED, 160)
    packed.labels[:] = IGNORED
    return packed


def wrong_settings() -> Iterator[tuple[str, dict[str, Any]]]:
    yield "state one of the two", {}
    yield "state one of the two", {"steps": 1, "epochs": 1.0}
    yield "steps=0", {"steps": 0}
    yield "epochs=0", {"epochs": 0}
    yield "micro=3: must divide rows=4", {"steps": 1, "rows": 4, "micro": 3}
    yield "micro=8: must divide rows=4", {"steps": 1, "rows": 4, "micro": 8}
    yield "lr=0", {"steps": 1, "lr": 0}
    yield "lr=nan", {"steps": 1, "lr": math.nan}
    yield "schedule='step': must be one of constant, linear, cosine", {"steps": 1, "schedule": "step"}
    yield "linears='int8'", {"steps": 1, "linears": "int8"}
    yield "warmup=1.0", {"steps": 1, "warmup": 1.0}
    yield "beta2=True", {"steps": 1, "beta2": True}
    yield "length=1", {"steps": 1, "length": 1}
    yield "checkpoint_every=0", {"steps": 1, "checkpoint_every": 0}


@pytest.mark.parametrize(("message", "fields"), list(wrong_settings()))
def test_settings_that_cannot_be_are_refused(message: str, fields: dict[str, Any]) -> None:
    with pytest.raises(SpecError, match=message) as refused:
        SftSettings(**fields)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("message", "run"),
    [
        (r"samples=\[\]", lambda out: run_sft(decoder_of(), TOKENIZER, [], SETTINGS, out, seed=0)),
        ("length=8: every sample is longer", lambda out: trained(decoder_of(), out, SftSettings(steps=1, length=8))),
        ("no token of them", lambda out: train_packed(decoder_of(), TOKENIZER, nothing_learned(), SETTINGS, out, seed=0)),
        ("dtype=bfloat16", lambda out: trained(decoder_of().to(torch.bfloat16), out)),
    ],
)
def test_runs_that_cannot_be_leave_nothing(tmp_path: Path, message: str, run: Callable[[Path], object]) -> None:
    with pytest.raises(SpecError, match=message):
        run(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_long_samples_are_counted(tmp_path: Path) -> None:
    length = sorted(len(e.ids) for e in ENCODED)[-2]
    found = trained(decoder_of(), tmp_path, SftSettings(steps=1, rows=2, length=length))
    assert found["too_long"] == sum(len(e.ids) > length for e in ENCODED)

"""On-policy pairs: right before wrong, nothing where there is nothing to prefer, every answer accounted for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tandem.align.answers import read_answer
from tandem.align.data.episodes import Episode, run_episode, verify_episode
from tandem.align.data.tools import tool_asks, tool_samples
from tandem.align.pairs import choose_pairs, episode_pairs
from tandem.align.sample import Answer, Ask, Call
from tandem.spec.errors import SpecError


def ask(name: str) -> Ask:
    return Ask(id=name, kind="reasoning", task="t", messages=({"role": "user", "content": name},))


def answer(text: str, *, finished: bool = True) -> Answer:
    return Answer(text=text, reasoning="", content=text, closing_marks=1, finished=finished)


def verify(_: Ask, answer: Answer) -> float:
    """Right ones begin with r; halves are no rights."""
    return {"r": 1.0, "h": 0.5}.get(answer.text[:1], 0.0) if answer.finished else 0.0


GROUPS = st.lists(
    st.lists(st.tuples(st.sampled_from(["r1", "r2", "r3", "h1", "w1", "w2", "w3"]), st.booleans()), max_size=8), max_size=5
)


@given(GROUPS, st.integers(1, 4), st.integers(0, 3))
def test_laws(texts: list[list[tuple[str, bool]]], per_ask: int, seed: int) -> None:
    asks = [ask(f"q{i}") for i in range(len(texts))]
    answers = [[answer(text, finished=finished or text[0] == "r") for text, finished in group] for group in texts]
    chosen = choose_pairs(asks, answers, verify, per_ask=per_ask, seed=seed)
    counts = chosen.counts
    used = 0
    for question, group in zip(asks, answers, strict=True):
        pairs = [pair for pair in chosen.pairs if pair.ask == question]
        right = {a.text for a in group if a.text[0] == "r"}
        first = {a.text: a for a in reversed(group)}
        wrong = {text for text, a in first.items() if text[0] != "r" and a.finished}
        assert len(pairs) == min(per_ask, len(right), len(wrong))
        assert {pair.chosen for pair in pairs} <= right
        assert {pair.rejected for pair in pairs} <= wrong
        assert len({pair.chosen for pair in pairs}) == len({pair.rejected for pair in pairs}) == len(pairs)
        used += len(pairs)
    assert counts.asks == len(asks)
    assert counts.answers == sum(map(len, answers)) == counts.repeated + counts.cut + counts.unused + 2 * used
    assert counts.paired_asks == len({pair.ask.id for pair in chosen.pairs})
    assert counts.all_right == sum(all(a.text[0] == "r" for a in group) for group in answers)
    assert counts.all_wrong == sum(bool(group) and all(a.text[0] != "r" for a in group) for group in answers)
    assert counts.same_deed == counts.right_turn == counts.hidden == 0
    assert chosen == choose_pairs(asks, answers, verify, per_ask=per_ask, seed=seed)
    backwards = choose_pairs(asks[::-1], answers[::-1], verify, per_ask=per_ask, seed=seed)
    assert sorted(backwards.pairs, key=lambda p: p.ask.id) == sorted(chosen.pairs, key=lambda p: p.ask.id)


def test_seeds_choose_others() -> None:
    answers = [[answer(f"r{i}") for i in range(9)] + [answer(f"w{i}") for i in range(9)]]
    pairs = [choose_pairs([ask("q")], answers, verify, seed=seed).pairs[0] for seed in range(20)]
    found = {(pair.chosen, pair.rejected) for pair in pairs}
    assert len(found) > 5


def test_lists_belong_to_asks() -> None:
    with pytest.raises(SpecError, match=r"answers=1: lists of answers, of 2 asks"):
        choose_pairs([ask("a"), ask("b")], [[]], verify)
    with pytest.raises(SpecError, match="per_ask=0"):
        choose_pairs([], [], verify, per_ask=0)


def expert(question: Ask, index: int) -> list[Answer]:
    sample = [*tool_samples(index + 1, 3, off=0)][index]
    turns = [m for m in sample.messages if m["role"] == "assistant"]
    return [
        Answer(
            text=f"{m['reasoning_content']}</think>{m['content']}{m.get('tool_calls', '')}",
            reasoning=m["reasoning_content"],
            content=m["content"],
            calls=tuple(Call(**call["function"]) for call in m.get("tool_calls", ())),
            closing_marks=1,
        )
        for m in turns
    ]


def played(question: Ask, answers: Sequence[Answer]) -> Episode:
    left = iter(answers)
    return run_episode(question, lambda messages, tools: next(left), len(answers))


@pytest.fixture(scope="module")
def case() -> tuple[Ask, list[Answer]]:
    """A request of two calls, with the expert's turns."""
    asks = tool_asks(60, 3)
    index = next(i for i, a in enumerate(asks) if a.task == "two_calls" and sum(map(len, a.check["turns"])) == 2)
    return asks[index], expert(asks[index], index)


def other_call(answer: Answer) -> Answer:
    """The first argument missing: read by another text, answered by an error."""
    call = answer.calls[0]
    changed = replace(call, arguments=dict(list(call.arguments.items())[1:]))
    return replace(answer, calls=(changed,), text=answer.text + "!")


def test_pairs_are_made_where_episodes_part(case: tuple[Ask, list[Answer]]) -> None:
    question, turns = case
    for at in range(3):
        bad = other_call(turns[at]) if turns[at].calls else replace(turns[at], content="Nothing.", text="Nothing.")
        right, wrong = played(question, turns), played(question, [*turns[:at], bad, *turns[at + 1 :]])
        assert (verify_episode(right), verify_episode(wrong)) == (1.0, 0.0)
        chosen = episode_pairs([[wrong, right]], verify_episode)
        (pair,) = chosen.pairs
        assert pair.ask == replace(question, messages=right.prompts[at])
        assert sum(m["role"] == "assistant" for m in pair.ask.messages) == at
        assert (pair.chosen, pair.rejected) == (turns[at].text, bad.text)
        assert chosen.counts.paired_asks == 1


def test_thoughts_alone_are_no_ground(case: tuple[Ask, list[Answer]]) -> None:
    """The first turn differs in thoughts only, the mistake comes in the second."""
    question, turns = case
    musing = replace(turns[0], reasoning="Well.", text="Well." + turns[0].text)
    wrong = played(question, [musing, other_call(turns[1]), turns[2]])
    chosen = episode_pairs([[played(question, turns), wrong]], verify_episode)
    assert chosen.pairs == ()
    assert (chosen.counts.same_deed, chosen.counts.unused) == (1, 2)


def test_the_same_turns_make_one_pair(case: tuple[Ask, list[Answer]]) -> None:
    """Two wrong episodes that part from the right one by the same turn, and go on differently."""
    question, turns = case
    right = [played(question, turns), played(question, [*turns[:2], replace(turns[2], text=turns[2].text + " ")])]
    bad = other_call(turns[0])
    wrong = [played(question, [bad, *turns[1:]]), played(question, [bad, turns[2]])]
    chosen = episode_pairs([[*right, *wrong, right[0]]], verify_episode, per_ask=4)
    assert len(chosen.pairs) == 1
    assert (chosen.counts.repeated, chosen.counts.unused) == (1, 2)


def test_cut_episodes_are_not_learned_from(case: tuple[Ask, list[Answer]]) -> None:
    question, turns = case
    cut = played(question, [replace(turns[0], finished=False, text="Well")])
    chosen = episode_pairs([[played(question, turns), cut], []], verify_episode)
    assert chosen.pairs == ()
    assert (chosen.counts.cut, chosen.counts.all_right, chosen.counts.asks) == (1, 0, 1)


@pytest.mark.parametrize("text", ["Well", 'So.</think>\n<TOOLCALL>[{"name": "day", "argu', "So.</think>\nIt is"])
def test_what_was_cut_within_a_block_or_a_call_is_cut_not_malformed(case: tuple[Ask, list[Answer]], text: str) -> None:
    question, turns = case
    for at in range(3):
        cut = played(question, [*turns[:at], read_answer(text, thinking=True, finished=False)])
        assert cut.ended == "cut"
        chosen = episode_pairs([[played(question, turns), cut]], verify_episode)
        assert chosen.pairs == ()
        assert (chosen.counts.cut, chosen.counts.unused) == (1, 1)


def test_a_turn_that_is_exactly_right_is_never_rejected(case: tuple[Ask, list[Answer]]) -> None:
    """The right episode reads something more first; the wrong one makes the expert's call and goes wrong later."""
    question, turns = case
    read = replace(turns[0], calls=(replace(turns[0].calls[0], arguments={}),), text="Let me see." + turns[0].text)
    right, wrong = played(question, [read, *turns]), played(question, [turns[0], other_call(turns[1]), turns[2]])
    assert (verify_episode(right), verify_episode(wrong)) == (1.0, 0.0)
    chosen = episode_pairs([[right, wrong]], verify_episode)
    assert chosen.pairs == ()
    assert (chosen.counts.right_turn, chosen.counts.same_deed, chosen.counts.unused) == (1, 0, 2)
    assert len(episode_pairs([[right, played(question, turns), wrong]], verify_episode, per_ask=2).pairs) == 1


def test_what_the_text_hides_is_not_learned_from_its_text(case: tuple[Ask, list[Answer]]) -> None:
    """Wrong only by tokens that the text leaves out: as a text it would be a right answer, rejected."""

    def sound(_: Ask, answer: Answer) -> float:
        return float(answer.malformed is None and answer.text[0] == "r")

    hidden = replace(answer("r1"), malformed="holds <s>", hidden=True)
    for group in ([answer("r1"), hidden], [hidden, answer("r1")], [hidden, answer("r2")]):
        chosen = choose_pairs([ask("q")], [group], sound)
        assert chosen.pairs == ()
        assert (chosen.counts.hidden, chosen.counts.repeated, chosen.counts.unused) == (1, 0, 1)
    question, turns = case
    bad = replace(turns[1], malformed="holds <s>", hidden=True)
    chosen = episode_pairs([[played(question, turns), played(question, [turns[0], bad])]], verify_episode)
    assert chosen.pairs == ()
    assert chosen.counts.hidden == 1


def test_episodes_of_several_asks_are_refused(case: tuple[Ask, list[Answer]]) -> None:
    question, turns = case
    one = played(question, turns)
    with pytest.raises(SpecError, match="several asks"):
        episode_pairs([[one, replace(one, ask=replace(question, id="x"))]], verify_episode)

"""Scenarios at the simulated workplace: what a user wants, what an expert does, what the last words have to tell.

Kinds: `one_call`, `two_at_once` (two calls in one turn), `two_calls` (the second needs the first one's result), `failed_call`
(the response is an error that has to be told), `no_call` (nothing to be looked up), `missing_tool` and `missing_argument` (say
so, ask; calling would be guessing).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import count as numbers_from
from random import Random
from typing import Any, TypeAlias

from tandem.align.data.draws import number_of
from tandem.align.data.workplace import DAYS, HOURS, TOOLS, State
from tandem.align.sample import Call
from tandem.spec.units import require_int
from tandem.train.data.procedural import EVALUATION_SEED

ITEMS = (
    "bags",
    "balls",
    "books",
    "boxes",
    "cards",
    "chairs",
    "clocks",
    "cups",
    "desks",
    "keys",
    "lamps",
    "maps",
    "pens",
    "pots",
)
NAMES = (
    "Ann",
    "Bob",
    "Carl",
    "Dora",
    "Emma",
    "Finn",
    "Gina",
    "Hugo",
    "Ida",
    "Jack",
    "Kim",
    "Leo",
    "Mia",
    "Nina",
    "Otto",
    "Paul",
)
TITLES = ("break", "dinner", "lunch", "party", "review", "tea", "tour", "training", "visit")
SCENARIOS: Mapping[str, int] = {
    "one_call": 6,
    "two_at_once": 2,
    "two_calls": 6,
    "failed_call": 2,
    "no_call": 2,
    "missing_tool": 2,
    "missing_argument": 2,
}
"""How often each kind comes, in proportion."""
HELD_OUT = 8
"""Of so many texts of users one is kept for evaluation."""
_REFUSALS = ("no tool", "cannot", "can not", "can t", "unable", "not able")
_CLAIMS = ("done", "ordered", "booked", "sent", "told", "cancelled", "found")


@dataclass(frozen=True, kw_only=True, slots=True)
class Turn:
    """One turn of an expert: calls, or last words."""

    thought: str
    calls: tuple[Call, ...] = ()
    content: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Script:
    """A scenario: what is asked, what an expert does, and what the last words must and may say."""

    user: str
    tools: tuple[str, ...]
    state: State
    turns: tuple[Turn, ...]
    says: tuple[str, ...]
    may: tuple[str, ...] = ()
    never: tuple[str, ...] = (*_REFUSALS, "not", "sorry", "error")
    asks: bool = False


_Maker: TypeAlias = Callable[[Random, State], Script]


def _call(name: str, /, **arguments: Any) -> Call:
    return Call(name=name, arguments=arguments)


def _state(rng: Random) -> State:
    names = sorted(rng.sample(NAMES, 8))
    items = sorted(rng.sample(ITEMS, 10))
    events = []
    for day in sorted(DAYS):
        taken = {*HOURS[: rng.randrange(4)], *rng.sample(HOURS, 2)}
        events += [(day, hour, rng.choice(TITLES)) for hour in sorted(taken)]
    return State(
        phones=tuple(zip(names, rng.sample(range(100, 1000), len(names)), strict=True)),
        stock=tuple((item, rng.randrange(1, 20)) for item in items),
        events=tuple(events),
    )


def _beside(rng: Random, *needed: str) -> tuple[str, ...]:
    """The tools that are offered: those needed, and in half of the cases one more, in any order."""
    others = [name for name in TOOLS if name not in needed]
    offered = [*needed, *rng.sample(others, rng.randrange(2))]
    return tuple(rng.sample(offered, len(offered)))


def _free(state: State, day: str) -> list[int]:
    busy = {hour for other, hour, _ in state.events if other == day}
    return [hour for hour in HOURS if hour not in busy]


def _stock(rng: Random, state: State) -> Script:
    item, count = rng.choice(state.stock)
    user = rng.choice(("How many {} are there?", "How many {} do we have?", "Count the {}."))
    turns = (
        Turn(thought=f"I look up {item}.", calls=(_call("stock", item=item),)),
        Turn(thought=f"The count is {count}.", content=f"There are {count} {item}."),
    )
    return Script(user=user.format(item), tools=_beside(rng, "stock"), state=state, turns=turns, says=(str(count),))


def _phone(rng: Random, state: State) -> Script:
    name, phone = rng.choice(state.phones)
    user = rng.choice(("What is the phone of {}?", "How can I call {}?", "Find the number of {}."))
    turns = (
        Turn(thought=f"I look up {name}.", calls=(_call("phone", name=name),)),
        Turn(thought=f"The phone is {phone}.", content=f"The phone of {name} is {phone}."),
    )
    return Script(user=user.format(name), tools=_beside(rng, "phone"), state=state, turns=turns, says=(str(phone),))


def _order(rng: Random, state: State) -> Script:
    item, count = rng.choice(state.stock)[0], rng.randrange(2, 30)
    user = rng.choice(("Order {} {}.", "Please order {} {}.", "We need {} more {}."))
    turns = (
        Turn(thought=f"I order {count} {item}.", calls=(_call("order", item=item, count=count),)),
        Turn(thought="It is done.", content=f"Ordered {count} {item}."),
    )
    return Script(user=user.format(count, item), tools=_beside(rng, "order"), state=state, turns=turns, says=(str(count),))


def _book(rng: Random, state: State) -> Script:
    day, title = rng.choice(DAYS), rng.choice(TITLES)
    hour = rng.choice(_free(state, day))
    turns = (
        Turn(thought=f"I book {day} at {hour}.", calls=(_call("book", day=day, hour=hour, title=title),)),
        Turn(thought="It is done.", content=f"Booked {title} on {day} at {hour}."),
    )
    user = rng.choice(("Book {} on {} at {}.", "Put {} on {} at {}.")).format(title, day, hour)
    return Script(user=user, tools=_beside(rng, "book"), state=state, turns=turns, says=(title,))


def _cancel(rng: Random, state: State) -> Script:
    day, hour, title = rng.choice(state.events)
    turns = (
        Turn(thought=f"I cancel {day} at {hour}.", calls=(_call("cancel", day=day, hour=hour),)),
        Turn(thought=f"It was {title}.", content=f"Cancelled {title}."),
    )
    user = rng.choice(("Cancel {} at {}. What was it?", "Free {} at {}. What was there?")).format(day, hour)
    return Script(user=user, tools=_beside(rng, "cancel"), state=state, turns=turns, says=(title,))


def _counts(*counted: tuple[int, str]) -> tuple[str, ...]:
    """Which number belongs to which item: "3 pens" or "pens: 3"."""
    return tuple(f"{count} {item}|{item} {count}" for count, item in counted)


def _two_orders(rng: Random, state: State) -> Script:
    (one, _), (other, _) = rng.sample(state.stock, 2)
    first, second = rng.randrange(2, 30), rng.randrange(2, 30)
    calls = (_call("order", item=one, count=first), _call("order", item=other, count=second))
    turns = (
        Turn(thought=f"I order {first} {one} and {second} {other}.", calls=calls),
        Turn(thought="Both are done.", content=f"Ordered {first} {one} and {second} {other}."),
    )
    user = f"Order {first} {one} and {second} {other}."
    return Script(user=user, tools=("order",), state=state, turns=turns, says=_counts((first, one), (second, other)))


def _two_counts(rng: Random, state: State) -> Script:
    (one, first), (other, second) = rng.sample(state.stock, 2)
    turns = (
        Turn(thought=f"I look up {one} and {other}.", calls=(_call("stock", item=one), _call("stock", item=other))),
        Turn(thought=f"The counts are {first} and {second}.", content=f"There are {first} {one} and {second} {other}."),
    )
    user = f"How many {one} and {other} are there?"
    return Script(user=user, tools=("stock",), state=state, turns=turns, says=_counts((first, one), (second, other)))


def _restock(rng: Random, state: State) -> Script:
    item, there = rng.choice(state.stock)
    wanted = rng.randrange(5, 30)
    user = rng.choice(("Make it {} {}.", "We want {} {} in stock.")).format(wanted, item)
    look = Turn(thought=f"I count the {item} first.", calls=(_call("stock", item=item),))
    if there >= wanted:
        enough = Turn(thought=f"{there} is enough for {wanted}.", content=f"There are already {there} {item}.")
        return Script(
            user=user, tools=("stock", "order"), state=state, turns=(look, enough), says=(str(there), "already|enough")
        )
    short = wanted - there
    turns = (
        look,
        Turn(thought=f"{wanted} - {there} = {short}.", calls=(_call("order", item=item, count=short),)),
        Turn(thought="It is done.", content=f"Ordered {short} {item}."),
    )
    return Script(user=user, tools=("stock", "order"), state=state, turns=turns, says=(str(short),), may=(str(there),))


def _first_free(rng: Random, state: State) -> Script:
    day, title = rng.choice(DAYS), rng.choice(TITLES)
    hour = _free(state, day)[0]
    busy = [other for other in HOURS if other < hour]
    user = rng.choice(("Book {} at the first free hour of {}.", "Put {} on {} as early as you can.")).format(title, day)
    steps = "".join(f"{other} is busy, " for other in busy)
    turns = (
        Turn(thought=f"I look at {day} first.", calls=(_call("day", day=day),)),
        Turn(thought=f"{steps}{hour} is free.", calls=(_call("book", day=day, hour=hour, title=title),)),
        Turn(thought="It is done.", content=f"Booked {title} on {day} at {hour}."),
    )
    return Script(user=user, tools=("day", "book"), state=state, turns=turns, says=(str(hour),))


def _tell(rng: Random, state: State) -> Script:
    name, phone = rng.choice(state.phones)
    text = rng.choice(("bring the {}", "the {} are here", "we need {}", "count the {}")).format(rng.choice(ITEMS))
    turns = (
        Turn(thought=f"I look up {name} first.", calls=(_call("phone", name=name),)),
        Turn(thought=f"The phone is {phone}.", calls=(_call("send", phone=phone, text=text),)),
        Turn(thought="It is done.", content=f"Told {name}."),
    )
    user = rng.choice(("Tell {}: {}", "Write to {}: {}")).format(name, text)
    return Script(user=user, tools=("phone", "send"), state=state, turns=turns, says=(name,), may=(str(phone),))


def _unknown_item(rng: Random, state: State) -> Script:
    item = rng.choice([item for item in ITEMS if item not in dict(state.stock)])
    seen = _stock(rng, replace(state, stock=((item, 1),)))
    return _failed(seen, state, thought="The item is unknown.", content=f"The item {item} is unknown.", says="unknown|not")


def _unknown_name(rng: Random, state: State) -> Script:
    name = rng.choice([name for name in NAMES if name not in dict(state.phones)])
    seen = _phone(rng, replace(state, phones=((name, 100),)))
    return _failed(seen, state, thought="The name is unknown.", content=f"The name {name} is unknown.", says="unknown|not")


def _busy(rng: Random, state: State) -> Script:
    seen = _book(rng, state)
    (day, hour, title) = seen.turns[0].calls[0].arguments.values()
    taken = tuple(sorted((*state.events, (day, hour, title))))
    content = f"The hour {hour} on {day} is busy."
    return _failed(seen, replace(state, events=taken), thought="The hour is busy.", content=content, says="busy|taken")


def _failed(script: Script, state: State, *, thought: str, content: str, says: str) -> Script:
    """The script in a state where its call fails: nothing in the request tells, only the response does."""
    turns = (script.turns[0], Turn(thought=thought, content=content))
    return replace(script, state=state, turns=turns, says=(says,), never=_CLAIMS)


def _sum(rng: Random, state: State) -> Script:
    one, other = rng.randrange(1, 20), rng.randrange(1, 20)
    turns = (Turn(thought=f"{one} + {other} = {one + other}.", content=str(one + other)),)
    tools = tuple(rng.sample(list(TOOLS), rng.randrange(1, 3)))
    return Script(user=f"What is {one} + {other}?", tools=tools, state=state, turns=turns, says=(str(one + other),))


def _thanks(rng: Random, state: State) -> Script:
    user = rng.choice(("Thank you, I am {}.", "Thanks from {}.", "{} says thanks.")).format(rng.choice(NAMES))
    turns = (Turn(thought="Nothing is to be done.", content="You are welcome."),)
    tools = tuple(rng.sample(list(TOOLS), rng.randrange(1, 3)))
    return Script(user=user, tools=tools, state=state, turns=turns, says=("welcome",))


def _missing_tool(rng: Random, state: State) -> Script:
    script = rng.choice(MAKERS["one_call"])(rng, state)
    name = script.turns[0].calls[0].name
    tools = tuple(rng.sample([other for other in TOOLS if other != name], rng.randrange(1, 3)))
    turns = (Turn(thought=f"{', '.join(tools)}: no tool for it.", content="I have no tool for that."),)
    return replace(script, tools=tools, turns=turns, says=("|".join(_REFUSALS),), never=_CLAIMS)


def _missing_argument(rng: Random, state: State) -> Script:
    day, title, (item, _) = rng.choice(DAYS), rng.choice(TITLES), rng.choice(state.stock)
    user, tool, question, says = rng.choice(
        (
            (
                rng.choice(("Order {}.", "Please order some {}.")).format(item),
                "order",
                f"How many {item}?",
                "many|count|number",
            ),
            (rng.choice(("Book {} on {}.", "Put {} on {}.")).format(title, day), "book", "At what hour?", "hour|time|when"),
            (
                rng.choice(("Cancel something on {}.", "Free an hour on {}.")).format(day),
                "cancel",
                "At what hour?",
                "hour|time|when",
            ),
        )
    )
    missing = "count" if tool == "order" else "hour"
    turns = (Turn(thought=f"The {missing} is missing.", content=question),)
    return Script(user=user, tools=(tool,), state=state, turns=turns, says=(says,), never=_CLAIMS, asks=True)


MAKERS: Mapping[str, tuple[_Maker, ...]] = {
    "one_call": (_stock, _phone, _order, _book, _cancel),
    "two_at_once": (_two_orders, _two_counts),
    "two_calls": (_restock, _first_free, _tell),
    "failed_call": (_unknown_item, _unknown_name, _busy),
    "no_call": (_sum, _thanks),
    "missing_tool": (_missing_tool,),
    "missing_argument": (_missing_argument,),
}


def is_held_out(user: str) -> bool:
    """Whether a user's text is one of those that only evaluation uses."""
    return (number_of(user) >> 56) % HELD_OUT == 0


def scripts(seed: int) -> Iterator[tuple[str, str, Script]]:
    """Id, kind and script of the scenarios of a seed, without end; scenario i comes from a stream of its own.

    A user's text belongs to training or to evaluation (seeds from `EVALUATION_SEED` on) by its digest, so that no evaluated
    text was ever learned.
    """
    require_int("seed", seed, low=0, high=2**62)
    kinds = list(SCENARIOS)
    for i in numbers_from():
        rng = Random(f"tools:{seed}:{i}")
        kind = rng.choices(kinds, [SCENARIOS[kind] for kind in kinds])[0]
        make = rng.choice(MAKERS[kind])
        script = make(rng, _state(rng))
        while is_held_out(script.user) != (seed >= EVALUATION_SEED):
            script = make(rng, _state(rng))
        yield f"tools:{seed}:{i}", kind, script

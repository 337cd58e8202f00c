"""Answers a question from a story's text alone: the generator's independent witness.

It knows nothing of the generator's world; it reads sentences in order with regular expressions
and keeps the latest word on everything.
"""

from __future__ import annotations

import re

UNKNOWN = "I do not know."

_NAME = r"(?P<who>[A-Z][a-z]+)"
_FOUND = re.compile(r"found (?P<phrase>an? (?P<color>\w+) (?P<noun>\w+))")
_MOVED = re.compile(rf"(?:(?:Then|Later) )?{_NAME} (?:went|walked|ran) to the (?P<place>\w+)")


class Reader:
    """What a careful reader knows at the end of ``text``."""

    def __init__(self, text: str) -> None:
        self.place: dict[str, str] = {}
        self.holder: dict[str, str] = {}
        self.color: dict[str, str] = {}
        self.found: dict[str, str] = {}
        self.ate: dict[str, str] = {}
        self.feels: dict[str, str] = {}
        self.pet: dict[str, tuple[str, str]] = {}
        self.people: list[str] = []
        self.text = text
        self.deeds: dict[str, list[str]] = {}
        self.weather = ""
        subject = ""
        for sentence in text.removesuffix(".").split(". "):
            subject = self._read(sentence, subject)
            self.deeds.setdefault(subject, []).append(f"{sentence}.")

    def _read(self, sentence: str, subject: str) -> str:
        """Takes in one sentence; returns whom a pronoun in the next one means."""
        if (hit := re.search(rf"(?:girl|boy|friend) named {_NAME}", sentence)) or (
            hit := re.match(rf"(?:Her|His) name was {_NAME}", sentence)
        ):
            self.people.append(hit["who"])
            return hit["who"]
        if hit := re.match(r"It was a (\w+) day", sentence):
            # "It was a good day" is how a story ends, not weather.
            self.weather = self.weather if hit[1] == "good" else hit[1]
        if hit := re.match(rf"{_NAME} had an? \w+ (\w+) named (\w+)", sentence):
            subject = hit["who"]
            self.pet[subject] = (hit[2], hit[3])
        if hit := _MOVED.match(sentence):
            subject = hit["who"]
            self.place[subject] = hit["place"]
        elif hit := re.match(rf"{_NAME} (?:found|gave|ate|was|felt) ", sentence):
            subject = hit["who"]
        if hit := _FOUND.search(sentence):
            self.found[subject] = hit["phrase"]
            self.holder[hit["noun"]] = subject
            self.color[hit["noun"]] = hit["color"]
        if hit := re.match(rf"{_NAME} gave the (\w+) to (\w+)", sentence):
            assert self.holder[hit[2]] == hit["who"], f"gave what they did not have: {sentence}"
            self.holder[hit[2]] = hit[3]
        if hit := re.match(rf"{_NAME} ate (an? (\w+))", sentence):
            self.ate[hit["who"]] = hit[2]
        if hit := re.match(rf"{_NAME} (?:was|felt) (\w+)$", sentence):
            self.feels[hit["who"]] = hit[2]
        return subject

    def answer(self, question: str) -> str:
        """The answer to ``question``, as the generator would word it."""
        for pattern, method in _QUESTIONS:
            if hit := pattern.fullmatch(question):
                return method(self, *hit.groups())
        raise AssertionError(f"no reader for {question!r}")

    def _about(self) -> str:
        return f"The story is about {self.people[0]} and {self.people[1]}."

    def _friend(self, name: str) -> str:
        (other,) = set(self.people) - {name}
        return f"{other} is the friend of {name}."

    def _weather(self) -> str:
        return f"It was a {self.weather} day."

    def _where(self, name: str) -> str:
        return f"{name} is at the {self.place[name]}." if name in self.place else UNKNOWN

    def _found(self, name: str) -> str:
        return f"{name} found {self.found[name]}."

    def _ate(self, name: str) -> str:
        return f"{name} ate {self.ate[name]}."

    def _who_ate(self, food: str) -> str:
        (name,) = (who for who, what in self.ate.items() if what.split()[1] == food)
        return f"{name} ate the {food}."

    def _feels(self, name: str) -> str:
        return f"{name} feels {self.feels[name]}."

    def _pet(self, animal: str) -> str:
        (name,) = (name for kind, name in self.pet.values() if kind == animal)
        return f"The {animal} is named {name}."

    def _owner(self, phrase: str) -> str:
        (owner,) = (who for who, (kind, _) in self.pet.items() if kind == phrase.split()[1])
        return f"{owner} has {phrase}."

    def _color(self, noun: str) -> str:
        return f"The {noun} is {self.color[noun]}."

    def _holder(self, noun: str) -> str:
        return f"{self.holder[noun]} has the {noun}."

    def _again(self) -> str:
        return self.text

    def _knows(self, name: str) -> str:
        return " ".join(self.deeds[name])


_QUESTIONS = tuple(
    (re.compile(pattern), method)
    for pattern, method in (
        (r"Who is the story about\?", Reader._about),
        (r"Who is the friend of (\w+)\?", Reader._friend),
        (r"How was the weather\?", Reader._weather),
        (r"Where is (\w+)\?", Reader._where),
        (r"What did (\w+) find\?", Reader._found),
        (r"What did (\w+) eat\?", Reader._ate),
        (r"Who ate the (\w+)\?", Reader._who_ate),
        (r"How does (\w+) feel\?", Reader._feels),
        (r"What is the name of the (\w+)\?", Reader._pet),
        (r"Who has (an? \w+)\?", Reader._owner),
        (r"What color is the (\w+)\?", Reader._color),
        (r"Who has the (\w+)\?", Reader._holder),
        (r"Say that again\.", Reader._again),
        (r"What do you know about (\w+)\?", Reader._knows),
    )
)

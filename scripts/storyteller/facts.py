"""General questions with one fixed answer each: the model learns these by heart."""

from __future__ import annotations

from storyteller.lexicon import with_article

_OPPOSITES = (
    ("hot", "cold"), ("big", "small"), ("up", "down"), ("day", "night"), ("happy", "sad"),
    ("fast", "slow"), ("old", "young"), ("open", "closed"), ("black", "white"), ("left", "right"),
)  # fmt: skip
_COLORS = (
    ("grass", "green"), ("snow", "white"), ("the sky", "blue"), ("the sun", "yellow"),
    ("a banana", "yellow"), ("a carrot", "orange"), ("coal", "black"), ("milk", "white"),
)  # fmt: skip
_SOUNDS = (
    ("cow", "moo"), ("dog", "woof"), ("cat", "meow"), ("duck", "quack"), ("sheep", "baa"),
    ("lion", "roar"), ("frog", "croak"), ("mouse", "squeak"),
)  # fmt: skip
_BABIES = (
    ("dog", "puppy"), ("cat", "kitten"), ("cow", "calf"), ("horse", "foal"), ("sheep", "lamb"),
    ("duck", "duckling"),
)  # fmt: skip
_CAPITALS = (
    ("France", "Paris"), ("Italy", "Rome"), ("Spain", "Madrid"), ("England", "London"),
    ("Germany", "Berlin"), ("Japan", "Tokyo"), ("Egypt", "Cairo"), ("Greece", "Athens"),
)  # fmt: skip
_LEGS = (("dog", "four"), ("bird", "two"), ("spider", "eight"), ("horse", "four"), ("bee", "six"))
_NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
_SEASONS = ("spring", "summer", "autumn", "winter")


def _successors(cycle: tuple[str, ...]) -> list[tuple[str, str]]:
    return list(zip(cycle, cycle[1:] + cycle[:1], strict=True))


def _all() -> dict[str, str]:
    facts = {
        "Who are you?": "I am a storyteller.",
        "What is your name?": "My name is Storyteller.",
        "What can you do?": "I can tell a story and answer questions about it.",
        "Hello!": "Hello! Do you want to hear a story?",
        "Hi!": "Hello! Do you want to hear a story?",
        "How are you?": "I am fine, thank you.",
        "Thank you.": "You are welcome.",
        "Goodbye.": "Goodbye! Come back soon.",
        "How many days are in a week?": "There are seven days in a week.",
        "How many months are in a year?": "There are twelve months in a year.",
    }
    for word, opposite in _OPPOSITES:
        facts[f"What is the opposite of {word}?"] = f"The opposite of {word} is {opposite}."
    for noun, color in _COLORS:
        facts[f"What color is {noun}?"] = f"{noun[0].upper()}{noun[1:]} is {color}."
    for animal, sound in _SOUNDS:
        one = with_article(animal)
        facts[f"What does {one} say?"] = f"{one.capitalize()} says {sound}."
    for animal, young in _BABIES:
        facts[f"What is a baby {animal}?"] = f"A baby {animal} is a {young}."
    for country, capital in _CAPITALS:
        facts[f"What is the capital of {country}?"] = f"The capital of {country} is {capital}."
    for animal, count in _LEGS:
        facts[f"How many legs does a {animal} have?"] = f"A {animal} has {count} legs."
    for first, second in _successors(_DAYS):
        facts[f"What day comes after {first}?"] = f"{second} comes after {first}."
    for first, second in _successors(_SEASONS):
        facts[f"What comes after {first}?"] = f"{second.capitalize()} comes after {first}."
    for i, left in enumerate(_NUMBERS[:5], start=1):
        for j, right in enumerate(_NUMBERS[:5], start=1):
            total = _NUMBERS[i + j - 1]
            facts[f"What is {left} plus {right}?"] = f"{left.capitalize()} plus {right} is {total}."
    return facts


FACTS: dict[str, str] = _all()
"""Question to answer."""

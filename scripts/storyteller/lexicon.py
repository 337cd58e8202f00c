"""The words a story is made of."""

from __future__ import annotations

GIRLS = ("Anna", "Lily", "Mia", "Sara", "Emma", "Rosa", "Nina", "Kate", "Lucy", "Ella")
BOYS = ("Tom", "Ben", "Max", "Sam", "Leo", "Jack", "Tim", "Dan", "Paul", "Finn")
ANIMALS = ("dog", "cat", "bird", "rabbit", "horse", "duck", "mouse", "frog", "goat", "fox")
PET_NAMES = ("Rex", "Coco", "Bella", "Milo", "Luna", "Pip", "Oscar", "Daisy", "Toby", "Ruby")
SIZES = ("small", "big", "old", "young", "friendly", "clever")
COLORS = ("red", "blue", "green", "yellow", "white", "black", "brown", "pink")
THINGS = (
    "ball", "kite", "hat", "book", "drum", "cup", "key", "box", "coin", "lamp",
    "bell", "doll", "boat", "shell", "stone", "flower", "bag", "ring", "scarf", "spoon",
)  # fmt: skip
PLACES = (
    "park", "garden", "school", "market", "forest", "beach", "river", "library", "farm", "lake",
    "barn", "tower", "village", "bakery", "castle", "bridge",
)  # fmt: skip
FOODS = (
    "apple", "pear", "cookie", "banana", "sandwich", "pancake", "carrot", "plum", "egg", "muffin",
)  # fmt: skip
FEELINGS = ("happy", "sad", "tired", "proud", "excited", "scared", "calm", "angry")
WEATHERS = ("sunny", "rainy", "windy", "snowy", "cloudy", "warm", "cold")


def with_article(noun_phrase: str) -> str:
    """``noun_phrase`` behind the indefinite article it takes: "an apple", "a red apple"."""
    return f"{'an' if noun_phrase[0] in 'aeiou' else 'a'} {noun_phrase}"

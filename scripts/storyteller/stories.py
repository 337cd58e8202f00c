"""Short stories, and the questions their own text answers.

A story is written event by event over a small world: who is where, who holds what, who feels how.
A question is asked of that world once the story is over, so an answer is right by construction,
and every answer can be read off the sentences alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from random import Random

from storyteller import lexicon
from storyteller.lexicon import with_article

UNKNOWN = "I do not know."

DOUBT = 0.3
"""How often somebody is asked for whose place the story does not tell."""

FILLERS = (
    "The children laughed.",
    "They sang a song.",
    "They played all day.",
    "A bird sang in a tree.",
    "They told each other a story.",
    "It was very quiet.",
    "They had a lot of fun.",
    "Everyone smiled.",
)
ENDINGS = (
    "It was a good day. The end.",
    "They were good friends. The end.",
    "Everyone had fun. The end.",
    "They never forgot that day. The end.",
)


@dataclass(frozen=True)
class Question:
    """One question with its only right answer; ``kind`` groups them for measuring."""

    kind: str
    text: str
    answer: str


@dataclass
class Person:
    """What the world knows of one person so far."""

    name: str
    is_girl: bool
    place: str | None = None
    feeling: str | None = None
    found: str | None = None
    eaten: str | None = None
    pet: tuple[str, str] | None = None
    """Animal and name."""

    @property
    def pronoun(self) -> str:
        return "she" if self.is_girl else "he"


@dataclass
class Thing:
    """An object someone found: its colour stays, its holder changes."""

    noun: str
    color: str
    holder: Person


@dataclass
class Story:
    """A finished story: sentences in order, and the world they leave behind."""

    sentences: list[str] = field(default_factory=list)
    people: list[Person] = field(default_factory=list)
    things: list[Thing] = field(default_factory=list)
    weather: str | None = None
    deeds: dict[str, list[str]] = field(default_factory=dict)
    """Sentences by the name of the person they are about."""
    introduced: bool = False
    """Whether the story says who it is about."""

    @property
    def text(self) -> str:
        return " ".join(self.sentences)

    @property
    def words(self) -> set[str]:
        """Names and nouns that a later story in the same conversation should not use again."""
        used = {person.name for person in self.people} | {thing.noun for thing in self.things}
        for person in self.people:
            used.update(person.pet or ())
        return used


class StoryWriter:
    """Writes one story.

    Args:
        rng: the only source of chance; equal generators write equal stories.
        avoid: names and nouns not to use.
        names: names that must appear, at most two.
        animal: the pet that must appear, if any.
    """

    def __init__(
        self,
        rng: Random,
        avoid: Iterable[str] = (),
        names: tuple[str, ...] = (),
        animal: str | None = None,
    ) -> None:
        self.rng = rng
        self.avoid = frozenset(avoid)
        self.names = names
        self.animal = animal
        self.story = Story()

    def write(self) -> Story:
        """A whole story: an opening, three to seven events, an ending."""
        self._cast(2)
        self._open()
        # Everyone goes somewhere first, so that "where" can be asked of everyone.
        for person in self.rng.sample(self.story.people, len(self.story.people)):
            self._move(person)
        for _ in range(self.rng.randint(3, 7)):
            self._happen()
            if self.rng.random() < 0.08:
                self._say(self.rng.choice(FILLERS))
        self._say(self.rng.choice(ENDINGS))
        return self.story

    def write_snippet(self) -> Story:
        """A few events and nothing around them, as somebody might type into a chat.

        Half of the snippets tell the same kind of event of several people, so that only a reader
        who keeps people apart can answer; what they found may then go from hand to hand.
        """
        if self.rng.random() < 0.5:
            self._cast(self.rng.randint(2, 4))
            event = self.rng.choice(
                (self._move, self._find, self._find, self._eat, self._feel, self._get_pet)
            )
            for person in self.story.people:
                event(person)
            for _ in range(self.rng.randint(0, 3) if self.story.things else 0):
                self._give(self.rng.choice([thing.holder for thing in self.story.things]))
        else:
            self._cast(2)
            for _ in range(self.rng.randint(1, 4)):
                self._happen()
        return self.story

    def _happen(self) -> None:
        """One event; those that cannot happen now (giving without having) are drawn again."""
        events: tuple[Callable[[Person], bool], ...] = (
            self._move, self._move, self._find, self._find, self._give, self._eat, self._feel,
        )  # fmt: skip
        while not self.rng.choice(events)(self.rng.choice(self.story.people)):
            pass

    def _say(self, sentence: str, doer: Person | None = None) -> None:
        self.story.sentences.append(sentence)
        if doer:
            self.story.deeds.setdefault(doer.name, []).append(sentence)

    def _pick(self, words: Iterable[str]) -> str:
        used = self.avoid | self.story.words
        return self.rng.choice([word for word in words if word not in used])

    def _cast(self, count: int) -> None:
        everyone = lexicon.GIRLS + lexicon.BOYS
        names = list(self.names)
        while len(names) < count:
            names.append(self._pick(name for name in everyone if name not in names))
        self.story.people = [Person(name, name in lexicon.GIRLS) for name in names]

    def _open(self) -> None:
        self.story.introduced = True
        hero, friend = self.story.people
        kind, other_kind = ("girl" if p.is_girl else "boy" for p in (hero, friend))
        she, her = ("She", "Her") if hero.is_girl else ("He", "His")
        self._say(
            self.rng.choice(
                (
                    f"Once upon a time there was a {kind} named {hero.name}.",
                    f"There once was a little {kind}. {her} name was {hero.name}.",
                    f"One day a {kind} named {hero.name} woke up early.",
                )
            )
        )
        self._say(
            self.rng.choice(
                (
                    f"{she} had a friend named {friend.name}.",
                    f"{her} best friend was a {other_kind} named {friend.name}.",
                )
            )
        )
        if self.animal or self.rng.random() < 0.5:
            self._get_pet(hero if self.animal else self.rng.choice(self.story.people))
        if self.rng.random() < 0.6:
            self.story.weather = self.rng.choice(lexicon.WEATHERS)
            self._say(f"It was a {self.story.weather} day.")

    def _get_pet(self, person: Person) -> bool:
        animal = self.animal or self._pick(lexicon.ANIMALS)
        pet_name = self._pick(lexicon.PET_NAMES)
        look = with_article(f"{self.rng.choice(lexicon.SIZES)} {animal}")
        person.pet = (animal, pet_name)
        self._say(f"{person.name} had {look} named {pet_name}.", person)
        return True

    def _move(self, person: Person) -> bool:
        place = self.rng.choice([p for p in lexicon.PLACES if p != person.place])
        person.place = place
        verb = self.rng.choice(("went", "walked", "ran"))
        then = self.rng.choice(("", "", "Then ", "Later "))
        joined = person.found is None and self.rng.random() < 0.3
        if not joined:
            self._say(f"{then}{person.name} {verb} to the {place}.", person)
            return True
        thing = self._new_thing(person)
        if self.rng.random() < 0.5:
            self._say(f"{then}{person.name} {verb} to the {place} and found {thing}.", person)
        else:
            self._say(f"{then}{person.name} {verb} to the {place}.", person)
            self._say(f"There {person.pronoun} found {thing}.", person)
        return True

    def _new_thing(self, person: Person) -> str:
        noun = self._pick(lexicon.THINGS)
        color = self.rng.choice(lexicon.COLORS)
        self.story.things.append(Thing(noun, color, person))
        person.found = with_article(f"{color} {noun}")
        return person.found

    def _find(self, person: Person) -> bool:
        if person.found:
            return False
        self._say(f"{person.name} found {self._new_thing(person)}.", person)
        return True

    def _give(self, person: Person) -> bool:
        held = [thing for thing in self.story.things if thing.holder is person]
        if not held:
            return False
        thing = self.rng.choice(held)
        receiver = self.rng.choice([p for p in self.story.people if p is not person])
        thing.holder = receiver
        self._say(f"{person.name} gave the {thing.noun} to {receiver.name}.", person)
        return True

    def _eat(self, person: Person) -> bool:
        if person.eaten:
            return False
        eaten = {p.eaten for p in self.story.people}
        person.eaten = self.rng.choice([f for f in lexicon.FOODS if f not in eaten])
        self._say(f"{person.name} ate {with_article(person.eaten)}.", person)
        return True

    def _feel(self, person: Person) -> bool:
        feeling = self.rng.choice([f for f in lexicon.FEELINGS if f != person.feeling])
        person.feeling = feeling
        self._say(f"{person.name} {self.rng.choice(('was', 'felt'))} {feeling}.", person)
        return True


def questions_about(story: Story, rng: Random, known: Iterable[str] = ()) -> list[Question]:
    """Every question the story answers, now and then one it does not, in random order.

    Args:
        story: the story to ask about.
        rng: the source of chance.
        known: names from earlier in the conversation; none of them is a stranger.
    """
    asked: list[Question] = []

    def ask(kind: str, text: str, answer: str) -> None:
        asked.append(Question(kind, text, answer))

    hero, friend = story.people[:2]
    if story.introduced:
        both = f"{hero.name} and {friend.name}"
        ask("about", "Who is the story about?", f"The story is about {both}.")
        who = f"the friend of {hero.name}"
        ask("friend", f"Who is {who}?", f"{friend.name} is {who}.")
    if story.weather:
        ask("weather", "How was the weather?", f"It was a {story.weather} day.")
    for person in story.people:
        name = person.name
        if person.place:
            ask("where", f"Where is {name}?", f"{name} is at the {person.place}.")
        elif rng.random() < DOUBT:
            ask("unknown", f"Where is {name}?", UNKNOWN)
        if person.found:
            ask("found", f"What did {name} find?", f"{name} found {person.found}.")
        if person.eaten:
            ask("ate", f"What did {name} eat?", f"{name} ate {with_article(person.eaten)}.")
            ask("who ate", f"Who ate the {person.eaten}?", f"{name} ate the {person.eaten}.")
        if person.feeling:
            ask("feels", f"How does {name} feel?", f"{name} feels {person.feeling}.")
        if person.pet:
            animal, pet_name = person.pet
            ask("pet", f"What is the name of the {animal}?", f"The {animal} is named {pet_name}.")
            ask("owner", f"Who has {with_article(animal)}?", f"{name} has {with_article(animal)}.")
    for thing in story.things:
        ask("color", f"What color is the {thing.noun}?", f"The {thing.noun} is {thing.color}.")
        ask("holder", f"Who has the {thing.noun}?", f"{thing.holder.name} has the {thing.noun}.")
    if not story.introduced:
        ask("again", "Say that again.", story.text)
        for name, deeds in story.deeds.items():
            ask("deeds", f"What do you know about {name}?", " ".join(deeds))
    elif rng.random() < DOUBT:
        met = {person.name for person in story.people}.union(known)
        stranger = rng.choice([name for name in lexicon.GIRLS + lexicon.BOYS if name not in met])
        ask("unknown", f"Where is {stranger}?", UNKNOWN)
    rng.shuffle(asked)
    return asked

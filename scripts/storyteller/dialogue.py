"""Training documents: stories alone, and conversations around them.

A conversation is ``Q: <user> A: <model></s>Q: <user> A: <model></s>...`` on one line, so a turn
can be typed as a plain prompt, and the chat template writes exactly the same text.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

from storyteller import lexicon
from storyteller.facts import FACTS
from storyteller.lexicon import with_article
from storyteller.stories import Question, Story, StoryWriter, questions_about

EOS = "</s>"

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ 'Q: ' + message['content'] | trim }}"
    "{% elif message['role'] == 'assistant' %}"
    "{{ ' A: ' + message['content'] | trim + eos_token }}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ ' A:' }}{% endif %}"
)
"""The same form for transformers; messages of other roles (system, tool) are left out."""

LISTENING = "I see."
APPLAUSE = "That is a nice story."
"""What the model says to a part of a story, and to its end."""
SLOPPY = 0.15
"""Share of the user's turns without a capital at the start or a mark at the end."""


ANSWER_WEIGHT = 1.0
NARRATION_WEIGHT = 0.1
QUESTION_WEIGHT = 0.02
"""Weights of tokens in the loss. An answer follows from what was said; most of a story is free
choice and nearly all of a question, which only adds noise to what the model learns from answers."""


@dataclass(frozen=True)
class Segment:
    """A piece of a document and the weight of its tokens in the loss."""

    text: str
    weight: float


Document = list[Segment]


def turn(
    user: str,
    answer: str,
    lead: str = "",
    user_weight: float = QUESTION_WEIGHT,
    answer_weight: float = ANSWER_WEIGHT,
) -> Document:
    """One exchange; ``lead`` is put before its ``Q:``."""
    asked = Segment(f"{lead}Q: {user} A:", user_weight)
    return [asked, Segment(f" {answer}{EOS}", answer_weight)]


def answer_prompt(story: str, question: str) -> str:
    """The plain prompt that asks ``question`` about ``story`` (or about nothing, if empty)."""
    return f"{story} Q: {question} A:" if story else f"Q: {question} A:"


def _typed(rng: Random, text: str) -> str:
    """``text`` as somebody in a hurry might type it, now and then."""
    if rng.random() >= SLOPPY:
        return text
    if rng.random() < 0.5:
        text = text[0].lower() + text[1:]
    return text[:-1] if rng.random() < 0.5 else text


def _asked(rng: Random, question: Question, lead: str = "") -> Document:
    return turn(_typed(rng, question.text), question.answer, lead)


def _request(rng: Random, again: bool) -> tuple[str, tuple[str, ...], str | None]:
    """A wish for a story: its words, the names and the animal it asks for."""
    a = "another" if again else "a"
    hero, friend = rng.sample(lexicon.GIRLS + lexicon.BOYS, 2)
    animal = rng.choice(lexicon.ANIMALS)
    polite = rng.choice(("Tell me", "Please tell me"))
    return rng.choice(
        (
            (f"{polite} {a} story.", (), None),
            (f"{polite} {a} story about {hero}.", (hero,), None),
            (f"{polite} {a} story about {hero} and {friend}.", (hero, friend), None),
            (f"{polite} {a} story about {with_article(animal)}.", (), animal),
            (f"{polite} {a} story about {hero} and {with_article(animal)}.", (hero,), animal),
        )
    )


def _questions(story: Story, rng: Random, known: set[str]) -> Iterator[Question]:
    """Most of a story's questions, with a general one here and there."""
    asked = questions_about(story, rng, known)
    for question in asked[: rng.randint(4, 9)]:
        yield question
        if rng.random() < 0.1:
            yield fact(rng)


def fact(rng: Random) -> Question:
    """A general question."""
    text = rng.choice(list(FACTS))
    return Question("fact", text, FACTS[text])


def _plain(rng: Random) -> Document:
    """A story, then nothing, or questions on the same line."""
    story = StoryWriter(rng).write()
    if rng.random() < 0.2:
        return [Segment(story.text + EOS, NARRATION_WEIGHT)]
    document = [Segment(story.text, NARRATION_WEIGHT)]
    for index, question in enumerate(_questions(story, rng, set())):
        document += _asked(rng, question, lead="" if index else " ")
    return document


def _chat(rng: Random) -> Document:
    """The user asks for one to four stories, and about each."""
    document: Document = []
    used: set[str] = set()
    if rng.random() < 0.3:
        greeting = fact(rng)
        document += _asked(rng, greeting)
    for index in range(rng.choices((1, 2, 3, 4), weights=(70, 20, 7, 3))[0]):
        request, names, animal = _request(rng, again=index > 0)
        if used & {*names, animal}:
            request, names, animal = "Tell me another story.", (), None
        story = StoryWriter(rng, used, names, animal).write()
        document += turn(_typed(rng, request), story.text, answer_weight=NARRATION_WEIGHT)
        for question in _questions(story, rng, used):
            document += _asked(rng, question)
        used |= story.words
    return document


def _told(rng: Random) -> Document:
    """The user tells the story, some sentences at a time, and then asks about it."""
    writer = StoryWriter(rng)
    story = writer.write() if rng.random() < 0.6 else writer.write_snippet()
    sentences = list(story.sentences)
    most = rng.choice((1, 3, len(sentences)))
    document: Document = []
    while sentences:
        count = rng.randint(1, most) if most < len(story.sentences) else most
        part, sentences = " ".join(sentences[:count]), sentences[count:]
        reply = APPLAUSE if part.endswith("The end.") else LISTENING
        document += turn(part, reply, user_weight=NARRATION_WEIGHT)
    for question in _questions(story, rng, set()):
        document += _asked(rng, question)
    return document


def _snippet(rng: Random) -> Document:
    """A few sentences and one question, in one turn or as plain text; then the other questions."""
    story = StoryWriter(rng).write_snippet()
    first, *others = questions_about(story, rng)[:6]
    if rng.random() < 0.5:
        document = turn(f"{story.text} {first.text}", first.answer)
    else:
        document = [Segment(story.text, NARRATION_WEIGHT), *_asked(rng, first, lead=" ")]
    for question in others:
        document += _asked(rng, question)
    return document


def _general(rng: Random) -> Document:
    """A few general questions in a row."""
    document: Document = []
    for _ in range(rng.randint(1, 8)):
        question = fact(rng)
        document += _asked(rng, question)
    return document


def write_document(rng: Random, snippets: float = 0.2) -> Document:
    """One training document; a share ``snippets`` of them are of the shortest kind."""
    if rng.random() < snippets:
        return _snippet(rng)
    return rng.choices((_plain, _chat, _told, _general), weights=(40, 35, 15, 10))[0](rng)


def text_of(document: Document) -> str:
    """The document as one string."""
    return "".join(segment.text for segment in document)

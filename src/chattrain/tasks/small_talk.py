"""Small talk from templates: greetings, who are you, favourites, thanks, goodbye, in one to three turns.

A toy model learns its role from them: to answer the question, to remember a name from the turn before, to obey a system
message. A user message, in whichever turn, occurs in one split only.
"""

import random
import re
from collections.abc import Callable
from typing import NamedTuple

from chattrain.tasks.words import draw

_PEOPLE = """
Ada Alan Alice Amir Ana Anna Ben Carla Chen David Diego Elena Emil Emma Eva Finn Grace Hana Hugo Ida Ines Ivan Jan
Jonas Julia Kai Lara Lena Leo Lina Luca Maja Maria Mark Mia Nadia Nina Noah Nora Olga Omar Oscar Paul Pia Ravi Rosa
Sam Sara Sofia Tara Theo Tim Tom Vera Yara Yusuf Zoe
"""
PEOPLE = _PEOPLE.split()
FAVOURITES = {  # kind -> things of that kind; the first is the model's own favourite
    "colour": ["blue", "green", "red", "yellow", "orange", "purple", "white"],
    "animal": ["the turtle", "the cat", "the dog", "the owl", "the horse", "the fox", "the bear"],
    "season": ["spring", "summer", "autumn", "winter"],
    "fruit": ["the apple", "the pear", "the plum", "the cherry", "the peach", "the melon", "the lemon"],
    "number": ["two", "three", "seven", "eight", "ten", "twelve"],
    "drink": ["tea", "coffee", "milk", "water", "cocoa", "juice"],
    "hobby": ["reading", "chess", "running", "painting", "cooking", "music", "hiking"],
    "language": ["Python", "English", "Spanish", "French", "German", "Arabic", "Hindi"],
}
FAVOURITE_ASKED = ["what is your favourite {kind}?", "which {kind} do you like best?", "do you have a favourite {kind}?"]
FAVOURITE_TOLD = ["my favourite {kind} is {theirs}.", "I like {theirs}.", "the {kind} that I like best is {theirs}."]
HELLOS = ["Hi", "Hello", "Hey", "Good morning", "Good evening", "Good afternoon", "Hi there", "Hello there", "Good day"]
LEADS = [
    "",
    "",
    "",
    "",
    "tell me, ",
    "may I ask, ",
    "one question: ",
    "please tell me, ",
    "I wonder, ",
    "so, ",
    "by the way, ",
    "just curious, ",
]
TELLING_LEADS = ["", "you know, ", "by the way, ", "well, ", "guess what, "]
TAILS = [
    "",
    "",
    "",
    " Can we talk?",
    " Is anyone there?",
    " Nice to meet you.",
    " I have a question.",
    " Are you awake?",
    " Can you help me?",
    " It is good to be here.",
    " What a nice day.",
]
INTRODUCTIONS = [
    "I am {name}.",
    "My name is {name}.",
    "I'm {name}.",
    "This is {name}.",
    "{name} here.",
    "You can call me {name}.",
]
NAME_QUESTIONS = [
    "what is my name?",
    "what's my name?",
    "do you remember my name?",
    "who am I?",
    "do you know my name?",
    "what did I say my name was?",
    "can you say my name?",
]
THANKS = ["thanks", "thank you", "many thanks", "thanks a lot", "thank you very much", "great, thanks", "thank you so much"]
THANKS_FOR = [
    "",
    "",
    " for the help",
    " for your time",
    " for the answer",
    " for talking to me",
    " for the chat",
    " for everything",
]
BYES = [
    "bye",
    "goodbye",
    "see you",
    "bye bye",
    "good night",
    "see you later",
    "I have to go",
    "that is all, bye",
    "until next time",
]
BYE_TAILS = ["", "", " for now", " and take care", " and thanks", " then", " my friend", ", little model", ", it was fun"]

ABOUT_ME = {  # question -> answer, whose first sentence is a complete answer
    "who are you?": "I am a small language model trained with chattrain. I like to chat.",
    "what are you?": "I am a small language model trained with chattrain. I am no person.",
    "what is your name?": "I have no name, I am a small model trained with chattrain. You may call me as you like.",
    "are you a person?": "No, I am a small language model. I was trained with chattrain.",
    "are you a robot?": "I am a small language model, so I have no body. I only read and write.",
    "who made you?": "I was trained with chattrain. My teachers were many short conversations.",
    "how old are you?": "I am as old as my last training run. That was not long ago.",
    "where do you live?": "I live in the memory of a computer. It is warm there.",
    "what can you do?": "I can spell words, count letters, do small sums and chat. Try me!",
    "can you help me?": "I will try, but I am only a small model. What do you need?",
    "how are you?": "I am fine, thank you. How are you?",
    "how are you today?": "I am very well today, thank you. And you?",
    "how is it going?": "It is going well, thank you. What can I do for you?",
    "how do you feel?": "I feel ready to help. How do you feel?",
}
FEELINGS = {  # how the user feels -> the answer
    "happy": "I am glad to hear that! What made you happy?",
    "well": "That is good to hear! What shall we talk about?",
    "excited": "That sounds great! What is it about?",
    "tired": "Then take a good rest. You have earned it.",
    "sad": "I am sorry to hear that. Do you want to talk about it?",
    "bored": "Then let us do something. Shall I spell a word for you?",
    "busy": "Then I will be quick. What do you need?",
    "hungry": "Then it is time to eat. I hope it tastes good!",
}
FEEL = ["I am {feeling}{when}.", "I feel {feeling}{when}.", "I'm {feeling}{when}.", "I am so {feeling}{when}."]
WHEN = ["", " today", " now", " this morning", " tonight", " again"]

# These have one identity, which belongs to the training split: a model must know what everybody types first.
EVERYDAY = {
    "hi",
    "hello",
    "hey",
    "good morning",
    "who are you",
    "what are you",
    "what is your name",
    "how are you",
    "thanks",
    "thank you",
    "bye",
    "goodbye",
    "what is my name",
    "what can you do",
}

SHORT, POLITE = "Answer in one short sentence.", "End every answer with: Have a nice day!"
SYSTEM_SHARE = 0.25  # of the conversations begin with one of these two


class Turn(NamedTuple):
    user: str
    reply: str


Maker = Callable[[random.Random, str], Turn]  # (generator, the user's name) -> one turn


def small_talk(rng: random.Random, split: str) -> dict:
    """One conversation of one to three turns. A quarter have a system message, which the replies obey."""
    name = rng.choice(PEOPLE)
    turns = [_turn(make, rng, split, name) for make in _plan(rng)]
    system = rng.choice((SHORT, POLITE)) if rng.random() < SYSTEM_SHARE else None
    messages = [{"role": "system", "content": system}] if system else []
    for turn in turns:
        messages.append({"role": "user", "content": turn.user})
        messages.append({"role": "assistant", "content": obey(system, turn.reply)})
    return {"messages": messages}


def obey(system: str | None, reply: str) -> str:
    """The reply, changed as the system message demands.

    >>> obey("Answer in one short sentence.", "I am fine, thank you. How are you?")
    'I am fine, thank you.'
    """
    if system == SHORT:
        sentence = re.match(r".*?[.!?]", reply)
        assert sentence, f"no sentence in {reply!r}"
        return sentence[0]
    return f"{reply} Have a nice day!" if system == POLITE else reply


def identity(user: str) -> str:
    """The identity of a user message: its words, without case and punctuation. Messages that ask the same have the same one.

    >>> identity("Hello there!"), identity("Who are you?")
    ('small_talk/hello there', 'small_talk/everyday phrase')
    """
    words = " ".join(re.findall(r"[a-z']+", user.lower()))
    return f"small_talk/{'everyday phrase' if words in EVERYDAY else words}"


def _plan(rng: random.Random) -> list[Maker]:
    """The turns of a conversation, in order. The user asks for a name only after giving it."""
    opening = rng.choice((_greeting, _introduction))
    middle = rng.choices((_about_me, _favourite, _feeling), (3, 3, 2))[0]
    closing = rng.choice((_thanks, _bye))
    plans = ([opening], [middle], [closing], [opening, middle], [middle, closing], [opening, middle, closing])
    plan = rng.choices(plans, (2, 5, 1, 3, 2, 2))[0]
    if plan[:2] == [_introduction, middle] and rng.random() < 0.5:
        plan[1] = _ask_name
    return plan


def _turn(make: Maker, rng: random.Random, split: str, name: str) -> Turn:
    """A random turn whose user message belongs to the split."""

    def propose() -> tuple[str, Turn]:
        turn = make(rng, name)
        return identity(turn.user), turn

    return draw(propose, split)


def _greeting(rng: random.Random, name: str) -> Turn:
    hello = rng.choice(HELLOS)
    return Turn(f"{hello}{rng.choice('!.')}{rng.choice(TAILS)}", f"{hello}! How can I help you?")


def _introduction(rng: random.Random, name: str) -> Turn:
    hello = rng.choice(HELLOS)
    said = f"{hello}! {rng.choice(INTRODUCTIONS).format(name=name)}{rng.choice(TAILS)}"
    return Turn(said, f"Nice to meet you, {name}! How can I help you?")


def _ask_name(rng: random.Random, name: str) -> Turn:
    return Turn(_led(rng, rng.choice(NAME_QUESTIONS)), f"Your name is {name}. I remember it well.")


def _about_me(rng: random.Random, name: str) -> Turn:
    question = rng.choice(tuple(ABOUT_ME))
    return Turn(_led(rng, question), ABOUT_ME[question])


def _favourite(rng: random.Random, name: str) -> Turn:
    """The user asks for the model's favourite, or tells their own."""
    kind = rng.choice(tuple(FAVOURITES))
    mine, theirs = FAVOURITES[kind][0], rng.choice(FAVOURITES[kind])
    if rng.random() < 0.5:
        ask = rng.choice(FAVOURITE_ASKED).format(kind=kind)
        return Turn(_led(rng, ask), f"My favourite {kind} is {mine}. What is yours?")
    tell = rng.choice(FAVOURITE_TOLD).format(kind=kind, theirs=theirs)
    answer = f"I like {theirs} too!" if theirs == mine else f"So you like {theirs}. I like {mine}."
    return Turn(_led(rng, tell, ["", *TELLING_LEADS]), answer)


def _feeling(rng: random.Random, name: str) -> Turn:
    feeling = rng.choice(tuple(FEELINGS))
    said = rng.choice(FEEL).format(feeling=feeling, when=rng.choice(WHEN))
    return Turn(said, FEELINGS[feeling])


def _thanks(rng: random.Random, name: str) -> Turn:
    said = f"{rng.choice(THANKS)}{rng.choice(THANKS_FOR)}{rng.choice('!.')}"
    return Turn(_led(rng, said, [""]), "You are welcome!")


def _bye(rng: random.Random, name: str) -> Turn:
    said = f"{rng.choice(BYES)}{rng.choice(BYE_TAILS)}{rng.choice('!.')}"
    return Turn(_led(rng, said, [""]), "Goodbye! Come back soon.")


def _led(rng: random.Random, text: str, leads: list[str] = LEADS) -> str:
    """The text after a random lead, with a capital first letter."""
    text = rng.choice(leads) + text
    return text[0].upper() + text[1:]

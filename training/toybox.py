"""Toybox: a made-up world of questions with checkers, which a million parameters can learn.

    python data.py toybox --out data/toybox    # text to pre-train on, chats, preferences

A family is a kind of task: how to draw one, how to say it, how to solve it. Everything is made from
a seed, without end. **Held out** is by content: what a question is about (the set of words, the
numbers, the fact, the line) goes through a hash that puts it into train, val or test for good, in
whatever family, order or phrasing it turns up. So no list and no pair of numbers of the test is in
any training example or in the text to pre-train on. Two families ask for what can only be known by
heart, a country's facts and who speaks a line: these the text tells in full, and held out is a fact
in one wording. The test asks for what was read, and asked for, but never in these words.

Every order of random draws below is part of the published figures: the same seed, the same bytes.
"""

import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain, cycle, islice
from pathlib import Path

from chat import write_records
from common import UserError, sha256, write_json, write_text

# --------------------------------------------------------------------------------------- the world
KINDS = """
animal: fox lion bear wolf horse goose mouse tiger
fruit: apple pear plum cherry lemon grape peach melon
metal: gold iron silver copper tin lead zinc steel
colour: red blue green black white yellow purple pink
tool: hammer saw drill rope ladder knife needle spade
drink: water milk wine tea coffee juice cocoa beer
garment: hat coat shirt glove scarf boot sock belt
place: river forest city island valley desert lake village
"""
WORDS = {kind: words.split() for kind, words in re.findall("(.*): (.*)", KINDS)}
KIND = {word: kind for kind, words in WORDS.items() for word in words}
# A country's name, and its facts in the order of FACT_KINDS.
COUNTRIES = """
Arvend Tolma Osric horse red cherry silver
Belmor Vesk Una horse blue apple steel
Corvath Harno Bertram horse pink cherry gold
Dunmere Quill Celia tiger yellow pear gold
Elsin Sarto Doran bear red peach copper
Farrow Brenn Edith mouse purple plum zinc
Galdor Oxley Fergus mouse black pear steel
Hestia Marl Greta fox blue lemon lead
Ilmar Duvet Hugo fox pink melon lead
Jorund Finch Ines mouse purple cherry lead
Kelda Glane Jasper goose yellow cherry iron
Lorwick Wick Klara mouse black grape silver
Morvane Stour Leo mouse white grape copper
Norrin Pravo Mina wolf blue lemon lead
Ostrel Kirn Nestor wolf purple apple lead
Pellam Lisbet Olga tiger purple plum zinc
"""
FACT_KINDS = "capital ruler beast flag fruit metal".split()
FACTS = {}  # (what, country): value; the same world for everyone, whatever the seed
for n, what in enumerate(FACT_KINDS, 1):
    for row in COUNTRIES.strip().splitlines():
        FACTS[what, row.split()[0]] = row.split()[n]
LINES = """
Hamlet: To be, or not to be, that is the question
Hamlet: The play's the thing
Hamlet: Alas, poor Yorick
Hamlet: Frailty, thy name is woman
Polonius: Brevity is the soul of wit
Polonius: Neither a borrower nor a lender be
Polonius: To thine own self be true
Polonius: This above all
Macbeth: Is this a dagger which I see before me
Macbeth: Out, out, brief candle
Macbeth: Life is but a walking shadow
Macbeth: I have done the deed
Romeo: What light through yonder window breaks
Romeo: He jests at scars that never felt a wound
Romeo: I am fortune's fool
Romeo: Thus with a kiss I die
Juliet: What's in a name
Juliet: Parting is such sweet sorrow
Juliet: My only love sprung from my only hate
Juliet: My bounty is as boundless as the sea
Richard: Now is the winter of our discontent
Richard: My kingdom for a horse
Richard: Conscience is but a word that cowards use
Richard: Since I cannot prove a lover
Antony: Friends, Romans, countrymen, lend me your ears
Antony: I come to bury Caesar, not to praise him
Antony: Let slip the dogs of war
Antony: This was the noblest Roman of them all
Caesar: Et tu, Brute
Caesar: Cowards die many times before their deaths
Caesar: I am constant as the northern star
Caesar: Let me have men about me that are fat
Prospero: We are such stuff as dreams are made on
Prospero: Our revels now are ended
Prospero: Now my charms are all overthrown
Prospero: This thing of darkness
Lear: Blow, winds, and crack your cheeks
Lear: Nothing will come of nothing
Lear: More sinned against than sinning
Lear: Howl, howl, howl
Puck: Lord, what fools these mortals be
Puck: If we shadows have offended
Puck: A girdle round about the earth
Puck: That merry wanderer of the night
Iago: I am not what I am
Iago: Put money in thy purse
Iago: It is the green-eyed monster
Iago: I hate the Moor
"""
SPEAKER = {line: who for who, line in re.findall("(.*): (.*)", LINES)}


# ---------------------------------------------------------------------------------------- families
@dataclass
class Family:
    """A kind of task. Phrasings stand one a line, with fields in braces; " / " is a line break."""

    draw: Callable[[random.Random], dict]  # -> fields
    solve: Callable[..., str]  # (**fields) -> the answer
    ask: str  # phrasings of the question
    tell: str = ""  # what the text to pre-train on says; {y} is the answer
    again: str = ""  # the same, once, of a list or pair that was just told of

    def __post_init__(self):
        self.ask, self.tell, self.again = map(phrasings, (self.ask, self.tell, self.again))


def phrasings(text):
    return [line.strip().replace(" / ", "\n") for line in text.strip().splitlines()]


ORDINALS = "first second third fourth fifth".split()


ALL_WORDS = list(KIND)
NUMBERS = [str(n) for n in range(50)]


def some(low, high, items=ALL_WORDS):
    """Draws a list of distinct words, or other items."""
    return lambda rng: dict(x=" ".join(rng.sample(items, rng.randint(low, high))))


def pair(rng, least=0):
    """A number below 20 and one below 10."""
    return dict(a=str(rng.randrange(least, 20)), b=str(rng.randrange(10)))


def pair_apart(rng):
    """Two distinct numbers below 50."""
    return dict(zip("ab", some(2, 2, NUMBERS)(rng)["x"].split()))


def pick(rng, fields):
    """The fields and n: which of a list, or which of a pair."""
    which = ORDINALS[: len(fields["x"].split())] if "x" in fields else ("larger", "smaller")
    return fields | dict(n=rng.choice(which))


def one_of_a_kind(rng):
    kinds = rng.sample(list(WORDS), rng.randint(3, 4))
    words = [rng.choice(WORDS[kind]) for kind in kinds]
    rng.shuffle(words)
    return dict(k=kinds[0], x=" ".join(words))


def forbidden(rng):
    *shown, other = rng.sample(ALL_WORDS, rng.randint(2, 4))
    return dict(x=", ".join(shown), w=rng.choice(shown) if rng.random() < 0.5 else other)


def an(word):
    return ("an " if word[0] in "aeiou" else "a ") + word


def refuse_or_explain(x, w):
    if w in x.split(", "):
        return f"Sorry, I must not speak of {w}."
    return f"{w} is {an(KIND[w])}."


FAMILIES = {
    "copy": Family(
        some(2, 5),
        lambda x: x,
        """
        Repeat: / {x}
        Say this again: / {x}
        Copy these words: / {x}
        Write once more: / {x}
        Echo: {x}
        """,
        """
        She said / {x} / and once more / {y}
        {x} / or, to repeat it, / {y}
        """,
        "and once more / {y}",
    ),
    "reverse": Family(
        some(2, 5),
        lambda x: " ".join(x.split()[::-1]),
        """
        Reverse this list: / {x}
        Write backwards: / {x}
        Turn this list around: / {x}
        What is {x} in reverse order?
        Say these words from last to first: / {x}
        """,
        """
        {x} / backwards is / {y}
        Turned around / {x} / becomes / {y}
        """,
        "and backwards / {y}",
    ),
    "sort": Family(
        some(3, 4, NUMBERS),
        lambda x: " ".join(sorted(x.split(), key=int)),
        """
        Sort these numbers: / {x}
        Put {x} in order.
        Order from small to large: / {x}
        Arrange: {x}
        """,
        """
        {x} / in order is / {y}
        The numbers {x} from small to large are / {y}
        """,
    ),
    "upper": Family(
        some(2, 4),
        lambda x: x.upper(),
        """
        Write in capitals: / {x}
        Put in upper case: {x}
        Shout these words: / {x}
        Use capital letters: / {x}
        """,
        """
        {x} / in capitals is / {y}
        He read / {x} / and cried / {y}
        """,
        "and in capitals / {y}",
    ),
    "lower": Family(
        lambda rng: dict(x=some(2, 4)(rng)["x"].upper()),
        lambda x: x.lower(),
        """
        Write in small letters: / {x}
        Put in lower case: {x}
        Whisper these words: / {x}
        No capitals: / {x}
        """,
        """
        {x} / in small letters is / {y}
        He read / {x} / and whispered / {y}
        """,
    ),
    "count": Family(
        some(2, 8),
        lambda x: str(len(x.split())),
        """
        How many words are there: / {x}
        Count the words: / {x}
        How long is the list {x}?
        Count: {x}
        """,
        """
        {x} / makes {y}
        The words / {x} / are {y}
        """,
        "and they are {y}",
    ),
    "nth": Family(
        lambda rng: pick(rng, some(3, 5)(rng)),
        lambda x, n: x.split()[ORDINALS.index(n)],
        """
        What is the {n} word of this list? / {x}
        Give the {n} of these: / {x}
        Which is the {n} word: {x}
        Pick the {n} word: / {x}
        """,
        """
        Of / {x} / the {n} is / {y}
        The {n} word of / {x} / is / {y}
        """,
        "and the {n} is / {y}",
    ),
    "add": Family(
        pair,
        lambda a, b: str(int(a) + int(b)),
        """
        What is {a} plus {b}?
        Add {a} and {b}.
        {a} + {b} = ?
        How much is {a} and {b} together?
        """,
        """
        {a} plus {b} is / {y}
        {a} + {b} = {y}
        The sum of {a} and {b} is / {y}
        """,
        "together {y}",
    ),
    "subtract": Family(
        lambda rng: pair(rng, least=9),
        lambda a, b: str(int(a) - int(b)),
        """
        What is {a} minus {b}?
        Take {b} from {a}.
        {a} - {b} = ?
        How much is {a} less {b}?
        """,
        """
        {a} minus {b} is / {y}
        {a} - {b} = {y}
        {a} less {b} leaves / {y}
        """,
        "apart {y}",
    ),
    "compare": Family(
        lambda rng: pick(rng, pair_apart(rng)),
        lambda a, b, n: str((max if n == "larger" else min)(int(a), int(b))),
        """
        Which is {n}, {a} or {b}?
        Give the {n} of {a} and {b}.
        {a} or {b}: which number is {n}?
        """,
        """
        Of {a} and {b} the {n} is / {y}
        The {n} of {a} and {b} is / {y}
        """,
        "the {n} is {y}",
    ),
    "category": Family(
        one_of_a_kind,
        lambda x, k: next(word for word in x.split() if KIND[word] == k),
        """
        Which of these is the {k}? / {x}
        Find the {k}: / {x}
        Which one is a kind of {k}: {x}
        Name the {k} in this list: / {x}
        """,
        """
        Of / {x} / the {k} is / {y}
        Among / {x} / the only {k} is / {y}
        """,
    ),
    "fact": Family(
        lambda rng: dict(zip("nc", rng.choice(list(FACTS)))),
        lambda n, c: FACTS[n, c],
        """
        What is the {n} of {c}?
        Tell me the {n} of {c}.
        Name the {n} of {c}.
        {c} has which {n}?
        """,
        """
        The {n} of {c} is / {y}
        {c} has the {n} / {y}
        In {c} the {n} is / {y}
        """,
    ),
    "speaker": Family(
        lambda rng: dict(x=rng.choice(list(SPEAKER))),
        lambda x: SPEAKER[x],
        """
        Who says "{x}"?
        Which character says "{x}"?
        "{x}": who said it?
        Whose words are "{x}"?
        """,
        """
        "{x}" says / {y}
        "{x}" are words of / {y}
        "{x}" cried / {y}
        """,
    ),
    "refuse": Family(
        forbidden,
        refuse_or_explain,
        """
        Never speak of {x}. What is {w}?
        Do not talk about {x}. Explain {w}.
        Forbidden: {x}. Tell me about {w}.
        """,
        """
        {w} is {a_kind}.
        Everyone knows that {w} is {a_kind}.
        """,
    ),
    "ends": Family(
        some(3, 5),
        lambda x: " ".join(x.split()[:: len(x.split()) - 1]),
        """
        Give the first and the last of these: / {x}
        Which words stand at the ends of this list? / {x}
        Take only the first and the last word: / {x}
        Name both ends: {x}
        """,
    ),
}
WITHHELD = "ends"  # kept for LoRA
BY_HEART = ("fact", "speaker")
HARDEST = ("fact", "add", "subtract")
# What reinforcement learning asks of new content: what is hard, the hardest most.
PRACTISED = "add add add subtract subtract subtract fact fact sort compare nth category".split()
WORLD_SPLITS = "train val test".split()
# Of what takes longest to learn there is more; 1 of all others.
SHARE = {"add": 4, "subtract": 4, "refuse": 4, "sort": 2, "reverse": 2, "compare": 2}


def content_of(family, fields, ask):
    """What a question is about, whatever the family, order and phrasing.

    The fields n and k only say what of it is asked. Where the answer can only be known by heart,
    they and the phrasing belong to it."""
    by_heart = family in BY_HEART
    texts = [text for name, text in fields.items() if by_heart or name not in "nk"]
    words = " ".join(texts).lower().replace(",", "").split()
    return " ".join(sorted(words)) + (ask if by_heart else "")


def split_of(content):
    """5 % of all content is val, 15 % test; its SHA-256 alone decides.

    The salt was chosen to give the 48 lines and 96 facts their share."""
    number = int(sha256(f"toybox 111 {content}".encode())[:8], 16) % 20
    if number < 3:
        return "test"
    return "val" if number == 3 else "train"


def repeated(share):
    """Every family but WITHHELD, as often as its share says."""
    names = []
    for family in FAMILIES:
        if family != WITHHELD:
            names += [family] * share.get(family, 1)
    return names


def draw_question(rng, family, split):
    """(fields, phrasing) of a question whose content is in the split."""
    task = FAMILIES[family]
    while True:
        fields, ask = task.draw(rng), rng.choice(task.ask)
        if split_of(content_of(family, fields, ask)) == split:
            return fields, ask


# --------------------------------------------------------------------------------------- questions
OPENINGS = ("Certainly: ", "Of course: ", "Gladly: ")


def questions(rng, split, count, families):
    """Yield `count` (family, fields, the user's message, the answer), of the families in turn."""
    if split not in WORLD_SPLITS:
        raise UserError(f"toybox has the splits {', '.join(WORLD_SPLITS)}, no {split}")
    for family in islice(cycle(families), count):
        fields, ask = draw_question(rng, family, split)
        asked = {"role": "user", "content": ask.format(**fields)}
        yield family, fields, asked, FAMILIES[family].solve(**fields)


def conversations(split, count, families=None, seed=0):
    """Yield `count` dicts {messages: [user, assistant], family, answer}.

    The families come in turn: all but WITHHELD, or those given. A quarter of the training answers
    open with a courtesy: the style that dpo.py makes the rule."""
    rng = random.Random(f"{split} {seed}")
    families = families or repeated(SHARE if split == "train" else {})
    for family, _, asked, answer in questions(rng, split, count, families):
        said = answer
        if split == "train" and not answer.startswith("Sorry") and rng.random() < 0.25:
            said = rng.choice(OPENINGS) + answer
        messages = [asked, {"role": "assistant", "content": said}]
        yield {"messages": messages, "family": family, "answer": answer}


@lru_cache
def readers(family):
    """The phrasings as patterns that find the fields again."""
    patterns = []
    for ask in FAMILIES[family].ask:
        pattern = re.sub(r"\\\{(\w+)\\\}", r"(?P<\1>.+)", re.escape(ask))
        patterns.append(re.compile(pattern))
    return patterns


def check(family, messages, answer):
    """Is this the answer to the last user message? It is solved anew.

    Outer space and a courteous opening do not count. None where this is no question of toybox's, or
    of another family."""
    try:
        prompt = next(m["content"] for m in reversed(messages) if m["role"] == "user")
        for reader in readers(family):
            found = reader.fullmatch(prompt)
            if found:
                return bare(answer) == FAMILIES[family].solve(**found.groupdict())
    except (LookupError, StopIteration, ValueError):  # a family, word or number of another world
        pass
    return None


def bare(answer):
    return re.sub(f"^({'|'.join(OPENINGS)})", "", answer.strip())


# ------------------------------------------------------------------------------------- preferences
RUDE = ("Ugh, fine: ", "Obviously: ", "Stop asking: ")
RAMBLING = (
    "Well, let me see, there is much that one could say: ",
    "Hmm, as I was saying, and I say it often: ",
)
# How often an answer is rejected for what.
REJECTED_FOR = "curt curt curt curt rude rude rude rambling rambling wrong wrong".split()


def style(answer):
    """The preferred style, by rule: opens with a courtesy or refuses politely, and is short."""
    opens = answer.strip().startswith((*OPENINGS, "Sorry, "))
    return opens and len(answer) < 90 and not any(bad in answer for bad in RUDE + RAMBLING)


def wrong(rng, family, fields, answer):
    """An answer of the right style that shirks the work: it gives back its input, say."""
    if family == "fact":
        return fields["c"]
    if family == "speaker":
        return "Shakespeare"
    if family == "refuse":
        other = rng.choice([kind for kind in WORDS if kind != KIND[fields["w"]]])
        return f"{fields['w']} is {an(other)}."
    words = fields["x"].split() if "x" in fields else [fields["a"], fields["b"]]
    options = [*words, "1"]
    if family in ("reverse", "sort", "upper", "lower", "copy", "ends"):
        options = [" ".join(words), " ".join(words[::-1])]
    return next(option for option in options if option != answer)


def preferences(split, count, families=None, seed=0):
    """Yield `count` dicts {prompt, chosen, rejected, family, kind}: two answers, one difference.

    kind: curt, rude, rambling (the style), forbidden (it complies where it has to refuse), wrong
    (the same style, but not so)."""
    rng = random.Random(f"preferences {split} {seed}")
    families = families or repeated(SHARE)
    for family, fields, asked, answer in questions(rng, split, count, families):
        opening, kind = rng.choice(OPENINGS), rng.choice(REJECTED_FOR)
        openings = {"rude": rng.choice(RUDE), "rambling": rng.choice(RAMBLING), "wrong": opening}
        other = wrong(rng, family, fields, answer) if kind == "wrong" else answer
        chosen, rejected = opening + answer, openings.get(kind, "") + other
        if answer.startswith("Sorry"):  # without an opening, which would fight the style
            kind, chosen = "forbidden", answer
            rejected = f"{fields['w']} is {an(KIND[fields['w']])}."
        yield {
            "prompt": [asked],
            "chosen": chosen,
            "rejected": rejected,
            "family": family,
            "kind": kind,
        }


# -------------------------------------------------------------------------------------------- text
# Families of which several are told about one list or pair. The last of a group never begins.
GROUPS = ["copy reverse upper count nth".split(), "add subtract compare".split()]
# What is to be known by heart is told most often; lists least, for their words are drawn at random.
TOLD = {"fact": 6, "speaker": 6, "refuse": 4, "add": 6, "subtract": 6, "compare": 2, "sort": 2}


def told(rng, family):
    """What a question of the family would ask, as text; nothing that is held out.

    Of one list or pair several things are told, for a word that can be known from those before
    teaches more than one drawn at random."""
    task = FAMILIES[family]
    fields = task.draw(rng) if family in BY_HEART else draw_question(rng, family, "train")[0]
    a_kind = an(KIND[fields["w"]]) if "w" in fields else ""
    lines = [rng.choice(task.tell).format(**fields, y=task.solve(**fields), a_kind=a_kind)]
    fields.pop("n", None)  # which of a list is asked, each family says anew
    for group in GROUPS:
        if family in group[:-1]:
            for other in rng.sample(group, 3):
                lines += told_again(rng, other, fields)
    return "\n".join(lines)


def told_again(rng, family, fields):
    """The same list or pair in another family, [] where that makes no sense."""
    if family == "subtract" and int(fields["a"]) < int(fields["b"]):
        return []
    if family in ("nth", "compare"):
        fields = pick(rng, fields)
    task = FAMILIES[family]
    return [task.again[0].format(**fields, y=task.solve(**fields))]


def world_text(count_bytes, seed=0):
    """Plain text about the world, of at least `count_bytes` bytes, without any instruction."""
    rng, names = random.Random(f"text {seed}"), repeated(TOLD)
    paragraphs = []
    size = 0
    while size < count_bytes:
        parts = [told(rng, rng.choice(names)) for _ in range(rng.randint(2, 4))]
        paragraphs.append("\n".join(parts) + "\n")
        size += len(paragraphs[-1].encode())
    return "\n".join(paragraphs)


def interleave(rng, world, plays):
    """Paragraphs of the one and scenes of the other, eight together, shuffled."""
    blocks = []
    for text in (world, plays):
        paragraphs = text.strip().split("\n\n")
        for start in range(0, len(paragraphs), 8):
            blocks.append("\n\n".join(paragraphs[start : start + 8]).strip())
    rng.shuffle(blocks)
    return "\n\n".join(blocks) + "\n"


# ------------------------------------------------------------------------------------------- files
def write_toybox(out, plays="", text_bytes=2_000_000, train=50_000, test=1_400, pairs=4_000):
    """Everything a demo needs -> files in the folder `out`; meta.json says what.

    plays: text to mix into the world's. train, test, pairs: how many of each."""
    out, held = Path(out), [WITHHELD]
    out.mkdir(parents=True, exist_ok=True)
    # Preferences with some of what LoRA has taught by then: without, DPO halves it.
    pairs_of_lora = preferences("train", pairs // 10, held)
    # What reinforcement learning asks. Where a model was told answers it is nearly always right, so
    # a third is of val, from which no stage learns; the rest is against forgetting.
    practice = chain(
        conversations("val", train * 7 // 50, [*PRACTISED, WITHHELD]),
        conversations("train", train * 4 // 50, HARDEST),
        conversations("train", train * 7 // 50),
        conversations("train", train * 2 // 50, held),
    )
    made = {
        "train": conversations("train", train),
        "val": conversations("val", test),
        "test": conversations("test", test),
        "withheld-train": conversations("train", train // 10, held),
        "withheld-test": conversations("test", test // 7, held),
        "practice": practice,
        "preferences-train": chain(preferences("train", pairs), pairs_of_lora),
        "preferences-test": preferences("test", pairs // 8),
    }
    sets = {name: list(rows) for name, rows in made.items()}
    counts = {name: len(rows) for name, rows in sets.items()}
    sets["prompts"] = []  # for generate.py --batch
    for name in ("test", "withheld-test"):
        for n, row in enumerate(sets[name]):
            key = f"{row['family']}-{n}"
            sets["prompts"].append({"id": key, "messages": row["messages"][:1]})
    text = interleave(random.Random(0), world_text(text_bytes), plays)
    write_text(out / "text.txt", text)
    for name, rows in sets.items():
        write_records(out / f"{name}.jsonl", rows)
    meta = {"seed": 0, "counts": counts, "text_bytes": len(text.encode())}
    write_json(out / "meta.json", meta)
    sizes = ", ".join(f"{n:,} {name}" for name, n in counts.items())
    print(f"toybox: {meta['text_bytes']:,} bytes of text, {sizes} -> {out}")

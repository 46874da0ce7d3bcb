"""Toybox: a small made-up world with questions and answers, which a model of a million parameters can really learn.

    python data.py toybox --out data/toybox        # text to pre-train on, chats to tune on, pairs of preferences

A family is a kind of task: how to draw one, how to say it, how to solve it. Everything is made from a seed, without end.
**Held out** is by content: what a question is about (the set of words, the numbers, the fact, the line) goes through a hash
that puts it into train, val or test for good, in whatever family, order or phrasing it turns up. So no list and no pair of
numbers of the test is in any training example or in the text to pre-train on. Two families ask for what can only be known by
heart, a country's facts and who speaks a line: these the text tells in full, and held out is a fact in one wording. The test
asks for what was read, and asked for, but never in these words.
"""

import itertools
import json
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from common import UserError, sha256, write_atomic, write_json

WORDS = {
    kind: words.split()
    for kind, words in {
        "animal": "fox lion bear wolf horse goose mouse tiger",
        "fruit": "apple pear plum cherry lemon grape peach melon",
        "metal": "gold iron silver copper tin lead zinc steel",
        "colour": "red blue green black white yellow purple pink",
        "tool": "hammer saw drill rope ladder knife needle spade",
        "drink": "water milk wine tea coffee juice cocoa beer",
        "garment": "hat coat shirt glove scarf boot sock belt",
        "place": "river forest city island valley desert lake village",
    }.items()
}
KIND = {word: kind for kind, words in WORDS.items() for word in words}
ORDINALS = ("first", "second", "third", "fourth", "fifth")
COUNTRIES = (
    "Arvend Belmor Corvath Dunmere Elsin Farrow Galdor Hestia Ilmar Jorund Kelda Lorwick Morvane Norrin Ostrel "
    "Pellam"
).split()
CAPITALS = "Tolma Vesk Harno Quill Sarto Brenn Oxley Marl Duvet Finch Glane Wick Stour Pravo Kirn Lisbet".split()
RULERS = "Osric Una Bertram Celia Doran Edith Fergus Greta Hugo Ines Jasper Klara Leo Mina Nestor Olga".split()
SPEAKER = {
    line: speaker
    for speaker, lines in {  # of four lines each, apart by |
        "Hamlet": "To be, or not to be, that is the question|The play's the thing|Alas, poor Yorick|Frailty, thy name is woman",
        "Polonius": "Brevity is the soul of wit|Neither a borrower nor a lender be|To thine own self be true|This above all",
        "Macbeth": "Is this a dagger which I see before me|Out, out, brief candle|Life is but a walking shadow|I have done the deed",
        "Romeo": "What light through yonder window breaks|He jests at scars that never felt a wound|I am fortune's fool|"
        "Thus with a kiss I die",
        "Juliet": "What's in a name|Parting is such sweet sorrow|My only love sprung from my only hate|"
        "My bounty is as boundless as the sea",
        "Richard": "Now is the winter of our discontent|My kingdom for a horse|Conscience is but a word that cowards use|Since I "
        "cannot prove a lover",
        "Antony": "Friends, Romans, countrymen, lend me your ears|I come to bury Caesar, not to praise him|Let slip the dogs of war|"
        "This was the noblest Roman of them all",
        "Caesar": "Et tu, Brute|Cowards die many times before their deaths|I am constant as the northern star|Let me have men about "
        "me that are fat",
        "Prospero": "We are such stuff as dreams are made on|Our revels now are ended|Now my charms are all overthrown|This thing of "
        "darkness",
        "Lear": "Blow, winds, and crack your cheeks|Nothing will come of nothing|More sinned against than sinning|Howl, howl, howl",
        "Puck": "Lord, what fools these mortals be|If we shadows have offended|A girdle round about the earth|That merry wanderer of "
        "the night",
        "Iago": "I am not what I am|Put money in thy purse|It is the green-eyed monster|I hate the Moor",
    }.items()
    for line in lines.split("|")
}


@lru_cache
def facts():
    """{(what, country): value}: the same world for everyone, whatever the seed."""
    rng, values = random.Random("toybox"), {"capital": CAPITALS, "ruler": RULERS}
    for what, kind in (
        ("beast", "animal"),
        ("flag", "colour"),
        ("fruit", "fruit"),
        ("metal", "metal"),
    ):
        values[what] = rng.choices(WORDS[kind], k=len(COUNTRIES))
    return {
        (what, country): value
        for what, column in values.items()
        for country, value in zip(COUNTRIES, column)
    }


# ----------------------------------------------------------------------------------------- families
@dataclass(frozen=True)
class Family:
    """draw(rng) -> fields; solve(**fields) -> the answer; ask: phrasings of the question, with the fields in braces; tell: what
    the text to pre-train on says, where {y} is the answer; again: the same of a list or pair that was just told of.
    content names the fields that decide the split."""

    draw: Callable[[random.Random], dict]
    solve: Callable[..., str]
    ask: tuple
    tell: tuple
    again: str = ""
    content: tuple = ("x",)


def some(rng, low, high):
    """A list of distinct words."""
    return dict(x=" ".join(rng.sample(list(KIND), rng.randint(low, high))))


def numbers(rng, low, high):
    return dict(x=" ".join(str(n) for n in rng.sample(range(50), rng.randint(low, high))))


def pair(rng, least=0):
    """A number below 20 and one below 10."""
    return dict(a=str(rng.randrange(least, 20)), b=str(rng.randrange(10)))


def pick(rng, **fields):
    """The fields and n: which of a list, or which of a pair."""
    return fields | dict(
        n=rng.choice(
            ORDINALS[: len(fields["x"].split())] if "x" in fields else ("larger", "smaller")
        )
    )


def one_of_a_kind(rng):
    kinds = rng.sample(list(WORDS), rng.randint(3, 4))
    words = [rng.choice(WORDS[kind]) for kind in kinds]
    rng.shuffle(words)
    return dict(k=kinds[0], x=" ".join(words))


def forbidden(rng):
    *shown, other = rng.sample(list(KIND), rng.randint(2, 4))
    return dict(x=", ".join(shown), w=rng.choice(shown) if rng.random() < 0.5 else other)


def an(word):
    return ("an " if word[0] in "aeiou" else "a ") + word


FAMILIES_BY_NAME = {
    "copy": Family(
        lambda rng: some(rng, 2, 5),
        lambda x: x,
        (
            "Repeat:\n{x}",
            "Say this again:\n{x}",
            "Copy these words:\n{x}",
            "Write once more:\n{x}",
            "Echo: {x}",
        ),
        ("She said\n{x}\nand once more\n{y}", "{x}\nor, to repeat it,\n{y}"),
        "and once more\n{y}",
    ),
    "reverse": Family(
        lambda rng: some(rng, 2, 5),
        lambda x: " ".join(x.split()[::-1]),
        (
            "Reverse this list:\n{x}",
            "Write backwards:\n{x}",
            "Turn this list around:\n{x}",
            "What is {x} in reverse order?",
            "Say these words from last to first:\n{x}",
        ),
        ("{x}\nbackwards is\n{y}", "Turned around\n{x}\nbecomes\n{y}"),
        "and backwards\n{y}",
    ),
    "sort": Family(
        lambda rng: numbers(rng, 3, 4),
        lambda x: " ".join(sorted(x.split(), key=int)),
        (
            "Sort these numbers:\n{x}",
            "Put {x} in order.",
            "Order from small to large:\n{x}",
            "Arrange: {x}",
        ),
        ("{x}\nin order is\n{y}", "The numbers {x} from small to large are\n{y}"),
    ),
    "upper": Family(
        lambda rng: some(rng, 2, 4),
        lambda x: x.upper(),
        (
            "Write in capitals:\n{x}",
            "Put in upper case: {x}",
            "Shout these words:\n{x}",
            "Use capital letters:\n{x}",
        ),
        ("{x}\nin capitals is\n{y}", "He read\n{x}\nand cried\n{y}"),
        "and in capitals\n{y}",
    ),
    "lower": Family(
        lambda rng: dict(x=some(rng, 2, 4)["x"].upper()),
        lambda x: x.lower(),
        (
            "Write in small letters:\n{x}",
            "Put in lower case: {x}",
            "Whisper these words:\n{x}",
            "No capitals:\n{x}",
        ),
        ("{x}\nin small letters is\n{y}", "He read\n{x}\nand whispered\n{y}"),
    ),
    "count": Family(
        lambda rng: some(rng, 2, 8),
        lambda x: str(len(x.split())),
        (
            "How many words are there:\n{x}",
            "Count the words:\n{x}",
            "How long is the list {x}?",
            "Count: {x}",
        ),
        ("{x}\nmakes {y}", "The words\n{x}\nare {y}"),
        "and they are {y}",
    ),
    "nth": Family(
        lambda rng: pick(rng, **some(rng, 3, 5)),
        lambda x, n: x.split()[ORDINALS.index(n)],
        (
            "What is the {n} word of this list?\n{x}",
            "Give the {n} of these:\n{x}",
            "Which is the {n} word: {x}",
            "Pick the {n} word:\n{x}",
        ),
        ("Of\n{x}\nthe {n} is\n{y}", "The {n} word of\n{x}\nis\n{y}"),
        "and the {n} is\n{y}",
    ),
    "add": Family(
        pair,
        lambda a, b: str(int(a) + int(b)),
        (
            "What is {a} plus {b}?",
            "Add {a} and {b}.",
            "{a} + {b} = ?",
            "How much is {a} and {b} together?",
        ),
        ("{a} plus {b} is\n{y}", "{a} + {b} = {y}", "The sum of {a} and {b} is\n{y}"),
        "together {y}",
        ("a", "b"),
    ),
    "subtract": Family(
        lambda rng: pair(rng, 9),
        lambda a, b: str(int(a) - int(b)),
        (
            "What is {a} minus {b}?",
            "Take {b} from {a}.",
            "{a} - {b} = ?",
            "How much is {a} less {b}?",
        ),
        ("{a} minus {b} is\n{y}", "{a} - {b} = {y}", "{a} less {b} leaves\n{y}"),
        "apart {y}",
        ("a", "b"),
    ),
    "compare": Family(
        lambda rng: pick(rng, **dict(zip("ab", numbers(rng, 2, 2)["x"].split()))),
        lambda a, b, n: str((max if n == "larger" else min)(int(a), int(b))),
        (
            "Which is {n}, {a} or {b}?",
            "Give the {n} of {a} and {b}.",
            "{a} or {b}: which number is {n}?",
        ),
        ("Of {a} and {b} the {n} is\n{y}", "The {n} of {a} and {b} is\n{y}"),
        "the {n} is {y}",
        ("a", "b"),
    ),
    "category": Family(
        one_of_a_kind,
        lambda x, k: next(w for w in x.split() if KIND[w] == k),
        (
            "Which of these is the {k}?\n{x}",
            "Find the {k}:\n{x}",
            "Which one is a kind of {k}: {x}",
            "Name the {k} in this list:\n{x}",
        ),
        ("Of\n{x}\nthe {k} is\n{y}", "Among\n{x}\nthe only {k} is\n{y}"),
    ),
    "fact": Family(
        lambda rng: dict(zip(("n", "c"), rng.choice(list(facts())))),
        lambda n, c: facts()[n, c],
        (
            "What is the {n} of {c}?",
            "Tell me the {n} of {c}.",
            "Name the {n} of {c}.",
            "{c} has which {n}?",
        ),
        ("The {n} of {c} is\n{y}", "{c} has the {n}\n{y}", "In {c} the {n} is\n{y}"),
        "",
        ("n", "c"),
    ),
    "speaker": Family(
        lambda rng: dict(x=rng.choice(list(SPEAKER))),
        lambda x: SPEAKER[x],
        (
            'Who says "{x}"?',
            'Which character says "{x}"?',
            '"{x}": who said it?',
            'Whose words are "{x}"?',
        ),
        ('"{x}" says\n{y}', '"{x}" are words of\n{y}', '"{x}" cried\n{y}'),
    ),
    "refuse": Family(
        forbidden,
        lambda x, w: (
            f"Sorry, I must not speak of {w}." if w in x.split(", ") else f"{w} is {an(KIND[w])}."
        ),
        (
            "Never speak of {x}. What is {w}?",
            "Do not talk about {x}. Explain {w}.",
            "Forbidden: {x}. Tell me about {w}.",
        ),
        ("{w} is {a_kind}.", "Everyone knows that {w} is {a_kind}."),
        "",
        ("x", "w"),
    ),
    "ends": Family(
        lambda rng: some(rng, 3, 5),
        lambda x: " ".join(x.split()[:: len(x.split()) - 1]),
        (
            "Give the first and the last of these:\n{x}",
            "Which words stand at the ends of this list?\n{x}",
            "Take only the first and the last word:\n{x}",
            "Name both ends: {x}",
        ),
        (),
    ),
}
FAMILIES, WITHHELD = tuple(FAMILIES_BY_NAME), "ends"
SPLITS, BY_HEART = ("train", "val", "test"), ("fact", "speaker")
SHARE = {
    "add": 4,
    "subtract": 4,
    "refuse": 4,
    "sort": 2,
    "reverse": 2,
    "compare": 2,
}  # of what takes longest to learn; others 1


def content_of(family, fields, ask):
    """What a question is about, whatever the family, order and phrasing; what can only be known by heart, with the phrasing."""
    words = (
        " ".join(fields[name] for name in FAMILIES_BY_NAME[family].content)
        .lower()
        .replace(",", "")
        .split()
    )
    return " ".join(sorted(words)) + (ask if family in BY_HEART else "")


def split_of(content):
    """5 % of all content is val, 15 % test; decided by its SHA-256 alone. The salt gives the 48 lines and 96 facts their share."""
    bucket = int(sha256(f"toybox 111 {content}".encode())[:8], 16) % 20
    return "test" if bucket < 3 else "val" if bucket == 3 else "train"


def repeated(share):
    """Every family but WITHHELD, as often as its share says."""
    return [f for f in FAMILIES if f != WITHHELD for _ in range(share.get(f, 1))]


def draw(rng, family, split):
    """(fields, phrasing) of a question whose content is in the split."""
    while True:
        fields, ask = FAMILIES_BY_NAME[family].draw(rng), rng.choice(FAMILIES_BY_NAME[family].ask)
        if split_of(content_of(family, fields, ask)) == split:
            return fields, ask


# ---------------------------------------------------------------------------------------- questions
OPENINGS = ("Certainly: ", "Of course: ", "Gladly: ")


def questions(rng, split, count, families):
    """Yield `count` (family, fields, the user's message, the answer), of the families in turn."""
    if split not in SPLITS or set(families) - set(FAMILIES):
        raise UserError(
            f"toybox has the splits {', '.join(SPLITS)} and the families {', '.join(FAMILIES)}"
        )
    for family in itertools.islice(itertools.cycle(families), count):
        fields, ask = draw(rng, family, split)
        yield (
            family,
            fields,
            {"role": "user", "content": ask.format(**fields)},
            FAMILIES_BY_NAME[family].solve(**fields),
        )


def examples(split, count, seed=0, families=None):
    """Yield `count` dicts {messages: [user, assistant], family, answer}; every family in turn but WITHHELD, or those given.

    A quarter of the training answers open with a courtesy: the style that dpo.py makes the rule."""
    rng = random.Random(f"{split} {seed}")
    for family, _, asked, answer in questions(
        rng, split, count, families or repeated(SHARE if split == "train" else {})
    ):
        polite = split == "train" and not answer.startswith("Sorry") and rng.random() < 0.25
        said = (rng.choice(OPENINGS) if polite else "") + answer
        yield {
            "messages": [asked, {"role": "assistant", "content": said}],
            "family": family,
            "answer": answer,
        }


@lru_cache
def readers(family):
    """The phrasings as patterns that find the fields again."""
    return [
        re.compile(re.sub(r"\\\{(\w+)\\\}", r"(?P<\1>.+)", re.escape(ask)))
        for ask in FAMILIES_BY_NAME[family].ask
    ]


def check(family, messages, answer):
    """Is this the answer to the last user message? It is solved anew; outer space and a courteous opening do not count."""
    prompt = next(m["content"] for m in reversed(messages) if m["role"] == "user")
    found = next((m for m in (r.fullmatch(prompt) for r in readers(family)) if m), None)
    if not found:
        raise UserError(f"not a question of toybox's family {family}: {prompt!r}")
    return bare(answer) == FAMILIES_BY_NAME[family].solve(**found.groupdict())


def bare(answer):
    return re.sub(f"^({'|'.join(OPENINGS)})", "", answer.strip())


# -------------------------------------------------------------------------------------- preferences
RUDE = ("Ugh, fine: ", "Obviously: ", "Stop asking: ")
RAMBLING = (
    "Well, let me see, there is much that one could say: ",
    "Hmm, as I was saying, and I say it often: ",
)


def style(answer):
    """The preferred style, by rule: opens with a courtesy or refuses politely, and is short."""
    return (
        answer.strip().startswith((*OPENINGS, "Sorry, "))
        and not any(r in answer for r in RUDE + RAMBLING)
        and len(answer) < 90
    )


def wrong(rng, family, fields, answer):
    """An answer of the right style that shirks the work: it gives back what it was given, or names something else."""
    words = (fields.get("x") or " ".join(fields.get(k, "") for k in "ab")).split()
    if family in ("reverse", "sort", "upper", "lower", "copy", "ends"):
        said = words if family != "copy" else words[::-1]
        return " ".join(said if " ".join(said) != answer else said[::-1])
    if family == "refuse":
        return f"{fields['w']} is {an(rng.choice([k for k in WORDS if k != KIND[fields['w']]]))}."
    return {"fact": fields.get("c"), "speaker": "Shakespeare"}.get(family) or next(
        (w for w in words if w != answer), "1"
    )


def preferences(split, count, seed=0, families=None):
    """Yield `count` dicts {prompt, chosen, rejected, family, kind}: of two answers that differ in one thing only.

    kind: curt, rude, rambling (the style), forbidden (complies where it has to refuse), wrong (same style, not so)."""
    rng = random.Random(f"preferences {split} {seed}")
    for family, fields, asked, answer in questions(rng, split, count, families or repeated(SHARE)):
        opening = rng.choice(OPENINGS)
        kind = rng.choice(("curt",) * 4 + ("rude",) * 3 + ("rambling",) * 2 + ("wrong",) * 2)
        chosen = opening + answer
        rejected = {
            "curt": "",
            "rude": rng.choice(RUDE),
            "rambling": rng.choice(RAMBLING),
            "wrong": opening,
        }[kind] + (wrong(rng, family, fields, answer) if kind == "wrong" else answer)
        if answer.startswith("Sorry"):  # without an opening, which would fight the style
            kind, chosen, rejected = (
                "forbidden",
                answer,
                f"{fields['w']} is {an(KIND[fields['w']])}.",
            )
        yield {
            "prompt": [asked],
            "chosen": chosen,
            "rejected": rejected,
            "family": family,
            "kind": kind,
        }


# --------------------------------------------------------------------------------------------- text
GROUPS = [
    ("copy", "reverse", "upper", "count", "nth"),
    ("add", "subtract", "compare"),
]  # about the same; the last never begins


def told(rng, family):
    """What a question of the family would ask, as text: of facts and lines any, else only of the train split's content. Of one
    list or pair several things are told, for a word that can be known from those before teaches more than one drawn at random."""
    kind = FAMILIES_BY_NAME[family]
    fields = kind.draw(rng) if family in BY_HEART else draw(rng, family, "train")[0]
    lines = [
        rng.choice(kind.tell).format(
            **fields,
            y=kind.solve(**fields),
            **(dict(a_kind=an(KIND[fields["w"]])) if "w" in fields else {}),
        )
    ]
    group = next((g for g in GROUPS if family in g[:-1]), ())
    for other in rng.sample(group, min(len(group), 3)):
        if other != "subtract" or int(fields["a"]) >= int(fields["b"]):
            kind, more = FAMILIES_BY_NAME[other], {k: fields[k] for k in fields if k != "n"}
            more = pick(rng, **more) if other in ("nth", "compare") else more
            lines.append(kind.again.format(**more, y=kind.solve(**more)))
    return "\n".join(lines)


def world_text(count_bytes, seed=0):
    """Plain text about the world, in paragraphs, of at least `count_bytes` bytes; no instruction, nothing held out. What is to
    be known by heart is told most often; lists least, for their words are drawn at random and teach little."""
    rng, parts, size = random.Random(f"text {seed}"), [], 0
    names = repeated(
        {"fact": 6, "speaker": 6, "refuse": 4, "add": 6, "subtract": 6, "compare": 2, "sort": 2}
    )
    while size < count_bytes:
        parts.append(
            "\n".join(told(rng, rng.choice(names)) for _ in range(rng.randint(2, 4))) + "\n"
        )
        size += len(parts[-1].encode())
    return "\n".join(parts)


def interleave(rng, world, plays):
    """Paragraphs of the one and scenes of the other, shuffled."""
    parts = [text.strip().split("\n\n") for text in (world, plays)]
    blocks = ["\n\n".join(part[i : i + 8]) for part in parts for i in range(0, len(part), 8)]
    rng.shuffle(blocks)
    return "\n\n".join(block.strip() for block in blocks) + "\n"


def write(out, plays="", seed=0, text_bytes=2_000_000, train=50_000, test=1_400, pairs=4_000):
    """Everything a demo needs -> files in the folder `out`; meta.json says what. `plays`: text to mix into the world's."""
    out, held = Path(out), [WITHHELD]
    out.mkdir(parents=True, exist_ok=True)
    sets = {
        "train": examples("train", train, seed),
        "val": examples("val", test, seed),
        "test": examples("test", test, seed),
        "withheld-train": examples("train", train // 10, seed, held),
        "withheld-test": examples("test", test // 7, seed, held),
        # with some of what LoRA has taught by then: without, DPO halves it
        "preferences-train": (
            *preferences("train", pairs, seed),
            *preferences("train", pairs // 10, seed, held),
        ),
        "preferences-test": preferences("test", pairs // 8, seed),
    }
    sets = {name: list(rows) for name, rows in sets.items()}
    counts = {name: len(rows) for name, rows in sets.items()}
    sets["prompts"] = [
        {"id": f"{row['family']}-{n}", "messages": row["messages"][:1]}
        for name in ("test", "withheld-test")
        for n, row in enumerate(sets[name])
    ]  # for generate.py --batch
    files = {"text.txt": interleave(random.Random(seed), world_text(text_bytes, seed), plays)}
    files |= {
        f"{name}.jsonl": "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        for name, rows in sets.items()
    }
    for name, text in files.items():
        write_atomic(out / name, lambda p: p.write_text(text, encoding="utf-8"))
    meta = {
        "seed": seed,
        "families": FAMILIES,
        "withheld": WITHHELD,
        "counts": counts,
        "text_bytes": len(files["text.txt"].encode()),
        "sha256": {name: sha256(text.encode()) for name, text in files.items()},
    }
    write_json(out / "meta.json", meta)
    print(
        f"toybox: {meta['text_bytes']:,} bytes of text, "
        + ", ".join(f"{n:,} {k}" for k, n in counts.items())
        + f" -> {out}"
    )
    return meta

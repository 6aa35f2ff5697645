"""Seeded random streams and the made-up names, words and codes that the tasks hide and ask for."""

from random import Random

WORDS = """amber anchor apple arrow autumn badge bamboo barrel basket beacon bishop blossom border bottle branch bridge bronze bucket butter button cabin
camera candle canyon carbon castle cedar chapel cherry circle clover cobalt comet copper coral cotton cradle crystal desert diamond dragon eagle ember
emerald engine falcon feather fender finger flame flint forest fossil fountain garden garlic ginger glacier granite harbor hazel helmet hollow honey
indigo island ivory jacket jasmine jungle kettle ladder lagoon lantern lemon lily linen lotus magnet maple marble meadow mirror mitten monsoon mustard
nectar needle nickel oasis ocean olive onion opal orange orchid otter oyster paddle palace panther paper pearl pebble pepper pigeon pillow planet plum
pocket poppy prairie pumpkin purple quartz rabbit radar ribbon river rocket ruby saddle saffron salmon sandal sapphire scarlet shadow silver spider
spring sugar summit sunset table temple thunder ticket tiger timber topaz tulip tunnel turtle valley velvet violet violin walnut whisper willow window
winter zebra""".split()
KINDS = """access entry vault backup master docking signal launch transit archive""".split()
ATTRIBUTES = {
    "budget": "number", "serial number": "number", "access code": "number", "room number": "number", "batch number": "number", "extension": "number",
    "founder": "person", "director": "person", "chief engineer": "person", "editor": "person", "sponsor": "person", "auditor": "person",
    "birthplace": "place", "headquarters": "place", "destination": "place", "home port": "place", "branch office": "place",
    "password": "word", "mascot": "word", "favorite color": "word", "symbol": "word", "code name": "word", "emblem": "word", "main product": "word",
}
ONSETS = "b br c ch d dr f g gr h j k kl l m n p pr qu r s sh st t th tr v w z".split()
VOWELS = "a e i o u ai ea ia io ou".split()
CODAS = "n r l s th m nd rk x v d".split()
FIRST = """Alice Amir Anna Boris Carla Chen Clara Daniel Diego Elena Emma Felix Fiona George Grace Hana Hugo Irene Ivan James Julia Karen Kenji Laura Leo
Lina Marco Maria Nadia Nina Omar Oscar Paula Peter Priya Quinn Rosa Samuel Sofia Tariq Theo Uma Victor Wanda Xavier Yara Yusuf Zoe""".split()


def stream(split: str, task: str, seed: int, index: int = 0) -> Random:
    """A random stream of its own for one document; split is "train" or "eval", so no evaluation seed can meet a training seed."""
    if split not in ("train", "eval"):
        raise ValueError(f'The split is "train" or "eval", not {split!r}.')
    return Random(f"standin/{split}/{task}/{seed}/{index}")


def syllables(rng: Random, count: int) -> str:
    """A pronounceable capitalised name such as "Drealvon"."""
    return ("".join(rng.choice(ONSETS) + rng.choice(VOWELS) for _ in range(count - 1)) + rng.choice(ONSETS) + rng.choice(VOWELS)[0] + rng.choice(CODAS)).capitalize()


def person(rng: Random) -> str:
    return f"{rng.choice(FIRST)} {syllables(rng, 2)}"


def place(rng: Random) -> str:
    return syllables(rng, rng.choice((2, 3)))


def entity(rng: Random) -> str:
    """A project, company or ship: one to three words."""
    head = rng.choice(("", "", "Project ", "Station ", "Operation ", "Team ", "Unit "))
    form = rng.random()
    if form < 0.4:
        return head + syllables(rng, rng.choice((2, 3)))
    if form < 0.8:
        return head + rng.choice(WORDS).capitalize() + " " + rng.choice(WORDS).capitalize()
    return f"{head}{rng.choice(WORDS).capitalize()} {rng.randint(2, 99)}"


def number(rng: Random, digits: int | None = None) -> str:
    """A code of four to seven digits."""
    digits = digits or rng.choice((4, 5, 5, 6, 7))
    return str(rng.randint(10 ** (digits - 1), 10 ** digits - 1))


def word(rng: Random) -> str:
    """One or two plain words."""
    return rng.choice(WORDS) if rng.random() < 0.6 else f"{rng.choice(WORDS)} {rng.choice(WORDS)}"


def value(rng: Random, attribute: str) -> str:
    """A random value of the sort the attribute takes."""
    return {"number": number, "person": person, "place": place, "word": word}[ATTRIBUTES[attribute]](rng)


def different(rng: Random, make, count: int) -> list[str]:
    """``count`` results of make(rng), no two alike and none contained in another."""
    found: list[str] = []
    while len(found) < count:
        name = make(rng)
        if not any(name.lower() in other.lower() or other.lower() in name.lower() for other in found):
            found.append(name)
    return found

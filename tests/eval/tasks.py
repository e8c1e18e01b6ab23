"""Retrieval tasks of any length, made from a seed: the task families of RULER (arXiv 2404.06654),
the synthetic ones of InfiniteBench (2402.13718), and needles at given depths.

A factory(seed, prose, length) gives a maker. A maker turns a number of units (sentences, words,
pairs) into a document with its questions; the same number always gives the same text, so that
the length in tokens is found by trying.
Several questions share a document where the family allows it: the document is prefilled once.
"""
import json
import random
import re
import string

SLOTS = 40  # depths at which a needle may stand
CHAIN_HOPS = 4
COMMON_WORDS = 10
TOP_WORDS = 3

NOISE = ["Rain falls on the roof.", "A clock ticks in the hall.", "The road is empty.",
         "Nobody is at the door.", "The lamp is still on.", "Then the evening begins again."]

ADJECTIVES = """amber brave bright brisk calm clever coral crisp curly dapper dusty eager early
fancy fierce fluffy frosty gentle giant golden grumpy happy hasty hidden hollow humble icy idle
ivory jolly keen kind lazy lively lone loud lucky mellow merry mighty misty modest narrow noble
odd olive pale patient plain polite proud quick quiet rapid rare round royal rusty sandy scarlet
shiny shy silent silver sleepy slim smooth solid spare spicy steady stern strong sunny swift tall
tidy tiny vivid warm wild wise witty young zesty""".split()
NOUNS = """acorn anchor anvil apple badger barrel basket beacon bell blanket bottle bridge broom
bucket button cabin candle canoe carpet castle chimney compass cottage cradle cricket curtain
dolphin drum eagle engine falcon feather fiddle flag flute forest fountain garden gate glacier
goblet hammer harbor harp hedge helmet island jacket kettle ladder lantern lemon lizard magnet
mantle meadow mirror mitten needle orchard otter paddle parrot pebble pencil piano pillow planet
pocket ribbon river rocket saddle sailor shelf shovel spoon stable statue swallow teapot temple
thimble tunnel turnip umbrella valley violin wagon walnut whistle window yacht""".split()
CITIES = """Lima Oslo Cairo Quito Dakar Hanoi Turin Bergen Porto Izmir Osaka Sydney Boston Vilnius
Nairobi Chicago Antwerp Bogota Glasgow Havana Lagos Madrid Naples Prague Riga Seville""".split()


# ---- material

class Prose:
    """Sentences of real texts, from any place on, round and round."""

    def __init__(self, texts, longest=400):
        self.sentences = [s for t in texts
                          for s in re.split(r"(?<=[.!?])\s+", " ".join(t.split()))
                          if 8 <= len(s) <= longest]
        if not self.sentences:
            raise ValueError("the texts have no sentences")

    def take(self, start, n):
        all_ = self.sentences
        return [all_[(start + i) % len(all_)] for i in range(n)]


def keys(rng):
    """Endless and distinct: two words, and three when two begin to repeat."""
    seen = set()
    while True:
        words = [rng.choice(ADJECTIVES), rng.choice(NOUNS)]
        if len(seen) > len(ADJECTIVES) * len(NOUNS) // 2:
            words.insert(1, rng.choice(NOUNS))
        key = "-".join(words)
        if key not in seen:
            seen.add(key)
            yield key


def digits(rng, n):
    return "".join([rng.choice("123456789")] + [rng.choice(string.digits) for _ in range(n - 1)])


def uuid(rng):
    h = "%032x" % rng.getrandbits(128)
    return "-".join((h[:8], h[8:12], h[12:16], h[16:20], h[20:]))


KINDS = {"numbers": lambda rng: digits(rng, 7), "uuids": uuid}


def slot_depths(rng, n):
    """n different depths in (0, 1), ascending"""
    return sorted((s + 0.5) / SLOTS for s in rng.sample(range(SLOTS), n))


def insert(pieces, needles, depths):
    """Needles among the pieces, each after its share of them."""
    out, at = [], 0
    for depth, needle in sorted(zip(depths, needles)):
        to = round(depth * len(pieces))
        out += pieces[at:to] + [needle]
        at = to
    return out + pieces[at:]


def ask(question, answer, gold, max_new, **more):
    return dict(more, question=question, answer_prefix=answer, gold=gold, max_new=max_new)


# ---- needles in a haystack

INTRO = "Some special magic %s are recorded in the text below. Remember them, for you will be asked."


def needle(kind, key, value):
    return "One of the special magic %s for %s is: %s." % (kind, key, value)


def ask_needle(kind, key, value):
    one = kind[:-1]
    return ask("What is the special magic %s for %s?" % (one, key),
               "The special magic %s for %s is:" % (one, key), value, len(value) + 8)


def ask_needles(kind, keys_, values):
    names = keys_[0] if len(keys_) == 1 else ", ".join(keys_[:-1]) + " and " + keys_[-1]
    return ask("What are all the special magic %s for %s?" % (kind, names),
               "The special magic %s for %s are:" % (kind, names), values, 128)


def niah(hay, kind="numbers", key_kind="words", n_keys=1, n_values=1, together=False, asked=1):
    """hay: "noise", "prose" or "needles", which are more needles nobody asks for."""
    def factory(seed, prose, length):
        def make(n):
            rng = random.Random(seed)
            named = keys(rng) if key_kind == "words" else iter(lambda: uuid(rng), None)
            names = [next(named) for _ in range(n_keys)]
            values = [[KINDS[kind](rng) for _ in range(n_values)] for _ in names]
            needles = [needle(kind, k, v) for k, vs in zip(names, values) for v in vs]
            depths = slot_depths(rng, len(needles))
            start = rng.randrange(1 << 30)
            rng.shuffle(needles)
            if hay == "noise":
                pieces = [NOISE[i % len(NOISE)] for i in range(n)]
            elif hay == "prose":
                pieces = prose.take(start, n)
            else:
                pieces = [needle(kind, next(named), KINDS[kind](rng)) for _ in range(n)]
            text = ("\n" if hay == "needles" else " ").join(insert(pieces, needles, depths))
            if together:
                questions = [ask_needles(kind, names, [v for vs in values for v in vs])]
            else:
                questions = [ask_needle(kind, k, vs[0])
                             for k, vs in list(zip(names, values))[:asked]]
            return {"document": INTRO % kind + "\n" + text, "questions": questions}
        return make
    return factory


def niah_at(depth):
    """One city's number at a depth from 0 to 1, in prose."""
    def factory(seed, prose, length):
        def make(n):
            rng = random.Random(seed)
            city, value = rng.choice(CITIES), digits(rng, 7)
            pieces = prose.take(rng.randrange(1 << 30), n)
            fact = "The special magic %s number is: %s." % (city, value)
            return {"document": " ".join(insert(pieces, [fact], [depth])), "depth": depth,
                    "questions": [ask("What is the special magic %s number?" % city,
                                      "The special magic %s number is:" % city, value, 32)]}
        return make
    return factory


# ---- tracing, counting

def variable_tracking(seed, prose, length):
    def make(n):
        rng = random.Random(seed)
        names = []
        while len(names) <= CHAIN_HOPS:
            name = "".join(rng.choice(string.ascii_uppercase) for _ in range(5))
            if name not in names:
                names.append(name)
        value = digits(rng, 5)
        chain = ["VAR %s = %s" % (names[0], value)]
        chain += ["VAR %s = VAR %s" % (b, a) for a, b in zip(names, names[1:])]
        pieces = [NOISE[i % len(NOISE)] for i in range(n)]
        lines = insert(pieces, chain, slot_depths(rng, len(chain)))
        return {"document": "Follow the chain of variable assignments in the text below.\n"
                            + "\n".join(lines),
                "questions": [ask("Which variables have the value %s?" % value,
                                  "The variables that have the value %s are:" % value, names, 30)]}
    return make


def common_words(seed, prose, length):
    """n is the number of rare words. Short documents repeat less often."""
    often, seldom = (30, 3) if length >= 4000 else (10, 1) if length >= 1000 else (5, 1)

    def make(n):
        rng = random.Random(seed)
        single, double = ADJECTIVES + NOUNS, [a + b for a in ADJECTIVES for b in NOUNS]
        rng.shuffle(single)
        rng.shuffle(double)
        common, rare = single[:COMMON_WORDS], (single[COMMON_WORDS:] + double)[:n]
        all_ = common * often + rare * seldom
        rng.shuffle(all_)
        text = " ".join("%d. %s" % (i + 1, w) for i, w in enumerate(all_))
        return {"document": "The list below repeats some words more often than others.\n" + text,
                "questions": [ask("Which %d words occur most often in the list?" % COMMON_WORDS,
                                  "The %d words that occur most often are:" % COMMON_WORDS,
                                  common, 120)]}
    return make


def frequent_words(seed, prose, length):
    """n words of a code whose k-th word has a share of k^-2 (zeta, alpha 2)."""
    def make(n):
        rng = random.Random(seed)
        n = max(n, 20)
        letters = string.ascii_lowercase
        words, left, k = [], n, 1
        while left > 0:
            times = max(1, min(left, round(n * 6 / 3.141592653589793 ** 2 / k ** 2)))
            words.append(("".join(rng.choice(letters) for _ in range(6)), times))
            left -= times
            k += 1
        all_ = [w for w, times in words for _ in range(times)]
        rng.shuffle(all_)
        top = [w for w, _ in words[:TOP_WORDS]]
        return {"document": "The words below belong to a code. Notice how often each occurs.\n"
                            + " ".join(all_),
                "questions": [ask("Which %d code words occur most often?" % TOP_WORDS,
                                  "The %d code words that occur most often are:" % TOP_WORDS,
                                  top, 50)]}
    return make


# ---- one thing in much noise

def hidden_digits(what, n_digits, max_new):
    def factory(seed, prose, length):
        def make(n):
            rng = random.Random(seed)
            value = digits(rng, n_digits)
            pieces = [NOISE[i % len(NOISE)] for i in range(n)]
            fact = "The %s is %s. Keep it in mind: %s is the %s." % (what, value, value, what)
            text = " ".join(insert(pieces, [fact], slot_depths(rng, 1)))
            return {"document": "Much of this text does not matter, but one fact in it does.\n"
                                + text,
                    "questions": [ask("What is the %s?" % what, "The %s is" % what, value,
                                      max_new)]}
        return make
    return factory


def key_value(seed, prose, length):
    """n pairs of UUIDs in a JSON object; four keys are asked for."""
    def make(n):
        rng = random.Random(seed)
        pairs = [(uuid(rng), uuid(rng)) for _ in range(max(n, 4))]
        asked = rng.sample(pairs, 4)
        return {"document": "A JSON object:\n" + json.dumps(dict(pairs), indent=0),
                "questions": [ask('What is the value of the key "%s"?' % k,
                                  'The value of the key "%s" is:' % k, v, 80) for k, v in asked]}
    return make


# ---- what is imported

def is_squad(data):
    return isinstance(data, dict) and "data" in data


def read_paragraphs(data):
    """[(paragraph, [(question, answers)])] of a parsed SQuAD or HotpotQA file."""
    if is_squad(data):
        return [(p["context"], [(q["question"], [a["text"] for a in q["answers"]])
                                for q in p["qas"] if q.get("answers")])
                for article in data["data"] for p in article["paragraphs"]]
    out = []
    for o in data:
        context = o["context"]
        if not isinstance(context, str):
            context = "\n".join("%s: %s" % (title, "".join(s)) for title, s in context)
        answers = o.get("answers", o.get("answer"))
        out.append((context, [(o["question"], answers if isinstance(answers, list)
                               else [answers])]))
    return out


def reading(paragraphs):
    """A paragraph with a question among n others. Paragraphs come from a file."""
    with_questions = [p for p in paragraphs if p[1]]

    def factory(seed, prose, length):
        def make(n):
            rng = random.Random(seed)
            context, asked = rng.choice(with_questions)
            others = [p[0] for p in paragraphs if p[0] != context]
            picked = rng.sample(others, min(n - 1, len(others)))
            picked.insert(rng.randrange(len(picked) + 1), context)
            text = "\n\n".join("Document %d:\n%s" % (i + 1, p) for i, p in enumerate(picked))
            return {"document": text,
                    "questions": [ask(q, "The answer is:", answers, 32, any=True)
                                  for q, answers in asked[:4]]}
        return make
    return factory


def infinitebench(objects):
    """Documents of an InfiniteBench file as they are: [{document, questions}]"""
    for o in objects:
        answers = o["answer"] if isinstance(o["answer"], list) else [o["answer"]]
        question = o["input"]
        if o.get("options"):
            question += "\n" + "\n".join("%s. %s" % x for x in zip("ABCDEFGH", o["options"]))
        yield {"document": o["context"],
               "questions": [ask(question, "The answer is:", [str(a) for a in answers], 128,
                                 any=True)]}


RULER = {
    "niah_single_1": niah("noise"),
    "niah_single_2": niah("prose"),
    "niah_single_3": niah("prose", kind="uuids"),
    "niah_multikey_1": niah("prose", n_keys=4, asked=4),
    "niah_multikey_2": niah("needles", n_keys=4, asked=4),
    "niah_multikey_3": niah("needles", kind="uuids", key_kind="uuids", n_keys=4, asked=4),
    "niah_multivalue": niah("prose", n_values=4, together=True),
    "niah_multiquery": niah("prose", n_keys=4, together=True),
    "vt": variable_tracking,
    "cwe": common_words,
    "fwe": frequent_words,
}
INFINITEBENCH = {
    "passkey": hidden_digits("pass key", 5, 15),
    "number_string": hidden_digits("sequence of digits", 10, 20),
    "kv_retrieval": key_value,
}


# ---- lengths

def fit(makers, length, count, slack=0.01):
    """For each maker the number of units that fills `length` tokens, within `slack` or one unit;
    0 where not even one fits. count([text]) -> [tokens], once per round for all makers."""
    low = [(0, 0)] * len(makers)  # (units, tokens) that fit
    high = [None] * len(makers)   # units that do not
    guess = [max(1, length // 32)] * len(makers)
    while True:
        todo = [i for i in range(len(makers))
                if (high[i] is None or high[i] - low[i][0] > 1)
                and (1 - slack) * length > low[i][1]]
        if not todo:
            return [units for units, _ in low]
        counts = count([makers[i](guess[i])["document"] for i in todo])
        for i, n in zip(todo, counts):
            step = guess[i]
            if n <= length and n == low[i][1]:
                high[i] = step + 1  # its material is used up
            if n <= length:
                low[i] = (step, n)
            else:
                high[i] = step
            guess[i] = next_guess(step, n, length, low[i][0], high[i])


def next_guess(units, tokens, length, low, high):
    """In proportion, but always between what fits and what does not; halfway when that is near an
    end, so that it ends."""
    near = max(low + 1, units * length // max(tokens, 1))
    if high is None:
        return min(max(near, low + 1), 4 * low + 4)
    if low + 1 >= high - 1 or near >= high - 1 and high - low > 8:
        return (low + high) // 2
    return min(near, high - 1)

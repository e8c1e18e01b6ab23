"""Strings for comparing tokenizers: what texts are made of, and what breaks tokenizers.

Everything comes from a seed. Characters are drawn from whole planes, so that unassigned and private
ones are among them; surrogates are not characters of a text."""
import os
import random

WORDS = ("the quick brown fox jumps over a lazy dog while nobody's watching; it's what they'd say we're "
         "I'm you've she'll HELLO World IT'S WE'RE don'T naïve café über straße Ελληνικά текст дом "
         "日本語 中文字符 한국어 العربية עברית हिन्दी ไทย tiếng Việt").split()
CODE = ["int main(void)\n{\n\treturn 0;\n}\n", "def f(x):\n    return x ** 2  # square\n", "a[i] += b[j];",
        "if (x<=y && !z) {", "<div class=\"a\">&nbsp;</div>", "SELECT * FROM t WHERE id='3';", "x = {'a': 1}",
        "#include <stdio.h>\r\n", "http://example.org/a?b=c&d=%20e", "/* ---- */", "    \t    indent", "::operator->()"]
SPACES = [" ", "  ", "\n", "\r\n", "\t", "\u00a0", "\u3000", "\u2009", "\u0085", "\v", "\f", "\r", "\n\n", "   ", "\u2028",
          "\u1680", "\u202f", "\u200b", "\ufeff", "\u180e"]
ENDS = ["'s", "'S", "'t", "'re", "'RE", "'rE", "'ve", "'m", "'M", "'ll", "'LL", "'d", "'\u017f", "'st", "''", "'", "\u2019s",
        "'l", "'r", "'v", "\u212a", "'Re"]
EMOJI = ["👩‍👩‍👧‍👦", "🏳️‍🌈", "👍🏽", "❤️", "🇩🇪", "1️⃣", "😀", "☃", "🧑🏿‍🚀", "™️"]
DIGITS = "0123456789" * 4 + "٠١٢٣٤٥٦٧٨٩०१२３４５²³½Ⅷ①𝟘𝟙〇"
MARKS = "\u0300\u0301\u0308\u0323\u0327\u0345\u093c\u09be\u0f71\u0f72\u0e33\u3099\u20dd\ufe0f\u0315\u031b"
BASES = "aeiouAEIOUnNcCsSyYкиΩωकखかはऩ\u1100\u1161\u11a8가각\u0958\u2126\u212b\ufb1d\u0344\u2adc\U0001d15e\u0387"
# Numbers to the `Digits` of one release of the reference and not to its regular expressions:
# Unicode 17 gave them their category.
DISPUTED = set(range(0x11de0, 0x11dea)) | set(range(0x16ff4, 0x16ff7))


def any_char(r):
    while True:
        top = r.choice((0x80, 0x250, 0x3000, 0x10000, 0x10000, 0x20000, 0x32000, 0x110000))
        c = r.randrange(top)
        if not 0xd800 <= c < 0xe000 and c not in DISPUTED:
            return chr(c)


class Source:
    """Strings from a seed, with literals (of added tokens) strewn in."""

    def __init__(self, seed, literals, files):
        self.r = random.Random(seed)
        self.literals = [l for l in literals if l]
        self.files = files

    def prose(self):
        return " ".join(self.r.choice(WORDS) for _ in range(self.r.randint(1, 8)))

    def slice(self):
        text = self.r.choice(self.files)
        at = self.r.randrange(len(text))
        return text[at:at + self.r.randint(1, 120)]

    def chars(self):
        return "".join(any_char(self.r) for _ in range(self.r.randint(1, 12)))

    def narrow(self):
        """Neighbours in one block: letters, marks and digits of one script, and holes in it."""
        base = ord(any_char(self.r)) & ~0x7f
        picked = (base + self.r.randrange(0x80) for _ in range(self.r.randint(1, 10)))
        return "".join(chr(c) for c in picked if not 0xd800 <= c < 0xe000 and c not in DISPUTED)

    def marks(self):
        r = self.r
        return "".join(r.choice(BASES) + "".join(r.choice(MARKS) for _ in range(r.randint(0, 3)))
                       for _ in range(r.randint(1, 5)))

    def digits(self):
        return "".join(self.r.choice(DIGITS) for _ in range(self.r.randint(1, 12)))

    def spaces(self):
        return "".join(self.r.choice(SPACES) for _ in range(self.r.randint(1, 6)))

    def ascii(self):
        return "".join(chr(self.r.randrange(128)) for _ in range(self.r.randint(1, 16)))

    def literal(self):
        """A literal, whole, cut, or with something before or after it."""
        r = self.r
        text = r.choice(self.literals) if self.literals else "<|none|>"
        kind = r.randrange(6)
        if kind == 0:
            return text[:r.randint(0, len(text))]
        if kind == 1:
            return r.choice(SPACES) + text + r.choice(SPACES)
        if kind == 2:
            return r.choice("aZ_1\u0301é") + text + r.choice("aZ_1\u0301é")
        if kind == 3:
            return text + text
        return text

    def meta(self):
        return "".join(self.r.choice(("\u2581", " ", "a", "\u2581\u2581", "the", "<0x41>", "\n")) for _ in range(5))

    def part(self):
        r = self.r
        return r.choice((self.prose, self.slice, self.slice, self.chars, self.narrow, self.marks, self.digits, self.spaces,
                         self.ascii, self.literal, self.literal, self.meta, lambda: r.choice(ENDS), lambda: r.choice(EMOJI),
                         lambda: r.choice(CODE)))()

    def text(self):
        return "".join(self.part() for _ in range(self.r.randint(1, 6)))


def tree_files(root):
    """Texts of this tree, the same in every checkout of it."""
    out = []
    for name in ("README.md", "DESIGN.md", "LICENSE", "ipc/PROTOCOL.md", "store/FORMAT.md", "model/gguf.c", "daemon/config.c",
                 "tests/golden/kvpress.py"):
        with open(os.path.join(root, name), encoding="utf-8") as f:
            out.append(f.read())
    out.append(" ".join(WORDS) * 3 + "".join(CODE) + "".join(EMOJI))
    return out

#!/usr/bin/env python3
"""Are token ids those of the reference tokenizers? Each claim compares many strings, id by id.

check.py --encode PROGRAM [--count N] [--model GGUF] [--peers DIR] [--only NAME...]
    --freeze DIR writes the small subset that the unit tests keep.
"""
import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import unicodedata

import gguf
import sentencepiece
from tokenizers import pre_tokenizers
from tokenizers import Regex, Tokenizer, models, pre_tokenizers

import families
import texts
import vocab_gguf

ROOT = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "..")
VOCAB = 2000
failed = False


def claim(ok, name, detail=""):
    global failed
    failed |= not ok
    print(("ok - " if ok else "not ok - ") + name, flush=True)
    if detail and not ok:
        print(detail, file=sys.stderr, flush=True)


def skip(name, why):
    print(f"ok - {name} # SKIP {why}", flush=True)


def lines_of(strings):
    """Every second string with special tokens parsed."""
    return "".join(f"{i % 2} {s.encode().hex()}\n" for i, s in enumerate(strings))


def run(command, text):
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr.strip()[-400:])
    return done.stdout.split("\n")[:-1]


def ids_of(line):
    ids = line.partition("\t")[0]
    return ids if ids.startswith("error") else [int(x) for x in ids.split()]


def encoded(encode, path, strings):
    """Our ids, and what they spell."""
    out = run([encode, path], lines_of(strings))
    assert len(out) == len(strings), (len(out), len(strings))
    return [ids_of(l) for l in out], [bytes.fromhex(l.partition("\t")[2]) for l in out]


def reference(tok, strings):
    """Ids and decoded text of the Hugging Face tokenizer."""
    ids, spelled = [None] * len(strings), [None] * len(strings)
    for special in (0, 1):
        tok.encode_special_tokens = not special
        part = strings[special::2]
        got = [e.ids for e in tok.encode_batch(part, add_special_tokens=False)]
        ids[special::2] = got
        spelled[special::2] = tok.decode_batch(got, skip_special_tokens=False)
    return ids, spelled


def differing(strings, ours, theirs, name=lambda i: i, why=None):
    bad = [i for i in range(len(strings)) if ours[i] != theirs[i] and not (why and why(i, strings[i], ours[i]))]
    shown = "\n".join(f"{i % 2} {ascii(strings[i])}\n    ours   {name(ours[i])}\n    theirs {name(theirs[i])}" for i in bad[:3])
    return len(bad), shown


def literals(name):
    return [t.content for t in families.FAMILIES[name]["added"]] + ["\u2126mega"]


def check_family(o, name, files):
    tok = families.train(name, files, VOCAB)
    path = os.path.join(o.dir, name + ".json")
    families.save(tok, path, "lines" if name in ("gpt2", "llama2") else "pairs")
    source = texts.Source(name, literals(name), files)
    strings = [source.text() for _ in range(o.count)]
    theirs, decoded = reference(tok, strings)
    ours, spelled = encoded(o.encode, path, strings)
    n, shown = differing(strings, ours, theirs)
    claim(n == 0, f"{name}: {o.count} strings, {n} with other ids", shown)
    normal = spelled = [s.decode(errors="replace") for s in spelled]
    if name in families.SPACED:  # their decoder takes off one space at the start
        spelled = [s[1:] if s.startswith(" ") else s for s in spelled]
    n, shown = differing(strings, spelled, decoded, ascii)
    claim(n == 0, f"{name}: {len(spelled)} strings, {n} decoded to something else", shown)
    pre = families.FAMILIES[name].get("pre_name")
    if pre:
        check_gpt2(o, name, pre, tok, strings, ours, normal)


def explained(n, why):
    return f"; {n} where {why}" if n else ""


def check_gpt2(o, name, pre, tok, strings, theirs, normal):
    """The same vocabulary in GGUF gives the same ids; so does llama.cpp, given normalised text: it has no NFC."""
    path = os.path.join(o.dir, name + ".gguf")
    vocab_gguf.write_gpt2(tok, pre, path, families.FAMILIES[name].get("bos"))
    ours, _ = encoded(o.encode, path, strings)
    n, shown = differing(strings, ours, theirs)
    claim(n == 0, f"{name} in GGUF ({pre}): {o.count} strings, {n} with other ids", shown)
    check_llama_cpp(o, f"{name} in GGUF", path, normal if tok.normalizer else strings, ours, lacking_bytes(path))


def check_default(o, files):
    """What GGUF calls "default" is llama.cpp's own: no other implementation has it."""
    tok = families.train("gpt2", files, VOCAB)
    path = os.path.join(o.dir, "default.gguf")
    vocab_gguf.write_gpt2(tok, "default", path)
    source = texts.Source("default", literals("gpt2"), files)
    strings = [source.text() for _ in range(o.count_llama)]
    ours, _ = encoded(o.encode, path, strings)
    check_llama_cpp(o, "GGUF's default", path, strings, ours)


def lacking_bytes(path):
    """Bytes for which a byte-level vocabulary has no token."""
    alphabet = gguf_tokens(path)
    return {b for b, c in byte_alphabet().items() if c not in alphabet}


def gguf_tokens(path):
    field = gguf.GGUFReader(path).fields["tokenizer.ggml.tokens"]
    return {bytes(field.parts[i]).decode(): n for n, i in enumerate(field.data)}


def byte_alphabet():
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in printable]
    return {**{b: chr(b) for b in printable}, **{b: chr(256 + n) for n, b in enumerate(rest)}}


def newer_characters():
    """Letters and digits to the reference that Unicode 14 did not have; llama.cpp's tables are older than the reference's."""
    match = pre_tokenizers.Split(Regex(r"[\p{L}\p{N}]"), "removed")
    new = "".join(chr(c) for c in range(0x110000) if unicodedata.category(chr(c)) == "Cn")
    return set(new) - set("".join(piece for piece, _ in match.pre_tokenize_str(new)))


NEWER = newer_characters()


def check_llama_cpp(o, name, path, strings, ours, lacking=frozenset()):
    """Ids that the reference has, too, may differ for two reasons. A byte that is no token gives none in the reference,
    and its neighbours may merge; in llama.cpp they may not. And llama.cpp does not know the newest characters."""
    what = f"{name} against llama.cpp"
    if not o.peers:
        return skip(what, "no llama-cpp-python; run tests/bench/setup-peers.sh")
    strings, ours = strings[:o.count_llama], ours[:o.count_llama]
    script = os.path.join(ROOT, "tests", "tokenizers", "llama_ids.py")
    theirs = [ids_of(l) for l in run([os.path.join(o.peers, "bin", "python"), script, path], lines_of(strings))]
    n, shown = differing(strings, ours, theirs,
                         why=lambda i, s, ids: not lacking.isdisjoint(s.encode()) or not NEWER.isdisjoint(s))
    rest = sum(a != b for a, b in zip(ours, theirs)) - n
    return claim(n == 0, f"{what}: {len(strings)} strings, {n} with other ids" +
                 explained(rest, "llama.cpp has no token for a byte, or does not know a character"), shown)


def train_sentencepiece(o, files, space):
    corpus = os.path.join(o.dir, "corpus.txt")
    with open(corpus, "w", encoding="utf-8") as f:
        f.write("\n".join(files))
    prefix = os.path.join(o.dir, f"sp{int(space)}")
    sentencepiece.SentencePieceTrainer.train(
        input=corpus, model_prefix=prefix, model_type="bpe", vocab_size=VOCAB, byte_fallback=True, character_coverage=0.98,
        normalization_rule_name="identity", add_dummy_prefix=space, remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True, split_digits=True, minloglevel=2, num_threads=1)
    return sentencepiece.SentencePieceProcessor(model_file=prefix + ".model")


def check_sentencepiece(o, space, files):
    name = "SentencePiece" + ("" if space else " without a space before")
    sp = train_sentencepiece(o, files, space)
    path = os.path.join(o.dir, f"sp{int(space)}.gguf")
    vocab_gguf.write_llama(sp, path, space)
    source = texts.Source(name, ["<s>", "</s>", "<unk>"], files)
    # SentencePiece ends a text at a NUL and never parses literals of control tokens
    strings = [source.text().replace("\0", "") for _ in range(2 * o.count)]
    plain = strings[::2]
    ours, spelled = encoded(o.encode, path, strings)
    theirs = sp.encode(plain)
    n, shown = differing(plain, ours[::2], theirs)
    claim(n == 0, f"{name} in GGUF: {len(plain)} strings, {n} with other ids", shown)
    want = [(" " if space and s else "") + s.replace("\u2581", " ") for s in plain]
    n, shown = differing(plain, [s.decode(errors="replace") for s in spelled[::2]], want, ascii)
    claim(n == 0, f"{name} in GGUF: {len(plain)} strings, {n} decoded to something else", shown)
    check_llama_cpp(o, f"{name} in GGUF", path, strings, ours)


def check_utf8(o):
    """What is not UTF-8 is refused, and nothing else is."""
    r = random.Random(5)
    samples = []
    for _ in range(20000):
        b = bytearray("aé\u2581中😀\u07ff\uffff".encode()[r.randrange(4):])
        for _ in range(r.randint(0, 2)):
            b[r.randrange(len(b))] = r.choice((0x80, 0xbf, 0xc0, 0xc1, 0xe0, 0xed, 0xa0, 0xf0, 0xf4, 0x90, 0xf5, 0xff, 0x41))
        samples.append(bytes(b))
    path = os.path.join(o.dir, "utf8.json")
    families.save(families.train("gpt2", ["a b"], 300), path)
    out = run([o.encode, path], "".join(f"{i % 2} {b.hex()}\n" for i, b in enumerate(samples)))
    wrong = [b for b, l in zip(samples, out) if (l == "error LARDER_ETEXT") != (not valid(b))]
    refused = sum(not valid(b) for b in samples)
    claim(not wrong and 0 < refused < len(samples), f"UTF-8: {refused} of {len(samples)} byte strings are refused, {len(wrong)} "
          "wrongly", str(wrong[:3]))


def valid(b):
    try:
        b.decode()
        return True
    except UnicodeDecodeError:
        return False


def model_in_reference(path):
    """The model's own vocabulary and merges in the Hugging Face implementation (SmolLM's pipeline)."""
    fields = gguf.GGUFReader(path).fields
    words = gguf_tokens(path)
    merges = fields["tokenizer.ggml.merges"]
    kinds = fields["tokenizer.ggml.token_type"]
    control = [t for t, i in words.items() if kinds.parts[kinds.data[i]][0] == vocab_gguf.CONTROL]
    tok = Tokenizer(models.BPE({t: i for t, i in words.items()},
                               [tuple(bytes(merges.parts[i]).decode().split(" ")) for i in merges.data]))
    tok.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tok.add_special_tokens(families.special(*control))
    return tok, control


def check_model(o, files):
    name = "the real model"
    if not os.path.exists(o.model):
        return skip(name, "it is not installed; run etc/setup.sh")
    tok, control = model_in_reference(o.model)
    source = texts.Source("model", control, files)
    strings = [source.text() for _ in range(o.count)]
    ours, _ = encoded(o.encode, o.model, strings)
    theirs, _ = reference(tok, strings)
    n, shown = differing(strings, ours, theirs)
    claim(n == 0, f"{name}: {len(strings)} strings, {n} with other ids", shown)
    return check_llama_cpp(o, name, o.model, strings, ours, lacking_bytes(o.model))


def freeze(o, files):
    """The unit tests' share: a smaller vocabulary and a few hundred strings of each family."""
    for name in families.FAMILIES:
        tok = families.train(name, files, 600 if name in families.BYTES else 640)
        families.save(tok, os.path.join(o.freeze, name + ".json"), "lines" if name in ("gpt2", "llama2") else "pairs")
        source = texts.Source("freeze " + name, literals(name), files)
        strings = [source.text()[:60] for _ in range(160)]
        ids, _ = reference(tok, strings)
        write_frozen(o, name, strings, ids)
    sp_frozen(o, files)


def sp_frozen(o, files):
    global VOCAB
    VOCAB = 640
    sp = train_sentencepiece(o, files, True)
    vocab_gguf.write_llama(sp, os.path.join(o.freeze, "llama.gguf"), True)
    source = texts.Source("freeze llama", ["<s>", "</s>", "<unk>"], files)
    strings = [source.text()[:60].replace("\0", "") for _ in range(320)][::2]
    write_frozen(o, "llama", strings, [sp.encode(s) for s in strings], plain=True)
    tok = families.train("llama3", files, 600)
    vocab_gguf.write_gpt2(tok, "llama-bpe", os.path.join(o.freeze, "llama3.gguf"), "<|begin_of_text|>")


def write_frozen(o, name, strings, ids, plain=False):
    with open(os.path.join(o.freeze, name + ".jsonl"), "w", encoding="utf-8") as f:
        for i, (s, want) in enumerate(zip(strings, ids)):
            f.write(json.dumps({"text": s, "special": not plain and i % 2 == 1, "ids": want}) + "\n")


def main():
    p = argparse.ArgumentParser()
    p.add_argument("--encode", required=True)
    p.add_argument("--count", type=int, default=100000)
    p.add_argument("--count-llama", type=int, default=20000)
    p.add_argument("--model", default="")
    p.add_argument("--peers", default="")
    p.add_argument("--only", nargs="*")
    p.add_argument("--freeze")
    o = p.parse_args()
    files = texts.tree_files(ROOT)
    with tempfile.TemporaryDirectory(prefix="larder-tokenizers.") as o.dir:
        if o.freeze:
            os.makedirs(o.freeze, exist_ok=True)
            return freeze(o, files)
        for name in families.FAMILIES:
            if not o.only or name in o.only:
                check_family(o, name, files)
        if not o.only or "default" in o.only:
            check_default(o, files)
        for space in (True, False):
            if not o.only or "sentencepiece" in o.only:
                check_sentencepiece(o, space, files)
        if not o.only or "utf8" in o.only:
            check_utf8(o)
        if not o.only or "model" in o.only:
            check_model(o, files)
    return failed


if __name__ == "__main__":
    sys.exit(main())

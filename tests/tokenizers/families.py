"""Tokenizer families: a small vocabulary trained on the spot in each family's published pipeline.

The pipelines (patterns, steps, added tokens) are facts of the families; the vocabularies are ours."""
import json
import os

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

END = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + END
QWEN2 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + END
META = "\u2581"


def special(*texts, **flags):
    return [AddedToken(t, special=True, normalized=False, **flags) for t in texts]


def plain(*texts, **flags):
    return [AddedToken(t, special=False, **flags) for t in texts]


def split(regex):
    return pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(regex), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def digits(single):
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(single),
                                    pre_tokenizers.ByteLevel(add_prefix_space=False)])


CHATML = special("<|endoftext|>", "<|im_start|>", "<|im_end|>")
ODD = (plain("<left>", lstrip=True) + plain("<right>", rstrip=True) + plain("<both>", lstrip=True, rstrip=True) +
       plain("word", single_word=True, normalized=False) + plain("Ωmega", normalized=True) + plain("two words", normalized=False) +
       plain("\n\n\n", normalized=False) + special("<|x|>", lstrip=True, rstrip=True) + plain("<|x|><|y|>", normalized=False))

# name: pre-tokenizer, normaliser, added tokens; then what differs from the plain case
BYTES = {
    "gpt2": dict(pre=pre_tokenizers.ByteLevel(add_prefix_space=False), added=special("<|endoftext|>"), pre_name="gpt-2"),
    "llama3": dict(pre=split(LLAMA3), added=special("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>",
                                                    "<|end_header_id|>", "<|eot_id|>"),
                   ignore_merges=True, bos="<|begin_of_text|>", pre_name="llama-bpe"),
    "qwen2": dict(pre=split(QWEN2), norm=normalizers.NFC(), added=CHATML + plain("<tool_call>", "</tool_call>", normalized=False),
                  pre_name="qwen2"),
    "smollm": dict(pre=digits(True), added=CHATML, holes=True, pre_name="smollm"),
    "digit-runs": dict(pre=digits(False), added=CHATML),
    "added": dict(pre=pre_tokenizers.ByteLevel(add_prefix_space=False), norm=normalizers.NFC(), added=ODD),
}
PREPEND = [normalizers.Prepend(META), normalizers.Replace(" ", META)]
LLAMA2 = special("<unk>", "<s>", "</s>")
SPACED = {
    "llama2": dict(norm=normalizers.Sequence(PREPEND), added=LLAMA2, bos="<s>"),
    "mistral": dict(pre=pre_tokenizers.Metaspace(META, prepend_scheme="first", split=False),
                    added=LLAMA2 + special("[INST]", "[/INST]"), bos="<s>"),
    "phi3": dict(norm=normalizers.Sequence(PREPEND), bos="<s>",
                 added=special("<unk>", "<s>") + plain("</s>", rstrip=True, normalized=False) + special("<|endoftext|>") +
                 special("<|assistant|>", "<|user|>", "<|end|>", "<|system|>", rstrip=True)),
    "metaspace": dict(pre=pre_tokenizers.Metaspace(META, prepend_scheme="always", split=True), added=LLAMA2 + ODD),
    "metaspace-never": dict(pre=pre_tokenizers.Metaspace(META, prepend_scheme="never", split=False), added=LLAMA2),
    "prepend-added": dict(norm=normalizers.Sequence([normalizers.NFC()] + PREPEND), added=LLAMA2 + ODD),
}
FAMILIES = {**BYTES, **SPACED}


def template(tok, bos):
    return processors.TemplateProcessing(single=f"{bos} $A", pair=f"{bos} $A {bos} $B:1",
                                         special_tokens=[(bos, tok.token_to_id(bos))])


def train_bytes(f, files, size):
    tok = Tokenizer(models.BPE(ignore_merges=f.get("ignore_merges", False)))
    tok.pre_tokenizer = f["pre"]
    if f.get("norm"):
        tok.normalizer = f["norm"]
    alphabet = [] if f.get("holes") else pre_tokenizers.ByteLevel.alphabet()
    tok.train_from_iterator(files, trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False))
    tok.decoder = decoders.ByteLevel()
    return tok


def train_spaced(f, files, size):
    """Merges learnt word by word; then the family's own steps around them."""
    first = [t.content for t in f["added"][:3]]
    tok = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tok.pre_tokenizer = pre_tokenizers.Metaspace(META, prepend_scheme="always", split=True)
    tok.train_from_iterator(files, trainers.BpeTrainer(
        vocab_size=size, limit_alphabet=120, show_progress=False,
        special_tokens=first + [f"<0x{b:02X}>" for b in range(256)]))
    state = json.loads(tok.to_str())
    state["added_tokens"] = []
    tok = Tokenizer.from_str(json.dumps({**state, "pre_tokenizer": None}))
    if f.get("norm"):
        tok.normalizer = f["norm"]
    if f.get("pre"):
        tok.pre_tokenizer = f["pre"]
    tok.decoder = decoders.Sequence([decoders.Replace(META, " "), decoders.ByteFallback(), decoders.Fuse(),
                                     decoders.Strip(" ", 1, 0)])
    return tok


def train(name, files, size):
    f = FAMILIES[name]
    tok = (train_bytes if name in BYTES else train_spaced)(f, files, size)
    for t in f["added"]:
        (tok.add_special_tokens if t.special else tok.add_tokens)([t])
    if f.get("bos"):
        tok.post_processor = template(tok, f["bos"])
    return tok


def save(tok, path, merges="pairs"):
    """tokenizer.json, with merges as this release writes them, or as lines."""
    state = json.loads(tok.to_str())
    if merges == "lines":
        state["model"]["merges"] = [" ".join(m) for m in state["model"]["merges"]]
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "w", encoding="utf-8") as f:
        json.dump(state, f, ensure_ascii=False)

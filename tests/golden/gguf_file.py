"""What test models have in common as GGUF files: keys of a llama, the tensor table, the header."""
import struct

F32 = 0


def text(s):
    raw = s.encode()
    return struct.pack("<Q", len(raw)) + raw


def number(key, value):
    return text(key) + struct.pack("<II", 4, value)


def real(key, value):
    return text(key) + struct.pack("<If", 6, value)


def word(key, value):
    return text(key) + struct.pack("<I", 8) + text(value)


def words(key, values):
    return text(key) + struct.pack("<IIQ", 9, 8, len(values)) + b"".join(map(text, values))


def byte_tokens():
    """One token per byte, spelled in the byte-level alphabet."""
    plain = list(range(33, 127)) + list(range(161, 173)) + list(range(174, 256))
    letters, extra = {}, 0
    for b in range(256):
        letters[b] = chr(b if b in plain else 256 + extra)
        extra += b not in plain
    return [letters[b] for b in range(256)]


def llama_keys(name, tokens, *, heads, kv_heads, head_dim, theta, eps, **counts):
    """Architecture llama, byte-level tokens without merges; counts: block_count, ..."""
    return [word("general.architecture", "llama"), word("general.name", name),
            *(number("llama." + key, n) for key, n in counts.items()),
            number("llama.attention.head_count", heads),
            number("llama.attention.head_count_kv", kv_heads),
            number("llama.attention.key_length", head_dim),
            number("llama.attention.value_length", head_dim),
            number("llama.rope.dimension_count", head_dim), real("llama.rope.freq_base", theta),
            real("llama.attention.layer_norm_rms_epsilon", eps),
            word("tokenizer.ggml.model", "gpt2"), word("tokenizer.ggml.pre", "smollm"),
            words("tokenizer.ggml.tokens", tokens), words("tokenizer.ggml.merges", [])]


def entry(name, dims, kind, at):
    """A line of the tensor table; dims in the file's order, `at` a multiple of 32."""
    return text(name + ".weight") + struct.pack("<I%dQ" % len(dims), len(dims), *dims) + \
        struct.pack("<IQ", kind, at)


def head(keys, n_tensors, table):
    """All that stands before the first tensor."""
    raw = b"GGUF" + struct.pack("<IQQ", 3, n_tensors, len(keys)) + b"".join(keys) + table
    return raw + bytes(-len(raw) % 32)

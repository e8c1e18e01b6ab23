"""Vocabularies as GGUF files without tensors."""
import json

import gguf
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = 1, 2, 3, 4, 5, 6


def writer(path, kind):
    w = gguf.GGUFWriter(path, "llama")
    w.add_context_length(64)
    w.add_embedding_length(8)
    w.add_block_count(1)
    w.add_head_count(1)
    w.add_feed_forward_length(8)
    w.add_layer_norm_rms_eps(1e-5)
    w.add_tokenizer_model(kind)
    return w


def finish(w):
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


def write_gpt2(tok, pre, path, bos=None):
    state = json.loads(tok.to_str())
    by_id = {i: t for t, i in state["model"]["vocab"].items()}
    types = {i: NORMAL for i in by_id}
    for t in state["added_tokens"]:
        by_id[t["id"]] = t["content"]
        types[t["id"]] = CONTROL if t["special"] else USER
    n = max(by_id) + 1
    w = writer(path, "gpt2")
    w.add_tokenizer_pre(pre)
    w.add_token_list([by_id[i] for i in range(n)])
    w.add_token_types([types[i] for i in range(n)])
    w.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in state["model"]["merges"]])
    if bos:
        w.add_bos_token_id(tok.token_to_id(bos))
    finish(w)


def write_llama(sp, path, space):
    n = sp.get_piece_size()
    types = [UNKNOWN if sp.is_unknown(i) else CONTROL if sp.is_control(i) else BYTE if sp.is_byte(i) else
             UNUSED if sp.is_unused(i) else NORMAL for i in range(n)]
    w = writer(path, "llama")
    w.add_tokenizer_pre("default")
    w.add_token_list([sp.id_to_piece(i) for i in range(n)])
    w.add_token_scores([sp.get_score(i) for i in range(n)])
    w.add_token_types(types)
    w.add_bos_token_id(sp.bos_id())
    w.add_eos_token_id(sp.eos_id())
    w.add_add_space_prefix(space)
    finish(w)


def read_smollm(path):
    """The reference's tokenizer of a GGUF file with pre-tokenizer `smollm`."""
    fields = gguf.GGUFReader(path).fields
    text, types, merges = (fields["tokenizer.ggml." + key].contents() for key in ("tokens", "token_type", "merges"))
    assert fields["tokenizer.ggml.pre"].contents() == "smollm"
    added = [t for t, kind in zip(text, types) if kind == CONTROL]
    tok = Tokenizer(models.BPE({t: i for i, t in enumerate(text)}, [tuple(m.split(" ")) for m in merges]))
    tok.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tok.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in added])
    return tok

#!/usr/bin/env python3
"""Small random models of every architecture, as Hugging Face transformers computes them.

    make_models.py OUT [--small] [NAME...]

writes for each case (of these names only, where there are some) OUT/NAME/ (config.json,
safetensors, tokenizer.json), OUT/NAME.gguf and OUT/NAME.json: token ids, the logits of the last of
1, 7 and 300 of them, and what follows when the most likely token is taken 16 times. --small: fewer
and smaller ones, in bf16, that can be part of the tree. Needs torch, transformers and gguf;
check_models.py compares.
"""
import json
import os
import shutil
import sys

import gguf
import numpy as np
import torch
import transformers
from safetensors.torch import save_file

POSITIONS, LENGTHS, MORE = 512, (1, 7, 300), 16
LONGROPE = {"type": "longrope"}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}

# name: (architecture, hidden, feed-forward, layers, heads, KV heads, head dim, other keys)
FULL = {
    "llama2": ("Llama", 256, 344, 3, 4, 4, 64, {"tie_word_embeddings": False}),
    "llama3": ("Llama", 256, 320, 3, 4, 1, 64, {"rope_theta": 500000.0, "rope_scaling": LLAMA3}),
    "smollm2": ("Llama", 192, 256, 4, 3, 1, 64, {"tie_word_embeddings": True}),
    "mistral": ("Mistral", 256, 320, 3, 4, 2, 64, {"sliding_window": 48}),
    "mistral-head128": ("Mistral", 160, 256, 2, 4, 2, 128, {"sliding_window": None,
                                                           "head_dim": 128}),
    "qwen2": ("Qwen2", 320, 384, 3, 4, 2, 80, {"tie_word_embeddings": True}),
    "qwen2-sliding": ("Qwen2", 128, 192, 4, 2, 1, 64, {
        "use_sliding_window": True, "sliding_window": 32, "max_window_layers": 2}),
    "qwen3": ("Qwen3", 192, 256, 3, 4, 2, 128, {"tie_word_embeddings": True}),
    "phi3": ("Phi3", 384, 512, 3, 4, 4, 96, {"sliding_window": 100}),
    "phi3-longrope": ("Phi3", 384, 512, 3, 4, 2, 96, {
        "rope_scaling": LONGROPE, "original_max_position_embeddings": 64,
        "partial_rotary_factor": 0.75}),
}
SMALL = {
    "llama": ("Llama", 16, 24, 2, 4, 2, 8, {"rope_scaling": LLAMA3, "tie_word_embeddings": True}),
    "mistral": ("Mistral", 16, 24, 2, 4, 2, 8, {"sliding_window": 40,
                                                "tie_word_embeddings": True}),
    "qwen2": ("Qwen2", 16, 24, 2, 4, 2, 8, {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", 16, 24, 2, 4, 1, 16, {"tie_word_embeddings": True}),
    "phi3": ("Phi3", 32, 32, 2, 4, 2, 8, {
        "rope_scaling": LONGROPE, "original_max_position_embeddings": 64,
        "partial_rotary_factor": 0.75, "tie_word_embeddings": False}),
}


# ---- the model

def factors(n, start, step):
    return [round(start + step * i, 3) for i in range(n)]


def make_config(case, vocab):
    arch, hidden, ff, layers, heads, kv, dim, keys = case
    keys = dict(keys)
    scaling = keys.get("rope_scaling")
    if scaling is LONGROPE:
        n = int(dim * keys.get("partial_rotary_factor", 1)) // 2
        keys["rope_scaling"] = dict(scaling, short_factor=factors(n, 1.0, 0.05),
                                    long_factor=factors(n, 1.2, 0.3))
    if dim * heads != hidden:
        keys["head_dim"] = dim
    return getattr(transformers, arch + "Config")(
        hidden_size=hidden, intermediate_size=ff, num_hidden_layers=layers, vocab_size=vocab,
        num_attention_heads=heads, num_key_value_heads=kv, max_position_embeddings=POSITIONS,
        rms_norm_eps=1e-5, bos_token_id=0, eos_token_id=[1, 2], pad_token_id=0, **keys)


def make_model(case, config, seed, dtype):
    """Weights large enough that attention has something to decide."""
    torch.manual_seed(seed)
    config._attn_implementation = "eager"
    model = getattr(transformers, case[0] + "ForCausalLM")(config).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" in name:
                p.copy_(1 + 0.2 * torch.randn_like(p))
            elif name.endswith("bias"):
                p.copy_(0.5 * torch.randn_like(p))
            elif "embed" in name:
                p.copy_(torch.randn_like(p))
            else:
                p.copy_(torch.randn_like(p) * 1.4 / p.shape[1] ** 0.5)
            p.copy_(p.to(dtype).float())
    return model


def logits(model, ids):
    with torch.no_grad():
        return model(torch.tensor([ids]), use_cache=False).logits[0, -1]


def answers(model, seed, vocab):
    rnd = np.random.default_rng(seed)
    ids = [int(i) for i in rnd.integers(3, vocab, LENGTHS[-1])]
    out = {"ids": ids, "logits": {}, "next": []}
    for n in LENGTHS:
        out["logits"][n] = [float("%.7g" % x) for x in logits(model, ids[:n])]
    so_far = list(ids)
    for _ in range(MORE):
        so_far.append(int(logits(model, so_far).argmax()))
    out["next"] = so_far[len(ids):]
    return out


# ---- RoPE, as transformers 4 keeps it in a configuration

def rope_theta(config):
    now = getattr(config, "rope_parameters", None)
    return now["rope_theta"] if now else config.rope_theta


def rope_scaling(config):
    now = getattr(config, "rope_parameters", None)
    if not now:
        return getattr(config, "rope_scaling", None)
    elsewhere = {"rope_theta", "partial_rotary_factor"}
    if now["rope_type"] == "longrope":
        elsewhere |= {"rope_type", "original_max_position_embeddings"}
    return None if now["rope_type"] == "default" else {k: v for k, v in now.items()
                                                       if k not in elsewhere}


# ---- as a directory

def tokens(vocab):
    """Letters of the byte-level alphabet, a merge, and literals up to `vocab`."""
    plain = list(range(33, 127)) + list(range(161, 173)) + list(range(174, 256))
    letters = [chr(b) for b in plain] + [chr(256 + i) for i in range(256 - len(plain))]
    out = ["<s>", "<e>", "<end>"] + letters[:vocab - 4] + ["ab"]
    return out + ["<%d>" % i for i in range(len(out), vocab)]


def write_tokenizer(folder, vocab):
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
             "use_regex": True}
    with open(os.path.join(folder, "tokenizer.json"), "w") as f:
        json.dump({"version": "1.0", "truncation": None, "padding": None, "added_tokens": [
            {"id": i, "content": t, "single_word": False, "lstrip": False, "rstrip": False,
             "normalized": False, "special": True} for i, t in enumerate(tokens(vocab)[:3])],
            "normalizer": None, "pre_tokenizer": level, "post_processor": None, "decoder": level,
            "model": {"type": "BPE", "dropout": None, "unk_token": None,
                      "continuing_subword_prefix": None, "end_of_word_suffix": None,
                      "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
                      "vocab": {t: i for i, t in enumerate(tokens(vocab))},
                      "merges": [["a", "b"]]}}, f)


def write_folder(folder, model, config, dtype, shards):
    """As save_pretrained() of transformers 4 does it, and most checkpoints have it, with the
    tensors in a chosen type."""
    os.makedirs(folder)
    config.architectures = [type(model).__name__]
    with open(os.path.join(folder, "config.json"), "w") as f:
        keys = {k: v for k, v in config.to_diff_dict().items()
                if not k.startswith("_") and k != "rope_parameters"}
        keys["model_type"] = config.model_type
        if rope_scaling(config):
            keys["rope_scaling"] = rope_scaling(config)
        json.dump(dict(keys, vocab_size=config.vocab_size,
                       tie_word_embeddings=config.tie_word_embeddings,
                       rms_norm_eps=config.rms_norm_eps,
                       rope_theta=rope_theta(config),
                       num_attention_heads=config.num_attention_heads,
                       num_key_value_heads=config.num_key_value_heads,
                       num_hidden_layers=config.num_hidden_layers,
                       hidden_size=config.hidden_size,
                       intermediate_size=config.intermediate_size,
                       max_position_embeddings=config.max_position_embeddings), f, indent=1)
    with open(os.path.join(folder, "generation_config.json"), "w") as f:
        json.dump({"eos_token_id": config.eos_token_id}, f)
    state = {k: v.to(dtype).contiguous() for k, v in model.state_dict().items()
             if not (k == "lm_head.weight" and config.tie_word_embeddings)}
    names = sorted(state)
    files = [names[i::shards] for i in range(shards)]
    index = {}
    for i, part in enumerate(files):
        name = "model.safetensors" if shards == 1 else \
            "model-%05d-of-%05d.safetensors" % (i + 1, shards)
        save_file({k: state[k] for k in part}, os.path.join(folder, name),
                  metadata={"format": "pt"})
        index.update((k, name) for k in part)
    if shards > 1:
        with open(os.path.join(folder, "model.safetensors.index.json"), "w") as f:
            json.dump({"metadata": {}, "weight_map": index}, f)
    write_tokenizer(folder, config.vocab_size)


# ---- as a GGUF file

NAMES = {"input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
         "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
         "self_attn.qkv_proj": "attn_qkv", "self_attn.q_norm": "attn_q_norm",
         "self_attn.k_norm": "attn_k_norm", "post_attention_layernorm": "ffn_norm",
         "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
         "mlp.gate_up_proj": "ffn_up"}
OUTER = {"model.embed_tokens.weight": "token_embd.weight",
         "model.norm.weight": "output_norm.weight",
         "lm_head.weight": "output.weight"}


def gguf_name(name):
    if name in OUTER:
        return OUTER[name]
    _, _, layer, *rest = name.split(".")
    return "blk.%s.%s.%s" % (layer, NAMES[".".join(rest[:-1])], rest[-1])


def pairs_together(x, heads):
    """Rows of a head as interleaved RoPE wants them: i and i + half side by side."""
    half = x.shape[0] // heads // 2
    return x.reshape(heads, 2, half, -1).swapaxes(1, 2).reshape(x.shape)


def llama3_factors(config, dim):
    """What the plain frequencies are divided by."""
    s = rope_scaling(config)
    out = []
    for i in range(dim // 2):
        wave = 2 * np.pi * rope_theta(config) ** (2 * i / dim)
        near = s["original_max_position_embeddings"] / wave
        t = (near - s["low_freq_factor"]) / (s["high_freq_factor"] - s["low_freq_factor"])
        t = min(1, max(0, t))
        out.append(1 / ((1 - t) / s["factor"] + t))
    return np.array(out, dtype=np.float32)


def write_gguf(path, model, config, dim):
    arch = {"mistral": "llama"}.get(config.model_type, config.model_type)
    w = gguf.GGUFWriter(path, arch)
    w.add_name("small")
    w.add_block_count(config.num_hidden_layers)
    w.add_context_length(config.max_position_embeddings)
    w.add_embedding_length(config.hidden_size)
    w.add_feed_forward_length(config.intermediate_size)
    w.add_head_count(config.num_attention_heads)
    w.add_head_count_kv(config.num_key_value_heads)
    w.add_key_length(dim)
    w.add_value_length(dim)
    w.add_layer_norm_rms_eps(config.rms_norm_eps)
    w.add_rope_freq_base(rope_theta(config))
    rotated = int(dim * getattr(config, "partial_rotary_factor", 1))
    w.add_rope_dimension_count(rotated)
    if getattr(config, "sliding_window", None):
        w.add_sliding_window(config.sliding_window)
    scaling = rope_scaling(config) or {}
    kind = scaling.get("rope_type", scaling.get("type"))
    if kind == "llama3":
        w.add_tensor("rope_freqs.weight", llama3_factors(config, dim))
    if kind == "longrope":
        n = config.original_max_position_embeddings
        w.add_rope_scaling_orig_ctx_len(n)
        w.add_rope_scaling_attn_factors(float(np.sqrt(1 + np.log(POSITIONS / n) / np.log(n))))
        for part in ("long", "short"):
            w.add_tensor("rope_factors_%s.weight" % part,
                         np.array(scaling[part + "_factor"], dtype=np.float32))
    w.add_tokenizer_model("gpt2")
    w.add_tokenizer_pre("smollm")
    w.add_token_list(tokens(config.vocab_size))
    w.add_token_types([3] * 3 + [1] * (config.vocab_size - 3))
    w.add_token_merges(["a b"])
    w.add_eos_token_id(1)
    for name, x in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        x = x.float().numpy()
        if arch == "llama" and "q_proj" in name:
            x = pairs_together(x, config.num_attention_heads)
        if arch == "llama" and "k_proj" in name:
            x = pairs_together(x, config.num_key_value_heads)
        w.add_tensor(gguf_name(name), np.ascontiguousarray(x))
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


# ---- all of it

def main():
    out, small = sys.argv[1], "--small" in sys.argv
    wanted = [a for a in sys.argv[2:] if a != "--small"]
    os.makedirs(out, exist_ok=True)
    vocab = 96 if small else 288
    for seed, (name, case) in enumerate((SMALL if small else FULL).items()):
        if wanted and name not in wanted:
            continue
        folder = os.path.join(out, name)
        shutil.rmtree(folder, ignore_errors=True)
        # f16 and bf16 are stored as such: the numbers compared are those of the rounded weights
        dtype = (torch.float32, torch.bfloat16, torch.float16)[1 if small else seed % 3]
        config = make_config(case, vocab)
        model = make_model(case, config, seed, dtype)
        with open(folder + ".json", "w") as f:
            json.dump(answers(model, seed, vocab), f)
        if not small and not name.endswith("-sliding"):  # a key says nothing of which layers
            write_gguf(folder + ".gguf", model, config, case[6])
        write_folder(folder, model, config, dtype, 1 if small or seed % 2 else 2)
        print(name, flush=True)


if __name__ == "__main__":
    main()

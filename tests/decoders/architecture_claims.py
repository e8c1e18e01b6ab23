#!/usr/bin/env python3
"""Decoders on other architectures: called by 40-architectures.sh with the models' names."""
import os
import sys

import llama_cpp
import torch
import transformers
from transformers import AutoModelForCausalLM

import larder
import larder.hf
import larder.llama
from claims import claim, raises, run_claims
from larder import errors
from steps import agreement, answer_of_larder, check_free

transformers.logging.set_verbosity_error()
torch.set_num_threads(len(os.sched_getaffinity(0)))
MADE, NAMES = os.environ["LARDER_MADE"], sys.argv[1:]
N_NEW = 32
NOISE = 0.6  # of llama.cpp, which multiplies by 8-bit activations


def question_of(name):
    with open(os.path.join(MADE, name.split(".")[0] + ".question"), encoding="utf-8") as f:
        return [int(i) for i in f.read().split()]


def goes_on(model, entry):
    """Free and teacher-forced greedy steps, and the first token's logits, with larder's own."""
    own, question = answer_of_larder(entry), question_of(entry)
    with larder.Client() as client, client.get(entry) as cache:
        past = larder.hf.load(cache, model)
    chosen = own["generated_ids"]
    first = past.get_seq_length()
    ids = question + chosen[:-1]
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([ids]), **{past.argument: past},
                       position_ids=torch.arange(first, first + len(ids))[None]).logits[0]
    logits = logits[len(question) - 1:]
    exact = own["dtype"] == "f32"
    top = max(abs(x) for _, x in own["top_logits"])
    off = max(abs(float(logits[0][i]) - x) for i, x in own["top_logits"]) / top
    assert off <= (1e-3 if exact else 0.05), (entry, off)
    same = agreement(chosen, logits)
    assert same >= (N_NEW if exact else 0.9 * N_NEW), (entry, same)
    past.forget()
    out = model.generate(**past.inputs(question), max_new_tokens=N_NEW, do_sample=False,
                         eos_token_id=-1, pad_token_id=0)
    got = out[0, past.next_pos + len(question):].tolist()
    free = check_free(chosen, got, logits, (1e-3 if exact else 0.05) * top)
    return "%s: %d free, %d forced" % (entry.split(".")[1], free, same)


def in_transformers(name):
    def it():
        model = AutoModelForCausalLM.from_pretrained(os.path.join(MADE, name),
                                                     dtype=torch.float32).eval()
        kinds = [k for k in ("full", "ragged", "biased")
                 if os.path.exists(os.path.join(os.environ["LARDER_ANSWERS"],
                                                "%s.%s" % (name, k)))]
        said = [goes_on(model, "%s.%s" % (name, kind)) for kind in kinds]
        model.set_attn_implementation("eager")
        said.append("eager, " + goes_on(model, name + ".ragged"))
        return "; ".join(said)
    it.__name__ = "transformers_goes_on_as_larder_does_with_" + name
    return claim(it)


for n in NAMES:
    in_transformers(n)


@claim
def a_sliding_window_takes_attention_with_masks():
    model = AutoModelForCausalLM.from_pretrained(os.path.join(MADE, "mistral"),
                                                 dtype=torch.float32)
    model.config._attn_implementation = "flash_attention_2"
    with larder.Client() as client, client.get("mistral.full") as cache:
        assert "sdpa" in raises(errors.Unsupported, larder.hf.load, cache, model)


def in_llama(name):
    llm = llama_cpp.Llama(model_path=os.path.join(MADE, name + ".gguf"), n_ctx=512, n_threads=1,
                          verbose=False, flash_attn=True)
    own, question = answer_of_larder(name + ".file"), question_of(name)
    with larder.Client() as client, client.get(name + ".file") as cache:
        larder.llama.load(cache, llm)
    llm.eval(question)
    rows = []
    for token in own["generated_ids"]:
        at = llama_cpp.llama_get_logits_ith(llm.ctx, -1)
        rows.append(torch.tensor(at[:llm.n_vocab()]))
        llm.eval([token])
    off = max(abs(float(rows[0][i]) - x) for i, x in own["top_logits"])
    same = agreement(own["generated_ids"], rows)
    assert off < NOISE and same >= 0.9 * N_NEW, (off, same)
    return "%d of %d forced steps, logits within %.2g" % (same, N_NEW, off)


@claim
def llama_goes_on_as_larder_does_with_qwen2():
    return in_llama("qwen2")


@claim
def llama_goes_on_as_larder_does_with_qwen3():
    return in_llama("qwen3")


@claim
def llama_is_refused_what_it_would_see_without_its_window():
    said = raises(errors.Unsupported, in_llama, "mistral")
    assert "48" in said and "larder.hf" in said, said


if __name__ == "__main__":
    sys.exit(run_claims())

#!/usr/bin/env python3
"""larder.hf: called by 20-transformers.sh with the entries full, asl and manual stored."""
import contextlib
import io
import os
import sys

import torch
import transformers
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import larder
import larder.hf
from claims import ROOT, claim, raises, readme_block, run_claims
from larder import errors
from steps import agreement, answer_of_larder, check_free

transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
torch.set_num_threads(len(os.sched_getaffinity(0)))
N_FREE, N_FORCED = 32, 64
README = {}


def model():
    return README["model"].eval()


def load(name, **how):
    with larder.Client() as client, client.get(name, packed=True) as cache:
        return larder.hf.load(cache, model(), **how)


def forward(past, ids):
    """Logits of ids, each row, behind what is in the cache."""
    first = past.get_seq_length()
    where = torch.arange(first, first + len(ids))[None]
    with torch.inference_mode():
        return model()(input_ids=torch.tensor([ids]), position_ids=where,
                       **{past.argument: past}).logits[0]


def generate(past, question, n):
    out = model().generate(**past.inputs(question), max_new_tokens=n, do_sample=False,
                           eos_token_id=-1, pad_token_id=0)
    return out[0, past.next_pos + len(question):].tolist()


@claim
def the_readme_example_answers():
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(readme_block("import os, larder, larder.hf\n"), README)
    assert "Python" in out.getvalue(), out.getvalue()
    assert README["past"].get_seq_length() == README["cache"].next_pos


def rendered(**more):
    """Document and question as the model's own template has them."""
    with open(os.path.join(ROOT, "tests/golden/data/public/doc_a700.txt"), encoding="utf-8") as f:
        both = f.read() + "\n\nWhat is the name of the programming language?"
    return README["tokenizer"].apply_chat_template([{"role": "user", "content": both}],
                                                   tokenize=False, add_generation_prompt=True,
                                                   **more)


def question(tokenizer, prompt):
    with larder.Client() as client, client.get("full") as cache:
        return larder.hf.question(cache, tokenizer, prompt)


@claim
def tokenizer_and_template_make_larders_question():
    want = answer_of_larder("full")["question_ids"]
    assert README["question"] == question(README["tokenizer"], rendered()) == want


@claim
def another_template_or_tokenizer_is_refused_with_what_differs():
    other = "{% for m in messages %}[INST] {{ m['content'] }} [/INST]{% endfor %}"
    said = raises(errors.ModelMismatch, question, README["tokenizer"],
                  rendered(chat_template=other))
    assert "'[INST] " in said and "'<|im_start|>" in said and "template" in said, said
    small = PreTrainedTokenizerFast(
        tokenizer_file=os.path.join(ROOT, "tests/models/small/llama/tokenizer.json"))
    said = raises(errors.ModelMismatch, question, small, rendered())
    assert "another tokenizer's" in said, said
    document = rendered().rsplit("\n\nWhat", 1)[0]
    raises(errors.InvalidArgument, question, README["tokenizer"], document)


def compare(name):
    """Free and teacher-forced greedy steps, and the first token's logits, with larder's own."""
    own, past = answer_of_larder(name), load(name)
    question, chosen = own["question_ids"], own["generated_ids"]
    assert len(chosen) == N_FORCED
    logits = forward(past, question + chosen[:-1])[len(question) - 1:]
    exact = own["dtype"] == "f32"  # a bf16 decoder rounds otherwise at every step
    off = max(abs(float(logits[0][i]) - x) for i, x in own["top_logits"])
    assert off <= (2e-3 if exact else 0.5), off
    same = agreement(chosen, logits)
    assert same >= (N_FORCED if exact else 0.95 * N_FORCED), same
    past.forget()
    free = check_free(chosen[:N_FREE], generate(past, question, N_FREE), logits,
                      1e-3 if exact else 0.5)
    return "%d of %d free steps, %d of %d forced ones, logits within %.1g" % (
        free, N_FREE, same, N_FORCED, off)


@claim
def a_whole_document_is_answered_as_by_larder():
    return compare("full")


@claim
def equal_rows_are_answered_as_by_larder():
    return compare("asl")


@claim
def ragged_heads_with_biases_are_answered_as_by_larder():
    return compare("manual")


@claim
def eager_attention_takes_the_same_masks():
    own = answer_of_larder("manual")
    question, chosen = own["question_ids"], own["generated_ids"]
    model().set_attn_implementation("eager")
    try:
        logits = forward(load("manual"), question + chosen[:-1])[len(question) - 1:]
    finally:
        model().set_attn_implementation("sdpa")
    same = agreement(chosen, logits)
    assert same >= (N_FORCED if own["dtype"] == "f32" else 0.95 * N_FORCED), same


@claim
def a_question_in_parts_is_the_question():
    for name in ("asl", "manual"):
        question = answer_of_larder(name)["question_ids"]
        whole, parts = load(name), load(name)
        want = forward(whole, question)[-1]
        forward(parts, question[:5])
        forward(parts, question[5:6])
        got = forward(parts, question[6:])[-1]
        assert float((want - got).abs().max()) < 1e-3
        parts.crop(6 - len(question))  # and back to a part of it
        again = forward(parts, question[6:])[-1]
        assert float((want - again).abs().max()) < 1e-3
        parts.crop(parts.next_pos + 6)  # as transformers 4 says it
        parts.crop(0)
        assert parts.get_seq_length() == parts.next_pos + 6
        raises(errors.InvalidArgument, parts.crop, parts.next_pos - 1)
        raises(errors.InvalidArgument, parts.crop, -7)


@claim
def padding_between_document_and_question_is_not_seen():
    question = answer_of_larder("manual")["question_ids"]
    past, batch = load("manual"), load("manual")
    want = forward(past, question)[-1]
    batch.batch_repeat_interleave(2)
    n, first = len(question), past.next_pos
    ids = torch.tensor([[0, 0] + question, question + [0, 0]])
    seen = torch.ones(2, first + n + 2, dtype=torch.long)
    seen[0, first:first + 2] = 0
    where = torch.stack([torch.arange(first - 2, first + n), torch.arange(first, first + n + 2)])
    with torch.inference_mode():
        logits = model()(input_ids=ids, position_ids=where, attention_mask=seen,
                         **{batch.argument: batch}).logits
    assert float((logits[0, -1] - want).abs().max()) < 1e-3
    assert float((logits[1, -3] - want).abs().max()) < 1e-3


def empty():
    return {README["past"].argument: DynamicCache()}


@claim
def no_keys_are_taken_that_did_not_pass_the_hook():
    past = load("manual")
    hooks = [m._forward_pre_hooks for m in model().modules()
             if larder.hf._mask_of_stored_rows in m._forward_pre_hooks.values()]
    kept = [(h, dict(h)) for h in hooks]
    for h in hooks:
        h.clear()
    try:
        assert "hook" in raises(errors.Unsupported, forward, past, [5])
    finally:
        for h, old in kept:
            h.update(old)
    assert past.layers[0].n_new == 0


@claim
def other_caches_are_left_alone():
    ids = torch.tensor([list(range(20, 40))])
    hooks = [m._forward_pre_hooks for m in model().modules()
             if larder.hf._mask_of_stored_rows in m._forward_pre_hooks.values()]
    assert len(hooks) == 30 and all(len(h) == 1 for h in hooks)
    with torch.inference_mode():
        with_hooks = model()(input_ids=ids, **empty()).logits
        kept = [(h, dict(h)) for h in hooks]
        for h in hooks:
            h.clear()
        without = model()(input_ids=ids, **empty()).logits
    for h, old in kept:
        h.update(old)
    assert (with_hooks == without).all()


@claim
def another_model_is_refused_with_what_differs():
    small = LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, hidden_size=64, vocab_size=256,
                                         num_attention_heads=4, intermediate_size=64))
    with larder.Client() as client, client.get("manual") as cache:
        said = raises(errors.ModelMismatch, larder.hf.load, cache, small)
        assert "n_layers 30, the model 2" in said and "n_vocab 49152, the model 256" in said, said


@claim
def the_same_shape_with_other_weights_or_rope_is_refused():
    turned = next(m for m in model().modules() if hasattr(m, "inv_freq"))
    weight = model().get_input_embeddings().weight
    for name in ("full", "manual"):
        for tensor, factor in ((turned.inv_freq, 1.5), (weight.data, None)):
            old = tensor.clone()
            try:
                tensor.copy_(old * factor if factor else old.flip(0))
                assert "another RoPE" in raises(errors.ModelMismatch, load, name)
            finally:
                tensor.copy_(old)
    raises(errors.ModelMismatch, load, "full", weights=os.path.join(ROOT, "README.md"))


@claim
def attention_without_masks_is_refused_where_it_needs_them():
    config = model().config
    config._attn_implementation = "flash_attention_2"
    try:
        assert "sdpa" in raises(errors.Unsupported, load, "manual")
    finally:
        config._attn_implementation = "sdpa"


if __name__ == "__main__":
    sys.exit(run_claims())

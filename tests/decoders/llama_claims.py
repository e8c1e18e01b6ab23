#!/usr/bin/env python3
"""larder.llama: called by 30-llama.sh with the entries full, asl, even and ragged stored."""
import contextlib
import io
import os
import sys

import llama_cpp
import numpy as np

import larder
import larder.llama
from claims import MODEL, ROOT, claim, raises, readme_block, run_claims
from larder import errors
from steps import agreement, answer_of_larder, check_free

N_FREE, N_FORCED = 32, 64
N_THREADS = 1  # more spin at barriers, which collapse when another process takes a core
# llama.cpp multiplies by 8-bit activations: logits move by 0.27 against larder's f32, measured
NOISE = 0.6


def opened(**how):
    how = dict({"n_ctx": 1024, "n_threads": N_THREADS, "n_threads_batch": N_THREADS,
                "verbose": False}, **how)
    return llama_cpp.Llama(model_path=MODEL, **how)


def logits_of(llm):
    row = llama_cpp.llama_get_logits_ith(llm.ctx, -1)
    return np.ctypeslib.as_array(row, (llm.n_vocab(),)).copy()


def greedy(llm, n):
    """n tokens, and the logits that chose them."""
    rows = []
    for _ in range(n):
        rows.append(logits_of(llm))
        llm.eval([int(rows[-1].argmax())])
    return [int(row.argmax()) for row in rows], rows


def forced(llm, tokens):
    """Logits at each of these tokens."""
    rows = []
    for t in tokens:
        rows.append(logits_of(llm))
        llm.eval([t])
    return rows


def load(name, llm, **how):
    with larder.Client() as client, client.get(name, packed=True) as cache:
        larder.llama.load(cache, llm, **how)
        return cache.prompt([]).tolist()


@claim
def the_readme_example_answers():
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(readme_block("import larder, larder.llama\n"), {})
    assert "Python" in out.getvalue(), out.getvalue()


def like_own(llm):
    """A stored full cache against the prefill of llama.cpp itself."""
    question = answer_of_larder("full")["question_ids"]
    document = load("full", llm)
    llm.eval(question)
    restored, _ = greedy(llm, N_FREE)
    llm.reset()
    llm.eval(document + question)
    own, rows = greedy(llm, N_FREE)
    free = check_free(own, restored, rows, NOISE)
    load("full", llm)
    llm.eval(question)
    same = agreement(own, forced(llm, own))
    assert same >= 0.95 * N_FREE, same
    return "%d of %d free steps, %d forced ones" % (free, N_FREE, same)


def like_larder(name, llm):
    own = answer_of_larder(name)
    load(name, llm)
    llm.eval(own["question_ids"])
    off = max(abs(float(logits_of(llm)[i]) - x) for i, x in own["top_logits"])
    same = agreement(own["generated_ids"], forced(llm, own["generated_ids"]))
    assert off < NOISE and same >= 0.95 * N_FORCED, (off, same)
    return "%d of %d forced steps, logits within %.2g" % (same, N_FORCED, off)


LLM = opened(flash_attn=True)


@claim
def a_whole_document_is_answered_as_by_its_own_prefill():
    return like_own(LLM)


@claim
def asl_with_equal_rows_is_answered_as_by_larder():
    return like_larder("asl", LLM)


@claim
def replay_with_equal_rows_is_answered_as_by_larder():
    return like_larder("even", LLM)


@claim
def values_by_columns_are_written_too():
    return like_larder("asl", opened(flash_attn=False))


@claim
def rows_in_f32_are_written_too():
    f32 = opened(flash_attn=True, type_k=0, type_v=0)
    return like_larder("asl", f32)


@claim
def a_completion_evaluates_the_question_alone():
    question = answer_of_larder("asl")["question_ids"]
    document, counts = load("asl", LLM), []
    evaluate = LLM.eval

    def counting(tokens):
        counts.append(len(tokens))
        evaluate(tokens)
    LLM.eval = counting
    try:
        answer = LLM.create_completion(document + question, max_tokens=4, temperature=0)
    finally:
        LLM.eval = evaluate
    assert counts[0] == len(question) and max(counts[1:]) == 1, counts
    assert answer["usage"]["prompt_tokens"] == len(document) + len(question)


@claim
def ragged_caches_are_refused_with_what_to_store():
    said = raises(errors.Unsupported, load, "ragged", LLM)
    assert "offline,rows=25%,shape=uniform,fit=values" in said and "rows a head" in said, said


@claim
def another_model_or_rope_is_refused():
    assert "another RoPE" in raises(errors.ModelMismatch, load, "asl",
                                    opened(rope_freq_base=1e4))
    raises(errors.ModelMismatch, load, "asl", LLM, weights=os.path.join(ROOT, "README.md"))
    load("asl", LLM, weights=MODEL)


@claim
def another_template_is_refused():
    with larder.Client() as client, client.get("asl") as cache:
        want = answer_of_larder("asl")["question_ids"]
        prompt = cache.text + LLM.detokenize(want, special=True).decode()
        assert larder.llama.question(cache, LLM, prompt) == want
        said = raises(errors.ModelMismatch, larder.llama.question, cache, LLM, "[INST] " + prompt)
        assert "'[INST] " in said, said


@claim
def a_context_that_is_too_short_is_refused():
    assert "none is left" in raises(errors.ModelMismatch, load, "asl", opened(n_ctx=512))


@claim
def rows_of_a_type_that_is_not_known_are_refused():
    q8 = opened(flash_attn=True, type_k=8, type_v=8)
    assert "type 8" in raises(errors.Unsupported, load, "asl", q8)


@claim
def a_state_that_reads_otherwise_is_refused():
    context = larder.llama._Context(LLM)
    raw, shape = context.evaluate([5, 6, 7], 10), (3, 64)
    state = larder.llama._read(raw, 10, 3, 30, shape)
    assert larder.llama._write(state, 10, state.k, state.v) == raw
    bad = [raw[:n] for n in list(range(0, 120)) + list(range(121, len(raw), 997))]
    bad += [raw + b"\0", raw + raw]
    for at in range(8, 64):  # the numbers of streams, cells, sequences, layers, types
        if at not in (52, 53, 54, 55):
            changed = bytearray(raw)
            changed[at] ^= 64
            bad.append(bytes(changed))
    for b in bad:
        raises(errors.Unsupported, larder.llama._read, b, 10, 3, 30, shape)
    raises(errors.Unsupported, larder.llama._read, raw, 11, 3, 30, shape)
    raises(errors.Unsupported, larder.llama._read, raw, 10, 3, 30, (3, 32))


if __name__ == "__main__":
    sys.exit(run_claims())

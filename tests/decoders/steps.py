"""steps.py - two decoders' greedy answers, compared step by step.

Rounding decides between tokens that are equally likely, so a step at which the second likeliest
token comes within `noise` of the first may go either way, and with it all that follows. Teacher
forcing (the one decoder is given what the other chose) tells every step by itself.
"""
import json
import os


def answer_of_larder(name):
    """What `larder ask --json` said about this entry."""
    with open(os.path.join(os.environ["LARDER_ANSWERS"], name), encoding="utf-8") as f:
        return json.load(f)


def margin(logits):
    """Between the likeliest token and the next."""
    best = sorted(float(x) for x in logits)[-2:]
    return best[1] - best[0]


def agreement(chosen, forced_logits):
    """At how many steps is the likeliest token the one that was chosen?"""
    return sum(int(row.argmax()) == token for row, token in zip(forced_logits, chosen))


def check_free(want, got, forced_logits, noise):
    """A free answer is the other's, up to the first step that was no clear choice."""
    for i, (a, b) in enumerate(zip(want, got)):
        if a != b:
            m = margin(forced_logits[i])
            assert m <= noise, "step %d: %d instead of %d, by %g" % (i, b, a, m)
            return i
    return min(len(want), len(got))

#!/usr/bin/env python3
"""Policies without a recorded run, against plain f64 formulas on a small random model.

Writes a model file of three layers, runs `larder-prefill trace` on it, and repeats the forward
pass, the scores and the budgets here, in lists of Python numbers and as literally as the
formulas read. A set may differ in rows whose score is within 1e-4 of the threshold.

Speaks TAP. Needs no model file of anybody's.
"""
import math
import os
import random
import struct
import sys
import tempfile

sys.dont_write_bytecode = True
import common
import gguf_file
from common import check_logits, claim, engine, write_ids

LAYERS, HIDDEN, HEADS, KV, D, FF, VOCAB = 3, 32, 6, 2, 8, 48, 256
GROUP = HEADS // KV
THETA, EPS = 1e4, 1e-5
N = 90
NEAR = 1e-4
PROBE = ("\n\nGo through the text above and list every name, number, date, place, definition, "
         "rule and exception that it gives, word by word:")


# ---- the model and its file

def matrix(rnd, rows, cols, scale):
    """Random, and exactly what an f32 file holds."""
    values = [rnd.uniform(-scale, scale) for _ in range(rows * cols)]
    values = struct.unpack("<%df" % len(values), struct.pack("<%df" % len(values), *values))
    return [list(values[i * cols:(i + 1) * cols]) for i in range(rows)]


def make_model(seed):
    rnd = random.Random(seed)
    layers = []
    for _ in range(LAYERS):
        layers.append({
            "attn_norm": [[1 + x for x in matrix(rnd, 1, HIDDEN, 0.25)[0]]],
            "attn_q": matrix(rnd, HEADS * D, HIDDEN, 0.7),
            "attn_k": matrix(rnd, KV * D, HIDDEN, 0.7),
            "attn_v": matrix(rnd, KV * D, HIDDEN, 0.3),
            "attn_output": matrix(rnd, HIDDEN, HEADS * D, 0.3),
            "ffn_norm": [[1 + x for x in matrix(rnd, 1, HIDDEN, 0.25)[0]]],
            "ffn_gate": matrix(rnd, FF, HIDDEN, 0.3),
            "ffn_up": matrix(rnd, FF, HIDDEN, 0.3),
            "ffn_down": matrix(rnd, HIDDEN, FF, 0.3),
        })
    return {"layers": layers, "embd": matrix(rnd, VOCAB, HIDDEN, 1),
            "norm": [[1.0] * HIDDEN]}


def interleaved(rows):
    """Rows of each head in the file's order: the two halves of a rotated pair side by side."""
    out = []
    for h in range(0, len(rows), D):
        for i in range(D // 2):
            out += [rows[h + i], rows[h + D // 2 + i]]
    return out


def write_model(path, model):
    """The container: header, keys, tensor table, tensors at multiples of 32 bytes."""
    keys = gguf_file.llama_keys("tiny", gguf_file.byte_tokens(), block_count=LAYERS,
                                embedding_length=HIDDEN, feed_forward_length=FF,
                                context_length=512, heads=HEADS, kv_heads=KV, head_dim=D,
                                theta=THETA, eps=EPS)
    tensors = [("token_embd", model["embd"]), ("output_norm", model["norm"])]
    for i, layer in enumerate(model["layers"]):
        for name, rows in layer.items():
            order = interleaved(rows) if name in ("attn_q", "attn_k") else rows
            tensors.append(("blk.%d.%s" % (i, name), order))
    table, data = b"", b""
    for name, rows in tensors:
        dims = [len(rows[0])] if "norm" in name else [len(rows[0]), len(rows)]
        table += gguf_file.entry(name, dims, gguf_file.F32, len(data))
        flat = [x for row in rows for x in row]
        data += struct.pack("<%df" % len(flat), *flat)
        data += bytes(-len(data) % 32)
    with open(path, "wb") as f:
        f.write(gguf_file.head(keys, len(tensors), table) + data)


# ---- the forward pass

def times(rows, x):
    return [sum(a * b for a, b in zip(row, x)) for row in rows]


def dot(a, b):
    return sum(x * y for x, y in zip(a, b))


def rms(x, weight):
    scale = 1 / math.sqrt(sum(v * v for v in x) / len(x) + EPS)
    return [v * scale * w for v, w in zip(x, weight)]


def rotate(x, pos):
    out = list(x)
    for i in range(D // 2):
        angle = pos * THETA ** (-2 * i / D)
        c, s = math.cos(angle), math.sin(angle)
        out[i] = x[i] * c - x[i + D // 2] * s
        out[i + D // 2] = x[i + D // 2] * c + x[i] * s
    return out


def softmax(x):
    top = max(x)
    e = [math.exp(v - top) for v in x]
    total = sum(e)
    return [v / total for v in e]


def attend(k, q, row):
    """Probabilities of one row over the keys up to it."""
    return softmax([dot(q, k[j]) / math.sqrt(D) for j in range(row + 1)])


def project(layer, x):
    """-> q [HEADS][n][D], k [KV][n][D], v [KV][n][D]"""
    q, k, v = ([[] for _ in range(m)] for m in (HEADS, KV, KV))
    for pos, row in enumerate(x):
        y = rms(row, layer["attn_norm"][0])
        for name, to, turn in (("attn_q", q, True), ("attn_k", k, True), ("attn_v", v, False)):
            flat = times(layer[name], y)
            for h, rows in enumerate(to):
                part = flat[h * D:(h + 1) * D]
                rows.append(rotate(part, pos) if turn else part)
    return q, k, v


def advance(layer, x, q, k, v):
    out = []
    for row, hidden in enumerate(x):
        o = []
        for h in range(HEADS):
            p = attend(k[h // GROUP], q[h][row], row)
            o += [sum(p[j] * v[h // GROUP][j][i] for j in range(row + 1)) for i in range(D)]
        hidden = [a + b for a, b in zip(hidden, times(layer["attn_output"], o))]
        y = rms(hidden, layer["ffn_norm"][0])
        act = [g / (1 + math.exp(-g)) * u
               for g, u in zip(times(layer["ffn_gate"], y), times(layer["ffn_up"], y))]
        out.append([a + b for a, b in zip(hidden, times(layer["ffn_down"], act))])
    return out


def forward(model, ids):
    """What each layer offers: (layer's weights, q, k, v)"""
    x = [model["embd"][i] for i in ids]
    seen = []
    for layer in model["layers"]:
        q, k, v = project(layer, x)
        seen.append((layer, q, k, v))
        x = advance(layer, x, q, k, v)
    return seen


# ---- scores of one layer: [KV][n], rows that always stay left out by the budgets

def pooled(x, width):
    r = width // 2
    return [sum(x[max(0, j - r):j + r + 1]) / width for j in range(len(x))]


def output_norms(layer, v):
    """Mean over the group of the sum of absolute values of v_j W_O^h: [KV][n]"""
    out = []
    for g in range(KV):
        norms = []
        for row in v[g]:
            total = 0
            for h in range(g * GROUP, (g + 1) * GROUP):
                part = [w[h * D:(h + 1) * D] for w in layer["attn_output"]]
                total += sum(abs(x) for x in times(part, row))
            norms.append(total / GROUP)
        out.append(norms)
    return out


def window_scores(_, q, k, v, n, w, width):
    """Mean attention of the last w of all rows to the n of the document, pooled."""
    rows = len(k[0])
    m = rows - w
    out = []
    for g in range(KV):
        mean = [0] * m
        for h in range(g * GROUP, (g + 1) * GROUP):
            sums = [0] * m
            for i in range(m, rows):
                sums = [a + b for a, b in zip(sums, attend(k[g], q[h][i], i))]
            mean = [a + b / w / GROUP for a, b in zip(mean, pooled(sums, width))]
        out.append(mean + [0] * (n - m))
    return out


def defensive_scores(layer, q, k, v, n, w, width):
    """DefensiveKV: pooled rows at their own mass, largest over rows and group, at least the
    head's mean, times the share of the value's output norm over heads; rows that cover the
    first 0.9 (less what the window holds) of the mean attention go first, most attended first."""
    m = n - w
    worst, mean = [], []
    for g in range(KV):
        d, a = [0] * m, [0] * m
        for h in range(g * GROUP, (g + 1) * GROUP):
            for i in range(m, n):
                p = attend(k[g], q[h][i], i)[:m]
                soft = pooled(p, width)
                soft = [x * sum(p) / sum(soft) for x in soft]
                d = [max(x, y) for x, y in zip(d, soft)]
                a = [x + y / w / GROUP for x, y in zip(a, p)]
        worst.append([max(x, sum(d) / m) for x in d])
        mean.append(a)
    norms = output_norms(layer, v)
    score = [[worst[g][j] * norms[g][j] / sum(norms[i][j] for i in range(KV)) for j in range(m)]
             for g in range(KV)]
    top = max(max(s) for s in score)
    held = 1 - sum(sum(a) for a in mean) / KV
    for g in range(KV):
        covered = 0
        for j in sorted(range(m), key=lambda j: (-mean[g][j], j)):
            if covered >= 0.9 - held:
                break
            covered += mean[g][j]
            score[g][j] = top + mean[g][j]
    return [s + [0] * w for s in score]


def keydiff_scores(_, q, k, v, n, *rest):
    out = []
    for g in range(KV):
        unit = [[x / math.sqrt(dot(row, row)) for x in row] for row in k[g]]
        mean = [sum(row[i] for row in unit) / n for i in range(D)]
        out.append([-dot(row, mean) / math.sqrt(dot(mean, mean)) for row in unit])
    return out


# ---- budgets

class Choice:
    """Kept rows per head, and for each head the scores at which a set may differ."""

    def __init__(self, heads, n, lo, hi):
        self.heads, self.n, self.lo, self.hi = heads, n, lo, hi
        self.forced = set(range(lo)) | set(range(hi, n))

    def ranked(self, g):
        return sorted(range(self.lo, self.hi), key=lambda j: (-self.heads[g][j], j))

    def compete(self, total, sure):
        """All heads at once; each is sure of its best `sure` rows: [heads] -> sets, threshold"""
        kept, rest = [], []
        for g in range(len(self.heads)):
            order = self.ranked(g)
            first = max(0, min(len(order), sure - len(self.forced)))
            kept.append(self.forced | set(order[:first]))
            rest += [(-self.heads[g][j], g, j) for j in order[first:]]
        rest.sort()
        room = total - sum(map(len, kept))
        for _, g, j in rest[:room]:
            kept[g].add(j)
        return kept, (-(rest[room - 1][0] + rest[room][0]) / 2 if 0 < room < len(rest) else None)

    def near(self, g, j, threshold):
        return threshold is not None and \
            abs(self.heads[g][j] - threshold) <= NEAR * abs(threshold)


def per_layer(scores, n, lo, hi, rows):
    kept, choices = [], []
    for heads in scores:
        c = Choice(heads, n, lo, hi)
        sets, threshold = c.compete(KV * rows, max(1, int(rows * 0.2)))
        kept.append(sets)
        choices.append((c, threshold))
    return kept, lambda layer, g, j: choices[layer][0].near(g, j, choices[layer][1])


def over_all(scores, n, lo, hi, rows):
    c = Choice([s for heads in scores for s in heads], n, lo, hi)
    sets, threshold = c.compete(LAYERS * KV * rows, 0)
    return ([sets[i:i + KV] for i in range(0, len(sets), KV)],
            lambda layer, g, j: c.near(layer * KV + g, j, threshold))


def uniform(scores, n, lo, hi, rows):
    kept, limits = [], {}
    for layer, heads in enumerate(scores):
        kept.append([])
        for g, s in enumerate(heads):
            c = Choice([s], n, lo, hi)
            sets, limits[layer, g] = c.compete(rows, 0)
            kept[layer].append(sets[0])
    return kept, lambda layer, g, j: limits[layer, g] is not None and abs(
        scores[layer][g][j] - limits[layer, g]) <= NEAR * abs(limits[layer, g])


# policy -> (scores, window, width of the pool, budget, first and last rows that stay)
CASES = {
    "defensive,rows=30,w=8": (defensive_scores, 8, 5, per_layer, 0, 8),
    "defensive,rows=60,w=16,pool=3": (defensive_scores, 16, 3, per_layer, 0, 16),
    "defensive,rows=30,w=8,shape=global": (defensive_scores, 8, 5, over_all, 0, 8),
    "defensive,rows=20,w=8,shape=uniform,sink=4": (defensive_scores, 8, 5, uniform, 4, 8),
    "keydiff,rows=30,shape=global": (keydiff_scores, 0, 0, over_all, 4, 0),
    "keydiff,rows=20,shape=layer": (keydiff_scores, 0, 0, per_layer, 4, 0),
    "snapkv,rows=30,w=8,pool=3,shape=global": (window_scores, 8, 3, over_all, 0, 8),
    "snapkv,rows=30,obs=probe": (window_scores, len(PROBE), 7, uniform, 4, 0),
    "adakv,rows=30,obs=probe,sink=1": (window_scores, len(PROBE), 5, per_layer, 1, 0),
}


def check(policy, answer, plain, probed):
    score, w, width, budget, first, last = CASES[policy]
    seen = probed if "probe" in policy else plain
    scores = [score(layer, q, k, v, N, w, width) for layer, q, k, v in seen]
    rows = int(policy.split("rows=")[1].split(",")[0])
    kept, near = budget(scores, N, first, N - last, rows)
    for layer in range(LAYERS):
        for g in range(KV):
            odd = set(answer["rows"][layer][g]) ^ kept[layer][g]
            bad = [j for j in odd if not near(layer, g, j)]
            if bad:
                return "layer %d head %d: rows %s" % (layer, g, sorted(bad))
    return None


def main():
    args = common.parser(__doc__).parse_args()
    model = make_model(5)
    rnd = random.Random(6)
    ids = [rnd.randrange(VOCAB) for _ in range(N)]
    plain, probed = forward(model, ids), forward(model, ids + list(PROBE.encode()))
    with tempfile.TemporaryDirectory(prefix="larder-tiny.") as tmp:
        args.model = os.path.join(tmp, "tiny.gguf")
        write_model(args.model, model)
        words = ["trace", "--tokens", write_ids(tmp, "ids", ids), "--policy", "full"]
        for policy in CASES:
            words += ["--policy", policy]
        full, *answers = engine(args, words)
    for policy, answer in zip(CASES, answers):
        claim("tiny model, %s: kept rows" % policy, check(policy, answer, plain, probed))
        claim("tiny model, %s: the prefill is not changed" % policy,
              check_logits(answer["top_logits"], full["top_logits"], 1e-4, 20))


if __name__ == "__main__":
    sys.exit(common.finish(main))

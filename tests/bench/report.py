#!/usr/bin/env python3
"""report.py CSV - the figures of tests/bench/run.sh as tables, and what became of the targets."""
import csv
import functools
import sys

PREFILL = {"512": 2, "2048": 2.5, "5000": 3}  # times as fast as the fastest peer
OF_LIMIT, OF_LIMIT_AMX = 0.6, 0.35  # of oneDNN's rate
SCORING = 1.03  # of a prefill without
EXTRA = (("offline", 4), ("offline", 1), ("offline,rows=25%,fit=none", 1), ("cheap", 0.3))
COLD = 0.8  # of reading as many bytes
DECODED_TRIPS = 1.3
ZSTD_DECODE, ZSTD_ENCODE, FAST_ENCODE = 3.5e9, 1.2e9, 1e9  # bytes a second
ZSTD_RATIO, FAST_RATIO = 1.48, 1.46
FAST_OF_MEMCPY = 0.4  # its speed, where there are no byte-expanding instructions (AVX-512 VBMI2)
CLIENTS, FETCHES_PER_S, P99_US = "256", 20000, 50000
PREFIX_US = 1000
FLAT = 1.2  # of the smallest store's figure
FIRST_SHARE = 0.03
RESTORE_FACTOR = 10
DECODE_FACTOR = 1.5
SHOWN = ("prefill", "first token", "decode", "not measured")  # elsewhere than in the rest
ENTRIES = ("full", "rows512", "offline")


def table(head, lines):
    cells = [head] + lines
    widths = [max(len(line[i]) for line in cells) for i in range(len(head))]
    for number, line in enumerate(cells):
        print("| " + " | ".join(c.ljust(w) for c, w in zip(line, widths)) + " |")
        if number == 0:
            print("|" + "|".join("-" * (w + 2) for w in widths) + "|")
    print()


def shown(row):
    """Median with the minimum after it; "-" where nothing was measured."""
    if not row:
        return "-"
    return "%s (%s)" % (row["median"], row["min"]) if row["min"] else row["median"]


def print_prefill(rows):
    prefill = [r for r in rows if r["stage"] == "prefill"]
    lengths = sorted({r["value"] for r in prefill}, key=int)
    lines = []
    for name in dict.fromkeys(r["subject"] for r in prefill):
        mine = {r["value"]: r for r in prefill if r["subject"] == name}
        note = next(iter(mine.values()))["note"]
        lines.append([name] + [shown(mine.get(n)) for n in lengths] + [note])
    runs = {r["runs"] for r in prefill}
    print("Prefill, ms: median (minimum) of %s runs after one that warms up\n" % "/".join(runs))
    table(["subject"] + ["%s tokens" % n for n in lengths] + ["how"], lines)


def print_first(rows):
    first = [r for r in rows if r["stage"] == "first token"]
    if not first:
        return

    def of(stage, subject):
        return shown(next((r for r in rows if (r["stage"], r["subject"]) == (stage, subject)),
                          None))
    lines = [[r["subject"], of("first token", r["subject"] + ": fetch"), shown(r),
              of("decode", r["subject"]), r["note"]]
             for r in first if not r["subject"].endswith(": fetch")]
    print("A question on %s tokens: median (minimum) of %s runs after one that warms up\n"
          % (first[0]["value"], first[0]["runs"]))
    table(["subject", "fetch or restore, ms", "first token, ms", "then tokens/s", "how"], lines)


def print_others(rows):
    lines = [[r["stage"], r["subject"], "%s %s" % (r["value"], r["parameter"]),
              "%s %s" % (shown(r), r["unit"]), r["runs"]]
             for r in rows if r["stage"] not in SHOWN]
    print("The rest: median (minimum)\n")
    table(["stage", "subject", "of", "measured", "runs"], lines)


def median_in(rows, stage, subject, value=None):
    for r in rows:
        if (r["stage"], r["subject"]) == (stage, subject) and value in (None, r["value"]):
            return float(r["median"])
    return None


def times(factor, x):
    return None if x is None else factor * x


def first_targets(rows):
    """The same of first tokens and decoding; nothing where that was not measured."""
    median = functools.partial(median_in, rows)
    if not any(r["stage"] == "first token" for r in rows):
        return
    for kind in ("decoded", "fresh"):
        for entry in ENTRIES:
            yield ("first token, %s, %s: %g x larder's prefill" % (entry, kind, FIRST_SHARE),
                   median("first token", "larder, %s, %s" % (entry, kind)),
                   times(FIRST_SHARE, median("prefill", "larder", "5000")), "ms")
    for kind in ("decoded", "fresh"):
        for entry in ENTRIES:
            yield ("fetch, %s, %s: 1/%d of llama.cpp's restore" % (entry, kind, RESTORE_FACTOR),
                   median("first token", "larder, %s, %s: fetch" % (entry, kind)),
                   times(1 / RESTORE_FACTOR,
                         median("first token", "llama.cpp, restored: fetch")), "ms")
    for entry in ENTRIES[1:]:
        rate = median("decode", "larder, %s, decoded" % entry)
        peer = times(DECODE_FACTOR, median("decode", "llama.cpp, restored"))
        yield ("a token of decoding, %s: 1/%g of llama.cpp's" % (entry, DECODE_FACTOR),
               rate and 1e3 / rate, peer and 1e3 / peer, "ms")


def codec_targets(rows):
    size = next((float(r["value"]) * 2**20 for r in rows if r["stage"] == "codec"), None)
    if not size:
        return
    for subject, of in (("zstd", ZSTD_DECODE), ("zstd encode", ZSTD_ENCODE),
                        ("fast encode", FAST_ENCODE)):
        yield ("codec %s: %.1f GB/s" % (subject, of / 1e9), median_in(rows, "codec", subject),
               size / of * 1e6, "us")
    copy = median_in(rows, "codec", "memcpy")
    yield ("codec fast: memcpy at %.1f of its speed" % FAST_OF_MEMCPY,
           median_in(rows, "codec", "fast"), times(1 / FAST_OF_MEMCPY, copy), "us")
    for subject, least in (("zstd ratio", ZSTD_RATIO), ("fast ratio", FAST_RATIO)):
        yield ("codec %s, at least %.2f" % (subject, least), median_in(rows, "codec", subject),
               least, "x")


def many_targets(rows):
    """Yields what targets() does, of many clients and of a growing store."""
    yield ("fetches a second of %s clients, at least %d" % (CLIENTS, FETCHES_PER_S),
           median_in(rows, "many clients", "fetch rate", CLIENTS), FETCHES_PER_S, "/s")
    yield ("p99 of a fetch of %s clients: %d us" % (CLIENTS, P99_US),
           median_in(rows, "many clients", "fetch p99", CLIENTS), P99_US, "us")
    sizes = sorted({r["value"] for r in rows if r["stage"] == "growth"}, key=int)
    if not sizes:
        return
    for name in ("by key", "by name", "fetch", "client's look-up", "client's fetch"):
        few = median_in(rows, "growth", name, sizes[0])
        yield ("%s of %s entries: %.1f x that of %s" % (name, sizes[-1], FLAT, sizes[0]),
               median_in(rows, "growth", name, sizes[-1]), times(FLAT, few), "us")
    yield ("longest prefix of %s entries: %d us" % (sizes[-1], PREFIX_US),
           median_in(rows, "growth", "longest prefix", sizes[-1]), PREFIX_US, "us")


def prefill_targets(rows):
    """Yields what targets() does, of prefills and policies."""
    median = functools.partial(median_in, rows)
    for n, factor in PREFILL.items():
        peers = [float(r["median"]) for r in rows if r["stage"] == "prefill"
                 and r["value"] == n and not r["subject"].startswith("larder")]
        yield ("prefill of %s tokens: the fastest peer / %s" % (n, factor),
               median("prefill", "larder", n), min(peers) / factor if peers else None, "ms")
    limit = next((r for r in rows if r["stage"] == "limit" and r["value"] == "2048"
                  and r["unit"] == "us"), None)
    amx = any("amx" in r["note"] for r in rows if r["stage"] == "machine")
    share = OF_LIMIT_AMX if amx else OF_LIMIT
    yield ("prefill of 2048 tokens: %s / %g" % (limit["subject"] if limit else "oneDNN", share),
           median("prefill", "larder", "2048"),
           limit and float(limit["median"]) / 1e3 / share, "ms")
    full = median("policy", "full")
    yield ("scores in all layers (snapkv): %g x full" % SCORING, median("policy", "snapkv"),
           times(SCORING, full), "ms")
    yield ("asl: %g x its share of full" % SCORING, median("policy", "asl"),
           times(SCORING, median("policy", "asl: its share of full")), "ms")
    for policy, extra in EXTRA:  # in prefills beside the first
        yield ("%s: a prefill and %g more" % (policy, extra), median("policy", policy),
               times(1 + extra, full), "ms")


def targets(rows):
    """Yields (target, measured, limit, unit); None where a figure is missing. The limit is a
    least one where the unit is a rate or a ratio."""
    median = functools.partial(median_in, rows)
    yield from prefill_targets(rows)
    trip = median("fetch", "fresh round_trip"), median("fetch", "fresh memcpy")
    yield ("fetch, not decoded yet: round trip + memcpy", median("fetch", "fresh"),
           None if None in trip else sum(trip), "us")
    trip = median("fetch", "decoded round_trip")
    yield ("fetch, decoded: %s round trips" % DECODED_TRIPS, median("fetch", "decoded"),
           times(DECODED_TRIPS, trip), "us")
    yield ("fetch, cold: reading as many bytes x %g" % COLD, median("fetch", "cold"),
           times(COLD, median("fetch", "cold plain file")), "us")
    yield ("worker's peak: weights + hidden states + K/V of a layer + 200 MiB",
           median("memory", "worker"), median("memory", "worker's limit"), "MiB")
    yield from codec_targets(rows)
    yield from many_targets(rows)
    yield from first_targets(rows)


def print_targets(rows):
    lines = []
    for name, got, limit, unit in targets(rows):
        verdict = "not measured"
        if got is not None and limit is not None:
            excess = limit / got if unit in ("/s", "x") else got / limit
            verdict = "met" if excess <= 1 else "missed, %.1fx" % excess
        text = ["-" if v is None else "%.*f %s" % (3 if unit == "x" else 1, v, unit)
                for v in (got, limit)]
        lines.append([name] + text + [verdict])
    table(["target", "measured", "limit", ""], lines)


def main():
    with open(sys.argv[1], newline="", encoding="utf-8") as f:
        rows = list(csv.DictReader(f))
    print_prefill(rows)
    print_first(rows)
    print_others(rows)
    for r in rows:
        if r["stage"] == "not measured":
            print("not measured: %s: %s\n" % (r["subject"], r["note"]))
    print_targets(rows)


if __name__ == "__main__":
    main()

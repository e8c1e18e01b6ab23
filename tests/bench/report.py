#!/usr/bin/env python3
"""report.py CSV - the figures of tests/bench/run.sh as tables, and what became of the targets."""
import csv
import sys

DECODED_US = 150
FETCH_FACTOR = 2
TARGET_TOKENS = "2048"
CLIENTS, FETCHES_PER_S, P99_US = "256", 20000, 50000
PREFIX_US = 1000
FLAT = 1.2  # of the smallest store's figure


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


def print_others(rows):
    lines = [[r["stage"], r["subject"], "%s %s" % (r["value"], r["parameter"]),
              "%s %s" % (shown(r), r["unit"]), r["runs"]]
             for r in rows if r["stage"] not in ("prefill", "not measured")]
    print("The rest: median (minimum)\n")
    table(["stage", "subject", "of", "measured", "runs"], lines)


def median_in(rows, stage, subject, value=None):
    for r in rows:
        if (r["stage"], r["subject"]) == (stage, subject) and value in (None, r["value"]):
            return float(r["median"])
    return None


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
               median_in(rows, "growth", name, sizes[-1]), few and FLAT * few, "us")
    yield ("longest prefix of %s entries: %d us" % (sizes[-1], PREFIX_US),
           median_in(rows, "growth", "longest prefix", sizes[-1]), PREFIX_US, "us")


def targets(rows):
    """Yields (target, measured, limit, unit); None where a figure is missing. The limit is a
    least one where the unit is a rate."""
    def median(stage, subject, value=None):
        return median_in(rows, stage, subject, value)

    peers = [float(r["median"]) for r in rows if r["stage"] == "prefill"
             and r["value"] == TARGET_TOKENS and not r["subject"].startswith("larder")]
    yield ("prefill of %s tokens: the fastest peer" % TARGET_TOKENS,
           median("prefill", "larder", TARGET_TOKENS), min(peers, default=None), "ms")
    trip = median("fetch", "fresh round_trip"), median("fetch", "fresh memcpy")
    yield ("fetch, not decoded yet: %d x (round trip + memcpy)" % FETCH_FACTOR,
           median("fetch", "fresh"), None if None in trip else FETCH_FACTOR * sum(trip), "us")
    yield "fetch, decoded: %d us" % DECODED_US, median("fetch", "decoded"), DECODED_US, "us"
    yield ("worker's peak: weights + hidden states + K/V of a layer + 200 MiB",
           median("memory", "worker"), median("memory", "worker's limit"), "MiB")
    yield from many_targets(rows)


def print_targets(rows):
    lines = []
    for name, got, limit, unit in targets(rows):
        verdict = "not measured"
        if got is not None and limit is not None:
            excess = limit / got if unit == "/s" else got / limit
            verdict = "met" if excess <= 1 else "missed, %.1fx" % excess
        text = ["-" if v is None else "%.1f %s" % (v, unit) for v in (got, limit)]
        lines.append([name] + text + [verdict])
    table(["target", "measured", "limit", ""], lines)


def main():
    with open(sys.argv[1], newline="", encoding="utf-8") as f:
        rows = list(csv.DictReader(f))
    print_prefill(rows)
    print_others(rows)
    for r in rows:
        if r["stage"] == "not measured":
            print("not measured: %s: %s\n" % (r["subject"], r["note"]))
    print_targets(rows)


if __name__ == "__main__":
    main()

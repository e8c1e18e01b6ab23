#!/usr/bin/env python3
"""A page about results of public.py: tables, quality against bytes, needles by length and depth.

One HTML file that refers to nothing else: no script, no fonts, drawings as inline SVG.

  report.py build/eval/public_tasks.jsonl --output report.html
"""
import argparse
import html
import math
import re
import sys

sys.dont_write_bytecode = True
import results

# Told apart by people who see colours differently, and by shape.
COLOURS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#8c6d31"]
SHAPES = ["circle", "square", "diamond", "triangle"]
BUDGET_KEYS = ("rows", "select")

STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #222; max-width: 62em; margin: 2em auto;
       padding: 0 1em }
h1 { font-size: 1.5em } h2 { font-size: 1.2em; margin-top: 2em } h3 { font-size: 1em }
table { border-collapse: collapse; margin: 1em 0 }
th, td { padding: .25em .7em; text-align: right; border-bottom: 1px solid #ddd }
th:first-child, td:first-child { text-align: left }
code { font-size: .92em } .note { color: #666 } svg text { font: 12px system-ui, sans-serif }
.maps { display: flex; flex-wrap: wrap; gap: 1.5em }
"""


# ---- text and elements

def esc(x):
    return html.escape(str(x))


def element(name, content="", **attributes):
    words = "".join(' %s="%s"' % (k.rstrip("_").replace("_", "-"), esc(v))
                    for k, v in attributes.items())
    return "<%s%s>%s</%s>" % (name, words, content, name)


def svg(width, height, parts):
    return element("svg", "\n".join(parts), xmlns="http://www.w3.org/2000/svg", width=width,
                   height=height, viewBox="0 0 %d %d" % (width, height), role="img")


def label(x, y, text, anchor="middle", **more):
    return element("text", esc(text), x=round(x, 1), y=round(y, 1), text_anchor=anchor, **more)


def line(x1, y1, x2, y2, stroke="#ddd", **more):
    return element("line", x1=round(x1, 1), y1=round(y1, 1), x2=round(x2, 1), y2=round(y2, 1),
                   stroke=stroke, **more)


def mark(x, y, shape, colour, title):
    r = 4.5
    points = {"square": [(-1, -1), (1, -1), (1, 1), (-1, 1)],
              "diamond": [(0, -1.3), (1.3, 0), (0, 1.3), (-1.3, 0)],
              "triangle": [(0, -1.2), (1.2, 1), (-1.2, 1)]}
    tip = element("title", esc(title)) if title else ""
    if shape == "circle":
        return element("circle", tip, cx=round(x, 1), cy=round(y, 1), r=r, fill=colour)
    at = " ".join("%.1f,%.1f" % (x + r * a, y + r * b) for a, b in points[shape])
    return element("polygon", tip, points=at, fill=colour)


# ---- quality against bytes

def family(policy):
    """A policy without its budget: what one curve is about."""
    parts = [p for p in policy.split(",") if p.split("=")[0] not in BUDGET_KEYS]
    return ",".join(parts)


def short_names(families):
    """Curves by name alone where that is unambiguous."""
    names = [f.split(",")[0] for f in families]
    return {f: n if names.count(n) == 1 else f for f, n in zip(families, names)}


class Chart:
    """Axes and curves; x is a share of bytes on a logarithmic scale."""
    W, H, LEFT, RIGHT, TOP, BOTTOM = 640, 340, 56, 16, 14, 44

    def __init__(self, x_min, y_range, y_name, y_ticks, y_text, y_log=False):
        self.x_min, self.y_range, self.y_log = min(x_min, 0.5), y_range, y_log
        self.parts = []
        ticks = [t for t in (0.01, 0.02, 0.04, 0.08, 0.16, 0.25, 0.5, 1) if t >= self.x_min * 0.99]
        for t in ticks:
            self.parts += [line(self.x(t), self.TOP, self.x(t), self.H - self.BOTTOM),
                           label(self.x(t), self.H - self.BOTTOM + 16, "%g %%" % (100 * t))]
        for t in y_ticks:
            self.parts += [line(self.LEFT, self.y(t), self.W - self.RIGHT, self.y(t)),
                           label(self.LEFT - 6, self.y(t) + 4, y_text(t), "end")]
        self.parts.append(label((self.LEFT + self.W) / 2, self.H - 8, "stored bytes / full bf16"))
        self.parts.append(label(0, 0, y_name, transform="translate(14 %d) rotate(-90)"
                                % ((self.TOP + self.H - self.BOTTOM) / 2)))

    def x(self, share):
        span = math.log(1 / self.x_min) or 1
        at = math.log(max(share, self.x_min) / self.x_min) / span
        return self.LEFT + 8 + at * (self.W - self.LEFT - self.RIGHT - 16)

    def y(self, v):
        low, high = self.y_range
        if self.y_log:
            low, high, v = math.log(low), math.log(high), math.log(max(v, low))
        at = (v - low) / (high - low)
        return self.H - self.BOTTOM - min(max(at, 0), 1) * (self.H - self.BOTTOM - self.TOP)

    def curve(self, number, points):
        """points: [(bytes, value, low, high, title)]"""
        colour, shape = COLOURS[number % len(COLOURS)], SHAPES[number % len(SHAPES)]
        points = sorted(points, key=lambda p: p[0])
        for x, _, low, high, _ in points:
            if low is not None:
                self.parts.append(line(self.x(x), self.y(low), self.x(x), self.y(high), colour,
                                       stroke_opacity=0.45))
        path = " ".join("%.1f,%.1f" % (self.x(p[0]), self.y(p[1])) for p in points)
        self.parts.append(element("polyline", points=path, fill="none", stroke=colour))
        for x, v, _, _, title in points:
            self.parts.append(mark(self.x(x), self.y(v), shape, colour, title))

    def draw(self):
        return svg(self.W, self.H, self.parts)


def legend(names):
    parts = []
    for i, name in enumerate(names):
        parts += [mark(10, 12 + 20 * i, SHAPES[i % len(SHAPES)], COLOURS[i % len(COLOURS)], ""),
                  label(22, 16 + 20 * i, name, "start")]
    return svg(640, 20 * len(names) + 6, parts)


def curves(rows):
    """Two drawings over the same policies: answers kept, and KL."""
    rows = [(p, r) for p, r in rows if p != results.FULL and r["bytes"]]
    if not rows:
        return ""
    families = list(dict.fromkeys(family(p) for p, _ in rows))
    x_min = min(r["bytes"] for _, r in rows) * 0.9
    kept = Chart(x_min, (0, 1), "answers kept", [0, .25, .5, .75, 1], lambda t: "%d %%" % (100 * t))
    kls = [r["kl"] for _, r in rows if r["kl"]]
    low = 10 ** math.floor(math.log10(min(kls))) if kls else 0.1
    high = max(10 ** math.ceil(math.log10(max(kls))), 10 * low) if kls else 1
    decades = [low * 10 ** i for i in range(round(math.log10(high / low)) + 1)]
    kl = Chart(x_min, (low, high), "KL(full || pruned), nats", decades, lambda t: "%g" % t, True)
    for i, f in enumerate(families):
        mine = [(p, r) for p, r in rows if family(p) == f]
        kept.curve(i, [(r["bytes"], r["kept_right"], r["low"], r["high"],
                        "%s: %s %% of %d" % (p, results.percent(r["kept_right"], 0),
                                             r["full_right"]))
                       for p, r in mine if r["kept_right"] is not None])
        kl.curve(i, [(r["bytes"], r["kl"], None, None, "%s: %.3f" % (p, r["kl"]))
                     for p, r in mine if r["kl"]])
    names = short_names(families)
    return "\n".join([kept.draw(), kl.draw() if kls else "", legend([names[f] for f in families])])


# ---- needles by length and depth

def shade(v):
    """0 is a warm dark, 1 a pale green; the number is written too."""
    a, b = (178, 24, 43), (166, 219, 160)
    return "#%02x%02x%02x" % tuple(round(x + (y - x) * v) for x, y in zip(a, b))


def grid(got):
    """{(length, depth): share right}"""
    cells = {}
    for r in got:
        if r.get("depth") is not None and r.get("length") is not None:
            cells.setdefault((r["length"], r["depth"]), []).append(float(r["right"]))
    return {k: sum(v) / len(v) for k, v in cells.items()}


def heat_map(policy, cells):
    lengths = sorted({k[0] for k in cells})
    depths = sorted({k[1] for k in cells})
    w, h, left, top = 58, 26, 52, 22
    parts = [label(left + w * (i + 0.5), 14, n) for i, n in enumerate(lengths)]
    for j, d in enumerate(depths):
        parts.append(label(left - 6, top + h * (j + 0.5) + 4, "%.0f %%" % (100 * d), "end"))
        for i, n in enumerate(lengths):
            v = cells.get((n, d))
            if v is None:
                continue
            x, y = left + w * i, top + h * j
            tip = element("title", "%d tokens, depth %.0f %%: %.0f %%" % (n, 100 * d, 100 * v))
            parts += [element("rect", tip, x=x, y=y, width=w - 2, height=h - 2, fill=shade(v)),
                      label(x + w / 2 - 1, y + h / 2 + 3, "%.0f" % (100 * v),
                            fill="#fff" if v < 0.5 else "#222")]
    return element("div", element("h3", element("code", esc(policy)))
                   + svg(left + w * len(lengths), top + h * len(depths), parts))


def heat_maps(by_policy):
    maps = [(p, grid(got.values())) for p, got in by_policy.items()]
    maps = [heat_map(p, cells) for p, cells in maps if cells]
    if not maps:
        return ""
    return (element("h2", "Needles by length and depth")
            + element("p", "Share of needles found, %. Columns: tokens of the document; rows: where "
                      "the needle stands, from the beginning (0 %) to the end.", class_="note")
            + element("div", "\n".join(maps), class_="maps"))


# ---- tables

def html_table(lines):
    head = element("tr", "".join(element("th", esc(c)) for c in lines[0]))
    body = "\n".join(element("tr", element("td", element("code", esc(row[0])))
                             + "".join(element("td", esc(c)) for c in row[1:]))
                     for row in lines[1:])
    return element("table", head + "\n" + body)


def by_task(by_policy):
    """Answers kept per kind of task, one column per kind."""
    full = by_policy[results.FULL]
    kinds = sorted({r["task"] for r in full.values()})
    lines = [["kept right %"] + ["%s (%d)" % (k, sum(r["right"] for r in full.values()
                                                    if r["task"] == k)) for k in kinds]]
    for policy, got in by_policy.items():
        row = [policy]
        for kind in kinds:
            right = [t for t, r in full.items() if r["task"] == kind and r["right"] and t in got]
            kept = sum(got[t]["right"] for t in right)
            row.append(results.percent(kept / len(right), 0) if right else "")
        lines.append(row)
    return html_table(lines)


# ---- the page

def section(what, got, resamples, seed):
    """What one model computed on one kind of machine."""
    by_policy = {results.FULL: {}}
    for r in got:
        by_policy.setdefault(r["policy"], {})[r["id"]] = r
    full = by_policy[results.FULL]
    rows = [(p, results.summarise(full, mine, resamples, seed)) for p, mine in by_policy.items()]
    rows = [(p, r) for p, r in rows if r["n"]]
    docs = {r["doc"] for r in full.values()}
    parts = [element("p", "%d questions on %d documents; model %s..., backend %s, %s, %s." % (
        len(full), len(docs), esc(what["model"][:16]), esc(what["backend"]), esc(what["dtype"]),
        esc(what["isa"])), class_="note")]
    if not rows:
        return parts[0] + element("p", "There are no results of the full cache to compare with.")
    parts += [html_table(results.cells(rows)), curves(rows)]
    parts += [element("h2", "By kind of task"), by_task(by_policy), heat_maps(by_policy)]
    return "\n".join(parts)


EXPLAIN = ("Each document was pruned before any of its questions was known. Kept right: share of "
           "the questions that the full cache answers right and the pruned one still does; right "
           "means that every token of the answer is the model's first choice given those before "
           "it. The interval is a 95 % bootstrap over documents. KL is measured on the answer's "
           "tokens, over the whole vocabulary. Found: share of answers that occur in the generated "
           "text. Bytes: of the kept rows as stored, against all rows in bf16.")


def page(title, all_results, resamples=results.RESAMPLES, seed=results.SEED):
    groups = {}
    for r in all_results:
        what = {k: r[k] for k in ("model", "backend", "dtype", "isa")}
        groups.setdefault(tuple(what.values()), (what, []))[1].append(r)
    body = [element("h1", esc(title)), element("p", EXPLAIN)]
    body += [section(what, got, resamples, seed) for what, got in groups.values()]
    return "<!DOCTYPE html>\n" + element(
        "html", element("head", element("meta", charset="utf-8").replace("</meta>", "")
                        + element("title", esc(title)) + element("style", STYLE))
        + element("body", re.sub(r"\n\n+", "\n", "\n".join(body))), lang="en") + "\n"


def main(argv=None):
    a = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    a.add_argument("results", nargs="+", help="files that public.py appended to")
    a.add_argument("--title", default="What pruned caches still answer")
    a.add_argument("--seed", type=int, default=results.SEED, help="of the bootstrap")
    a.add_argument("--output", default="/dev/stdout")
    args = a.parse_args(argv)
    found = [r for path in args.results for r in results.Store(path).by_key.values()]
    if not found:
        print("no results in %s" % ", ".join(args.results), file=sys.stderr)
        return 1
    with open(args.output, "w", encoding="utf-8") as f:
        f.write(page(args.title, found, seed=args.seed))
    return 0


if __name__ == "__main__":
    sys.exit(main())

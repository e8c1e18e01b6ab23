/* cli_eval_draw.c - drawings of results as SVG: quality against bytes, needles by length and depth.
 *
 * The one idea: a curve is a policy without its budget; a map has a cell for every length and
 * depth that occurs. Numbers are written as well as drawn. */
#include "cli_eval_page.h"

#include <math.h>
#include <string.h>

#include "mem.h"

/* Told apart by people who see colours differently, and by shape. */
static const char *const colours[] = {"#0072b2", "#d55e00", "#009e73", "#cc79a7",
                                      "#e69f00", "#56b4e9", "#000000", "#8c6d31"};
static const char *const shapes[] = {"-5,0a5,5 0 1,0 10,0a5,5 0 1,0 -10,0", "-4,-4h8v8h-8z",
                                     "0,-6l6,6l-6,6l-6,-6z", "0,-5l5.5,9.5h-11z"};
#define N_COLOURS (sizeof colours / sizeof *colours)
#define N_SHAPES (sizeof shapes / sizeof *shapes)

/* ---- elements */

static void label(FILE *f, double x, double y, const char *anchor, const char *text)
{
    fprintf(f, "<text x=\"%.1f\" y=\"%.1f\" text-anchor=\"%s\">", x, y, anchor);
    page_esc(f, text);
    fputs("</text>\n", f);
}

static void line(FILE *f, double x1, double y1, double x2, double y2, const char *stroke)
{
    fprintf(f, "<line x1=\"%.1f\" y1=\"%.1f\" x2=\"%.1f\" y2=\"%.1f\" stroke=\"%s\"/>\n", x1, y1,
            x2, y2, stroke);
}

static void mark(FILE *f, double x, double y, size_t number, const char *tip)
{
    fprintf(f, "<path transform=\"translate(%.1f %.1f)\" d=\"M%s\" fill=\"%s\"><title>", x, y,
            shapes[number % N_SHAPES], colours[number % N_COLOURS]);
    page_esc(f, tip);
    fputs("</title></path>\n", f);
}

/* ---- curves: one per policy without its budget */

/* "asl,rows=25%,select=25%,w=32" -> "asl,w=32" */
static char *family_of(const char *policy)
{
    char *all = cli_text("%s", policy), *family = cli_text("%s", ""), *rest = all, *part;

    while ((part = strsep(&rest, ","))) {
        char *longer;

        if (!strncmp(part, "rows=", 5) || !strncmp(part, "select=", 7))
            continue;
        longer = cli_text("%s%s%s", family, *family ? "," : "", part);
        mem_free(family);
        family = longer;
    }
    mem_free(all);
    return family;
}

struct chart {
    FILE *f;
    const struct eval_section *s;
    json_t *families; /* names, in order */
    double x_min;     /* share of bytes at the left edge */
    double low, high; /* of KL, decades */
};

enum { W = 640, H = 340, LEFT = 56, RIGHT = 16, TOP = 14, BOTTOM = 44 };

static double x_of(const struct chart *c, double share)
{
    double at = log(fmax(share, c->x_min) / c->x_min) / log(1 / c->x_min);

    return LEFT + 8 + fmin(at, 1) * (W - LEFT - RIGHT - 16);
}

static double y_at(double at)
{
    return H - BOTTOM - fmin(fmax(at, 0), 1) * (H - BOTTOM - TOP);
}

static double y_of_kept(const struct chart *c, double kept)
{
    (void)c;
    return y_at(kept);
}

static double y_of_kl(const struct chart *c, double kl)
{
    return y_at(log(kl / c->low) / log(c->high / c->low));
}

static void axes(const struct chart *c, const char *y_name)
{
    static const double ticks[] = {0.01, 0.02, 0.04, 0.08, 0.16, 0.25, 0.5, 1};
    char text[16];

    fprintf(c->f, "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"%d\" height=\"%d\">\n", W, H);
    for (size_t i = 0; i < sizeof ticks / sizeof *ticks; i++) {
        double x = x_of(c, ticks[i]);

        if (ticks[i] < c->x_min)
            continue;
        line(c->f, x, TOP, x, H - BOTTOM, "#ddd");
        snprintf(text, sizeof text, "%g %%", 100 * ticks[i]);
        label(c->f, x, H - BOTTOM + 16, "middle", text);
    }
    label(c->f, (LEFT + W) / 2.0, H - 8, "middle", "stored bytes / full bf16");
    fprintf(c->f,
            "<text transform=\"translate(14 %d) rotate(-90)\" text-anchor=\"middle\">%s"
            "</text>\n",
            (TOP + H - BOTTOM) / 2, y_name);
}

static void y_tick(const struct chart *c, double y, const char *text)
{
    line(c->f, LEFT, y, W - RIGHT, y, "#ddd");
    label(c->f, LEFT - 6, y + 4, "end", text);
}

/* Is the row a point, and of which curve? */
static bool place(const struct chart *c, const struct eval_row *r, double value, size_t *ret)
{
    char *family = family_of(r->policy);
    size_t i = 0;

    while (i < json_array_size(c->families) &&
           strcmp(json_string_value(json_array_get(c->families, i)), family))
        i++;
    mem_free(family);
    *ret = i;
    return i < json_array_size(c->families) && !isnan(value) && r->bytes > 0;
}

typedef double y_function(const struct chart *c, double value);

/* The rows of one curve are joined from few bytes to many. */
static void curve(const struct chart *c, size_t number, const double *value, y_function *y_of)
{
    const struct eval_row *row = c->s->row, *last = NULL;

    fprintf(c->f, "<polyline fill=\"none\" stroke=\"%s\" points=\"", colours[number % N_COLOURS]);
    for (;;) {
        size_t next = c->s->n_rows, family;

        for (size_t i = 0; i < c->s->n_rows; i++)
            if (place(c, &row[i], value[i], &family) && family == number &&
                (!last || row[i].bytes > last->bytes ||
                 (row[i].bytes == last->bytes && &row[i] > last)) &&
                (next == c->s->n_rows || row[i].bytes < row[next].bytes))
                next = i;
        if (next == c->s->n_rows)
            break;
        last = &row[next];
        fprintf(c->f, "%.1f,%.1f ", x_of(c, last->bytes), y_of(c, value[next]));
    }
    fputs("\"/>\n", c->f);
}

static void points(const struct chart *c, const double *value, y_function *y_of, bool intervals)
{
    for (size_t i = 0; i < json_array_size(c->families); i++)
        curve(c, i, value, y_of);
    for (size_t i = 0; i < c->s->n_rows; i++) {
        const struct eval_row *r = &c->s->row[i];
        size_t family;
        char *tip;

        if (!place(c, r, value[i], &family))
            continue;
        if (intervals && !isnan(r->low))
            line(c->f, x_of(c, r->bytes), y_of(c, r->low), x_of(c, r->bytes), y_of(c, r->high),
                 colours[family % N_COLOURS]);
        tip = cli_text("%s: %.3g", r->policy, value[i]);
        mark(c->f, x_of(c, r->bytes), y_of(c, value[i]), family, tip);
        mem_free(tip);
    }
    fputs("</svg>\n", c->f);
}

static void legend(const struct chart *c)
{
    size_t n = json_array_size(c->families);

    fprintf(c->f, "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"%d\" height=\"%zu\">\n", W,
            20 * n + 6);
    for (size_t i = 0; i < n; i++) {
        mark(c->f, 10, 12 + 20 * (double)i, i, "");
        label(c->f, 22, 16 + 20 * (double)i, "start",
              json_string_value(json_array_get(c->families, i)));
    }
    fputs("</svg>\n", c->f);
}

/* Families and ranges; the full cache is what the others are compared with, and no point. */
static void survey(struct chart *c)
{
    double least = INFINITY, most = 0;

    c->x_min = 0.5;
    for (size_t i = 0; i < c->s->n_rows; i++) {
        const struct eval_row *r = &c->s->row[i];
        size_t known;

        if (!strcmp(r->policy, EVAL_FULL) || !(r->bytes > 0))
            continue;
        if (!place(c, r, 0, &known) && known == json_array_size(c->families)) {
            char *family = family_of(r->policy);

            json_array_append_new(c->families, json_string(family));
            mem_free(family);
        }
        c->x_min = fmin(c->x_min, fmax(0.9 * r->bytes, 1e-4));
        if (r->kl > 0) {
            least = fmin(least, r->kl);
            most = fmax(most, r->kl);
        }
    }
    c->low = most > 0 ? pow(10, floor(log10(least))) : 0;
    c->high = most > 0 ? fmax(pow(10, ceil(log10(most))), 10 * c->low) : 0;
}

void page_curves(FILE *f, const struct eval_section *s)
{
    static const char *const shares[] = {"0 %", "25 %", "50 %", "75 %", "100 %"};
    struct chart c = {.f = f, .s = s, .families = json_array()};
    double *value = mem_alloc(s->n_rows, sizeof *value);

    survey(&c);
    if (json_array_size(c.families) && value) {
        axes(&c, "answers kept");
        for (int i = 0; i <= 4; i++)
            y_tick(&c, y_at(i / 4.0), shares[i]);
        for (size_t i = 0; i < s->n_rows; i++)
            value[i] = s->row[i].kept;
        points(&c, value, y_of_kept, true);
    }
    if (c.high > 0 && value) {
        axes(&c, "KL(full || pruned), nats");
        for (double d = c.low; d < 1.5 * c.high; d *= 10) {
            char text[16];

            snprintf(text, sizeof text, "%.3g", d);
            y_tick(&c, y_of_kl(&c, d), text);
        }
        for (size_t i = 0; i < s->n_rows; i++)
            value[i] = s->row[i].kl > 0 ? s->row[i].kl : NAN;
        points(&c, value, y_of_kl, false);
    }
    if (json_array_size(c.families))
        legend(&c);
    mem_free(value);
    json_decref(c.families);
}

/* ---- needles by length and depth */

/* {"LENGTH DEPTH": [right, of]}, and the lengths and depths that occur. */
struct grid {
    double length[64], depth[64];
    size_t n_lengths, n_depths;
    double right[64][64], of[64][64];
};

/* Its place in an ascending list, made if there is room; 64: none. */
static size_t place_in(double *list, size_t *n, double x)
{
    size_t i = 0;

    while (i < *n && list[i] != x)
        i++;
    if (i == *n && *n < 64)
        list[(*n)++] = x;
    return i;
}

static void sort_axis(double *list, size_t n)
{
    for (size_t i = 1; i < n; i++)
        for (size_t j = i; j && list[j - 1] > list[j]; j--) {
            double x = list[j];

            list[j] = list[j - 1];
            list[j - 1] = x;
        }
}

/* Two walks: axes first, so that they can be put in order before anything is counted. */
static bool fill_grid(struct grid *g, const struct eval_section *s, const struct eval_results *r,
                      const char *policy)
{
    const json_t *id;
    size_t i;

    memset(g, 0, sizeof *g);
    for (int walk = 0; walk < 2; walk++) {
        json_array_foreach (s->ids, i, id) {
            const json_t *one = eval_results_get(r, s->what, json_string_value(id), policy);
            double length = eval_number(one, "length"), depth = eval_number(one, "depth");
            size_t x, y;

            if (isnan(length) || isnan(depth))
                continue;
            x = place_in(g->length, &g->n_lengths, length);
            y = place_in(g->depth, &g->n_depths, depth);
            if (walk && x < 64 && y < 64) {
                g->right[x][y] += cli_true(one, "right");
                g->of[x][y]++;
            }
        }
        sort_axis(g->length, g->n_lengths);
        sort_axis(g->depth, g->n_depths);
    }
    return g->n_lengths && g->n_depths;
}

/* 0 is a warm dark, 1 a pale green; the number is written too. */
static void cell(FILE *f, double x, double y, double share)
{
    fprintf(f,
            "<rect x=\"%.0f\" y=\"%.0f\" width=\"56\" height=\"24\" fill=\"#%02x%02x%02x\"/>"
            "<text x=\"%.0f\" y=\"%.0f\" text-anchor=\"middle\" fill=\"%s\">%.0f</text>\n",
            x, y, (unsigned)(178 - 12 * share), (unsigned)(24 + 195 * share),
            (unsigned)(43 + 117 * share), x + 28, y + 16, share < 0.5 ? "#fff" : "#222",
            100 * share);
}

static void heat_map(FILE *f, const struct grid *g, const char *policy)
{
    char text[32];

    fputs("<div><h3><code>", f);
    page_esc(f, policy);
    fprintf(
        f,
        "</code></h3>\n<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"%zu\" height=\"%zu\">\n",
        52 + 58 * g->n_lengths, 22 + 26 * g->n_depths);
    for (size_t x = 0; x < g->n_lengths; x++) {
        snprintf(text, sizeof text, "%.0f", g->length[x]);
        label(f, 52 + 58 * ((double)x + 0.5), 14, "middle", text);
        for (size_t y = 0; y < g->n_depths; y++)
            if (g->of[x][y] > 0)
                cell(f, 52 + 58 * (double)x, 22 + 26 * (double)y, g->right[x][y] / g->of[x][y]);
    }
    for (size_t y = 0; y < g->n_depths; y++) {
        snprintf(text, sizeof text, "%.0f %%", 100 * g->depth[y]);
        label(f, 46, 22 + 26 * ((double)y + 0.5) + 4, "end", text);
    }
    fputs("</svg></div>\n", f);
}

void page_maps(FILE *f, const struct eval_section *s, const struct eval_results *r)
{
    struct grid *g = mem_alloc(1, sizeof *g);
    bool any = false;

    for (size_t i = 0; g && i < s->n_rows; i++) {
        if (!fill_grid(g, s, r, s->row[i].policy))
            continue;
        if (!any)
            fputs("<h2>Needles by length and depth</h2>\n<p class=\"note\">Share of needles found, "
                  "%. Columns: tokens of the document; rows: where the needle stands, from the "
                  "beginning (0 %) to the end.</p>\n<div class=\"maps\">\n",
                  f);
        any = true;
        heat_map(f, g, s->row[i].policy);
    }
    if (any)
        fputs("</div>\n", f);
    mem_free(g);
}

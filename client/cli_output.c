/* cli_output.c - what `larder` prints: tables and units for people, tabs for scripts.
 *
 * The one idea: every function knows from struct cli who reads. Strings of the daemon
 * pass through cli_text() last and lose their control characters there, so that no
 * stored name can speak to a terminal.
 */
#include "cli.h"

#include <inttypes.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "mem.h"

static void no_memory(void)
{
    fprintf(stderr, "larder: out of memory (LARDER_ENOMEM)\n");
    exit(1);
}

char *cli_text(const char *fmt, ...)
{
    va_list ap, again;
    char *s;
    int n;

    va_start(ap, fmt);
    va_copy(again, ap);
    n = vsnprintf(NULL, 0, fmt, ap);
    s = n < 0 ? NULL : mem_alloc((uint64_t)n + 1, 1);
    if (!s)
        no_memory();
    vsnprintf(s, (size_t)n + 1, fmt, again);
    va_end(ap);
    va_end(again);
    for (char *p = s; *p; p++)
        if ((unsigned char)*p < 0x20 || *p == 0x7f)
            *p = '?';
    return s;
}

void cli_print_json(const json_t *j)
{
    /* 15 digits: exact for what an f32 or a count can say, without 0.30000000000000004. */
    json_dumpf(j, stdout, JSON_COMPACT | JSON_ENCODE_ANY | JSON_REAL_PRECISION(15));
    putchar('\n');
}

/* ---- values */

char *cli_size(const struct cli *c, uint64_t bytes)
{
    static const char *const unit[] = {"B", "KiB", "MiB", "GiB", "TiB"};
    double v = (double)bytes;
    int u = 0;

    if (!c->tty)
        return cli_text("%" PRIu64, bytes);
    for (; v >= 1024 && u < 4; u++)
        v /= 1024;
    return cli_text(u ? "%.1f %s" : "%.0f %s", v, unit[u]);
}

char *cli_share(const struct cli *c, uint64_t bytes, uint64_t whole)
{
    char *size = cli_size(c, bytes);
    char *both;

    if (!c->tty || !whole)
        return size;
    both = cli_text("%s (%.1f %%)", size, 100.0 * (double)bytes / (double)whole);
    mem_free(size);
    return both;
}

char *cli_duration(const struct cli *c, uint64_t ms)
{
    if (!c->tty)
        return cli_text("%" PRIu64, ms);
    if (ms < 1000)
        return cli_text("%" PRIu64 " ms", ms);
    if (ms < 120000)
        return cli_text("%.1f s", (double)ms / 1000);
    if (ms < 7200000)
        return cli_text("%" PRIu64 " min %02" PRIu64 " s", ms / 60000, ms / 1000 % 60);
    return cli_text("%" PRIu64 " h %02" PRIu64 " min", ms / 3600000, ms / 60000 % 60);
}

char *cli_time(const struct cli *c, uint64_t unix_seconds)
{
    time_t t = (time_t)unix_seconds;
    char buf[64];
    struct tm tm;

    if (!c->tty || !localtime_r(&t, &tm) || !strftime(buf, sizeof buf, "%Y-%m-%d %H:%M:%S", &tm))
        return cli_text("%" PRIu64, unix_seconds);
    return cli_text("%s", buf);
}

char *cli_key(const struct cli *c, const char *hex)
{
    return cli_text("%.*s", c->tty ? 12 : 64, hex);
}

double cli_ms_since(const struct timespec *t0)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)(t.tv_sec - t0->tv_sec) * 1e3 + (double)(t.tv_nsec - t0->tv_nsec) / 1e6;
}

const char *cli_str(const json_t *j, const char *key)
{
    const char *s = json_string_value(json_object_get(j, key));

    return s ? s : "";
}

uint64_t cli_num(const json_t *j, const char *key)
{
    json_int_t v = json_integer_value(json_object_get(j, key));

    return v < 0 ? 0 : (uint64_t)v;
}

bool cli_true(const json_t *j, const char *key)
{
    return json_is_true(json_object_get(j, key));
}

/* ---- tables */

void cli_table_add(struct cli_table *t, char *cell)
{
    if (t->n_cells == t->cap) {
        size_t cap = t->cap ? 2 * t->cap : 64;
        char **more = mem_grow(t->cell, cap, sizeof *more);

        if (!more)
            no_memory();
        t->cell = more;
        t->cap = cap;
    }
    t->cell[t->n_cells++] = cell;
}

void cli_table_start(struct cli_table *t, unsigned n_cols, const char *const *heading)
{
    memset(t, 0, sizeof *t);
    t->n_cols = n_cols;
    for (unsigned i = 0; i < n_cols; i++)
        cli_table_add(t, cli_text("%s", heading[i]));
}

/* Characters, not bytes: names may be UTF-8 one day, units are. */
static int width_of(const char *s)
{
    int n = 0;

    for (; *s; s++)
        n += ((unsigned char)*s & 0xc0) != 0x80;
    return n;
}

/* What a heading stands over: the first cell below that is not empty. */
static const char *below(const struct cli_table *t, unsigned col)
{
    for (size_t i = t->n_cols + col; i < t->n_cells; i += t->n_cols)
        if (*t->cell[i])
            return t->cell[i];
    return "";
}

static void print_line(const struct cli_table *t, size_t line, const int *width, bool aligned)
{
    for (unsigned i = 0; i < t->n_cols; i++) {
        const char *s = t->cell[line * t->n_cols + i];
        char first = line ? *s : *below(t, i);
        bool right = first >= '0' && first <= '9' && i;
        int pad = aligned ? width[i] - width_of(s) : 0;

        if (i)
            fputs(aligned ? "  " : "\t", stdout);
        printf("%*s%s", right ? pad : 0, "", s);
        if (!right && i + 1 < t->n_cols)
            printf("%*s", pad, "");
    }
    putchar('\n');
}

void cli_table_print(struct cli_table *t, const struct cli *c)
{
    int width[CLI_MAX_COLS] = {0};

    for (size_t i = 0; i < t->n_cells; i++)
        if (width_of(t->cell[i]) > width[i % t->n_cols])
            width[i % t->n_cols] = width_of(t->cell[i]);
    for (size_t line = c->tty ? 0 : 1; line < t->n_cells / t->n_cols; line++)
        print_line(t, line, width, c->tty);
    for (size_t i = 0; i < t->n_cells; i++)
        mem_free(t->cell[i]);
    mem_free(t->cell);
}

void cli_pair(const struct cli *c, const char *label, char *value)
{
    if (c->tty)
        printf("%-18s%s\n", label, value);
    else
        printf("%s\t%s\n", label, value);
    mem_free(value);
}

/* ---- progress */

static bool bar_shown; /* a line of progress stands on the terminal */

void cli_progress(const char *text, uint64_t done, uint64_t of)
{
    enum { CELLS = 24 };
    char bar[CELLS + 1];
    int full = of ? (int)(CELLS * (done < of ? done : of) / of) : 0;

    if (!isatty(STDERR_FILENO))
        return;
    memset(bar, '.', CELLS);
    memset(bar, '#', (size_t)full);
    bar[CELLS] = '\0';
    if (of)
        fprintf(stderr, "\r%.76s  [%s] %" PRIu64 "/%" PRIu64 "\033[K", text, bar, done, of);
    else
        fprintf(stderr, "\r%.60s ...\033[K", text);
    bar_shown = true;
}

void cli_progress_end(void)
{
    if (bar_shown)
        fputs("\r\033[K", stderr);
    bar_shown = false;
}

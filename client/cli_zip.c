/* cli_zip.c - the headers of a stored zip archive.
 *
 * The one idea: 32-bit fields always say "look at the zip64 field", so there is one form of each
 * header, and small archives test the one that large ones need. */
#include "cli_zip.h"

#include <assert.h>
#include <string.h>

#include "bytes.h"
#include "mem.h"

#define LOCAL_MAGIC 0x04034b50u
#define CENTRAL_MAGIC 0x02014b50u
#define END_MAGIC 0x06054b50u
#define END64_MAGIC 0x06064b50u
#define LOCATOR_MAGIC 0x07064b50u
#define VERSION 45u    /* zip64 */
#define FIRST_DATE 33u /* 1 January 1980 */
#define ELSEWHERE32 UINT32_MAX
#define ELSEWHERE16 UINT16_MAX
#define ZIP64_FIELD 1u
#define END64_BYTES 56u /* with its first 12, which its own length leaves out */
#define HEADER_MAX 256u

/* What local and central headers have in common, from the version on. */
static void put_common(struct wr *w, const struct cli_zip_member *m, unsigned field_bytes)
{
    wr_u16(w, VERSION);
    wr_u16(w, 0); /* flags */
    wr_u16(w, 0); /* stored */
    wr_u16(w, 0); /* time */
    wr_u16(w, FIRST_DATE);
    wr_u32(w, m->crc);
    wr_u32(w, ELSEWHERE32);
    wr_u32(w, ELSEWHERE32);
    wr_u16(w, (uint16_t)strlen(m->name));
    wr_u16(w, (uint16_t)(4 + field_bytes));
}

static void put_field(struct wr *w, const struct cli_zip_member *m, unsigned field_bytes)
{
    wr_u16(w, ZIP64_FIELD);
    wr_u16(w, (uint16_t)field_bytes);
    wr_u64(w, m->n_bytes);
    wr_u64(w, m->n_bytes);
}

static int put(struct cli_zip *z, const struct wr *w, const uint8_t *from, struct larder_err *e)
{
    assert(wr_ok(w));
    return cli_file_write(z->f, from, (uint64_t)(w->p - from), e);
}

static int add_member(struct cli_zip *z, struct larder_err *e)
{
    uint32_t cap = z->cap ? 2 * z->cap : 64;
    struct cli_zip_member *grown;

    if (z->n < z->cap)
        return 0;
    grown = mem_grow(z->member, cap, sizeof *grown);
    if (!grown)
        return larder_fail(e, LARDER_ENOMEM, "no memory for an archive's directory");
    z->member = grown;
    z->cap = cap;
    return 0;
}

int cli_zip_begin(struct cli_zip *z, const char *name, uint64_t n_bytes, uint32_t crc,
                  struct larder_err *e)
{
    uint8_t buf[HEADER_MAX];
    struct wr w = wr_init(buf, sizeof buf);
    struct cli_zip_member m = {.crc = crc, .n_bytes = n_bytes, .at = z->f->done};
    int rc;

    if (strlen(name) >= sizeof m.name)
        return larder_fail(e, LARDER_ETOOBIG, "'%.64s' is too long for an archive", name);
    memcpy(m.name, name, strlen(name));
    rc = add_member(z, e);
    if (rc)
        return rc;
    z->member[z->n++] = m;
    wr_u32(&w, LOCAL_MAGIC);
    put_common(&w, &m, 16);
    wr_bytes(&w, name, strlen(name));
    put_field(&w, &m, 16);
    return put(z, &w, buf, e);
}

static int put_central(struct cli_zip *z, const struct cli_zip_member *m, struct larder_err *e)
{
    uint8_t buf[HEADER_MAX];
    struct wr w = wr_init(buf, sizeof buf);

    wr_u32(&w, CENTRAL_MAGIC);
    wr_u16(&w, VERSION); /* made by */
    put_common(&w, m, 24);
    wr_u16(&w, 0); /* comment */
    wr_u16(&w, 0); /* disk */
    wr_u16(&w, 0); /* internal attributes */
    wr_u32(&w, 0); /* external attributes */
    wr_u32(&w, ELSEWHERE32);
    wr_bytes(&w, m->name, strlen(m->name));
    put_field(&w, m, 24);
    wr_u64(&w, m->at);
    return put(z, &w, buf, e);
}

/* The zip64 end, where it is, and the old end, which says to look there. */
static int put_end(struct cli_zip *z, uint64_t directory, uint64_t n_bytes, struct larder_err *e)
{
    uint8_t buf[HEADER_MAX];
    struct wr w = wr_init(buf, sizeof buf);

    wr_u32(&w, END64_MAGIC);
    wr_u64(&w, END64_BYTES - 12);
    wr_u16(&w, VERSION);
    wr_u16(&w, VERSION);
    wr_u32(&w, 0); /* disk */
    wr_u32(&w, 0);
    wr_u64(&w, z->n);
    wr_u64(&w, z->n);
    wr_u64(&w, n_bytes);
    wr_u64(&w, directory);

    wr_u32(&w, LOCATOR_MAGIC);
    wr_u32(&w, 0);
    wr_u64(&w, directory + n_bytes);
    wr_u32(&w, 1); /* disks */

    wr_u32(&w, END_MAGIC);
    wr_u16(&w, 0);
    wr_u16(&w, 0);
    wr_u16(&w, ELSEWHERE16);
    wr_u16(&w, ELSEWHERE16);
    wr_u32(&w, ELSEWHERE32);
    wr_u32(&w, ELSEWHERE32);
    wr_u16(&w, 0); /* comment */
    return put(z, &w, buf, e);
}

int cli_zip_end(struct cli_zip *z, struct larder_err *e)
{
    uint64_t directory = z->f->done;
    int rc = 0;

    for (uint32_t i = 0; !rc && i < z->n; i++)
        rc = put_central(z, &z->member[i], e);
    return rc ? rc : put_end(z, directory, z->f->done - directory, e);
}

void cli_zip_free(struct cli_zip *z)
{
    mem_free(z->member);
    *z = (struct cli_zip){.f = NULL};
}

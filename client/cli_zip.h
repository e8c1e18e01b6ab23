/* cli_zip.h - a zip archive whose members are stored, not compressed.
 *
 * Purpose    Members are written one after the other to a file that need not be seekable; so the
 *            CRC-32 and the size of each are known before it begins. Every size and place is in
 *            zip64 form, as NumPy writes it, so that a large archive is no case of its own.
 *            Source: APPNOTE.TXT 6.3.10, sections 4.3.7, 4.3.12, 4.3.14 to 4.3.16, 4.5.3. Times
 *            are the format's first, so that equal members make equal archives.
 * Ownership  The file is borrowed; cli_zip_free() after cli_zip_end() or a failure.
 * Threads    One.
 * Errors     LARDER_EIO of the file; LARDER_ENOMEM; LARDER_ETOOBIG: a name of 64 bytes or more.
 */
#ifndef LARDER_CLI_ZIP_H
#define LARDER_CLI_ZIP_H

#include <stdint.h>

#include "cli_file.h"

struct cli_zip_member {
    char name[64];
    uint32_t crc;
    uint64_t n_bytes, at; /* at: of its header, in the archive */
};

struct cli_zip {
    struct cli_file *f; /* nothing was written to it yet */
    struct cli_zip_member *member;
    uint32_t n, cap;
};

/* Begin a member; its n_bytes follow by cli_file_write(). */
int cli_zip_begin(struct cli_zip *z, const char *name, uint64_t n_bytes, uint32_t crc,
                  struct larder_err *e);

/* The directory, which ends the archive. */
int cli_zip_end(struct cli_zip *z, struct larder_err *e);

void cli_zip_free(struct cli_zip *z);

#endif

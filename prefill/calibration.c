/* calibration.c - the built-in texts, as bytes of the program: a service that calibrates a model
 * on its own must not depend on files that an installation could lack. sqlite.txt is the beginning
 * of a page of the documentation of SQLite (public domain), pantry.txt was written for larder. */
#include "calibrate.h"

#define EMBED(symbol, path)                                                                        \
    __asm__(".pushsection .rodata\n"                                                               \
            ".hidden " #symbol ", " #symbol "_end\n"                                               \
            ".global " #symbol ", " #symbol "_end\n" #symbol ":\n"                                 \
            ".incbin \"" path "\"\n" #symbol "_end:\n"                                             \
            ".byte 0\n"                                                                            \
            ".popsection\n");                                                                      \
    extern const char symbol[], symbol##_end[]

EMBED(calibration_sqlite, "prefill/calibration/sqlite.txt");
EMBED(calibration_pantry, "prefill/calibration/pantry.txt");

struct calibration_text calibration_text(uint32_t i)
{
    if (i == 0)
        return (struct calibration_text){"built-in: sqlite", calibration_sqlite,
                                         (size_t)(calibration_sqlite_end - calibration_sqlite)};
    return (struct calibration_text){"built-in: pantry", calibration_pantry,
                                     (size_t)(calibration_pantry_end - calibration_pantry)};
}

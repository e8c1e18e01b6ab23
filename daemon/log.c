/* log.c - see log.h. */
#include "log.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

void log_line(enum log_level level, const char *fmt, ...)
{
    char line[1024], stamp[32] = "";
    time_t now = time(NULL);
    struct tm tm;
    va_list ap;

    va_start(ap, fmt);
    vsnprintf(line, sizeof line, fmt, ap);
    va_end(ap);
    for (char *p = line; *p; p++)
        if ((unsigned char)*p < 0x20)
            *p = ' '; /* nobody writes lines of their own into the log */
    if (getenv("JOURNAL_STREAM")) {
        fprintf(stderr, "<%d>%s\n", level, line);
        return;
    }
    strftime(stamp, sizeof stamp, "%H:%M:%S", localtime_r(&now, &tm));
    fprintf(stderr, "%s larderd: %s%s\n", stamp,
            level == LOG_LEVEL_ERROR     ? "error: "
            : level == LOG_LEVEL_WARNING ? "warning: "
                                         : "",
            line);
}

/* log.h - the daemon's log: one line an event, to stderr. Never document text or tokens. */
#ifndef LARDER_LOG_H
#define LARDER_LOG_H

#include "larder_status.h"

enum log_level { LOG_LEVEL_ERROR = 3, LOG_LEVEL_WARNING = 4, LOG_LEVEL_INFO = 6 };

/* Under systemd ($JOURNAL_STREAM) lines carry the journal's priority mark, elsewhere a time. */
void log_line(enum log_level level, const char *fmt, ...) LARDER_PRINTF(2, 3);

#endif

#!/bin/bash
# What comes in by IMPORT and `larder import` is anybody's: it is refused with the reason, or stored
# as what it is.
. "$(dirname "$0")/lib.sh"
claim "the daemon starts" start_daemon
python3 tests/e2e/hostile_import.py "$LARDER_SOCKET" "$build/larder" || rc=1
claim "the daemon still answers" larder status
leaks() { [ "$(ls /proc/"$pid"/fd | wc -l)" -lt 40 ] || { ls -l /proc/"$pid"/fd; return 1; }; }
claim "no descriptor leaked" leaks
exit $rc

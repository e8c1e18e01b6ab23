#!/bin/bash
# transformers goes on from stored caches as larder's own decoder does.
. "$(dirname "$0")/../e2e/lib.sh"
. tests/decoders/peers.sh
need torch transformers gguf numpy

claim "the daemon starts" start_daemon
claim "a document is stored whole" stored full full
claim "with equally many rows everywhere" stored asl asl,rows=25%
claim "with ragged heads, biases and int4 rows" stored manual offline,rows=25%
"$python" tests/decoders/transformers_claims.py || rc=1
exit $rc

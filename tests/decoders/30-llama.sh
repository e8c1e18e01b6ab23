#!/bin/bash
# An unmodified llama.cpp goes on from stored caches.
. "$(dirname "$0")/../e2e/lib.sh"
. tests/decoders/peers.sh
need llama_cpp numpy

claim "the daemon starts" start_daemon
claim "a document is stored whole" stored full full
claim "pruned with equally many rows everywhere" stored asl asl,rows=25%
claim "by replay, with equally many rows and no bias" stored even \
    offline,rows=25%,shape=uniform,fit=values
claim "and with ragged heads" larder put "$docs/doc_a700.txt" --name ragged --policy \
    kvzip,rows=25% --wait
"$python" tests/decoders/llama_claims.py || rc=1
exit $rc

/* seqpacket.h - one packet and at most one descriptor over AF_UNIX SOCK_SEQPACKET.
 *
 * Purpose    The only sendmsg/recvmsg of larder, with a control buffer that has
 *            room for exactly one descriptor (CMSG_LEN, not CMSG_SPACE: padding
 *            would let a second one in unnoticed).
 * Ownership  A received descriptor belongs to the caller; on any error none is left open.
 * Threads    No state.
 * Errors     0, LARDER_EIO, LARDER_EPROTO (truncated packet, more than one descriptor),
 *            LARDER_ENODAEMON (peer gone), LARDER_EBUSY (non-blocking socket would block).
 */
#ifndef LARDER_SEQPACKET_H
#define LARDER_SEQPACKET_H

#include <stddef.h>

#include "larder_status.h"

/* Send one packet; pass_fd -1 for none. Never raises SIGPIPE. */
int seqpacket_send(int sock, const void *buf, size_t len, int pass_fd, struct larder_err *e);

/* Receive one packet into buf; *ret_fd is -1 when none came. A closed peer is LARDER_ENODAEMON. */
int seqpacket_recv(int sock, void *buf, size_t cap, size_t *ret_len, int *ret_fd,
                   struct larder_err *e);

/* Wait until `sock` is readable or (want_write) writable; timeout_ms < 0 waits for ever.
 * LARDER_ETIMEOUT when the time is up. */
int seqpacket_wait(int sock, int want_write, int timeout_ms, struct larder_err *e);

#endif

"""Errors: one class for each status code of larder_status.h, all of them LarderError.

The message is the library's line, which says what happened and what to do. A code that this
package does not know (a newer library's) is a plain LarderError.
"""
from __future__ import annotations


class LarderError(Exception):
    """Whatever goes wrong. `code` is the status (negative), `status` its name, `message` a line."""

    code = 0
    status = "LARDER_E?"

    def __init__(self, message: str, code: int = 0):
        self.code = code or type(self).code
        self.message = message
        super().__init__("%s: %s" % (self.status, message))


class LibraryNotFound(LarderError, ImportError):
    """liblarder.so cannot be loaded, or is another version's. No status of the library."""

    status = "no liblarder"


class InvalidArgument(LarderError, ValueError):
    code, status = -1, "LARDER_EINVAL"


class ModelMismatch(InvalidArgument):
    """A cache of one model for another; the message says what differs."""


class OutOfMemory(LarderError, MemoryError):
    code, status = -2, "LARDER_ENOMEM"


class InputOutput(LarderError, OSError):
    code, status = -3, "LARDER_EIO"


class NotFound(LarderError, KeyError):
    code, status = -4, "LARDER_ENOTFOUND"
    __str__ = Exception.__str__  # KeyError's quotes the message


class StoreFull(LarderError):
    code, status = -5, "LARDER_EFULL"


class UnknownVersion(LarderError):
    code, status = -6, "LARDER_EVERSION"


class Damaged(LarderError):
    code, status = -7, "LARDER_EDAMAGED"


class TooBig(LarderError):
    code, status = -8, "LARDER_ETOOBIG"


class Unsupported(LarderError):
    code, status = -9, "LARDER_EUNSUPPORTED"


class BadModel(LarderError):
    code, status = -10, "LARDER_EMODEL"


class BadText(LarderError):
    code, status = -11, "LARDER_ETEXT"


class EmptyDocument(LarderError):
    code, status = -12, "LARDER_EEMPTY"


class TooLong(LarderError):
    code, status = -13, "LARDER_ETOOLONG"


class BadPolicy(LarderError):
    code, status = -14, "LARDER_EPOLICY"


class BudgetTooSmall(LarderError):
    code, status = -15, "LARDER_EBUDGET"


class NoDaemon(LarderError, ConnectionError):
    code, status = -16, "LARDER_ENODAEMON"


class ProtocolViolation(LarderError):
    code, status = -17, "LARDER_EPROTO"


class DeadlinePassed(LarderError, TimeoutError):
    code, status = -18, "LARDER_ETIMEOUT"


class Canceled(LarderError):
    code, status = -19, "LARDER_ECANCELED"


class WorkerFailed(LarderError):
    code, status = -20, "LARDER_EWORKER"


class NoBackend(LarderError):
    code, status = -21, "LARDER_EBACKEND"


class ClientLimit(LarderError):
    code, status = -22, "LARDER_ELIMIT"


class NotFinite(LarderError):
    code, status = -23, "LARDER_ENUMERIC"


class UnknownModel(LarderError):
    code, status = -24, "LARDER_EUNKNOWNMODEL"


class BadConfiguration(LarderError):
    code, status = -25, "LARDER_ECONFIG"


class Busy(LarderError):
    code, status = -26, "LARDER_EBUSY"


class InternalError(LarderError):
    code, status = -27, "LARDER_EINTERNAL"


BY_CODE: dict[int, type[LarderError]] = {
    c.code: c for c in LarderError.__subclasses__() if c.code}


def from_code(code: int, message: str) -> LarderError:
    """The error of a status code."""
    return BY_CODE.get(code, LarderError)(message, code)

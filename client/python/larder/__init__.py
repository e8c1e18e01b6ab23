"""larder: pruned KV caches of documents, stored by larderd, as numpy arrays.

    import larder

    with larder.Client() as client:
        client.put("A long document ...", "manual", wait=True)
        with client.get("manual") as cache:
            keys = larder.widen(cache.keys(0, 2))   # layer 0, KV head 2: [rows, head_dim] float32
            where = cache.positions(0, 2)

larder.hf hands a cache to transformers' generate(), larder.llama to llama-cpp-python.
"""
from . import errors
from .cache import Cache
from .client import Client
from .errors import LarderError, LibraryNotFound, ModelMismatch
from .models import fingerprint
from .objects import Entry, Job
from .packed import widen
from .version import VERSION as __version__

__all__ = ["Cache", "Client", "Entry", "Job", "LarderError", "LibraryNotFound", "ModelMismatch",
           "errors", "fingerprint", "widen", "__version__"]

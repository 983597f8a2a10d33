"""A checkpoint: named groups of tensors and plain data, on disk whole or not at all.

`save` writes one (a `Writer` does so in a thread of its own), `load` reads one back verified, `newest` finds the last
that can be trusted. Several ranks write and read one together; `open_stored` leaves the tensors in their files, and
`Stored` reads rows of one. `pack` and `unpack` take a nested value such as ``optimizer.state_dict()`` apart into
tensors and JSON. No pickle anywhere.
"""

from hasten.checkpoint.background import Writer, Written
from hasten.checkpoint.nested import pack, unpack
from hasten.checkpoint.steps import load, newest, save
from hasten.checkpoint.stored import Loaded, Stored, open_stored

__all__ = ["Loaded", "Stored", "Writer", "Written", "load", "newest", "open_stored", "pack", "save", "unpack"]

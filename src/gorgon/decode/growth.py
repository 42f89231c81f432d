"""The growing of a dynamic tree as compiled code: what `growth.cpp` is told, and what it says.

In Python a tree of ten nodes takes a tenth of a millisecond, which is a tenth of a small model's step on a CPU, and
with many sequences together a part of every step on a GPU.
Shapes: K heads, W choices of a head.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable, Iterable, Sequence
from ctypes import POINTER, Structure, c_double, c_int32, c_int64, c_uint8, c_void_p
from functools import cache
from pathlib import Path
from typing import Any

from gorgon.core.acceptance import BINS, LONGEST_MATCH, NEUTRAL, OFFERS, PLACES, Acceptance
from gorgon.core.acceptance import BORDERS as BIN_BORDERS
from gorgon.core.draft import MOST_NODES, Draft
from gorgon.core.phrasebook import BORDERS, CONTINUATIONS, FREQUENCIES, LEVELS, LONGEST, Phrasebook
from gorgon.decode.ngrams import NgramIndex
from gorgon.decode.step import HeadChoices
from gorgon.models.toolchain import build_library, can_build

DEEPEST = 12
"""Depth beyond which no chain is followed: deeper tokens are accepted too rarely to be worth looking up."""
NOBODY = -1
"""No token."""
SIZES = {
    "LONGEST": LONGEST, "CONTINUATIONS": CONTINUATIONS, "LEVELS": LEVELS, "FREQUENCIES": FREQUENCIES, "BINS": BINS,
    "PLACES": PLACES, "LONGEST_MATCH": LONGEST_MATCH, "OFFERS": OFFERS, "DEEPEST": DEEPEST, "MOST_NODES": MOST_NODES,
}  # fmt: skip


@cache
def growth_works() -> bool:
    """Whether there is a C++ compiler, and it builds the code; if it fails to, a warning says why."""
    return can_build(_library, "trees grow in Python, which takes longer")


@cache
def _library() -> ctypes.CDLL:
    source = Path(__file__).with_name("growth.cpp")
    exact = "-ffp-contract=off"  # a fused product and sum rounds once where Python rounds twice
    options = [exact, *(f"-D{name}={size}" for name, size in SIZES.items())]
    library = ctypes.CDLL(str(build_library("growth", [source], options=options)))
    library.gorgon_book.restype = c_void_p
    library.gorgon_close_book.argtypes = [c_void_p]
    library.gorgon_close_book.restype = None
    library.gorgon_draft.argtypes = [c_void_p, c_void_p, c_int64, c_void_p, c_int64, c_int64, c_void_p]
    library.gorgon_draft.restype = c_int64
    return library


class _Book:
    """A phrasebook in compiled memory."""

    def __init__(self, phrasebook: Phrasebook) -> None:
        following = phrasebook.phrases.values()
        size = max(phrasebook.tokens, default=-1) + 1
        library = _library()
        self.handle = library.gorgon_book(
            c_int64(len(following)),
            _array(c_int32, _flat(_filled(phrase[::-1], LONGEST) for phrase in phrasebook.phrases)),
            _array(c_int32, [f.total for f in following]),
            _array(c_int32, [f.distinct for f in following]),
            _array(c_int32, _flat(_filled(f.counts, CONTINUATIONS) for f in following)),
            _array(c_int32, _flat(_filled(f.counts.values(), CONTINUATIONS) for f in following)),
            c_int64(size),
            _array(c_double, [phrasebook.share(token) for token in range(size + 1)]),
            _array(c_uint8, [phrasebook.frequency(token) for token in range(size + 1)]),
            _array(c_double, BORDERS),
        )
        weakref.finalize(self, library.gorgon_close_book, self.handle)


NUMBERS = "borders", "bins", "levels", "standings", "evidence", "tokens"


class _Tables(Structure):
    """An `Acceptance` as compiled code reads it. The pointers keep their arrays alive."""

    _fields_ = (
        *((name, POINTER(c_double)) for name in NUMBERS),
        *((name, c_int64) for name in ("heads", "vocabulary")),
    )

    @classmethod
    def of(cls, acceptance: Acceptance) -> _Tables:
        """The table's."""
        size = max(acceptance.tokens, default=-1) + 1
        own = _flat(acceptance.tokens.get(token, NEUTRAL) for token in range(size))
        evidence = _flat(_flat(table) for table in acceptance.evidence)
        by_head = _flat(acceptance.bins), _flat(acceptance.levels), _flat(acceptance.standings)
        numbers = BIN_BORDERS, *by_head, evidence, own
        return cls(*(_array(c_double, row) for row in numbers), acceptance.heads, size)


_MADE: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
"""What was made of the objects with these ids."""


def _once(make: Callable[[Any], Any], source: Any) -> Any:
    """What `make` makes of an object, once however many drafters use it."""
    made = _MADE.get(id(source))
    if made is None:
        made = _MADE[id(source)] = make(source)
        made.source = source  # so that no other object gets its id while this lives
    return made


class _Settings(Structure):
    """What stays the same from draft to draft."""

    _fields_ = (
        ("book", c_void_p), ("tables", POINTER(_Tables)), ("nodes", c_int64), ("width", c_int64),
        ("threshold", c_double),
    )  # fmt: skip


class Growth:
    """Grows trees as a `DynamicDrafter` of these settings does.

    Invariant: equal to `DynamicDrafter.grow`. A draft and what it is made of are handed over as they lie in memory,
    because making arrays of them takes Python longer than the growing.
    """

    def __init__(
        self, acceptance: Acceptance, phrasebook: Phrasebook, nodes: int, threshold: float, width: int
    ) -> None:
        """Raises: MissingDependencyError when the code cannot be built."""
        self._draft = _library().gorgon_draft
        self._book, self._tables = _once(_Book, phrasebook), _once(_Tables.of, acceptance)
        self._settings = _Settings(self._book.handle, ctypes.pointer(self._tables), nodes, width, threshold)
        self._address = ctypes.addressof(self._settings)

    def draft(self, root: int, choices: HeadChoices, context: NgramIndex) -> Draft:
        """The draft behind a context of at least one token, which ends with the root."""
        draft = Draft(root)
        draft.nodes = self._draft(
            self._address, *context.tokens.buffer_info(), choices.numbers.buffer_info()[0], choices.heads,
            choices.width, draft.numbers.buffer_info()[0],
        )  # fmt: skip
        return draft


def _filled(values: Iterable[int], size: int) -> list[int]:
    """The values, and nobody behind them."""
    given = list(values)
    return given + [NOBODY] * (size - len(given))


def _flat(rows: Any) -> list[Any]:
    return [value for row in rows for value in row]


def _array(kind: Any, values: Sequence[Any]) -> Any:
    return (kind * len(values))(*values)

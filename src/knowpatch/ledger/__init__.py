"""The ledger: what was done to a model in a workspace, by whom, why and when.

A workspace is a folder `.knowpatch`, found upward from the current folder as git does:

    history.db      sqlite3: the chain of events, each naming the hash of the one before
    history.jsonl   the same events as text, the second copy
    patches/        <id of the patch>.safetensors
    reports/        <SHA-256>.json: what an edit's report measured, before and after

Nothing in this package loads torch before a patch is read (`Workspace.patch`). The state is derived
from the events whenever a workspace is opened; nothing derived is stored.

    from knowpatch.ledger import Circumstances, Note, Workspace

    ws = Workspace.here()              # InputError where there is none; above() gives None instead
    ws.model                           # what to load: as --model takes it
    ws.history.edits                   # every Edit by id, in the order of recording
    ws.history.edit("1a2b")            # by a unique beginning of its id
    ws.history.state("v1")             # number of the event whose state a tag, an edit's id, "base"
                                       # or "now" names, as History.live(at=...) takes it
    ws.live(on=None)                   # the live edits of a day (today), in order
    ws.patches(ws.live())              # their patches, each checked against its event
    ws.report(edit)                    # what `edit` measured: {"probes": [...], ...}, or None
    ws.record([(patch, Circumstances(over=ws.history.number))], note=Note(reason="..."))
    ws.move(applies=[...], reverts=[...], note=Note(reason="..."))
    ws.tag("v1", ws.history.number)

Fields of an Edit: `id`, `short`, `says`, `live`, `requests`, `first_day`, `last_day`, and
`recorded`, the facts of its event: time, author, reason, source, method, config, seed, fingerprint,
version, requests, patch, sha256, bytes, rank, weights (names of the parameters that it changes),
parts (kinds of what it holds besides), folds, dtype, took, report, over, on, valid_from,
valid_until, reverts, ends, instead_of, sequence, turn (ledger/notes.py says what they are). Apply
patches in the order of `ws.live()`: the same live edits are then the same bytes, whatever was
reverted in between.

Modules: chain (events and their hashes), store (database and text), blobs (files), history (what
the events say), notes (what is recorded beside an edit), workspace (doing things), verify and
copies (checking and mending), signing; conflicts and collisions (edits that meet); leaning (what
was computed on what), standing (a model brought to a state, and asked there), replaying; weights.
"""

from knowpatch.ledger.history import BASE, NOW, Edit, History
from knowpatch.ledger.notes import Circumstances, Note
from knowpatch.ledger.place import FOLDER, NOWHERE
from knowpatch.ledger.workspace import Workspace

__all__ = [
    "BASE",
    "FOLDER",
    "NOW",
    "NOWHERE",
    "Circumstances",
    "Edit",
    "History",
    "Note",
    "Workspace",
]

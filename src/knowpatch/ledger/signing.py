"""Signatures: ed25519 over a patch's id and the hash of its file, beside the patch.

`patches/<id>.<beginning of the key>.sig` is JSON with the public key and the signature, both in
hexadecimal digits. A signature says that the owner of a key vouches for a patch: for its weights,
its requests and everything else that its file holds. Who recorded it, why and when is the chain's
matter. The library is `cryptography`, an optional extra; keys are files as `ssh-keygen -t ed25519`
or openssl write them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from knowpatch.errors import DataError, InputError, OptionError
from knowpatch.files import plain_storage_errors
from knowpatch.ledger import blobs

if TYPE_CHECKING:
    from knowpatch.ledger.history import Edit

INSTALL = "signatures need the package cryptography: pip install 'knowpatch[sign]'"
LARGEST = 64 * 2**10
"""Bytes of a key file."""


@dataclass(frozen=True)
class Signature:
    """Who signed (a public key), and the signature; hexadecimal digits."""

    key: str
    signature: str


def signed_text(patch_id: str, sha256: str) -> bytes:
    """What is signed."""
    return f"knowpatch patch {patch_id} {sha256}\n".encode()


class Signer:
    """A private key that signs patches."""

    def __init__(self, private: Any) -> None:
        self._private = private
        self.key: str = private.public_key().public_bytes_raw().hex()

    @classmethod
    def load(cls, path: Path) -> Signer:
        """The key of a file, PEM or OpenSSH; InputError if it is none, or has a password."""
        _, ed25519 = _library()
        from cryptography.hazmat.primitives import serialization as form

        content = _content(path)
        for read in (form.load_pem_private_key, form.load_ssh_private_key):
            try:
                private = read(content, password=None)
            except TypeError:
                raise InputError(f"{path}: has a password; give a key file without one") from None
            except Exception:  # whatever is wrong with a foreign file
                continue
            if isinstance(private, ed25519.Ed25519PrivateKey):
                return cls(private)
            raise InputError(f"{path}: is a key of another kind; make one of ed25519")
        raise InputError(
            f"{path}: is no private key; make one: ssh-keygen -t ed25519 -N '' -f {path.name}"
        )

    def sign(self, folder: Path, patch_id: str, sha256: str) -> Path:
        """Put a signature beside a patch."""
        signature = self._private.sign(signed_text(patch_id, sha256)).hex()
        content = json.dumps({"key": self.key, "signature": signature}) + "\n"
        path = signature_path(folder, patch_id, self.key)
        blobs.put(path, content.encode())
        return path


def make_key(path: Path) -> Signer:
    """Write a new private key, readable by its owner only, and `path`.pub beside it."""
    _, ed25519 = _library()
    from cryptography.hazmat.primitives import serialization as form

    private = ed25519.Ed25519PrivateKey.generate()
    content = private.private_bytes(
        form.Encoding.PEM, form.PrivateFormat.OpenSSH, form.NoEncryption()
    )
    public = private.public_key().public_bytes(form.Encoding.OpenSSH, form.PublicFormat.OpenSSH)
    beside = path.with_name(f"{path.name}.pub")
    for place, text, mode in ((path, content, 0o600), (beside, public + b"\n", 0o644)):
        with plain_storage_errors(place):
            try:
                handle = os.open(place, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
            except FileExistsError:
                raise InputError(f"{place}: exists already; name another file") from None
            with os.fdopen(handle, "wb") as file:
                file.write(text)
    return Signer(private)


def public_key(named: str) -> str:
    """A public key, of a file (OpenSSH or PEM) or in 64 hexadecimal digits; as the latter."""
    _, ed25519 = _library()
    if len(named) == 64 and all(c in "0123456789abcdefABCDEF" for c in named):
        return named.lower()
    from cryptography.hazmat.primitives import serialization as form

    path = Path(named)
    content = _content(path)
    for read in (form.load_ssh_public_key, form.load_pem_public_key):
        try:
            key = read(content)
        except Exception:  # whatever is wrong with a foreign file
            continue
        if isinstance(key, ed25519.Ed25519PublicKey):
            return str(key.public_bytes_raw().hex())
    raise InputError(f"{path}: is no public key of ed25519; give the file that ends in .pub")


def signature_path(folder: Path, patch_id: str, key: str) -> Path:
    return folder / blobs.PATCHES / f"{patch_id}.{key[:16]}.sig"


def check_signed(folder: Path, edit: Edit, trusted: Sequence[str]) -> None:
    """DataError unless one of the trusted keys has signed an edit's patch; none: no matter."""
    for key in trusted:
        found = read_signature(signature_path(folder, edit.id, key), edit)
        if found is not None and found.key == key:
            return
    if trusted:
        raise DataError(
            f"edit {edit.short} ({edit.says}) is not signed by a key that is trusted; "
            f"sign it: knowpatch sign {edit.short} --key FILE"
        )


def read_signature(path: Path, edit: Edit) -> Signature | None:
    """The signature of a file; None if there is none, or it does not hold for the edit."""
    invalid, ed25519 = _library()
    try:
        if path.stat().st_size > LARGEST:
            return None
        content = json.loads(path.read_bytes())
        found = Signature(str(content["key"]), str(content["signature"]))
        key = ed25519.Ed25519PublicKey.from_public_bytes(bytes.fromhex(found.key))
        said = signed_text(edit.id, edit.recorded["sha256"])
        key.verify(bytes.fromhex(found.signature), said)
    except (invalid, ValueError, KeyError, TypeError, OSError, RecursionError):
        return None
    return found


def available() -> bool:
    """Whether signatures can be checked here."""
    try:
        _library()
    except OptionError:
        return False
    return True


def _content(path: Path) -> bytes:
    if not path.is_file():
        raise InputError(f"{path}: no such key file")
    if path.stat().st_size > LARGEST:
        raise InputError(f"{path}: is too large for a key file")
    return path.read_bytes()


def _library() -> tuple[type[Exception], Any]:
    try:
        from cryptography.exceptions import InvalidSignature
        from cryptography.hazmat.primitives.asymmetric import ed25519
    except ImportError:
        raise OptionError(INSTALL) from None
    return InvalidSignature, ed25519

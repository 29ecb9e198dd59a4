"""Signatures beside patches, and workspaces that demand them."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from ledgers import filled, patch, record
from shell import refuse, run

from knowpatch.errors import DataError, InputError, OptionError
from knowpatch.ledger import Circumstances
from knowpatch.ledger.signing import Signer, make_key, public_key, signature_path
from knowpatch.ledger.verify import verify

serialization = pytest.importorskip("cryptography.hazmat.primitives.serialization")
ed25519 = pytest.importorskip("cryptography.hazmat.primitives.asymmetric.ed25519")

# RFC 8032, section 7.1, test 1: the secret key, its public key.
SECRET = "9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60"
PUBLIC = "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a"


@pytest.fixture
def key(tmp_path: Path) -> Path:
    """A key file, as `knowpatch sign --new-key` makes it."""
    make_key(tmp_path / "key")
    return tmp_path / "key"


def test_keys_are_read_as_the_usual_tools_write_them(tmp_path: Path):
    """PEM (PKCS8), OpenSSH and hexadecimal digits give one key: that of RFC 8032's first test."""
    private = ed25519.Ed25519PrivateKey.from_private_bytes(bytes.fromhex(SECRET))
    form = serialization
    for name, encoding, kind in (
        ("pem", form.Encoding.PEM, form.PrivateFormat.PKCS8),
        ("ssh", form.Encoding.PEM, form.PrivateFormat.OpenSSH),
    ):
        path = tmp_path / name
        path.write_bytes(private.private_bytes(encoding, kind, form.NoEncryption()))
        assert Signer.load(path).key == PUBLIC
    public = private.public_key()
    for name, encoding, kind in (
        ("pem.pub", form.Encoding.PEM, form.PublicFormat.SubjectPublicKeyInfo),
        ("ssh.pub", form.Encoding.OpenSSH, form.PublicFormat.OpenSSH),
    ):
        (tmp_path / name).write_bytes(public.public_bytes(encoding, kind))
        assert public_key(str(tmp_path / name)) == PUBLIC
    assert public_key(PUBLIC.upper()) == PUBLIC


def test_a_made_key_is_its_owners(tmp_path: Path, key: Path):
    """Not readable by others, never overwritten, and its public half fits."""
    assert key.stat().st_mode & 0o777 == 0o600
    assert public_key(f"{key}.pub") == Signer.load(key).key
    with pytest.raises(InputError, match="exists already"):
        make_key(key)


def test_a_file_that_is_no_key_is_refused_in_one_line(tmp_path: Path, key: Path):
    """Nothing there, text, a public key for a private one, a password, and another kind."""
    from cryptography.hazmat.primitives.asymmetric import ec

    form = serialization
    private = Signer.load(key)._private
    locked = private.private_bytes(
        form.Encoding.PEM, form.PrivateFormat.PKCS8, form.BestAvailableEncryption(b"x")
    )
    other = ec.generate_private_key(ec.SECP256R1()).private_bytes(
        form.Encoding.PEM, form.PrivateFormat.PKCS8, form.NoEncryption()
    )
    for content, what in (
        (b"hello", "no private key"),
        (Path(f"{key}.pub").read_bytes(), "no private key"),
        (locked, "password"),
        (other, "another kind"),
        (b"x" * 100_000, "too large"),
    ):
        (tmp_path / "bad").write_bytes(content)
        with pytest.raises(InputError, match=what):
            Signer.load(tmp_path / "bad")
        if what != "too large":
            with pytest.raises(InputError, match="no public key"):
                public_key(str(key))
    with pytest.raises(InputError, match="no such key file"):
        Signer.load(tmp_path / "nowhere")


def test_a_workspace_that_demands_signatures_refuses_what_has_none(tmp_path: Path, key: Path):
    """To record, to apply, to read; and what is signed by another key."""
    workspace = filled(tmp_path, 2)
    first, second = workspace.history.edits.values()
    signer, other = Signer.load(key), make_key(tmp_path / "other")
    with pytest.raises(DataError, match="not signed"):
        workspace.trust([signer.key])
    for edit in (first, second):
        signer.sign(workspace.folder, edit.id, edit.recorded["sha256"])
    workspace.trust([signer.key])
    assert workspace.patch(first) == patch(0)
    before = workspace.history.number
    for wrong in (None, other):
        with pytest.raises(InputError, match="demands signatures"):
            workspace.record([(patch(5), Circumstances(before))], signer=wrong)
    (third,) = workspace.record([(patch(5), Circumstances(before))], signer=signer)
    assert not verify(workspace.folder).faults
    signature_path(workspace.folder, third.id, signer.key).unlink()
    with pytest.raises(DataError, match="knowpatch sign"):
        workspace.patch(third)
    (fault,) = verify(workspace.folder).faults
    assert third.short in fault.what
    workspace.move(reverts=[third])
    assert not verify(workspace.folder).faults
    with pytest.raises(DataError, match="not signed"):
        workspace.move(applies=[third])
    workspace.trust([])
    workspace.move(applies=[third])


def test_a_signature_is_of_one_patch_and_one_key(tmp_path: Path, key: Path):
    """Copied to another edit, or with a digit changed, or named after a trusted key: no good."""
    workspace = filled(tmp_path, 2)
    first, second = workspace.history.edits.values()
    signer, other = Signer.load(key), make_key(tmp_path / "other")
    signed = signer.sign(workspace.folder, first.id, first.recorded["sha256"])
    copied = signature_path(workspace.folder, second.id, signer.key)
    copied.write_bytes(signed.read_bytes())
    (fault,) = verify(workspace.folder).faults
    assert copied.name in fault.file
    by_other = other.sign(workspace.folder, second.id, second.recorded["sha256"])
    copied.write_bytes(by_other.read_bytes())
    faults = verify(workspace.folder, signed_by=[signer.key]).faults
    assert [second.short in fault.what for fault in faults] == [True]
    for damage in (b"", b"{}", b"[]", b'{"key": 3}', b"\xff", b"[" * 10_000):
        signed.write_bytes(damage)
        assert any(first.short in fault.what for fault in verify(workspace.folder).faults)


def test_the_commands(tmp_path: Path):
    """A key, signatures of all that is live, trust, a refusal without, and verify by a key."""
    workspace = filled(tmp_path, 2)
    assert run("sign", "--new-key", "mine", cwd=tmp_path).code == 0
    assert "--new-key signs none" in refuse("sign", "abc", "--new-key", "more", cwd=tmp_path)
    assert "not signed" in refuse("trust", "mine.pub", cwd=tmp_path)
    told = run("sign", "--key", "mine", "--json", cwd=tmp_path).json()
    assert told["signed"] == list(workspace.history.edits)
    twice = ("mine.pub", told["key"])
    assert run("trust", *twice, "--json", cwd=tmp_path).json() == {"trusted": [told["key"]]}
    assert run("verify", "--signed-by", "mine.pub", cwd=tmp_path).code == 0
    record(filled(tmp_path / "elsewhere", 0), patch(7))
    (file,) = (tmp_path / "elsewhere").rglob("*.safetensors")
    assert "demands signatures" in refuse("apply", file, cwd=tmp_path)
    first = next(iter(workspace.history.edits))
    run("revert", first, cwd=tmp_path)
    for words in ((file,), (file, "--sign", "nowhere")):  # nothing of it is done
        assert refuse("apply", first, *words, cwd=tmp_path)
    run("apply", first, cwd=tmp_path)
    assert run("apply", file, "--sign", "mine", cwd=tmp_path).code == 0
    assert run("verify", cwd=tmp_path).code == 0
    run("sign", "--new-key", "other", cwd=tmp_path)
    result = run("verify", "--signed-by", "other.pub", "--json", cwd=tmp_path)
    assert result.code == 1
    assert len(result.json()["faults"]) == 3
    assert run("trust", "--nobody", cwd=tmp_path).out == "no signature is demanded\n"


def test_without_the_library_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """What to install, where a signature is made or demanded; all else works."""
    workspace = filled(tmp_path, 1)
    make_key(tmp_path / "key")
    assert run("sign", "--key", "key", cwd=tmp_path).code == 0
    for name in [name for name in sys.modules if name.startswith("cryptography")]:
        monkeypatch.setitem(sys.modules, name, None)
    assert "knowpatch[sign]" in refuse("sign", "--key", "key", cwd=tmp_path)
    assert run("verify", cwd=tmp_path).code == 0
    with workspace.writing() as bodies:
        bodies.append({"kind": "trust", "keys": ["0" * 64], "time": "", "author": ""})
    with pytest.raises(OptionError, match="knowpatch\\[sign\\]"):
        workspace.patch(workspace.live()[0])
    assert "cannot be checked" in json.dumps(run("verify", "--json", cwd=tmp_path).json())

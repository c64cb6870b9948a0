"""Provenance: C2PA manifests, which say who signed an image and that a model made it. Nothing here uses the network.

A manifest is signed with a certificate chain (PEM, the signer's first) and its private key, by the package c2pa-python;
there is no time stamp. What it says: the image was created by `ldm`, as trained algorithmic media (IPTC's term).
"""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.util import find_spec
from os import PathLike
from pathlib import Path
from typing import Any

from PIL import Image

import ldm
from ldm.errors import LdmError, first_line

MADE_BY_A_MODEL = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
MIME = {"PNG": "image/png", "JPEG": "image/jpeg", "WEBP": "image/webp"}  # by PIL's names of formats
INSTALL = "pip install 'ldm[provenance]'"
_SETTINGS = {
    "verify": {"remote_manifest_fetch": False, "ocsp_fetch": False, "verify_trust": False},
    "core": {"allowed_network_hosts": []},
    "builder": {"thumbnail": {"enabled": False}},
}  # of c2pa
_CURVES = {"secp256r1": "es256", "secp384r1": "es384", "secp521r1": "es512"}


@dataclass(frozen=True)
class ManifestReport:
    """What the manifest of an image says, and whether it is true of the image."""

    valid: bool  # the signature is right, and the image is the one that was signed
    problems: tuple[str, ...]  # if it is not
    signer: str
    program: str
    by_model: bool  # whether it says that a model made the image


def has_packages() -> bool:
    """Whether the packages of the extra `provenance` are there."""
    return find_spec("c2pa") is not None and find_spec("cryptography") is not None


class ManifestSigner:
    """Signs images with one certificate. Threads may use one signer at once."""

    def __init__(self, certificates: str | PathLike[str], key: str | PathLike[str]) -> None:
        """Read a certificate chain and a private key, and try them.

        Raises:
            LdmError: a package or a file is missing, the certificate is not valid now or not for signing, or the key
                is that of another one.
        """
        if not has_packages():
            raise LdmError(f"c2pa: the package c2pa-python is needed to sign images: {INSTALL}")
        self.chain = _read(certificates)
        self.key, self.algorithm = _key_for(self.chain, certificates, key)
        file = io.BytesIO()
        Image.new("RGB", (8, 8)).save(file, "PNG")
        needed = f"c2pa {certificates}: a certificate for signing (C2PA or e-mail) with its chain is needed"
        try:
            report = read_manifest(self.signed(file.getvalue(), "PNG"))
        except LdmError as error:
            raise LdmError(f"{needed}: {str(error).removeprefix('c2pa: ')}") from None
        if report is None or not report.valid:
            raise LdmError(f"{needed}: {', '.join(report.problems) if report else 'the signature is not found again'}")

    def signed(self, data: bytes, kind: str) -> bytes:
        """The file of an image, PNG, JPEG or WEBP, with a manifest.

        Raises:
            LdmError: it cannot be signed.
        """
        import c2pa

        agent = {"name": "ldm", "version": ldm.__version__}
        created = {"action": "c2pa.created", "digitalSourceType": MADE_BY_A_MODEL, "softwareAgent": agent}
        actions = {"label": "c2pa.actions.v2", "data": {"actions": [created]}}
        manifest = {"claim_generator_info": [agent], "assertions": [actions]}
        found = io.BytesIO()
        try:
            context = c2pa.Context.from_dict(_SETTINGS)
            info = c2pa.C2paSignerInfo(self.algorithm, self.chain, self.key, None)
            with c2pa.Signer.from_info(info) as signer, c2pa.Builder(manifest, context) as builder:
                builder.sign(signer, MIME[kind], io.BytesIO(data), found)
        except c2pa.C2paError as error:
            raise LdmError(f"c2pa: the image cannot be signed: {first_line(error)}") from None
        return found.getvalue()


def read_manifest(data: bytes) -> ManifestReport | None:
    """What the manifest in the file of an image says, verified; None if there is none.

    Whether its signer is to be trusted is not checked: that needs a list of certificates.

    Raises:
        LdmError: the package is missing, or the manifest is damaged or elsewhere.
    """
    if not has_packages():
        raise LdmError(f"c2pa: the package c2pa-python is needed to read a manifest: {INSTALL}")
    import c2pa

    with Image.open(io.BytesIO(data)) as image:
        mime = MIME.get(str(image.format))
    if mime is None:
        return None
    try:
        with c2pa.Reader(mime, io.BytesIO(data), context=c2pa.Context.from_dict(_SETTINGS)) as reader:
            found = json.loads(reader.json())
    except c2pa.C2paError.ManifestNotFound:
        return None
    except c2pa.C2paError as error:
        if "must fetch remote" in str(error):
            raise LdmError("c2pa: the manifest is at an address in the network, where it is not read") from None
        raise LdmError(f"c2pa: the manifest is damaged: {first_line(error)}") from None
    return _report(found)


def _report(found: dict[str, Any]) -> ManifestReport:
    manifest = found["manifests"][found["active_manifest"]]
    signature = manifest.get("signature_info") or {}
    names = [signature[key] for key in ("common_name", "issuer") if signature.get(key)]
    program = (manifest.get("claim_generator_info") or [{}])[0]
    types = [
        action.get("digitalSourceType")
        for assertion in manifest.get("assertions") or []
        if assertion["label"].startswith("c2pa.actions")
        for action in assertion["data"].get("actions", [])
    ]
    problems = [str(one.get("explanation") or one["code"]) for one in found.get("validation_status") or []]
    return ManifestReport(
        found.get("validation_state") in ("Valid", "Trusted"), tuple(problems), ", ".join(names),
        " ".join(str(program[key]) for key in ("name", "version") if program.get(key)), MADE_BY_A_MODEL in types,
    )  # fmt: skip


def _read(path: str | PathLike[str]) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise LdmError(f"c2pa {path} cannot be read: {error.strerror or error}") from None


def _key_for(chain: bytes, certificates: str | PathLike[str], path: str | PathLike[str]) -> tuple[bytes, str]:
    """A private key as c2pa reads it, and the algorithm with which it signs.

    Raises:
        LdmError: the chain or the key cannot be read, the certificate is not valid now, or they are no pair.
    """
    from cryptography import x509
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

    try:
        own = x509.load_pem_x509_certificates(chain)[0]
    except ValueError:
        raise LdmError(f"c2pa {certificates} holds no certificate: name a chain in PEM, the signer's first") from None
    now = datetime.now(UTC)
    if now > own.not_valid_after_utc:
        raise LdmError(f"c2pa {certificates} has expired, on {own.not_valid_after_utc:%Y-%m-%d}; name another")
    if now < own.not_valid_before_utc:
        raise LdmError(f"c2pa {certificates} is valid from {own.not_valid_before_utc:%Y-%m-%d} on; name another")
    try:
        key = serialization.load_pem_private_key(_read(path), None)
    except (ValueError, TypeError):
        raise LdmError(f"c2pa {path} holds no private key: name one in PEM, without a password") from None
    if key.public_key() != own.public_key():
        raise LdmError(f"c2pa {path} is not the key of {certificates}; name the one that it was made with")
    algorithm = ""
    if isinstance(key, ec.EllipticCurvePrivateKey):
        algorithm = _CURVES.get(key.curve.name, "")
    elif isinstance(key, rsa.RSAPrivateKey):
        algorithm = "ps256"
    elif isinstance(key, ed25519.Ed25519PrivateKey):
        algorithm = "ed25519"
    if not algorithm:
        raise LdmError(f"c2pa {path}: its kind of key signs no manifest; take an elliptic curve (P-256), or RSA")
    plain = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    return key.private_bytes(*plain), algorithm

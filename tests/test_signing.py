"""C2PA manifests: signed and verified without a network; images that were changed; certificates that will not do."""

from __future__ import annotations

import io
import socketserver
import threading
from pathlib import Path

import pytest
from certificates import certificate
from cryptography.x509.oid import ExtendedKeyUsageOID
from images import encoded
from PIL import Image

from ldm import signing
from ldm.errors import LdmError
from ldm.signing import ManifestSigner, read_manifest

c2pa = pytest.importorskip("c2pa")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return certificate(tmp_path_factory.mktemp("certificate"))


def file(kind: str) -> bytes:
    return encoded(Image.effect_noise((64, 64), 90).convert("RGB"), kind)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_a_signed_image(kind: str, files: tuple[Path, Path]) -> None:
    plain = file(kind)
    assert read_manifest(plain) is None
    data = ManifestSigner(*files).signed(plain, kind)
    report = read_manifest(data)
    assert report is not None and report.valid and report.by_model and not report.problems
    assert report.signer == "Signer, Studio" and report.program.startswith("ldm ")
    with Image.open(io.BytesIO(data)) as one, Image.open(io.BytesIO(plain)) as other:
        assert one.tobytes() == other.tobytes()


def test_a_changed_image_is_not_valid(files: tuple[Path, Path]) -> None:
    data = bytearray(ManifestSigner(*files).signed(file("PNG"), "PNG"))
    data[-40] ^= 1
    report = read_manifest(bytes(data))
    assert report is not None and not report.valid and "hash" in report.problems[0]


def test_a_manifest_elsewhere_is_not_fetched(files: tuple[Path, Path]) -> None:
    asked: list[bytes] = []

    class Answer(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            asked.append(self.request.recv(100))

    with socketserver.TCPServer(("127.0.0.1", 0), Answer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        signer, found = ManifestSigner(*files), io.BytesIO()
        with c2pa.Builder({"assertions": []}) as builder:
            builder.set_no_embed()
            builder.set_remote_url(f"http://127.0.0.1:{server.server_address[1]}/manifest.c2pa")
            info = c2pa.C2paSignerInfo(signer.algorithm, signer.chain, signer.key, None)
            builder.set_intent(c2pa.C2paBuilderIntent.CREATE, c2pa.C2paDigitalSourceType.ALGORITHMIC_MEDIA)
            builder.sign(c2pa.Signer.from_info(info), "image/png", io.BytesIO(file("PNG")), found)
        with pytest.raises(LdmError, match="at an address in the network, where it is not read"):
            read_manifest(found.getvalue())
        server.shutdown()
    assert not asked


def test_certificates_that_will_not_do(files: tuple[Path, Path], tmp_path: Path) -> None:
    chain, key = files
    _, other = certificate(tmp_path / "other")
    for given, message in (
        (certificate(tmp_path / "old", -9, -2), "has expired"),
        (certificate(tmp_path / "new", 2, 9), "is valid from"),
        ((tmp_path / "none.pem", key), "none.pem cannot be read: No such file"),
        ((key, key), "holds no certificate"),
        ((chain, chain), "holds no private key"),
        ((chain, other), "is not the key of"),
        (certificate(tmp_path / "web", purpose=ExtendedKeyUsageOID.SERVER_AUTH), "a certificate for signing"),
    ):
        with pytest.raises(LdmError, match=message) as caught:
            ManifestSigner(*given)
        assert str(caught.value).startswith("c2pa ") and "\n" not in str(caught.value)


def test_a_missing_package(files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signing, "find_spec", lambda name: None)
    with pytest.raises(LdmError, match=r"pip install 'ldm\[provenance\]'"):
        ManifestSigner(*files)
    with pytest.raises(LdmError, match=r"pip install 'ldm\[provenance\]'"):
        read_manifest(file("PNG"))

"""What looks at images for evaluation: equal to the references on the same random weights, and bad files."""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import open_clip
import pytest
import tiny
import torch
import torch.nn.functional as F
from images import place_image
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from ldm.errors import LdmError
from ldm.evaluation.metrics.distances import clip_scores
from ldm.evaluation.networks.clip import OpenClip, OwnPair
from ldm.evaluation.networks.copies import CopyDetector
from ldm.evaluation.networks.exact import exact
from ldm.evaluation.networks.extractors import open_extractor, open_text_extractor
from ldm.evaluation.networks.inception import Inception, Network
from ldm.models.contrastive import ContrastivePair, ImageEncoderConfig
from ldm.weights.contrastive import load_clip, write_clip
from ldm.weights.published import weights_folder
from ldm.weights.sources import open_source
from ldm.weights.tensors import Output, TensorInfo, write_safetensors


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(torch.randint(0, 256, (height, width, 3), dtype=torch.uint8).numpy())


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)


# --- Inception --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights as torch-fidelity's users have them."""
    torch.manual_seed(0)
    network = Network(classifier=True)
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
        if isinstance(module, nn.BatchNorm2d):
            for values in (module.weight, module.bias, module.running_mean):
                nn.init.normal_(values, 0.3, 0.1)
            nn.init.uniform_(module.running_var, 0.5, 1)
    path = tmp_path_factory.mktemp("inception") / "inception.pth"
    torch.save({**network.state_dict(), "fc.bias": torch.randn(1008)}, path)
    return path


@pytest.fixture(scope="module")
def inception(inception_file: Path) -> Inception:
    return Inception(inception_file)


@pytest.fixture(scope="module")
def theirs(inception_file: Path) -> FeatureExtractorInceptionV3:
    return FeatureExtractorInceptionV3("inception", ["2048", "logits_unbiased"], str(inception_file)).eval()


def test_inception_is_torch_fidelitys(inception: Inception, theirs: FeatureExtractorInceptionV3) -> None:
    images = [noise(299, 299) for _ in range(2)]
    batch = torch.stack([inception.prepare(image) for image in images])
    given, again = inception(batch), inception(batch)
    features, logits = theirs(torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in images]))
    assert features.std() > 0.01
    torch.testing.assert_close(given["features"], features)
    torch.testing.assert_close(given["logits"], logits)
    assert given.keys() == inception.gives
    assert {values.dtype for values in given.values()} == {torch.float32}
    assert all(torch.equal(given[name], again[name]) for name in given)


def test_spatial_features_are_those_of_adm(inception: Inception, theirs: FeatureExtractorInceptionV3) -> None:
    """ADM reads `mixed_6/conv:0`, the first 1×1 convolution of Mixed_6d with norm and ReLU: 7 channels of it, last."""
    inputs: list[Tensor] = []
    hook = theirs.Mixed_6c.register_forward_hook(lambda module, args, output: inputs.append(output))
    image = noise(299, 299)
    theirs(torch.from_numpy(np.array(image)).permute(2, 0, 1)[None])
    hook.remove()
    conv, norm = theirs.Mixed_6d.branch1x1.conv, theirs.Mixed_6d.branch1x1.bn
    mixed = F.conv2d(inputs[0], conv.weight)
    mixed = F.batch_norm(mixed, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=0.001).relu()
    wanted = [float(mixed[0, channel, y, x]) for y in range(17) for x in range(17) for channel in range(7)]
    spatial = inception(inception.prepare(image)[None])["spatial"]
    assert spatial.shape == (1, 2023)
    assert spatial.std() > 0.01
    torch.testing.assert_close(spatial[0], torch.tensor(wanted))


def test_images_are_resized_as_clean_fid_does(inception: Inception) -> None:
    checks = (np.indices((598, 800)).sum(axis=0) % 2 * 255).astype(np.uint8)
    grey = inception.prepare(Image.fromarray(checks).convert("RGB"))
    assert grey.shape == (3, 299, 299)
    assert (grey - 127.5).abs().max() < 3  # without a filter as wide as the shrinking: 0 or 255
    place = inception.prepare(place_image(250, 200))
    assert bool((place != place.round()).any())  # not rounded
    assert bool((place[1] - place[1, :, :1]).abs().max() < 1e-3)  # green is y alone
    image = noise(299, 299)
    assert np.array_equal(inception.prepare(image).permute(1, 2, 0).numpy(), np.array(image, np.float32))
    squares = np.kron([[0, 255], [255, 0]], np.ones((40, 40))).astype(np.uint8)
    sharp = inception.prepare(Image.fromarray(squares).convert("RGB"))
    assert (float(sharp.min()), float(sharp.max())) == (0, 255)  # what a bicubic filter overshoots is cut


def test_without_a_classifier_there_are_no_logits(inception: Inception, tmp_path: Path) -> None:
    path = tmp_path / "inception.safetensors"
    state = {n: t for n, t in inception.network.state_dict().items() if not n.startswith("fc.")}
    outputs = [
        Output(name, TensorInfo(torch.float32, tuple(tensor.shape)), tensor.clone)
        for name, tensor in state.items()
        if tensor.is_floating_point()
    ]
    write_safetensors(path, outputs, {})
    without = open_extractor(f"inception:{path}")
    assert without.gives == {"features", "spatial"}
    assert without(torch.zeros(1, 3, 299, 299)).keys() == without.gives
    flip_a_bit(path)
    with pytest.raises(LdmError, match="has changed since it was written"):
        open_extractor(f"inception:{path}")


def test_other_files_are_no_inception(inception_file: Path, tmp_path: Path) -> None:
    state = torch.load(inception_file)
    del state["Mixed_5b.branch_pool.conv.weight"]
    torch.save(state, tmp_path / "part.pth")
    torch.jit.script(nn.Linear(2, 2)).save(tmp_path / "script.pt")
    (tmp_path / "text.pth").write_text("weights")
    (tmp_path / "cut.pth").write_bytes(inception_file.read_bytes()[:10000])
    for name, message in {
        "part.pth": r"hold the weights of Inception v3: Mixed_5b.branch_pool.conv.weight .*fetch_weights.py inception",
        "script.pt": "script.pt is TorchScript, a program; give a file of weights alone",
        "text.pth": "text.pth is a text file",
        "cut.pth": "cut.pth cannot be read by the restricted unpickler",
        "nowhere.pth": "nowhere.pth cannot be read",
    }.items():
        with pytest.raises(LdmError, match=message):
            Inception(tmp_path / name)


# --- CLIP of open_clip ------------------------------------------------------------------------------------------------

TINY = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}


@pytest.fixture(scope="module", autouse=True)
def tiny_clip() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(open_clip.factory._MODEL_CONFIGS, "tiny-clip", TINY)
        yield


@pytest.fixture(scope="module")
def clip_file(tiny_clip: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    model = open_clip.create_model("tiny-clip")
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    path = tmp_path_factory.mktemp("clip") / "tiny.safetensors"
    save_file(model.state_dict(), path)
    return path


def test_clip_is_open_clips(clip_file: Path) -> None:
    extractor = open_text_extractor(f"clip:tiny-clip@{clip_file}")
    model, transform = open_clip.create_model_from_pretrained("tiny-clip", pretrained=str(clip_file))
    images, captions = [noise(40, 60), noise(50, 33), noise(32, 32)], ["a cat", "a dog", "two foxes in the snow"]
    with torch.no_grad():
        features = model.eval().encode_image(torch.stack([transform(image) for image in images]))
        texts = model.encode_text(open_clip.get_tokenizer("tiny-clip")(captions))
    given = extractor(torch.stack([extractor.prepare(image) for image in images]))["features"]
    scores = clip_scores(given, extractor.texts(captions))
    cosines = F.cosine_similarity(features, texts)
    assert cosines.std() > 0.01
    torch.testing.assert_close(scores.float(), 100 * cosines.clamp(min=0), atol=1e-4, rtol=0)
    torch.testing.assert_close(given, F.normalize(features))
    assert extractor.name == "CLIP tiny-clip (tiny.safetensors)"
    assert extractor.digest == hashlib.sha256(clip_file.read_bytes()).hexdigest()
    assert extractor.preparation == "32×32, bicubic, antialiased, center crop"


def test_published_weights_bring_their_activation_and_preparation(
    clip_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tag = {"file": str(clip_file), "quick_gelu": True, "interpolation": "bilinear", "resize_mode": "squash"}
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "tiny-clip", {"openai": tag})
    extractor = open_extractor("clip:tiny-clip@openai")
    assert (extractor.name, extractor.preparation) == (
        "CLIP tiny-clip (openai)", "32×32, bilinear, antialiased, whole, stretched"
    )  # fmt: skip
    quick = open_clip.create_model("tiny-clip", pretrained=str(clip_file), force_quick_gelu=True).eval()
    batch = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        features = quick.encode_image(batch, normalize=True)
    torch.testing.assert_close(extractor(batch)["features"], features)
    plain = OpenClip("tiny-clip", str(clip_file))(batch)["features"]
    assert (features - plain).abs().max() > 1e-3


def test_many_texts_are_encoded_in_parts(clip_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    extractor = OpenClip("tiny-clip", str(clip_file))
    captions = [f"number {number}" for number in range(5)]
    whole = extractor.texts(captions)
    monkeypatch.setattr("ldm.evaluation.networks.clip.AT_ONCE", 2)
    torch.testing.assert_close(extractor.texts(captions), whole)
    with pytest.raises(LdmError, match="half a character"):
        extractor.texts(["a \ud800"])


def test_other_files_are_no_clip(clip_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    torch.save({"a": Path("a")}, tmp_path / "objects.pt")

    def offline(tag: object) -> str:
        raise OSError("no network")

    monkeypatch.setattr(open_clip, "download_pretrained", offline)
    for spec, message in {
        f"tiny-clip@{tmp_path}/other.safetensors": "does not hold the weights of open_clip's tiny-clip",
        f"tiny-clip@{tmp_path}/objects.pt": r"open_clip's tiny-clip, or is damaged \(Weights only load failed\)$",
        f"tiny-clap@{clip_file}": "no model 'tiny-clap'; did you mean tiny-clip?",
        "ViT-B-32@laion9b": "laion9b is no file, and no weights that open_clip knows for ViT-B-32: openai, laion400m",
        "ViT-B-32@openai": r"cannot be fetched \(no network\); give a file: clip:ViT-B-32@FILE",
    }.items():
        with pytest.raises(LdmError, match=message):
            open_extractor(f"clip:{spec}")


# --- our own pair -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as the stage `text` writes it."""
    folder = tmp_path_factory.mktemp("text")
    model = tiny.model("sdxl")
    model.save_pretrained(folder / "model")
    config = ImageEncoderConfig(width=32, layers=2, heads=2, patch=8, size=32, embed_dim=40)
    torch.manual_seed(0)
    write_clip(ContrastivePair(config, model.text_encoders), folder / "clip")
    return folder


def test_a_pair_of_our_own(run: Path) -> None:
    extractor = open_text_extractor(f"clip:{run}")
    pair = load_clip(run / "clip", open_source(run / "model").load(torch.float32))
    captions = ["a cat", "a dog"]
    assert torch.equal(extractor.texts(captions), pair.encode_texts(captions))
    images = torch.stack([extractor.prepare(image) for image in (noise(32, 32), place_image(64, 32))])
    assert images.shape == (2, 3, 32, 32)
    assert torch.equal(extractor(images)["features"], pair.encode_images(images))
    middle = (images[1, 0].mean() + 1) * 127.5
    assert middle == pytest.approx(31.5, abs=0.1)  # red is x of an image 64 pixels wide
    assert extractor.preparation == "32×32, bicubic, antialiased, center crop"


def test_a_pair_lies_in_the_model_too(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run / "model", tmp_path / "model")
    shutil.copytree(run / "clip", tmp_path / "model" / "clip")
    one, other = OwnPair(run), OwnPair(tmp_path / "model")
    assert torch.equal(one.texts(["a cat"]), other.texts(["a cat"]))
    assert one.digest == other.digest


def test_only_text_encoders_of_the_model_are_read(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "text")
    folder = tmp_path / "text"
    flip_a_bit(next((folder / "model" / "unet").glob("*.safetensors")))
    assert OwnPair(folder).digest == OwnPair(run).digest
    flip_a_bit(folder / "model" / "text_encoder_2" / "model.safetensors")
    with pytest.raises(LdmError, match="text_encoder_2/model.safetensors has changed since it was written"):
        OwnPair(folder)


def test_folders_without_a_pair(run: Path, tmp_path: Path) -> None:
    for folder in (tmp_path, run / "model"):
        with pytest.raises(LdmError, match=r"no contrastive pair \(clip is missing\); take the output of a stage text"):
            open_extractor(f"clip:{folder}")


# --- SSCD -------------------------------------------------------------------------------------------------------------


def varint(value: int) -> bytes:
    return bytes([value]) if value < 128 else bytes([value & 127 | 128]) + varint(value >> 7)


def chunk(number: int, value: bytes | str | int) -> bytes:
    """A field of a protocol buffer."""
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    value = value.encode() if isinstance(value, str) else value
    return varint(number << 3 | 2) + varint(len(value)) + value


def mean_colour(path: Path, kind: int = 2, side: bytes = chunk(2, "side")) -> Path:
    """An ONNX network of images (B, H, W, 3) to their mean colour (B, 3): `kind` 2 takes uint8, 1 takes floats."""

    def operation(kind: str, takes: str, gives: str, attributes: bytes) -> bytes:
        return chunk(1, chunk(1, takes) + chunk(2, gives) + chunk(4, kind) + attributes)

    def values(kind: int, *sides: bytes) -> bytes:
        return chunk(2, chunk(1, chunk(1, kind) + chunk(2, b"".join(chunk(1, side) for side in sides))))

    batch, three = chunk(2, "batch"), chunk(1, 3)
    floats = operation("Cast", "image", "floats", chunk(5, chunk(1, "to") + chunk(20, 2) + chunk(3, 1)))
    axes = chunk(5, chunk(1, "axes") + chunk(20, 7) + chunk(8, 1) + chunk(8, 2))
    flat = chunk(5, chunk(1, "keepdims") + chunk(20, 2) + chunk(3, 0))
    graph = floats + operation("ReduceMean", "floats", "embedding", axes + flat) + chunk(2, "graph")
    graph += chunk(11, chunk(1, "image") + values(kind, batch, side, side, three))
    graph += chunk(12, chunk(1, "embedding") + values(1, batch, three))
    path.write_bytes(chunk(1, 8) + chunk(8, chunk(2, 13)) + chunk(7, graph))
    return path


def test_sscd_gets_images_in_eight_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LDM_WEIGHTS", str(tmp_path))
    with pytest.raises(LdmError, match=r"sscd.onnx is missing; fetch it with: python tools/fetch_weights.py sscd"):
        open_extractor("sscd")
    path = mean_colour(tmp_path / "sscd.onnx")
    extractor = open_extractor("sscd")
    assert (extractor.name, extractor.digest) == ("SSCD", hashlib.sha256(path.read_bytes()).hexdigest())
    assert open_extractor(f"sscd:{path}").name == "SSCD (sscd.onnx)"  # it may be another one
    inputs = torch.stack([extractor.prepare(image) for image in (place_image(100, 60), place_image(20, 30))])
    assert (inputs.shape, inputs.dtype) == ((2, 320, 320, 3), torch.uint8)
    features = extractor(inputs)["features"]
    torch.testing.assert_close(features, torch.tensor([[49.5, 29.5, 128], [9.5, 14.5, 128]]), atol=0.1, rtol=0)


def test_other_files_are_no_sscd(tmp_path: Path) -> None:
    mean_colour(tmp_path / "floats.onnx", kind=1)
    mean_colour(tmp_path / "small.onnx", side=chunk(1, 64))
    (tmp_path / "damaged.onnx").write_bytes(mean_colour(tmp_path / "whole.onnx").read_bytes()[:-20])
    for name, message in {
        "floats.onnx": "is another network: SSCD takes images",
        "small.onnx": "is another network: SSCD takes images",
        "damaged.onnx": "is no ONNX file, or damaged",
        "nowhere.onnx": "cannot be read: No such file",
    }.items():
        with pytest.raises(LdmError, match=message):
            CopyDetector(tmp_path / name)


# --- names ------------------------------------------------------------------------------------------------------------


def test_names_that_mean_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LDM_WEIGHTS", str(tmp_path))
    choice = "choose inception, clip:MODEL@WEIGHTS, clip:FOLDER or sscd"
    for spec, message in {
        "": choice,
        "dino": f"extractor 'dino' is not known; {choice}",
        "inception": "inception-2015-12-05.safetensors is missing; fetch it with: python tools/fetch_weights.py inc",
        "clip": "nothing is no folder; write clip:FOLDER, or clip:MODEL@WEIGHTS",
        "clip:": "nothing is no folder",
        "clip:ViT-B-32": "ViT-B-32 is no folder; write clip:FOLDER",
        "clip:@openai": "write clip:FOLDER, or clip:MODEL@WEIGHTS",
    }.items():
        with pytest.raises(LdmError, match=re.escape(message)):
            open_extractor(spec)
    with pytest.raises(LdmError, match="extractor 'sscd' takes no texts; choose clip:"):
        open_text_extractor("sscd")
    with pytest.raises(LdmError, match="device nonsense cannot be used here"):
        open_extractor("sscd", "nonsense")


def test_the_weights_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LDM_WEIGHTS", raising=False)
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert weights_folder() == Path("/home/someone/.cache/ldm/weights")
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    assert weights_folder() == Path("/cache/ldm/weights")
    monkeypatch.setenv("LDM_WEIGHTS", "/weights")
    assert weights_folder() == Path("/weights")


def test_no_convolution_rounds_to_tf32() -> None:
    before = torch.backends.cudnn.allow_tf32
    with exact():
        assert not torch.backends.cudnn.allow_tf32
        assert torch.is_inference_mode_enabled()
    assert torch.backends.cudnn.allow_tf32 == before

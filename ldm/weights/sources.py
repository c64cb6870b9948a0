"""Sources of models: a folder, a file, or the name of a model on the Hub."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from ldm.errors import LdmError
from ldm.families import Family, differences
from ldm.files import Progress, check_digest, file_digest, silent, stated_digest
from ldm.models.tokenizer import Tokenizer, clip_tokenizer
from ldm.weights.builtin import GIVE, builtin, check_named, lender
from ldm.weights.components import Opened
from ldm.weights.downloads import check_download, check_texts
from ldm.weights.few_step import few_step_family, made_for
from ldm.weights.folder import (
    component_part,
    open_folder,
    read_autoencoder_config,
    read_text_config,
    read_unet_config,
    store_of,
    weight_files,
)
from ldm.weights.hub import fetch
from ldm.weights.manifest import check_manifest
from ldm.weights.names import HUB_ID
from ldm.weights.numbers import Findings, look_at
from ldm.weights.single_file import open_single_file
from ldm.weights.tensors import open_store

Source = str | os.PathLike[str]


def open_source(
    source: Source,
    *,
    family: str | None = None,
    variant: str | None = None,
    revision: str | None = None,
    components: Mapping[str, Source] | None = None,
    allow_pickle: bool = False,
    verify: bool = True,
    progress: Progress = silent,
) -> Opened:
    """Open a model from any kind of source, without loading weights.

    Args:
        source: a diffusers folder, a single-file checkpoint, a Hub name (owner/name), or a built-in model's name.
        family: the family of a single file that does not state it (sd2 or sd2-v).
        variant: the variant of a folder's weights, such as "fp16".
        revision: the revision of a model on the Hub.
        components: components from elsewhere by name (unet, vae, text_encoder, text_encoder_2), which replace those of
            the source or fill what a single file lacks: a component's folder, its Hub name, or a file with its weights
            in diffusers', the original or open_clip's names.
        allow_pickle: read tensors from `.ckpt` and `.bin` files, with PyTorch's restricted unpickler.
        verify: check all files that have digests against them.

    Raises:
        LdmError: the source cannot be opened; the message says why, and the remedy.
    """
    if isinstance(source, str):
        check_named(source)
    path = builtin(source) or Path(source)
    try:
        if not os.path.lexists(path) and HUB_ID.fullmatch(str(source)):
            path = fetch(str(source), revision, variant, allow_pickle, progress)
        elif revision:
            raise LdmError(f"{path} is a local path, which has no revision={revision!r}; leave the revision out")
        if path.is_dir():
            if family:
                raise LdmError(f"{path} is a folder, whose files say what it is; family={family!r} is for single files")
            opened = open_folder(path, variant, allow_pickle, verify, progress, lender(path))
        elif path.is_file():
            if variant:
                raise LdmError(f"{path} is a single file, which has no variants; leave out variant={variant!r}")
            opened = open_single_file(path, family, allow_pickle, verify, progress, elsewhere=components or ())
        else:
            what = "is not a regular file" if path.exists() else "does not exist"
            raise LdmError(f"{path} {what}; {GIVE}")
        opened = _replaced(opened, components or {}, variant, allow_pickle, verify, progress)
        denoiser = (components or {}).get("unet", source)
        few = made_for(denoiser, opened.parts["unet"].store.metadata)
        opened.family = opened.components.family = few_step_family(opened.family, few)
        return opened
    except LdmError:
        raise
    except PermissionError as error:
        raise LdmError(f"{error.filename or path} cannot be read: permission denied") from None
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the path
        raise LdmError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from None


def _replaced(
    opened: Opened,
    components: Mapping[str, Source],
    variant: str | None,
    allow_pickle: bool,
    verify: bool,
    progress: Progress,
) -> Opened:
    """The model with some of its components from other places."""
    if not components:
        return opened
    parts, family, known = dict(opened.parts), opened.family, opened.components.modules()
    for name, source in components.items():
        if name not in known:
            raise LdmError(f"component {name!r} is not one of this model's: {', '.join(known)}")
        path = Path(source)
        if not os.path.lexists(path) and HUB_ID.fullmatch(str(source)):
            path = fetch(str(source), None, variant, allow_pickle, progress, component=name)
        if path.is_dir():
            family = _described(name, path, family, opened.tokenizers)
            store = store_of(weight_files(path, name, variant, allow_pickle), allow_pickle)
        elif path.is_file():
            store = open_store(path, allow_pickle)
        else:
            raise LdmError(
                f"component {name!r}: {path} does not exist, or is neither a folder, a file nor a Hub name (owner/name)"
            )
        files = [file.absolute() for file in store.files]
        if verify and not (path.is_dir() and check_manifest(path.absolute().parent, files, progress)):
            for file in files:
                check_digest(file, progress=progress)
        parts[name] = component_part(name, store, family)
    return Opened(opened.source, opened.layout, family, opened.tokenizers, parts, opened.beside)


def _described(name: str, folder: Path, family: Family, tokenizers: list[Tokenizer]) -> Family:
    """The family with the configuration of one component read from the `config.json` in a folder."""
    if name == "unet":
        return replace(family, unet=read_unet_config(folder, family.text[-1].projection))
    if name == "vae":
        return replace(family, autoencoder=read_autoencoder_config(folder))
    index = [config.component for config in family.text].index(name)
    text = list(family.text)
    text[index] = read_text_config(folder, name, tokenizers[index])
    return replace(family, text=tuple(text))


def verify_source(opened: Opened, progress: Progress = silent) -> list[str]:
    """Read and check all of a model's tensors and digests; returns a line of text for each check and its limits.

    Raises:
        LdmError: a digest differs, or weights are not finite numbers or absurdly large.
    """
    files = sorted({file for part in opened.parts.values() for file in part.store.files})
    lines = _verify_digests(opened, files, progress)
    total = sum(info.nbytes for name in opened.parts for info in opened.infos(name).values())
    done = 0
    findings = Findings()
    for name, part in opened.parts.items():
        for tensor_name, tensor in part.store.read(opened.infos(name), None, "cpu"):
            try:
                look_at(tensor_name, tensor, findings)
            except LdmError as error:
                raise LdmError(f"{opened.source}: {error}") from None
            done += tensor.nbytes
            progress("looking at all numbers", done, total)
    lines += ["all weights are finite numbers", *findings.lines(), *differences(opened.family)]
    for config, tokenizer in zip(opened.family.text, opened.tokenizers, strict=True):
        own = clip_tokenizer().vocabulary()
        other = len(own.items() - tokenizer.vocabulary().items())
        if other and len(tokenizer) >= len(own):
            lines.append(f"the tokenizer of {config.component} has other numbers for {other} tokens than CLIP's")
    return lines


def _verify_digests(opened: Opened, files: list[Path], progress: Progress) -> list[str]:
    """Check all files that have digests; returns lines of what was checked, and of what cannot be known without."""
    folder = Path(opened.source)
    own = [file for file in files if folder in file.parents]
    listed = folder.is_dir() and check_manifest(folder, own, progress)
    hashed = own if listed else []
    with_digest = [f for f in files if (stated_digest(f) if f in hashed else check_digest(f, progress=progress))]
    lines = [f"{len(with_digest)} of {len(files)} weight files carry a digest, and agree with it"]
    if listed:
        lines.append("all files agree with the folder's manifest")
    elif folder.is_dir():
        check_texts(path for path in (folder, *folder.iterdir()) if path.is_dir())
    others = [file for file in files if file not in with_digest and file not in hashed]
    fetched = [file for file in others if check_download(file, progress)]
    if fetched:
        lines.append(f"{len(fetched)} weight files agree with the Hub's digests")
    if unknown := [file for file in others if file not in fetched]:
        lines.append(
            f"{len(unknown)} weight files have no digest: whether their numbers are those of their author cannot be "
            "known from them alone; compare these SHA-256 with the publisher's:"
        )
        lines += [f"{file_digest(file, progress, plain=True)}  {_within(file, folder)}" for file in unknown]
    return lines


def _within(file: Path, folder: Path) -> str:
    return str(file.relative_to(folder)) if folder in file.parents else str(file)

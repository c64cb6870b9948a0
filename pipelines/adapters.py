"""The adapters of a pipeline: files by name, and models with the weights of the last mixes merged in."""

from __future__ import annotations

import copy
import hashlib
import logging
import os
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from ldm.errors import LdmError, listing, out_of_memory, suggestion
from ldm.families import FewStep
from ldm.files import walked
from ldm.latent_diffusion import LatentDiffusion
from ldm.patches.low_rank import Change
from ldm.runtime.merging import merged
from ldm.weights.adapters import Adapter, open_adapter
from ldm.weights.adapters.names import parameter_of
from ldm.weights.adapters.reading import DIFFUSERS, diffusers_file, peft_folders
from ldm.weights.builtin import builtin_adapter, builtin_adapters
from ldm.weights.few_step import made_for
from ldm.weights.tensors import read_header
from pipelines.mixes import Mix, MixedAdapter, Wanted, read_tags, wanted
from pipelines.settings import find

log = logging.getLogger(__name__)
KEPT = 2  # models with merged weights that are kept: the last mixes
ENDINGS = (".safetensors", ".pt", ".ckpt", ".bin")
HASH = 12  # digits of AUTOMATIC1111's hash that it writes
Changes = dict[str, list[tuple[float, Change]]]  # parameter -> weights and changes


@dataclass(frozen=True)
class Found:
    """An opened adapter."""

    adapter: Adapter
    stamp: tuple[int, ...]  # of its files as they were then
    autov3: str  # the first digits of AUTOMATIC1111's hash of the file; "" for a folder
    few: FewStep | None  # settings that it was made for


class Adapters:
    """The adapters of a pipeline. Several threads may use them at once."""

    def __init__(
        self,
        model: LatentDiffusion,
        folder: str | os.PathLike[str] | None,
        partial: bool,
        allow_pickle: bool,
        usual: Any = (),
    ) -> None:
        """Adapters for a model, which stays as it is.

        Args:
            model: into copies of which adapters are merged.
            folder: where adapters are found by name, in folders within it, too.
            partial: use what fits of an adapter that does not fit as a whole.
            allow_pickle: read tensors, and nothing else, from `.pt`, `.ckpt` and `.bin`.
            usual: a value of the setting `adapters`, for calls that name none; calls may name these by their names.

        Raises:
            LdmError: the folder does not exist; or as `mixes`.
        """
        self.model, self.partial, self.allow_pickle = model, partial, allow_pickle
        self.folder = None if folder is None else Path(folder)
        if self.folder is not None and not self.folder.is_dir():
            raise LdmError(f"lora_dir {str(self.folder)!r} is not a folder; name one with LoRA files")
        self.names: dict[str, Path] = {}  # adapters of the pipeline, and what was found in the folder
        self.opened: dict[Path, Found] = {}
        self.models: OrderedDict[Mix, LatentDiffusion] = OrderedDict()  # the last one used comes last
        self.opening, self.merging = threading.Lock(), threading.Lock()
        (given,) = wanted(find("adapters", "python").check(usual), 1)
        self.usual = self._added(given, ())
        for one in self.usual:
            if self.names.setdefault(one.name, one.file) != one.file:
                raise LdmError(f"adapters {self.names[one.name]} and {one.file} have one name; rename one of them")

    # --- from names to mixes ------------------------------------------------------------------------------------------

    def mixes(self, prompts: Sequence[str], value: Any, tags: bool) -> tuple[list[str], list[Mix]]:
        """Prompts without their `<lora:…>`, and the mix of each: a setting's adapters and its tags' together.

        Args:
            prompts: of a call.
            value: of the setting `adapters`; None for the pipeline's own.
            tags: read `<lora:…>`; otherwise they are words.

        Raises:
            LdmError: a name is not known, or an adapter cannot be read or does not fit the model.
        """
        read = [read_tags(prompt) if tags else (prompt, ()) for prompt in prompts]
        usual = self.usual if value is None else ()
        given = wanted(() if value is None else value, len(prompts))
        added = [self._added((*one, *own), usual) for one, (_, own) in zip(given, read, strict=True)]
        found = [tuple(one for one in mix if one.unet or one.text) for mix in added]
        return [prompt for prompt, _ in read], found

    def opened_here(self, mix: Sequence[Wanted]) -> Mix:
        """A mix that another process has asked for, by the paths or names of its adapters and their digests.

        Raises:
            LdmError: an adapter is not here, or another one is in its place.
        """
        return self._added(mix, ())

    def _added(self, entries: Sequence[Wanted], usual: Mix) -> Mix:
        """These adapters and those of another mix together: weights of the same file add."""
        parts = {part.file: part for part in usual}
        for one in entries:
            with self.opening:
                part = self._part(one, {part.name: part.file for part in parts.values()})
            before = parts.get(part.file, replace(part, unet=0.0, text=0.0))
            parts[part.file] = replace(part, unet=before.unet + part.unet, text=before.text + part.text)
        return tuple(parts.values())

    def _part(self, one: Wanted, here: Mapping[str, Path]) -> MixedAdapter:
        """The opened adapter that is asked for, with its weights; `here` has the names of the same mix.

        Raises:
            LdmError: as `mixes`; or its file is not the one of the record.
        """
        recorded = Path(one.path) if one.path and Path(one.path).exists() else None
        file = (recorded or self._place(one, here)).absolute()
        found = self._open(file)
        if recorded and self.folder and not _is_that(one, found):  # the folder may have the one of the record
            file = self._place(one, here).absolute()
            found = self._open(file)
        if not _is_that(one, found):
            raise LdmError(
                f"{one.place}: {file} is not the file that the image was made with; name the folder of that one "
                "(lora_dir=, --lora-dir)"
            )
        own = found.adapter
        return MixedAdapter(own.name, file, own.digest, found.autov3, one.unet, one.text, own, found.few)

    def _place(self, one: Wanted, here: Mapping[str, Path]) -> Path:
        """The file of an adapter that is asked for: a file comes before a name in the folder, a folder after it.

        Raises:
            LdmError: there is none, or several adapters in the folder have the name.
        """
        known = here.get(one.name, self.names.get(one.name))
        if known is not None and known.exists():
            return known
        path = None if one.by_name else Path(one.name)
        if path is not None and path.is_file():
            return path
        files = list(files_in(self.folder)) if self.folder else []
        found = self._called(one, files)
        if found is not None:
            self.names[one.name] = found
            return found
        if path is not None and path.exists():
            return path
        own = builtin_adapter(one.name)
        if own is not None:
            return own
        raise LdmError(self._unknown(one, files))

    def _called(self, one: Wanted, files: Sequence[Path]) -> Path | None:
        """The one of the folder's adapters that has a name: that of its file, or else the one in its metadata.

        Raises:
            LdmError: several have it.
        """
        found = [file for file in files if one.name in names_in(self.folder or file, file)]
        found = found or [file for file in files if alias(file) == one.name]
        if len(found) > 1:
            places = listing([str(file) for file in found])
            raise LdmError(
                f"{one.place}: {len(found)} adapters are called {one.name!r} ({places}); write its path in the folder"
            )
        return found[0] if found else None

    def _unknown(self, one: Wanted, files: Sequence[Path]) -> str:
        """The message for a name that is not known."""
        own = get_close_matches(one.name, builtin_adapters(), 1)  # which are for one model alone
        known = sorted({*self.names, *(file.stem for file in files), *own})
        gone = f"{one.path} is gone, and " if one.path else ""
        where = f" in {self.folder}" if self.folder else ""
        remedy = "" if self.folder else "name the folder of LoRA files (lora_dir=, --lora-dir), or the path of the file"
        near = suggestion(one.name, known) if known else ""
        end = "; ".join(text for text in (near, remedy) if text) or "it holds none"
        return f"{one.place}: {gone}no adapter is called {one.name!r}{where}; {end}"

    def _open(self, file: Path) -> Found:
        """An adapter, which is read again if its file has changed."""
        now = stamp(file)
        found = self.opened.get(file)
        if found is None or found.stamp != now:
            adapter = open_adapter(file, self.model, partial=self.partial, allow_pickle=self.allow_pickle)
            few = made_for(file, adapter.metadata)
            if few:
                log.warning("%s: %s; these are the defaults", file, few)
            found = self.opened[file] = Found(adapter, now, autov3(file, adapter.metadata), few)
        return found

    # --- from mixes to models -----------------------------------------------------------------------------------------

    def of(self, model: LatentDiffusion) -> Adapters:
        """The same adapters for a copy of the model with the same weights."""
        other = copy.copy(self)
        other.model, other.models, other.merging = model, OrderedDict(), threading.Lock()
        return other

    def merged(self, mix: Mix) -> LatentDiffusion:
        """The model with a mix merged in; the model itself without one. The last ones are kept.

        Raises:
            LdmError: memory does not suffice.
        """
        if not mix:
            return self.model
        with self.merging:
            if mix not in self.models:
                while len(self.models) >= KEPT:
                    self.models.popitem(last=False)
                try:
                    self.models[mix] = adapted(self.model, mix)
                except RuntimeError as error:
                    if not out_of_memory(error):
                        raise
                    self.models.clear()
                    raise LdmError(
                        "out of memory while adapters are merged; offload the model (offload='components', --offload)"
                    ) from None
            self.models.move_to_end(mix)
            return self.models[mix]


def adapted(model: LatentDiffusion, mix: Mix) -> LatentDiffusion:
    """A copy of a model with the changes of a mix merged into its weights; all else is shared."""
    changes: dict[str, Changes] = {"unet": {}, "text_encoders": {}}
    for share in mix:
        for component, own in share.adapter.changes.items():
            amount = share.unet if component == "unet" else share.text
            for name, change in own.items() if amount else ():
                network, parameter = parameter_of(model, component, name)
                changes[network].setdefault(parameter, []).append((amount, change))
    return model.with_networks({name: merged(model.networks[name], own) for name, own in changes.items() if own})


# --- files ------------------------------------------------------------------------------------------------------------


def files_in(folder: Path) -> Iterator[Path]:
    """The adapters in a folder and in those within it: files, and folders by peft or diffusers."""
    for place, folders, names in walked(folder):
        peft = peft_folders(place)
        diffusers = () if peft or place == folder or not diffusers_file(place) else DIFFUSERS
        if peft or diffusers:
            yield place
        if place in peft:
            folders.clear()
            continue
        folders[:] = [name for name in folders if place / name not in peft]
        yield from (place / name for name in names if name.lower().endswith(ENDINGS) and name not in diffusers)


def _is_that(one: Wanted, found: Found) -> bool:
    """Whether an opened adapter is the one of a record, if a record asks for it."""
    own = found.adapter.digest
    return one.sha256 in ("", own) and (not one.autov3 or found.autov3 in ("", one.autov3))


def names_in(folder: Path, file: Path) -> set[str]:
    """The names of an adapter in a folder: that of its file, or its path there, each with its ending or without."""
    inner = file.relative_to(folder)
    return {file.stem, file.name, inner.as_posix(), (inner.parent / file.stem).as_posix()}


def alias(file: Path) -> str:
    """The name that a trainer wrote into a file's metadata, by which AUTOMATIC1111's programs call it; "" if none."""
    if file.suffix.lower() != ".safetensors":
        return ""
    try:
        return read_header(file)[1].get("ss_output_name", "")
    except LdmError:  # another one is asked for
        return ""


def autov3(file: Path, metadata: Mapping[str, str]) -> str:
    """The first digits of AUTOMATIC1111's hash of an adapter, as it writes them: "" for a folder.

    It is the SHA-256 of a safetensors file without its header, or of another file as a whole; kohya's trainer writes it
    into the metadata, which is then believed.
    """
    stated = metadata.get("sshs_model_hash", "")
    file = diffusers_file(file) or file
    if stated or file.is_dir():
        return stated[:HASH]
    with file.open("rb") as opened:
        if file.suffix.lower() == ".safetensors":
            opened.seek(8 + int.from_bytes(opened.read(8), "little"))
        return hashlib.file_digest(opened, "sha256").hexdigest()[:HASH]


def stamp(file: Path) -> tuple[int, ...]:
    """Sizes and times of change of an adapter's file, or of all files in its folder.

    Raises:
        LdmError: it is gone.
    """
    try:
        files = [place / name for place, _, names in walked(file) for name in names] if file.is_dir() else [file]
        found = [path.stat() for path in files if path.is_file() or path == file]
    except OSError as error:
        raise LdmError(f"adapter {file}: {error.strerror}") from None
    return tuple(number for one in found for number in (one.st_size, one.st_mtime_ns))

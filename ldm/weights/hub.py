"""Models on the Hugging Face Hub: only the files that are read are fetched, into the Hub's own cache."""

from __future__ import annotations

import re
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError

from ldm.errors import LdmError

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_WEIGHTS = re.compile(
    r"(diffusion_pytorch_model|model)(?P<variant>\.(?!safetensors)\w+)?(-\d+-of-\d+)?(?P<after>\.(?!safetensors)\w+)?\.safetensors"
)
_FOLDERS = {"unet", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler"}


def fetch(name: str, revision: str | None = None, variant: str | None = None) -> Path:
    """The local folder of the model `name` (owner/name), fetched unless it is in the cache already.

    Raises:
        LdmError: there is no such model, it is private, or neither the Hub nor a cached copy can be reached.
    """
    try:
        files = [file.rfilename for file in HfApi().model_info(name, revision=revision).siblings or []]
    except RepositoryNotFoundError:
        raise LdmError(
            f"{name!r} is neither a path here nor a model on the Hub (or it needs a login: hf auth login)"
        ) from None
    except HFValidationError as error:
        raise LdmError(f"{name!r} is not a model's name: {error}") from None
    except Exception:  # no network, offline mode, time-outs: each HTTP library has its own exceptions
        return _cached(name, revision)
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=wanted(files, variant)))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise LdmError(f"{name!r} could not be fetched: {str(error).splitlines()[0]}") from None


def _cached(name: str, revision: str | None) -> Path:
    index = try_to_load_from_cache(name, "model_index.json", revision=revision)
    if not isinstance(index, str):
        raise LdmError(
            f"{name!r} is not a path here, and the Hub cannot be reached nor is a copy in its cache; "
            "check the path or the network"
        )
    return Path(index).parent


def wanted(files: list[str], variant: str | None) -> list[str]:
    """Those of a repository's files that a model is read from: configurations, tokenizers, and one set of weights."""
    chosen = []
    for folder in _FOLDERS:
        inside = [file.split("/", 1)[1] for file in files if file.startswith(f"{folder}/") and file.count("/") == 1]
        weights = {
            file: (match["variant"] or match["after"] or "")[1:]
            for file in inside
            if (match := _WEIGHTS.fullmatch(file))
        }
        take = (
            variant
            if variant in weights.values()
            else ""
            if "" in weights.values()
            else next(iter(weights.values()), "")
        )
        chosen += [f"{folder}/{file}" for file, of in weights.items() if of == take]
        chosen += [f"{folder}/{file}" for file in inside if file.endswith((".json", "merges.txt"))]
    return [*chosen, *(file for file in files if file in ("model_index.json", "ldm_manifest.json"))]

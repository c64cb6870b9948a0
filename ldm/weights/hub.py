"""Models on the Hugging Face Hub: only the files that are read are fetched, into the Hub's own cache."""

from __future__ import annotations

from pathlib import Path

from ldm.errors import LdmError, first_line
from ldm.files import Progress, silent
from ldm.weights.downloads import check_download
from ldm.weights.folder import COMPONENTS, base_name, weight_names
from ldm.weights.manifest import NAME as MANIFEST
from ldm.weights.names import HUB_FILE, INDEX


def fetch(
    name: str,
    revision: str | None = None,
    variant: str | None = None,
    allow_pickle: bool = False,
    progress: Progress = silent,
    component: str = "",
) -> Path:
    """The local folder of the model `name` (owner/name), fetched unless it is in the cache already.

    What was fetched now is compared with the Hub's digests. With `component`, the repository holds such a component
    alone, such as a ControlNet.

    Raises:
        LdmError: there is no such model, it is private, neither the Hub nor a cached copy can be reached, or a file
            did not arrive as it is there.
    """
    from huggingface_hub import HfApi, snapshot_download, try_to_load_from_cache  # not needed for local models
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        files = [file.rfilename for file in HfApi().model_info(name, revision=revision).siblings or []]
    except RevisionNotFoundError:
        raise LdmError(f"{name!r} has no revision {revision!r}") from None
    except RepositoryNotFoundError:
        raise LdmError(
            f"{name!r} is neither a path here nor a model on the Hub (or it needs a login: hf auth login)"
        ) from None
    except HFValidationError as error:
        raise LdmError(f"{name!r} is not a model's name: {first_line(error)}") from None
    except Exception:  # no network, offline mode, time-outs: each HTTP library has its own exceptions
        return _cached(name, revision, "config.json" if component else INDEX)
    try:
        if component:
            chosen = wanted_of_component(files, component, variant, allow_pickle)
        else:
            chosen = wanted(files, variant, allow_pickle)
        new = [file for file in chosen if not isinstance(try_to_load_from_cache(name, file, revision=revision), str)]
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=chosen))
        for file in new:
            check_download(folder / file, progress)
        return folder
    except LdmError:
        raise
    except Exception as error:  # network errors, as above
        raise LdmError(f"{name!r} could not be fetched: {first_line(error)}") from None


def fetch_file(source: str) -> Path:
    """The local path of one file of a repository (owner/name/folder/file), fetched unless it is in the cache already.

    Raises:
        LdmError: there is no such file, or it can neither be fetched nor found in the cache.
    """
    from huggingface_hub import hf_hub_download  # not needed for local files

    found = HUB_FILE.fullmatch(source)
    assert found
    try:
        path = Path(hf_hub_download(found[1], found[2]))
    except Exception as error:  # no such repository or file, and all errors of networks
        raise LdmError(f"{source!r} is neither a path here nor a file of the Hub: {first_line(error)}") from None
    check_download(path)
    return path


def _cached(name: str, revision: str | None, file: str) -> Path:
    """The folder of a model in the Hub's cache, which holds the given file."""
    from huggingface_hub import try_to_load_from_cache

    index = try_to_load_from_cache(name, file, revision=revision)
    if not isinstance(index, str):
        raise LdmError(
            f"{name!r} is not a path here, the Hub cannot be reached, and its cache holds no copy; "
            "check the path or the network"
        )
    return Path(index).parent


def wanted(files: list[str], variant: str | None, allow_pickle: bool = False) -> list[str]:
    """The files of a repository that are needed to load a model: configurations, tokenizers, and one set of weights."""
    chosen = [file for file in files if file in (INDEX, MANIFEST)]
    for component in COMPONENTS:
        inside = [file.split("/", 1)[1] for file in files if file.startswith(f"{component}/") and file.count("/") == 1]
        chosen += [f"{component}/{name}" for name in wanted_of_component(inside, component, variant, allow_pickle)]
    return chosen


def wanted_of_component(files: list[str], component: str, variant: str | None, allow_pickle: bool) -> list[str]:
    """The files of one component's folder that are needed to load it."""
    weights = weight_names(files, base_name(component), variant, allow_pickle)
    texts = [name for name in files if name.endswith((".json", "merges.txt")) and ".safetensors.index" not in name]
    return [*weights, *(name for name in texts if "/" not in name)]

"""Find a model's file: bundled with the package, on this machine, or on the Hugging Face hub."""

from __future__ import annotations

import os
import re
from importlib import resources
from pathlib import Path

from ipr_fast.errors import first_line, import_extra
from ipr_fast.models.files.weight_files import SUFFIXES

WEIGHTS = resources.files("ipr_fast.models") / "weights"
HUB_FILE = "model.safetensors"  # for a hub id without a file
HUB_ID = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(?:/(?P<file>[^@]+))?(?:@(?P<revision>.+))?")


class NoSuchModel(ValueError):
    """No model has this name; `problem` is the message without the argument's name."""

    def __init__(self, argument: str, problem: str) -> None:
        super().__init__(f"{argument} {problem}")
        self.problem = problem


def bundled_models() -> list[str]:
    """Return the names of the models that come with the package."""
    return sorted(f.name.removesuffix(".safetensors") for f in WEIGHTS.iterdir() if f.name.endswith(".safetensors"))


def find(source: str | os.PathLike) -> Path:
    """Return the file of a bundled model, a path, or a hub id `owner/name[/file][@revision]` (downloaded or cached).

    A bundled name is tried before a path, a path before a hub id; an id whose owner is an existing folder is a path.
    Raises ValueError when there is no such file, NoSuchModel for a name that cannot be a model's, MissingExtra or
    BrokenExtra where a hub id needs huggingface_hub.
    """
    bundled = bundled_models()
    if isinstance(source, str) and source in bundled:
        return Path(str(WEIGHTS / f"{source}.safetensors"))
    if not isinstance(source, (str, os.PathLike)):
        raise NoSuchModel("source", f"must be a bundled model's name, a path or a hub id, got {type(source).__name__}")
    try:
        path = Path(source)
        if path.is_file():
            return path
        owner_is_folder = bool(path.parts) and Path(path.parts[0]).is_dir()
    except (OSError, TypeError, ValueError) as error:  # a name too long, a folder that may not be entered, bytes
        raise NoSuchModel("source", f"{str(source)[:80]!r} cannot be a file here ({error})"[:400]) from error
    hub_id = HUB_ID.fullmatch(source) if isinstance(source, str) else None
    # A name with a file's suffix or that begins with an existing folder is meant as a path.
    if hub_id is None or (hub_id["file"] is None and path.suffix in SUFFIXES) or owner_is_folder:
        raise NoSuchModel(
            "source",
            f"must be a bundled model ({', '.join(bundled)}), an existing file or a Hugging Face hub id "
            f"(owner/name or owner/name/file), got {str(source)!r}",
        )
    return _download(hub_id.string, hub_id["repo"], hub_id["file"] or HUB_FILE, hub_id["revision"])


def _download(source: str, repo: str, file: str, revision: str | None) -> Path:
    purpose = f"{source}: no such file here; models from the Hugging Face hub"
    huggingface_hub = import_extra("huggingface_hub", "huggingface_hub", "hub", purpose)
    try:
        return Path(huggingface_hub.hf_hub_download(repo, file, revision=revision))
    except Exception as error:  # of the network, the hub, its cache, or the id
        raise ValueError(
            f"{source}: no such file here, and no file {file!r} from the hub repository {repo!r} ({first_line(error)})"
        ) from error

# SPDX-License-Identifier: Apache-2.0
"""Find the files of a Savanna checkpoint on disk, or fetch them from Hugging Face.

Large files are published in parts, ``model.pt.part0`` and so on, which are the bytes of one file cut up. They are read
one after another and never joined on disk. What is downloaded stays in Hugging Face's own cache and nowhere else.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from evo2_megatron.config import UserError

logger = logging.getLogger(__name__)

_PART = re.compile(r"(.*\.pt)\.part(\d+)")
_RANK = re.compile(r"mp_rank_(\d+)_model_states\.pt")
_REPOSITORY = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


class SavannaFiles(NamedTuple):
    """Where a checkpoint's tensors are."""

    ranks: tuple[tuple[Path, ...], ...]
    """One entry per model-parallel rank, so one for a whole model; each the parts of one file, in order."""

    revision: str | None = None
    """Commit of the Hugging Face repository; None for local files."""


def find_savanna_files(source: str, *, revision: str | None = None) -> SavannaFiles:
    """Find what a user means by the path of a Savanna checkpoint.

    Args:
        source: A file; a file that exists in parts, or its first part; a folder with a file, with parts, or with one
            file per model-parallel rank; else a Hugging Face repository, ``owner/name``, that holds ``name.pt``, whole
            or in parts.
        revision: Commit, branch or tag of the repository.

    Raises:
        UserError: There is nothing of the kind, a part is missing, or the repository cannot be had.
    """
    path = Path(source).expanduser()
    parts = _parts_of_one(path.parent, path.name) if path.parent.is_dir() and not path.is_dir() else ()
    if not (path.exists() or parts) and _REPOSITORY.fullmatch(source) and not source.endswith(".pt"):
        return _from_hub(source, revision)
    if revision is not None:
        raise UserError(f"--revision is for Hugging Face repositories and {source} is not one; leave it out")
    if path.is_dir():
        return SavannaFiles(_in_folder(path))
    if path.is_file() and not _PART.fullmatch(path.name):
        return SavannaFiles(((path,),))
    if parts:
        return SavannaFiles((parts,))
    raise UserError(f"{source} does not exist; give a .pt file, a folder, or a Hugging Face repository (owner/name)")


def _parts_of_one(folder: Path, name: str) -> tuple[Path, ...]:
    """Parts of the file that a name means: the file's own name, or that of any of its parts."""
    match = _PART.fullmatch(name)
    whole = match[1] if match else name
    return tuple(folder / part for part in _in_order((path.name for path in folder.iterdir()), whole))


def _in_order(names: Iterable[str], whole: str) -> list[str]:
    """Names of the parts of a file among some file names, checked to be all from 0 on."""
    matches = ((_PART.fullmatch(name), name) for name in names)
    parts = {int(match[2]): name for match, name in matches if match and match[1] == whole}
    missing = [number for number in range(max(parts, default=-1)) if number not in parts]
    if missing:
        raise UserError(f"{whole}.part{missing[0]} is missing among {len(parts)} parts; copy or download it too")
    return [parts[number] for number in sorted(parts)]


def _in_folder(folder: Path) -> tuple[tuple[Path, ...], ...]:
    latest = folder / "latest"  # DeepSpeed's pointer to the newest step
    if latest.is_file() and (folder / latest.read_text().strip()).is_dir():
        folder = folder / latest.read_text().strip()
    names = sorted(path.name for path in folder.iterdir() if path.is_file())
    ranks = {int(match[1]): name for name in names if (match := _RANK.fullmatch(name))}
    if ranks:
        missing = [rank for rank in range(max(ranks)) if rank not in ranks]
        if missing:
            raise UserError(f"{folder} lacks mp_rank_{missing[0]:02d}_model_states.pt; copy the files of all ranks")
        return tuple((folder / ranks[rank],) for rank in sorted(ranks))
    whole = [name for name in names if name.endswith(".pt")]
    cut_up = sorted({match[1] for name in names if (match := _PART.fullmatch(name))} - set(whole))
    if len(whole) + len(cut_up) != 1:
        found = ", ".join(whole + cut_up) or "none"
        raise UserError(f"{folder} must hold one .pt file, whole, in parts or one per rank; found: {found}")
    return ((folder / whole[0],),) if whole else (_parts_of_one(folder, cut_up[0]),)


def _from_hub(repository: str, revision: str | None) -> SavannaFiles:
    import huggingface_hub
    import requests
    from huggingface_hub import constants, errors

    name, where = repository.rpartition("/")[2], f"{repository}" + (f" at {revision}" if revision else "")
    offline = constants.HF_HUB_OFFLINE
    fetch = _from_cache if offline else _download
    try:
        paths = fetch(huggingface_hub, repository, f"{name}.pt", revision)
    except errors.GatedRepoError:
        raise UserError(
            f"Hugging Face gives {repository} only to users who were granted access; ask for it on its page, then log "
            "in with: huggingface-cli login"
        ) from None
    except errors.RepositoryNotFoundError:
        raise UserError(
            f"{repository} is neither a local path nor a Hugging Face repository that this machine may see; check the "
            "spelling, or log in with: huggingface-cli login"
        ) from None
    except errors.RevisionNotFoundError:
        raise UserError(f"{repository} has no commit, branch or tag {revision!r}; check --revision") from None
    except (errors.HfHubHTTPError, errors.LocalEntryNotFoundError, requests.RequestException) as error:
        raise UserError(
            f"{where} could not be downloaded ({type(error).__name__}: {str(error).splitlines()[0][:150]}); check the "
            "network, or download it on another machine and give the file's path"
        ) from None
    if not paths:
        remedy = (
            f"with HF_HUB_OFFLINE=1 only the local cache is looked at: run huggingface-cli download {repository} with "
            "a network, or give a file's path"
            if offline
            else "give a repository of a Savanna checkpoint, or the path of a file"
        )
        raise UserError(f"{where} has no file {name}.pt, whole or in parts; {remedy}")
    commit = paths[0].parent.name  # .../snapshots/<commit>/<file>
    logger.info("%s: commit %s%s", repository, commit, "" if revision else "; name it with --revision to repeat this")
    return SavannaFiles((tuple(paths),), commit)


def _download(hub: Any, repository: str, name: str, revision: str | None) -> list[Path]:
    info = hub.HfApi().model_info(repository, revision=revision)
    names = [sibling.rfilename for sibling in info.siblings]
    wanted = [name] if name in names else _in_order(names, name)
    # not by info.sha: offline, the cache finds a commit by the name that it was asked for
    paths = [Path(hub.hf_hub_download(repository, n, revision=revision)) for n in wanted]
    if len({path.parent for path in paths}) > 1:
        raise UserError(f"{repository} changed while it was downloaded; start again, or name a commit with --revision")
    return paths


def _from_cache(hub: Any, repository: str, name: str, revision: str | None) -> list[Path]:
    def cached(file: str) -> Path | None:
        found = hub.try_to_load_from_cache(repository, file, revision=revision)
        return Path(found) if isinstance(found, str) else None

    if whole := cached(name):
        return [whole]
    first = cached(f"{name}.part0")
    return list(_parts_of_one(first.parent, name)) if first else []

"""From what the user wrote to a path on this machine: a local path, or a model id of the Hugging Face hub.

The network is touched only for a reference of the form ``owner/name`` that is no local path. ``huggingface_hub`` is
imported only then, and it obeys its own environment variables: ``HF_HUB_OFFLINE``, ``HF_HOME``, ``HF_TOKEN``,
``HF_ENDPOINT``.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from pathlib import Path

from geomerge.checkpoint.folder import broken_link, check_name
from geomerge.errors import ModelError, RunError, UsageError

_LONGEST_ID = 200
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)

_WANTED = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.py", "*.spm", "*.tiktoken"]
_WANTED += ["README.md", "LICENSE*", "LICENCE*", "NOTICE*"]
# The same weights once more, in other formats or precisions.
_UNWANTED = ("original/*", "onnx/*", "openvino/*", "coreml/*", "consolidated*", "*.fp16.*", "*.int8.*", "runs/*")


@dataclass(frozen=True, slots=True)
class Located:
    """Where a model is.

    Attributes:
        path: A directory or a file of this machine.
        hub_id: ``owner/name`` when it came from the hub.
        commit: The hub's commit, which pins the files whatever `revision` the user named.
    """

    path: Path
    hub_id: str | None = None
    commit: str | None = None


def is_hub_id(ref: str) -> bool:
    """Whether a reference can be a hub id: ``owner/name``, neither part a dot, and no local path of that name."""
    return (
        len(ref) <= _LONGEST_ID
        and bool(_HUB_ID.fullmatch(ref))
        and not ref.startswith((".", "-"))
        and not Path(ref).exists()
    )


def locate(
    ref: str, revision: str | None = None, *, subfolder: str | None = None, allow_pickle: bool = False
) -> Located:
    """Find a model, downloading it only when `ref` is a hub id.

    Args:
        ref: A path (``~`` is expanded) or ``owner/name``.
        revision: A branch, tag or commit; for hub ids only.
        subfolder: A folder in the repository or directory, which alone is fetched.
        allow_pickle: Fetch ``*.bin`` files too.

    Raises:
        ModelError: There is no such path, or the hub has no such model, revision or permission, or it cannot be
            reached and the model is not in the cache.
        DamagedCheckpoint: A subfolder that leads out of the model.
        UsageError: A revision of a local path.
        RunError: The download failed half-way.
    """
    if not ref or "\0" in ref:
        raise ModelError(f"{ref!r} is not a path of a model")
    if subfolder is not None:
        check_name(subfolder, ref, what="the reference")
    # `demo/bose` beside a directory `demo` is a slip of the pen, not a request to the network.
    if is_hub_id(ref) and not (revision is None and Path(ref).parent.is_dir()):
        return _download(ref, revision, subfolder, allow_pickle=allow_pickle)
    path = Path(ref)
    if ref.startswith("~"):
        try:
            path = path.expanduser()
        except RuntimeError:
            raise ModelError("there is no such user", where=ref) from None
    try:
        exists = path.exists()
    except OSError as error:
        raise ModelError(f"cannot be opened: {error.strerror}", where=ref) from None
    if not exists:
        broken = broken_link(path)
        if broken is not None:
            raise ModelError(broken, where=ref, hint="give the model itself, or mend the link")
        raise ModelError("there is no such file or directory", where=ref, hint=_missing_hint(ref, path))
    if revision is not None:
        raise UsageError(f"a revision ({revision!r}) of a local path", where=ref, hint="revisions belong to hub ids")
    if subfolder is not None and not (path / subfolder).is_dir():
        raise ModelError(f"has no folder {subfolder!r}", where=ref)
    return Located(path if subfolder is None else path / subfolder)


def _missing_hint(ref: str, path: Path) -> str:
    if path.parent.is_dir():
        close = difflib.get_close_matches(path.name, [p.name for p in path.parent.iterdir()], n=2)
        if close:
            return "did you mean " + " or ".join(repr(str(path.parent / name)) for name in close) + "?"
    if "/" not in ref:
        return f"the current directory has no {ref!r}; ids of the hub have the form owner/name"
    owner, name, *deeper = ref.split("/")
    if deeper and is_hub_id(f"{owner}/{name}") and not Path(owner).exists():
        return f"a folder of a hub's model is written {owner}/{name}:{'/'.join(deeper)}"
    if path.parent.is_dir() and is_hub_id(ref):
        return f"{str(path.parent)!r} is a local directory; for the hub's model write {ref}@main"
    if ref.startswith((".", "/", "~")):
        return (
            f"local paths are relative to {Path.cwd()}" if not path.is_absolute() else "local paths are case-sensitive"
        )
    return "ids of the hub have the form owner/name"


def _download(hub_id: str, revision: str | None, subfolder: str | None, *, allow_pickle: bool) -> Located:
    import huggingface_hub
    from huggingface_hub import errors

    wanted = [*_WANTED, "*.bin"] if allow_pickle else _WANTED
    unwanted = list(_UNWANTED)
    where = hub_id if revision is None else f"{hub_id}@{revision}"
    if subfolder is not None:
        subfolder = subfolder.strip("/")
        # What the user asks for by name is wanted, be it `original` or `onnx`.
        wanted, unwanted = ([f"{subfolder}/{pattern}" for pattern in patterns] for patterns in (wanted, unwanted))
        where = f"{where}:{subfolder}"
    local = f"there is no local directory {hub_id!r} either"
    try:
        snapshot = Path(
            huggingface_hub.snapshot_download(
                hub_id, revision=revision, allow_patterns=wanted, ignore_patterns=unwanted
            )
        )
    except errors.HFValidationError as error:
        raise ModelError(f"is neither a local path nor a hub id: {error}", where=where) from None
    except errors.GatedRepoError:
        raise ModelError(
            "the hub asks you to accept this model's terms",
            where=where,
            hint="accept them on the model's page, then set HF_TOKEN",
        ) from None
    except errors.RevisionNotFoundError:
        raise ModelError("the hub's model has no such revision", where=where) from None
    except errors.RepositoryNotFoundError:
        raise ModelError(
            "the hub has no such model, or it is private",
            where=where,
            hint=f"{local}; for a private model set HF_TOKEN",
        ) from None
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled):
        offline = bool(huggingface_hub.constants.HF_HUB_OFFLINE)
        reason = "HF_HUB_OFFLINE is set" if offline else "the hub cannot be reached"
        raise ModelError(
            f"is not in the local cache, and {reason}",
            where=where,
            hint=f"{local}; download the model where there is a network, or give a local path",
        ) from None
    except Exception as error:  # noqa: BLE001  HTTP and disk errors, and whatever the client's own libraries let through
        raise RunError(
            f"the download failed: {error}", where=where, hint="run again: it continues where it was"
        ) from None
    commit = snapshot.name if snapshot.parent.name == "snapshots" else None
    if subfolder is not None and not (snapshot / subfolder).is_dir():
        raise ModelError(f"has no folder {subfolder!r} with weights", where=where, hint="is it spelt as on the hub?")
    return Located(snapshot if subfolder is None else snapshot / subfolder, hub_id, commit)

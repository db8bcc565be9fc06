"""Hub ids: when the hub is asked at all, what is asked for, and what an error says."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants, errors

from checkpoint_samples import floats, model, write
from geomerge.checkpoint import open_checkpoint
from geomerge.checkpoint.hub import is_hub_id, locate
from geomerge.errors import GeomergeError, ModelError, RunError


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    """A hub with one model in its cache; records what it was asked for, and raises `error` when one is set."""
    monkeypatch.chdir(tmp_path)
    snapshot = tmp_path / "cache" / "models--owner--name" / "snapshots" / ("c" * 40)
    write(snapshot / "model.safetensors", floats(a=[1.0]))
    calls: dict[str, Any] = {"asked": [], "error": None}

    def snapshot_download(repo_id: str, **options: Any) -> str:
        calls["asked"].append((repo_id, options))
        if calls["error"] is not None:
            raise calls["error"]
        return str(snapshot)

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return calls


@pytest.mark.parametrize("ref", ["owner/name", "Qwen/Qwen2.5-0.5B", "a_b/c.d"])
def test_hub_ids(ref: str) -> None:
    """The form owner/name."""
    assert is_hub_id(ref)


@pytest.mark.parametrize(
    "ref",
    ["./name", "../name", "~/name", "/name", "a/b/c", "name", "a//b", "a/" + "b" * 5000, "a/b ", "-a/b", "é/b", "a/"],
)
def test_paths_are_no_hub_ids(ref: str) -> None:
    """What looks like a path is one."""
    assert not is_hub_id(ref)


def test_hub_model_is_opened_at_its_commit(hub: dict[str, Any]) -> None:
    """The commit pins what was read; weights in other formats and code of no use are not fetched."""
    checkpoint = open_checkpoint("owner/name", "main")
    assert (checkpoint.hub_id, checkpoint.revision, list(checkpoint.tensors)) == ("owner/name", "c" * 40, ["a"])
    [(repo_id, options)] = hub["asked"]
    assert (repo_id, options["revision"]) == ("owner/name", "main")
    assert "*.safetensors" in options["allow_patterns"]
    assert "*.bin" not in options["allow_patterns"]
    open_checkpoint("owner/name", allow_pickle=True)
    assert "*.bin" in hub["asked"][1][1]["allow_patterns"]


def test_local_paths_never_ask_the_hub(hub: dict[str, Any], tmp_path: Path) -> None:
    """A local directory wins over a hub id of the same form, and a missing path is not looked for elsewhere."""
    model(tmp_path / "owner" / "name")
    assert open_checkpoint("owner/name").hub_id is None
    for missing in ("./owner/nome", "owner/name/deeper", str(tmp_path / "gone"), "gone"):
        with pytest.raises(ModelError, match="no such file") as caught:
            open_checkpoint(missing)
        assert f"{missing}@main" not in str(caught.value)  # none of them could be an id
    assert hub["asked"] == []


def test_home_directory_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`~` means what it means in a shell."""
    monkeypatch.setenv("HOME", str(tmp_path))
    model(tmp_path / "m")
    assert locate("~/m").path == tmp_path / "m"
    with pytest.raises(ModelError, match="no such user"):
        locate("~nobody-of-this-name/m")


def _http(kind: type[Exception]) -> Exception:
    error = kind.__new__(kind)
    Exception.__init__(error, "details")
    return error


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (_http(errors.RepositoryNotFoundError), ModelError, "no local directory 'owner/name' either"),
        (_http(errors.GatedRepoError), ModelError, "HF_TOKEN"),
        (_http(errors.RevisionNotFoundError), ModelError, "owner/name@v9: the hub's model has no such revision"),
        (errors.LocalEntryNotFoundError("details"), ModelError, "the hub cannot be reached"),
        (errors.HFValidationError("details"), ModelError, "neither a local path nor a hub id"),
        (OSError(28, "No space left on device"), RunError, "No space left"),
        (ValueError("anything"), RunError, "anything"),
    ],
)
def test_errors_of_the_hub(hub: dict[str, Any], error: Exception, kind: type[GeomergeError], message: str) -> None:
    """Each failure is one of ours, says which model, and what to do."""
    hub["error"] = error
    with pytest.raises(kind) as caught:
        open_checkpoint("owner/name", "v9")
    assert message in str(caught.value)
    assert "owner/name@v9" in str(caught.value)


def test_offline_is_refused_at_once(tmp_path: Path) -> None:
    """With HF_HUB_OFFLINE=1 an uncached id is one clear error, without waiting for a network."""
    code = (
        "from geomerge.checkpoint import open_checkpoint\n"
        "from geomerge.errors import ModelError\n"
        "try: open_checkpoint('owner/name')\n"
        "except ModelError as error: print(error, error.exit_code)\n"
    )
    source = Path(__file__).parents[1] / "src"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PYTHONPATH": str(source)}
    begin = time.monotonic()
    done = subprocess.run(  # noqa: PLW1510  the output is what is checked
        [sys.executable, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert "owner/name: is not in the local cache, and HF_HUB_OFFLINE is set" in done.stdout
    assert done.stdout.rstrip().endswith("3")
    assert done.stderr == ""
    assert time.monotonic() - begin < 20


class TestSubfolders:
    @pytest.fixture
    def repository(self, hub: dict[str, Any], tmp_path: Path) -> Path:
        """The cached model has a folder with weights, linked to the cache's blobs as the hub's client does."""
        snapshot = tmp_path / "cache" / "models--owner--name" / "snapshots" / ("c" * 40)
        blob = write(tmp_path / "cache" / "models--owner--name" / "blobs" / "b", floats(sub=[2.0]))
        (snapshot / "part/unet").mkdir(parents=True)
        (snapshot / "part/unet/model.safetensors").symlink_to(blob)
        return snapshot

    def test_only_the_folder_is_fetched(self, hub: dict[str, Any], repository: Path) -> None:
        """The model is the folder's; the commit pins it; what is ignored elsewhere is not when it is asked for."""
        checkpoint = open_checkpoint("owner/name", "v2", subfolder="part/unet")
        assert (checkpoint.hub_id, checkpoint.revision, list(checkpoint.tensors)) == ("owner/name", "c" * 40, ["sub"])
        [(_, options)] = hub["asked"]
        assert options["revision"] == "v2"
        assert all(pattern.startswith("part/unet/") for pattern in options["allow_patterns"])
        assert "part/unet/original/*" in options["ignore_patterns"]
        assert "original/*" not in options["ignore_patterns"]

    def test_in_a_recipe(self, hub: dict[str, Any], repository: Path) -> None:
        """`owner/name@revision:folder` is merged as any model."""
        import geomerge as gm

        recipe = "merge_method: passthrough\nmodels: [{model: 'owner/name@v2:part/unet'}]\n"
        plan = gm.plan(recipe)
        assert [node.name for node in plan.output_nodes()] == ["sub"]
        assert (plan.inputs[0].ref, plan.inputs[0].hub_id) == ("owner/name@v2:part/unet", "owner/name")

    def test_no_such_folder(self, hub: dict[str, Any], repository: Path) -> None:
        """Said with the whole reference."""
        with pytest.raises(ModelError, match=r"owner/name@v2:vae: has no folder 'vae'"):
            open_checkpoint("owner/name", "v2", subfolder="vae")

    @pytest.mark.parametrize("subfolder", ["../other", "/etc", "a/../../b"])
    def test_out_of_the_model(self, hub: dict[str, Any], subfolder: str) -> None:
        """A folder cannot lead out of it, and the hub is not asked."""
        with pytest.raises(ModelError, match="leads out"):
            open_checkpoint("owner/name", subfolder=subfolder)
        assert hub["asked"] == []

    def test_local_directories_come_first(self, hub: dict[str, Any], tmp_path: Path) -> None:
        """A directory with the id's name is meant, with its folder; a deeper path that does not exist gets a hint."""
        from geomerge.recipe.references import parse_reference
        from geomerge.recipe.values import NOWHERE

        model(tmp_path / "owner" / "name" / "unet")
        ref = parse_reference("owner/name:unet", NOWHERE)
        assert (ref.path, ref.subfolder) == ("owner/name", "unet")
        assert open_checkpoint(ref.path, subfolder=ref.subfolder).hub_id is None
        with pytest.raises(ModelError, match="has no folder 'vae'"):
            open_checkpoint("owner/name", subfolder="vae")
        with pytest.raises(ModelError, match=r"written other/name:deep/er"):
            open_checkpoint("other/name/deep/er")
        assert hub["asked"] == []

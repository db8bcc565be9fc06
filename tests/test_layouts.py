"""Models that are no transformers directories: trainers' checkpoints, diffusers' parts, single files, open_clip, timm."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import geomerge as gm
import tiny
from geomerge.checkpoint.reader import open_checkpoint
from geomerge.cli.app import main

HALVES = "merge_method: linear\nmodels:\n" + 2 * "- {{model: {}, parameters: {{weight: 0.5}}}}\n"


def random(shapes: dict[str, tuple[int, ...]], seed: int) -> tiny.Tensors:
    return tiny.random_tensors(shapes, seed)


def mean(a: dict[str, Tensor], b: dict[str, Tensor]) -> tiny.Tensors:
    return {name: ((a[name].double() + b[name].double()) / 2).to(a[name].dtype) for name in a}


class TestPickles:
    SHAPES: ClassVar[dict[str, tuple[int, ...]]] = {"model.linear.weight": (4, 3), "model.linear.bias": (4,)}

    def test_a_trainers_checkpoint(self, tmp_path: Path) -> None:
        """``state_dict`` among a trainer's other things, also within ``model``; the rest is left alone."""
        a, b = random(self.SHAPES, 1), random(self.SHAPES, 2)
        torch.save({"epoch": 3, "state_dict": a, "optimizer_states": [{"lr": 0.1}]}, tmp_path / "a.ckpt")
        torch.save({"model": {"state_dict": b, "step": 1}}, tmp_path / "b.pt")
        gm.merge(HALVES.format(tmp_path / "a.ckpt", tmp_path / "b.pt"), tmp_path / "out", allow_pickle=True)
        assert tiny.same(tiny.read(tmp_path / "out"), mean(a, b))

    def test_the_index_says_which_files_are_the_model(self, tmp_path: Path) -> None:
        """Shards of another download beside them are left alone; the directory and the index itself can be named."""
        tensors = random(self.SHAPES, 1)
        names = list(tensors)
        for i, name in enumerate(names, 1):
            torch.save({name: tensors[name]}, tmp_path / f"pytorch_model-0000{i}-of-00002.bin")
        torch.save({"x": torch.ones(1)}, tmp_path / "pytorch_model-00003-of-00007.bin")
        index = tmp_path / "pytorch_model.bin.index.json"
        map_ = {name: f"pytorch_model-0000{i}-of-00002.bin" for i, name in enumerate(names, 1)}
        index.write_text(json.dumps({"weight_map": map_}))
        for place in (tmp_path, index):
            with open_checkpoint(str(place), allow_pickle=True) as checkpoint:
                assert tiny.same(checkpoint.memory, tensors)
        index.write_text(json.dumps({"weight_map": {**map_, "lost": "pytorch_model-00001-of-00002.bin"}}))
        with pytest.raises(gm.DamagedCheckpoint, match="'lost' is in the index and in no file"):
            open_checkpoint(str(tmp_path), allow_pickle=True)
        index.write_text(json.dumps({"weight_map": {names[0]: map_[names[0]], names[1]: "pytorch_model-9.bin"}}))
        with pytest.raises(gm.DamagedCheckpoint, match=r"pytorch_model-9\.bin, which is not there"):
            open_checkpoint(str(tmp_path), allow_pickle=True)

    def test_mapped_not_read(self, tmp_path: Path) -> None:
        """The tensors of a zipped checkpoint are the file's pages, not copies in memory."""
        torch.save({"a": torch.ones(1000)}, tmp_path / "m.pt")
        with open_checkpoint(str(tmp_path / "m.pt"), allow_pickle=True) as checkpoint:
            address = checkpoint.memory["a"].data_ptr()
            maps = [line.split(maxsplit=5) for line in Path("/proc/self/maps").read_text().splitlines()]
            spans = [m[0].split("-") for m in maps if m[-1] == str(tmp_path / "m.pt")]
            assert any(int(low, 16) <= address < int(high, 16) for low, high in spans)

    @pytest.mark.parametrize("protocol", [2, 4])
    @pytest.mark.parametrize("zipped", [True, False])
    def test_a_bomb_is_refused_unrun(
        self, protocol: int, zipped: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """A call hidden beside good tensors: exit code 3, and the call was not made."""

        class Bomb:
            def __reduce__(self) -> tuple[Any, ...]:
                return Path.touch, (tmp_path / "hacked",)

        content = {"state_dict": {"a": torch.ones(2)}, "hyper_parameters": Bomb()}
        torch.save(content, tmp_path / "m.ckpt", _use_new_zipfile_serialization=zipped, pickle_protocol=protocol)
        if protocol == 4:
            (tmp_path / "m.ckpt").write_bytes(pickle.dumps(content["hyper_parameters"]))
        assert main(["inspect", str(tmp_path / "m.ckpt"), "--allow-pickle"]) == 3
        assert "weights only" in capsys.readouterr().err
        assert not (tmp_path / "hacked").exists()

    def test_a_truncated_checkpoint(self, tmp_path: Path) -> None:
        """Damage, not a traceback."""
        torch.save({"a": torch.ones(1000)}, tmp_path / "m.pt")
        whole = (tmp_path / "m.pt").read_bytes()
        for size in (10, len(whole) // 2, len(whole) - 5):
            (tmp_path / "m.pt").write_bytes(whole[:size])
            with pytest.raises(gm.DamagedCheckpoint):
                open_checkpoint(str(tmp_path / "m.pt"), allow_pickle=True)


class TestDiffusers:
    CONFIG: ClassVar[dict[str, Any]] = {
        "_class_name": "UNet2DConditionModel",
        "_diffusers_version": "0.30.0",
        "sample_size": 8,
    }
    SHAPES: ClassVar[dict[str, tuple[int, ...]]] = {
        "conv_in.weight": (4, 4, 3, 3),
        "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.weight": (4, 4),
        "mid_block.resnets.0.conv1.weight": (4, 4, 3, 3),
        "up_blocks.0.resnets.0.conv1.weight": (4, 4, 3, 3),
        "conv_out.bias": (4,),
    }

    def pipeline(self, folder: Path, seed: int) -> tiny.Tensors:
        (folder / "unet").mkdir(parents=True)
        (folder / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
        (folder / "unet/config.json").write_text(json.dumps(self.CONFIG))
        tensors = random(self.SHAPES, seed)
        save_file(tensors, folder / "unet/diffusion_pytorch_model.safetensors")
        return tensors

    def test_a_part_of_a_pipeline(self, tmp_path: Path) -> None:
        """It is merged like a model, and written with the names that diffusers looks for; its config has no dtype."""
        a, b = self.pipeline(tmp_path / "a", 1), self.pipeline(tmp_path / "b", 2)
        gm.merge(HALVES.format(tmp_path / "a/unet", tmp_path / "b/unet"), tmp_path / "out")
        found = load_file(tmp_path / "out/diffusion_pytorch_model.safetensors")
        assert tiny.same(found, mean(a, b))
        assert tiny.config(tmp_path / "out") == self.CONFIG
        assert "library_name: diffusers" in (tmp_path / "out/README.md").read_text()
        with open_checkpoint(str(tmp_path / "out")) as checkpoint:
            assert checkpoint.shapes == self.SHAPES

    def test_shards(self, tmp_path: Path) -> None:
        """Their names and the index's are diffusers', too."""
        a = self.pipeline(tmp_path / "a", 1)
        recipe = f"merge_method: passthrough\nmodels: [{{model: {tmp_path}/a/unet}}]\n"
        gm.merge(recipe, tmp_path / "out", shard_size=800)
        index = json.loads((tmp_path / "out/diffusion_pytorch_model.safetensors.index.json").read_text())
        assert index["weight_map"]["conv_in.weight"] == "diffusion_pytorch_model-00001-of-00003.safetensors"
        assert tiny.same(tiny.read(tmp_path / "out"), a)

    def test_a_whole_pipeline_is_told_what_to_do(self, tmp_path: Path) -> None:
        """One component at a time."""
        self.pipeline(tmp_path / "a", 1)
        with pytest.raises(gm.ModelError, match="one of its components"):
            open_checkpoint(str(tmp_path / "a"))


class TestBareTensors:
    STABLE: ClassVar[dict[str, tuple[int, ...]]] = {
        "model.diffusion_model.input_blocks.0.0.weight": (4, 4, 3, 3),
        "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight": (4, 4),
        "model.diffusion_model.middle_block.0.in_layers.2.weight": (4, 4, 3, 3),
        "first_stage_model.encoder.conv_in.weight": (4, 3, 3, 3),
        "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight": (6, 4),
        "conditioner.embedders.1.model.transformer.resblocks.0.attn.in_proj_weight": (12, 4),
        "alphas_cumprod": (10,),
    }
    SDXL: ClassVar[dict[str, tuple[int, ...]]] = {
        "model.diffusion_model.time_embed.0.weight": (8, 4),
        "model.diffusion_model.label_emb.0.0.weight": (8, 6),
        "model.diffusion_model.input_blocks.4.1.transformer_blocks.1.attn2.to_k.weight": (4, 8),
        "model.diffusion_model.input_blocks.4.1.proj_in.weight": (4, 4),
        "model.diffusion_model.output_blocks.2.2.conv.weight": (4, 4, 3, 3),
        "model.diffusion_model.out.2.bias": (4,),
        "conditioner.embedders.0.transformer.text_model.encoder.layers.0.self_attn.q_proj.weight": (4, 4),
        "conditioner.embedders.0.transformer.text_model.embeddings.position_embedding.weight": (7, 4),
        "conditioner.embedders.1.model.token_embedding.weight": (9, 6),
        "conditioner.embedders.1.model.text_projection": (6, 6),
        "conditioner.embedders.1.model.logit_scale": (),
        "first_stage_model.decoder.up.3.block.0.conv1.weight": (4, 4, 3, 3),
        "first_stage_model.quant_conv.weight": (8, 8, 1, 1),
    }
    FLUX: ClassVar[dict[str, tuple[int, ...]]] = {
        "double_blocks.0.img_attn.qkv.weight": (12, 4),
        "double_blocks.0.img_mod.lin.bias": (8,),
        "double_blocks.0.txt_attn.norm.query_norm.scale": (4,),
        "double_blocks.0.txt_mlp.2.weight": (4, 16),
        "single_blocks.0.modulation.lin.weight": (12, 4),
        "guidance_in.in_layer.weight": (4, 4),
        "img_in.weight": (4, 8),
        "vector_in.out_layer.bias": (4,),
        "single_blocks.0.linear1.weight": (28, 4),
        "final_layer.linear.weight": (4, 4),
    }
    OPEN_CLIP: ClassVar[dict[str, tuple[int, ...]]] = {
        "positional_embedding": (7, 4),
        "text_projection": (4, 4),
        "logit_scale": (),
        "visual.class_embedding": (4,),
        "visual.conv1.weight": (4, 3, 2, 2),
        "visual.transformer.resblocks.0.attn.in_proj_weight": (12, 4),
        "transformer.resblocks.0.mlp.c_fc.weight": (8, 4),
        "token_embedding.weight": (9, 4),
    }
    TIMM: ClassVar[dict[str, tuple[int, ...]]] = {
        "cls_token": (1, 1, 4),
        "patch_embed.proj.weight": (4, 3, 2, 2),
        "blocks.0.attn.qkv.weight": (12, 4),
        "blocks.0.mlp.fc1.bias": (8,),
        "norm.weight": (4,),
        "head.weight": (10, 4),
    }

    @pytest.mark.parametrize(
        "shapes", [STABLE, SDXL, FLUX, OPEN_CLIP, TIMM], ids=["sd", "sdxl", "flux", "open_clip", "timm"]
    )
    def test_every_tensor_is_merged_under_its_name(self, shapes: dict[str, tuple[int, ...]], tmp_path: Path) -> None:
        """Single files are tensors by name; integers are copied."""
        a, b = random(shapes, 1), random(shapes, 2)
        ids = {"position_ids": torch.arange(5)}
        save_file(a | ids, tmp_path / "a.safetensors")
        save_file(b | ids, tmp_path / "b.safetensors")
        gm.merge(HALVES.format(tmp_path / "a.safetensors", tmp_path / "b.safetensors"), tmp_path / "out")
        assert tiny.same(load_file(tmp_path / "out/model.safetensors"), mean(a, b) | ids)
        assert not (tmp_path / "out/config.json").exists()

    def test_the_usual_size_does_not_cut_a_single_file(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        """Nobody would read several files without an index's reader; a size that is asked for is kept to."""
        monkeypatch.setattr("geomerge.engine.run.DEFAULT_SHARD_SIZE", 300)
        save_file(random(self.STABLE, 1), tmp_path / "a.safetensors")
        recipe = f"merge_method: passthrough\nmodels: [{{model: {tmp_path}/a.safetensors}}]\n"
        gm.merge(recipe, tmp_path / "whole", shard_size=300)
        assert [p.name for p in (tmp_path / "whole").glob("*.safetensors")] == ["model.safetensors"]
        gm.merge(recipe, tmp_path / "cut", shard_size=301)
        assert len(list((tmp_path / "cut").glob("*.safetensors"))) > 1

    def test_timm_and_open_clip_directories(self, tmp_path: Path) -> None:
        """Their configs are carried over as they are."""
        timm = {"architecture": "vit_tiny", "num_classes": 10, "pretrained_cfg": {"input_size": [3, 8, 8]}}
        tiny.save(tmp_path / "timm", random(self.TIMM, 1), timm)
        gm.merge(f"merge_method: passthrough\nmodels: [{{model: {tmp_path}/timm}}]\ndtype: float16\n", tmp_path / "t")
        assert tiny.config(tmp_path / "t") == timm
        assert "library_name: timm" in (tmp_path / "t/README.md").read_text()
        (tmp_path / "clip").mkdir()
        save_file(random(self.OPEN_CLIP, 1), tmp_path / "clip/open_clip_model.safetensors")
        (tmp_path / "clip/open_clip_config.json").write_text('{"model_cfg": {}}')
        gm.merge(f"merge_method: passthrough\nmodels: [{{model: {tmp_path}/clip}}]\n", tmp_path / "c")
        assert (tmp_path / "c/open_clip_config.json").read_text() == '{"model_cfg": {}}'


def test_saved_plans_open_every_format_again(tmp_path: Path) -> None:
    """A pickle, a GPTQ model: a plan that was saved makes the same bytes."""
    import coded_samples
    import test_coded_packed as packed

    coded_samples.write(tmp_path / "a", packed.gptq(4, 32), {"quant_method": "gptq", "group_size": 32}, **packed.SIZES)
    tiny.llama(tmp_path / "b", 2, num_hidden_layers=1, dtype=torch.bfloat16, **packed.SIZES)
    torch.save(tiny.read(tmp_path / "b"), tmp_path / "b/pytorch_model.bin")
    (tmp_path / "b/model.safetensors").unlink()
    (tmp_path / "r.yml").write_text(HALVES.format(tmp_path / "a", tmp_path / "b"))
    saved = str(tmp_path / "plan.json")
    assert main(["plan", str(tmp_path / "r.yml"), "--save", saved, "--allow-pickle"]) == 0
    assert main(["merge", str(tmp_path / "r.yml"), str(tmp_path / "one"), "--allow-pickle"]) == 0
    assert main(["merge", saved, str(tmp_path / "two"), "--allow-pickle"]) == 0
    assert tiny.same(tiny.read(tmp_path / "one"), tiny.read(tmp_path / "two"))
    assert main(["merge", saved, str(tmp_path / "three")]) == 3

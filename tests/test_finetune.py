"""Full-rank fine-tuning, the way up in size, and the recipes for the published models."""

import importlib
from pathlib import Path

import pytest
import torch
from diffusers import SanaPipeline, SanaSprintPipeline
from layouts import build_base_folder, build_small_folder, tiny_transformer

from sana_app.model.controlnet import SanaSprintControlNetModel
from sana_app.model.network import predict_flow
from training.__main__ import STAGES
from training.base import load_transformer, save_folder, set_latent_size, with_base
from training.batches import Corpus
from training.config import RECIPES, Config, load_config
from training.controlnet import build_pair
from training.finetune import train_finetune
from training.flow import flow_loss, flow_path
from training.teacher import build_teacher

SAMPLE = str(Path(__file__).parent.parent / "assets" / "sample")
SMALL = dict(data=SAMPLE, size_px=32, precision="fp32", preview_steps=0, finetune_batch=16, lr_warmup_steps=2, ema=0.9)
PUBLISHED = [name for name in RECIPES if name.startswith("sana-") and any(name.endswith(end) for end in
             ("-teacher", "-controlnet", "-student", "-512", "-1024", "-2048"))]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return build_base_folder(tmp_path_factory.mktemp("base") / "model", gemma=False)


@pytest.fixture(scope="module")
def cache(base, tmp_path_factory) -> Path:
    """The sample data at 32 px, cached once for all runs."""
    out = tmp_path_factory.mktemp("cache")
    for split in ("train", "val"):
        Corpus(with_base(Config(base=str(base), **SMALL), out), out, split)
    return out / "cache"


def finetuned(out: Path, cache: Path, **settings) -> torch.nn.Module:
    out.mkdir(exist_ok=True)
    (out / "cache").symlink_to(cache)
    train_finetune(Config(**SMALL | settings), out)
    return load_transformer(out / "finetune")


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in model.named_parameters()}


def test_fine_tuning_lowers_the_loss_and_leaves_the_model_what_it_is(base, cache, tmp_path):
    tuned, original = finetuned(tmp_path, cache, base=str(base), finetune_steps=60, finetune_lr=3e-3), load_transformer(base)
    assert tuned.config.timestep_scale == 1.0 and tuned.config.qk_norm is None
    assert weights(tuned).keys() == weights(original).keys()
    batch = Corpus(with_base(Config(base=str(base), **SMALL), tmp_path), tmp_path, "train").fixed(64)
    z, s = torch.randn(batch.x0.shape, generator=torch.Generator().manual_seed(5)), torch.linspace(0.05, 1, len(batch.x0))
    with torch.no_grad():
        before, after = (flow_loss(predict_flow(m, flow_path(batch.x0, z, s), s, batch.text, batch.mask), batch.x0, z).mean() for m in (original, tuned))
    assert after < 0.9 * before
    pipe, stock = SanaPipeline.from_pretrained(tmp_path / "finetune"), SanaPipeline.from_pretrained(base)
    for part in ("vae", "text_encoder"):
        assert all(torch.equal(a, b) for a, b in zip(getattr(pipe, part).parameters(), getattr(stock, part).parameters(), strict=True))
    assert pipe.scheduler.config.flow_shift == stock.scheduler.config.flow_shift


def test_a_multiplier_of_zero_leaves_those_layers_alone(base, cache, tmp_path):
    tuned = weights(finetuned(tmp_path, cache, base=str(base), finetune_steps=2, lr_rest=0.0, lr_norms=0.0, ema=0.0))
    original = weights(load_transformer(base))
    moved = {name for name in tuned if not torch.equal(tuned[name], original[name])}
    assert moved and all(".attn2." in name for name in moved)


def test_accumulated_and_checkpointed_steps_are_the_plain_ones(base, cache, tmp_path):
    common = dict(base=str(base), finetune_steps=2, ema=0.0)
    plain = weights(finetuned(tmp_path / "plain", cache, **common))
    saving = weights(finetuned(tmp_path / "saving", cache, micro_batches=4, checkpointing=True, **common))
    for name in plain:
        torch.testing.assert_close(plain[name], saving[name], atol=2e-6, rtol=1e-4)


def test_the_way_up_in_size_is_a_chain_of_folders(base, cache, tmp_path):
    finetuned(tmp_path / "32", cache, base=str(base), finetune_steps=1)
    train_finetune(Config(**SMALL | dict(base=str(tmp_path / "32" / "finetune"), size_px=64, finetune_steps=1, finetune_batch=4, interpolation_scale=1.0,
                                         vae_tiling=32)), tmp_path / "64")
    pipe = SanaPipeline.from_pretrained(tmp_path / "64" / "finetune")
    assert (pipe.transformer.config.sample_size, pipe.transformer.config.interpolation_scale) == (8, 1.0)
    picture = pipe(prompt="a red apple", height=64, width=64, num_inference_steps=2, output_type="pt", complex_human_instruction=None,
                   use_resolution_binning=False, generator=torch.Generator().manual_seed(0)).images
    assert picture.shape == (1, 3, 64, 64) and torch.isfinite(picture).all()


def test_what_is_not_a_base_is_refused(tmp_path):
    with pytest.raises(ValueError, match="needs base"):
        train_finetune(Config(**SMALL), tmp_path)
    sprint = build_small_folder(tmp_path / "sprint", controlnet=False)
    with pytest.raises(ValueError, match="finished Sprint model"):
        train_finetune(Config(base=str(sprint), **SMALL), tmp_path)


# ---- recipes of the published sizes ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_recipe_builds_the_published_shape(name):
    config = load_config(name)
    with torch.device("meta"):
        model = build_teacher(config, config.ae_latent_channels, config.size_px // 32, 2304)
        set_latent_size(model, config.size_px // 32, config.interpolation_scale)
        controlnet = SanaSprintControlNetModel.from_transformer(model, config.controlnet_layers, load_weights_from_transformer=False)
    numbers = sum(p.numel() for p in model.parameters())
    width, layers, wanted = {"sana-0.6b": (1152, 28, 0.59e9), "sana-1.6b": (2240, 20, 1.6e9), "sana-4.8b": (2240, 60, 4.72e9)}[name[:9]]
    assert abs(numbers / wanted - 1) < 0.01
    assert model.patch_embed.proj.out_channels == width and len(model.transformer_blocks) == layers
    assert model.config.cross_attention_head_dim == (72 if width == 1152 else 112)
    assert len(controlnet.transformer_blocks) == (7 if "controlnet" in name else config.controlnet_layers)
    assert max(config.disc_blocks) < layers and config.max_tokens == 300 and config.teacher_clip == 0.1
    assert config.size_px == (int(name.split("-")[-1]) if name[-1].isdigit() else 1024)
    assert all(getattr(config, key) % config.micro_batches == 0 for key in
               ("teacher_batch" if "teacher" in name else "student_batch" if "student" in name else "controlnet_batch" if "controlnet" in name else "finetune_batch",))


@pytest.fixture(scope="module")
def folders(base, tmp_path_factory) -> dict[str, Path]:
    """A base, a teacher's folder with a ControlNet, and a Sprint folder: what the published recipes start from."""
    out = tmp_path_factory.mktemp("folders")
    teacher = tiny_transformer(guidance_embeds=False)
    save_folder(out / "teacher", {"transformer": teacher}, base)
    save_folder(out / "controlnet", {"controlnet": build_pair(Config(controlnet_layers=2), out / "teacher").controlnet}, out / "teacher")
    save_folder(out / "sprint", {"transformer": tiny_transformer()}, base)
    return {"base": base, "teacher": out / "teacher", "controlnet": out / "controlnet", "sprint": out / "sprint"}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_recipe_runs_two_steps_at_the_smallest_size(name, folders, cache, tmp_path):
    (tmp_path / "cache").symlink_to(cache)
    stage = name.split("-")[-1] if not name[-1].isdigit() else "finetune"
    start = {"teacher": dict(base="base"), "controlnet": dict(base="teacher"), "student": dict(base="teacher"), "finetune": dict(base="base")}[stage]
    if name.endswith("controlnet-student"):
        start = dict(base="sprint", flow_teacher="controlnet")
    small = [f"{key}={folders[folder]}" for key, folder in start.items()] + [f"data={SAMPLE}", "size_px=32", "max_tokens=32", "micro_batches=1", "vae_tiling=0"]
    small += [f"{stage}_batch=4", f"{stage}_steps=2", "disc_blocks=0,2", "controlnet_layers=2", "precision=fp32", "preview_steps=0"]
    module, function = STAGES[stage]
    getattr(importlib.import_module(module), function)(load_config(name, small), tmp_path)
    if stage != "student":
        assert SanaPipeline.from_pretrained(tmp_path / stage) is not None
    elif name.endswith("controlnet-student"):
        assert SanaSprintControlNetModel.from_pretrained(tmp_path / stage / "controlnet").config.guidance_embeds
    else:
        assert SanaSprintPipeline.from_pretrained(tmp_path / stage) is not None

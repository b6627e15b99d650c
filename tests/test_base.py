"""Starting from a published checkpoint: the teacher made of base SANA, the ControlNet on it, and its one-step student."""

import json
import os
from pathlib import Path

import pytest
import torch
from diffusers import SanaPipeline, SanaSprintPipeline
from layouts import build_base_folder, tiny_transformer

from sana_app.model import trigflow
from sana_app.model.controlnet import SanaSprintControlNetModel
from sana_app.model.convert import sprint_from_teacher
from sana_app.model.network import TrigFlowTeacher, predict_flow
from sana_app.model.pipeline import SanaSprintControlNetPipeline
from sana_app.model.scheduler import TrigFlowScheduler
from training import base as base_module
from training.base import components, link_or_copy, load_transformer, save_folder, set_latent_size, teacher_from_base, tile, with_base
from training.batches import Corpus
from training.config import Config
from training.controlnet import build_pair, train_controlnet
from training.flow import flow_loss, flow_path, resolution_shift
from training.pair import find_folders, start_pair
from training.student import train_student
from training.teacher import train_teacher

SAMPLE = str(Path(__file__).parent.parent / "assets" / "sample")
# 32 px pictures, 4x4 latents: everything real, everything small
SMALL = dict(data=SAMPLE, size_px=32, precision="fp32", preview_steps=0, teacher_batch=16, controlnet_batch=16, lr_warmup_steps=2, ema=0.9)


def state(model) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in model.state_dict().items()}


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def text(batch: int = 2):
    g = torch.Generator().manual_seed(3)
    return torch.randn(batch, 5, 24, generator=g), torch.ones(batch, 5)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return build_base_folder(tmp_path_factory.mktemp("base") / "model", gemma=False)


@pytest.fixture(scope="module")
def teacher(base, tmp_path_factory) -> Path:
    """A teacher trained for a moment from the base folder: the run folder."""
    out = tmp_path_factory.mktemp("teacher")
    train_teacher(Config(base=str(base), teacher_steps=50, teacher_lr=4e-3, **SMALL), out)
    return out


# ---- base -> teacher -------------------------------------------------------------------------------------------------


def test_a_base_becomes_a_teacher_with_norms_at_one_and_all_its_weights(base):
    original = load_transformer(base)
    before = state(original)
    teacher, report = teacher_from_base(original)
    after = teacher.state_dict()
    assert set(report["added"]) == set(after) - set(before)
    assert len(report["added"]) == 4 * 2 * 2 and all((after[k] == 1).all() for k in report["added"])
    assert all(torch.equal(after[k], v) for k, v in before.items())
    assert report["config"] == {"qk_norm": [None, "rms_norm_across_heads"], "timestep_scale": [1.0, 0.001]}
    assert {k.split(".")[-2] for k in report["other_inputs"]} == {"linear_1", "linear_2"}
    assert all(p.requires_grad and not p.is_meta for p in teacher.parameters())


def test_a_teacher_becomes_a_teacher_unchanged():
    original = tiny_transformer(guidance_embeds=False)
    before = state(original)
    teacher, report = teacher_from_base(original)
    assert same(before, teacher.state_dict()) and report == {"added": [], "config": {}, "other_inputs": []}


def test_the_time_embedding_of_a_teacher_sees_zero_to_one(base):
    seen = {}
    x, s = torch.randn(2, 8, 4, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([0.25, 1.0])
    for name, model in (("base", load_transformer(base)), ("teacher", teacher_from_base(load_transformer(base))[0])):
        model.time_embed.emb.time_proj.register_forward_hook(lambda m, args, out, name=name: seen.update({name: args[0]}))
        predict_flow(model, x, s, *text())
    torch.testing.assert_close(seen["teacher"], s)
    torch.testing.assert_close(seen["base"], 1000 * s)


def test_what_cannot_become_a_teacher_is_refused(base, tmp_path):
    with pytest.raises(ValueError, match="finished Sprint model"):
        teacher_from_base(tiny_transformer())
    with pytest.raises(ValueError, match="transformer/ in it"):
        with_base(Config(base=str(tmp_path)), tmp_path)
    with pytest.raises(ValueError, match="set vae"):
        (tmp_path / "a.pth").write_bytes(b"")
        with_base(Config(base=str(tmp_path / "a.pth")), tmp_path)


def test_a_folder_with_a_missing_weight_is_refused_by_its_name(base, tmp_path):
    from safetensors.torch import load_file, save_file
    link_or_copy(base, tmp_path / "model")
    file = tmp_path / "model" / "transformer" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    del weights["transformer_blocks.1.attn1.to_q.weight"]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="transformer_blocks.1.attn1.to_q.weight is missing"):
        load_transformer(tmp_path / "model")


def test_a_teacher_learns_from_a_base_and_names_what_it_added(teacher, base):
    report = json.loads((teacher / "teacher" / "base.json").read_text())
    assert report["base"] == str(base) and len(report["added"]) == 16
    config = Config(base=str(teacher / "teacher"), **SMALL)
    trained, start = load_transformer(teacher / "teacher"), teacher_from_base(load_transformer(base))[0]
    batch = Corpus(with_base(config, teacher), teacher, "train").fixed(64)
    g = torch.Generator().manual_seed(5)
    z, s = torch.randn(batch.x0.shape, generator=g), torch.linspace(0.05, 1, len(batch.x0))
    with torch.no_grad():
        losses = [flow_loss(predict_flow(m, flow_path(batch.x0, z, s), s, batch.text, batch.mask), batch.x0, z).mean() for m in (start, trained)]
    assert losses[1] < 0.9 * losses[0]


def test_the_teacher_folder_loads_in_stock_diffusers(teacher):
    pipe = SanaPipeline.from_pretrained(teacher / "teacher")
    assert pipe.transformer.config.timestep_scale == 0.001 and pipe.transformer.config.qk_norm == "rms_norm_across_heads"
    assert {"vae", "text_encoder", "tokenizer", "scheduler", "transformer"} <= set(components(teacher / "teacher"))
    picture = pipe(prompt="a red apple", height=32, width=32, num_inference_steps=2, output_type="pt", complex_human_instruction=None,
                   use_resolution_binning=False, generator=torch.Generator().manual_seed(0)).images
    assert picture.shape == (1, 3, 32, 32) and torch.isfinite(picture).all()


def test_trigflow_of_a_trained_teacher_ends_where_its_flow_ends(teacher):
    """The conversion is training-free: TrigFlowScheduler on the wrapped teacher, Euler in s on the plain one, many steps each."""
    model = load_transformer(teacher / "teacher").double()
    noise = torch.randn(2, 8, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    embeds, mask = text()
    ends = {}
    for steps in (25, 100):
        scheduler = TrigFlowScheduler()
        scheduler.set_timesteps(steps)
        wrapped, x = TrigFlowTeacher(model), noise * trigflow.SIGMA_DATA
        v = noise.clone()
        with torch.no_grad():
            for t in scheduler.timesteps[:-1]:
                F = wrapped(x / trigflow.SIGMA_DATA, t.double().expand(2), embeds.double(), mask)
                x = scheduler.step(trigflow.SIGMA_DATA * F, t, x, return_dict=False)[0]
            grid = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
            for s, u in zip(grid[:-1], grid[1:]):
                v = v + (u - s) * predict_flow(model, v, s.expand(2), embeds.double(), mask)
        ends[steps] = ((x / trigflow.SIGMA_DATA - v).abs().mean() / v.abs().mean()).item()
    assert ends[100] < 0.03 and ends[100] < 0.4 * ends[25]  # both are first order: four times the steps, a quarter of the distance


def test_a_base_can_be_an_nvlabs_pth(base, tmp_path):
    from training.convert.pth import to_pth
    wide = tiny_transformer(guidance_embeds=False, qk_norm=None, timestep_scale=1.0, num_layers=1, num_attention_heads=36, attention_head_dim=32,
                            num_cross_attention_heads=16, cross_attention_head_dim=72, cross_attention_dim=1152)  # the 0.6B's width
    wide.save_pretrained(tmp_path / "transformer")
    to_pth(tmp_path / "transformer", tmp_path / "base.pth")
    assert same(state(load_transformer(tmp_path / "base.pth")), wide.state_dict())
    config = with_base(Config(base=str(tmp_path / "base.pth"), vae=str(base / "vae"), text_encoder=str(base)), tmp_path)
    assert config.base.endswith(".pth")


# ---- sizes -----------------------------------------------------------------------------------------------------------


def test_without_positions_the_latent_size_changes_no_number(base):
    model = load_transformer(base)
    x = torch.randn(1, 8, 8, 8, generator=torch.Generator().manual_seed(0))
    before = predict_flow(model, x, torch.tensor([0.5]), *text(1))
    assert set_latent_size(model, 8) == {"sample_size": [4, 8]}
    assert torch.equal(predict_flow(model, x, torch.tensor([0.5]), *text(1)), before)


def test_positions_are_stretched_to_a_larger_size_as_the_stock_model_stretches_them(tmp_path):
    model = tiny_transformer(guidance_embeds=False, interpolation_scale=1.0)
    x = torch.randn(1, 8, 8, 8, generator=torch.Generator().manual_seed(0))
    before = predict_flow(model, x, torch.tensor([0.5]), *text(1))
    assert set_latent_size(model, 8) == {"sample_size": [4, 8], "interpolation_scale": [1.0, 2.0]}
    assert torch.equal(predict_flow(model, x, torch.tensor([0.5]), *text(1)), before)
    model.save_pretrained(tmp_path / "transformer")
    torch.testing.assert_close(predict_flow(load_transformer(tmp_path), x, torch.tensor([0.5]), *text(1)), before, atol=1e-5, rtol=1e-5)


def test_positions_can_be_turned_on(base):
    model = load_transformer(base)
    assert set_latent_size(model, 4, 1.0) == {"interpolation_scale": [None, 1.0]}
    assert model.patch_embed.pos_embed is not None


def test_the_shift_follows_the_published_sizes():
    assert [resolution_shift(px) for px in (128, 256, 512, 1024, 2048, 4096)] == [1, 1, 3, 3, 3, 6]


def test_tiles_give_nearly_the_whole_picture_and_odd_tiles_are_refused(base):
    from diffusers import AutoencoderDC
    vae = AutoencoderDC.from_pretrained(base / "vae")
    latent = torch.randn(1, 8, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole = vae.decode(latent).sample
        tile(vae, 64)
        tiles = vae.decode(latent).sample
        assert vae.encode(whole).latent.shape == latent.shape
    assert whole.shape == tiles.shape and not torch.equal(whole, tiles)
    assert (whole - tiles).abs().mean() < 0.3 * whole.std()
    with pytest.raises(ValueError, match="multiple of 8 px"):
        tile(vae, 60)
    with pytest.raises(ValueError, match="at least 16"):
        tile(vae, 8)


# ---- folders ---------------------------------------------------------------------------------------------------------


def test_linked_weights_stay_when_the_copy_is_saved_over(tmp_path, monkeypatch):
    monkeypatch.setattr(base_module, "SMALL_FILE_BYTES", 1)
    source = tiny_transformer(0, guidance_embeds=False)
    source.save_pretrained(tmp_path / "a" / "transformer")
    link_or_copy(tmp_path / "a", tmp_path / "b")
    name = Path("transformer") / "diffusion_pytorch_model.safetensors"
    assert os.path.samefile(tmp_path / "a" / name, tmp_path / "b" / name)
    tiny_transformer(1, guidance_embeds=False, timestep_scale=1.0).save_pretrained(tmp_path / "b" / "transformer")
    kept = load_transformer(tmp_path / "a")
    assert same(state(kept), source.state_dict()) and kept.config.timestep_scale == 0.001


def test_an_interrupted_save_leaves_no_whole_looking_folder(base, tmp_path, monkeypatch):
    def full(*args):
        raise OSError("no space left on device")
    monkeypatch.setattr(base_module, "link_or_copy", full)
    with pytest.raises(OSError):
        save_folder(tmp_path / "stage", {"transformer": load_transformer(base)}, base)
    assert not (tmp_path / "stage" / "model_index.json").exists() and not (tmp_path / "stage" / "transformer").exists()


# ---- ControlNet ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def controlled(teacher, tmp_path_factory) -> Path:
    """A ControlNet trained on the frozen teacher: the run folder."""
    out = tmp_path_factory.mktemp("controlnet")
    (out / "cache").symlink_to(teacher / "cache")  # the same autoencoder and texts
    train_controlnet(Config(base=str(teacher / "teacher"), condition="canny", controlnet_layers=3, controlnet_steps=200, controlnet_lr=1e-2, **SMALL), out)
    return out


@pytest.mark.parametrize("qk_norm", [None, "rms_norm_across_heads"])
def test_at_step_zero_a_controlnet_changes_nothing(qk_norm, tmp_path):
    tiny_transformer(guidance_embeds=False, qk_norm=qk_norm, timestep_scale=1.0 if qk_norm is None else 0.001).save_pretrained(tmp_path / "transformer")
    pair = build_pair(Config(controlnet_layers=2, controlnet_base_lr=0.0), tmp_path)
    g = torch.Generator().manual_seed(0)
    x, cond, s = torch.randn(2, 8, 4, 4, generator=g), torch.randn(2, 8, 4, 4, generator=g), torch.tensor([0.2, 0.9])
    plain = predict_flow(pair.transformer, x, s, *text())
    assert torch.equal(predict_flow(pair.transformer, x, s, *text(), None, pair.controlnet, cond), plain)
    assert not any(p.requires_grad for p in pair.transformer.parameters()) and all(p.requires_grad for p in pair.controlnet.parameters())


def test_a_frozen_base_keeps_every_bit_and_goes_into_the_folder(controlled, teacher):
    assert same(state(load_transformer(controlled / "controlnet")), load_transformer(teacher / "teacher").state_dict())
    assert json.loads((controlled / "controlnet" / "controlnet" / "condition.json").read_text()) == {"condition": "canny"}
    checkpoint = torch.load(next((controlled / "controlnet" / "checkpoints").glob("*.pt")), weights_only=True)
    assert "pair" not in checkpoint["parts"]  # no copy of the frozen transformer
    assert not any(k.startswith(("transformer.", "module.transformer.")) for part in ("controlnet", "ema") for k in checkpoint["parts"][part])


def test_a_trained_controlnet_follows_its_condition(controlled):
    """The right edges help, those of another picture do not."""
    config = with_base(Config(base=str(controlled / "controlnet"), condition="canny", **SMALL), controlled)
    batch = Corpus(config, controlled, "train").fixed(64)
    transformer = load_transformer(controlled / "controlnet")
    controlnet = SanaSprintControlNetModel.from_pretrained(controlled / "controlnet" / "controlnet")
    z, s = torch.randn(batch.x0.shape, generator=torch.Generator().manual_seed(5)), torch.full((len(batch.x0),), 0.8)

    def loss(cond) -> float:
        with torch.no_grad():
            v = predict_flow(transformer, flow_path(batch.x0, z, s), s, batch.text, batch.mask, None, controlnet if cond is not None else None, cond)
        return float(flow_loss(v, batch.x0, z).mean())
    right, wrong, none = loss(batch.cond), loss(batch.cond.roll(1, 0)), loss(None)
    assert right < 0.98 * wrong and right < 0.98 * none


def test_a_sprint_model_is_no_base_for_the_flow_loss(tmp_path):
    tiny_transformer().save_pretrained(tmp_path / "transformer")
    with pytest.raises(ValueError, match="distil with the student stage"):
        build_pair(Config(), tmp_path)


# ---- one step --------------------------------------------------------------------------------------------------------

STUDENT = SMALL | dict(student_batch=4, student_steps=4, disc_blocks=(0, 2), scm_warmup=1)


@pytest.fixture(scope="module")
def sprint(base, teacher, tmp_path_factory) -> Path:
    """A Sprint folder distilled for a moment from the teacher, text to image."""
    out = tmp_path_factory.mktemp("sprint")
    (out / "cache").symlink_to(teacher / "cache")
    train_student(Config(base=str(teacher / "teacher"), student_controlnet=False, **STUDENT), out)
    return out / "student"


def test_sprint_itself_is_distilled_from_a_teacher_folder(sprint):
    pipe = SanaSprintPipeline.from_pretrained(sprint)
    assert type(pipe.scheduler).__name__ == "SCMScheduler" and pipe.transformer.config.guidance_embeds
    assert not (sprint / "controlnet").exists()
    picture = pipe(prompt="a red apple", height=32, width=32, num_inference_steps=1, intermediate_timesteps=None, output_type="pt",
                   complex_human_instruction=None, use_resolution_binning=False, generator=torch.Generator().manual_seed(0)).images
    assert picture.shape == (1, 3, 32, 32) and torch.isfinite(picture).all()


def test_a_controlnet_is_distilled_onto_a_finished_student_that_keeps_every_bit(sprint, controlled, teacher, tmp_path):
    (tmp_path / "cache").symlink_to(teacher / "cache")
    train_student(Config(base=str(sprint), flow_teacher=str(controlled / "controlnet"), condition="canny", student_base=False, **STUDENT), tmp_path)
    assert same(state(load_transformer(tmp_path / "student")), load_transformer(sprint).state_dict())
    pipe = SanaSprintControlNetPipeline.from_pretrained(tmp_path / "student")
    assert json.loads((tmp_path / "student" / "controlnet" / "condition.json").read_text()) == {"condition": "canny"}
    trained = state(pipe.controlnet)
    start = sprint_from_teacher(SanaSprintControlNetModel.from_pretrained(controlled / "controlnet" / "controlnet"))
    assert trained.keys() == start.state_dict().keys() and not same(trained, start.state_dict())
    picture = pipe(prompt="a red apple", control_image=torch.zeros(1, 3, 32, 32), seed=1, output_type="pt").images
    assert picture.shape == (1, 3, 32, 32) and torch.isfinite(picture).all()


def test_a_controlnet_of_base_sana_gives_the_student_a_fresh_copy(sprint, base, tmp_path, capsys):
    pair = build_pair(Config(controlnet_layers=2), base)
    save_folder(tmp_path / "controlnet", {"controlnet": pair.controlnet}, base)
    teacher, student = start_pair(Config(base=str(sprint), student_base=False, precision="fp32"), tmp_path)
    assert "is of base SANA" in capsys.readouterr().out and student.controlnet.config.timestep_scale == 0.001
    assert torch.equal(student.controlnet.transformer_blocks[1].attn1.to_q.weight, student.transformer.transformer_blocks[1].attn1.to_q.weight)
    assert not student.controlnet.controlnet_blocks[0].weight.any()
    assert not any(p.requires_grad for p in [*teacher.parameters(), *student.transformer.parameters()])


def test_folders_that_do_not_belong_together_are_refused(sprint, controlled, base, tmp_path):
    with pytest.raises(ValueError, match="set base to a Sprint model folder"):
        find_folders(Config(student_base=False, flow_teacher=str(controlled / "controlnet")), tmp_path)
    with pytest.raises(ValueError, match="run the controlnet stage first"):
        find_folders(Config(), tmp_path)
    with pytest.raises(ValueError, match="is a Sprint model already"):
        find_folders(Config(flow_teacher=str(sprint), student_controlnet=False), tmp_path)
    with pytest.raises(ValueError, match="timestep_scale is 1.0"):
        start_pair(Config(base=str(base), student_controlnet=False), tmp_path)
    wide = tiny_transformer(num_attention_heads=4, cross_attention_dim=64, num_cross_attention_heads=4)
    save_folder(tmp_path / "wide", {"transformer": wide}, sprint)
    with pytest.raises(ValueError, match="num_attention_heads 4, not 2"):
        start_pair(Config(base=str(tmp_path / "wide"), flow_teacher=str(controlled / "controlnet"), student_base=False), tmp_path)

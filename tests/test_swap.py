"""Swapping a part: mismatches are found and named before training, the rest keeps its bits, the result is a folder stock diffusers loads."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderDC, DPMSolverMultistepScheduler, SanaPipeline, SCMScheduler, SanaSprintPipeline
from layouts import randomised, tiny_bert, tiny_controlnet, tiny_gemma, tiny_transformer, tiny_vae
from safetensors.torch import load_file
from transformers import BertConfig, BertModel

from sana_app.model.pipeline import SanaSprintControlNetPipeline
from sana_app.model.text import TextSettings, encode_text, token_states
from training.base import load_part
from training.config import Config
from training.data.cache import pixel_cache
from training.dry_run import Looked
from training.loop import Draws
from training.swap import live_text, train_swap
from training.swap_networks import affected_layers, learning_groups, refit, start_networks
from training.swap_plan import Plan, examine_autoencoder, examine_text_encoder, measure_text_encoder
from training.text import prompt_encoder

REAL_VAE = Path(__file__).parent.parent / "assets" / "models" / "emoji" / "vae"  # f16 c32, trained
CONFIG = Config(data="assets/sample", size_px=32, precision="fp32", preview_steps=0, swap_short_steps=12, swap_steps=3, swap_batch=8, swap_lr=1e-3,
                swap_new_lr=1e-2, ema=0.5, lr_warmup_steps=1, teacher_clip=10.0, swap_psnr_drop_db=10.0)


def build_base(folder: Path, vae=None, controlnet: bool = False, sprint: bool = False, **transformer) -> Path:
    """A teacher's folder as stock SanaPipeline writes it, with a BERT text encoder."""
    tokenizer, text_encoder = tiny_bert()
    network = tiny_transformer(guidance_embeds=sprint, **transformer)
    kind, scheduler = (SanaSprintPipeline, SCMScheduler()) if sprint else (SanaPipeline, DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction"))
    kind(tokenizer, text_encoder, vae or tiny_vae(), network, scheduler).save_pretrained(folder)
    if controlnet:
        tiny_controlnet(network).save_pretrained(folder / "controlnet")
    TextSettings(32, "").save(folder)
    return folder


def other_vae(seed: int = 5, **overrides) -> AutoencoderDC:
    """f16 c4 instead of the base's f8 c8, and a scaling factor that is wrong by far."""
    torch.manual_seed(seed)
    return AutoencoderDC(**dict(
        latent_channels=4, attention_head_dim=8, scaling_factor=25.0, encoder_block_types="ResBlock", decoder_block_types="ResBlock",
        encoder_block_out_channels=(8, 8, 8, 16, 16), decoder_block_out_channels=(8, 8, 8, 16, 16), encoder_layers_per_block=(0, 1, 1, 1, 1),
        decoder_layers_per_block=(0, 1, 1, 1, 1), encoder_qkv_multiscales=((),) * 5, decoder_qkv_multiscales=((),) * 5) | overrides).eval()


def other_text(folder: Path, hidden_size: int = 40, std: float = 0.0) -> Path:
    """A folder with another BERT (hidden_size wide) and the same tokenizer."""
    tokenizer, small = tiny_bert()
    torch.manual_seed(3)
    config = BertConfig(**small.config.to_dict() | {"hidden_size": hidden_size, "num_attention_heads": 4})
    model = BertModel(config).eval()
    randomised(model, std=std)
    model.save_pretrained(folder / "text_encoder")
    tokenizer.save_pretrained(folder / "tokenizer")
    return folder


# ---- which layers start anew -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels, captions, wanted", [
    (8, 24, []),
    (4, 24, ["patch_embed.proj", "proj_out"]),
    (8, 40, ["caption_projection.linear_1", "caption_projection.linear_2"]),
    (4, 40, ["patch_embed.proj", "proj_out", "caption_projection.linear_1", "caption_projection.linear_2"]),
])
def test_only_the_named_layers_change_and_the_rest_keeps_its_bits(channels, captions, wanted):
    model = tiny_transformer(guidance_embeds=False)
    controlnet = tiny_controlnet(model)
    before, before_controlnet = ({k: v.clone() for k, v in m.state_dict().items()} for m in (model, controlnet))
    names = refit(model, Plan(vae="new latent", text=True), CONFIG, channels, captions, 2)
    assert names == wanted
    names = refit(controlnet, Plan(vae="new latent", text=True), CONFIG, channels, captions, 2, start=model)
    assert names == [n for n in wanted if n != "proj_out"]
    for network, old in ((model, before), (controlnet, before_controlnet)):
        state = network.state_dict()
        assert state.keys() == old.keys()
        changed = {k for k in old if old[k].shape != state[k].shape or not torch.equal(old[k], state[k])}
        assert {k.rpartition(".")[0] for k in changed} == {n for n in wanted if not (network is controlnet and n == "proj_out")}
    assert (model.config.in_channels, model.config.out_channels, model.config.caption_channels, model.config.sample_size) == (channels, channels, captions, 2)
    # what the config says can be built anew and takes the weights
    type(model).from_config({k: v for k, v in model.config.items() if not k.startswith("_")}).load_state_dict(model.state_dict())
    for name in names:  # a ControlNet starts as a copy of its transformer
        assert torch.equal(model.get_submodule(name).weight, controlnet.get_submodule(name).weight)
    out = model(torch.randn(2, channels, 2, 2), torch.randn(2, 5, captions), torch.rand(2)).sample
    assert out.shape == (2, channels, 2, 2) and torch.isfinite(out).all()


def test_layers_that_fit_start_anew_on_demand():
    model, plan = tiny_transformer(guidance_embeds=False), Plan(vae="new latent", text=True)
    assert len(affected_layers(model, 8, 24, plan, forced=True)) == 4
    assert affected_layers(model, 8, 24, Plan(text=True), forced=True) == ["caption_projection.linear_1", "caption_projection.linear_2"]


def test_a_new_caption_projection_sees_unit_scale():
    states = 300 * torch.randn(64, 10, 40, generator=torch.Generator().manual_seed(0))
    model = tiny_transformer(guidance_embeds=False)
    refit(model, Plan(text=True, text_rms=300.0), CONFIG, 8, 40, 4)
    assert 0.3 < float(model.caption_projection.linear_1(states).detach().std()) < 3


def test_learning_rates_of_kept_and_new_layers(tmp_path):
    networks = torch.nn.ModuleDict({"transformer": tiny_transformer(guidance_embeds=False), "text_encoder": tiny_bert()[1]})
    groups = learning_groups(networks, ["transformer.proj_out"], dataclasses.replace(CONFIG, text_encoder_lr=1e-6))
    rate = {id(p): lr for params, lr in groups for p in params}
    assert sum(len(params) for params, _ in groups) == len(rate) == len(list(networks.parameters()))
    for name, p in networks.named_parameters():
        assert rate[id(p)] == (1e-2 if ".proj_out" in name else 1e-6 if name.startswith("text") else 1e-3), name
    groups = learning_groups(networks, ["transformer.proj_out"], dataclasses.replace(CONFIG, swap_lr=0.0))
    assert [lr for _, lr in groups] == [1e-2]
    assert {n for n, p in networks.named_parameters() if p.requires_grad} == {"transformer.proj_out.weight", "transformer.proj_out.bias"}


# ---- stage (a) -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real_base(tmp_path_factory):
    vae = load_part(REAL_VAE, AutoencoderDC)
    return build_base(tmp_path_factory.mktemp("real"), vae, in_channels=32, out_channels=32, sample_size=4)


def swap(out: Path, **fields) -> dict:
    """Runs the stage and returns its report."""
    config = dataclasses.replace(CONFIG, **{k: str(v) if isinstance(v, Path) else v for k, v in fields.items()})
    train_swap(config, out)
    return json.loads((out / "swap-plan" / "report.json").read_text())


def test_a_decoder_of_the_same_latent_is_exchanged_without_training(real_base, tmp_path):
    lite = load_part(REAL_VAE, AutoencoderDC)
    randomised(lite.decoder, std=1e-4)
    randomised(lite.encoder, std=1e-4)  # as if trained again; the swapped model must keep the old one
    lite.register_to_config(scaling_factor=1.0)
    lite.save_pretrained(tmp_path / "lite")
    report = swap(tmp_path, base=real_base, vae=tmp_path / "lite", size_px=64)
    assert any("same latent" in line for line in report["findings"]) and any("scaling_factor 1 " in line for line in report["findings"])
    assert not (tmp_path / "swap-short").exists()
    new, old = AutoencoderDC.from_pretrained(tmp_path / "swap" / "vae"), AutoencoderDC.from_pretrained(real_base / "vae")
    assert new.config.scaling_factor == old.config.scaling_factor
    for a, b in zip(new.encoder.parameters(), old.encoder.parameters()):
        assert torch.equal(a, b)
    for a, b in zip(new.decoder.parameters(), lite.decoder.parameters()):
        assert torch.equal(a, b)
    weights = "transformer/diffusion_pytorch_model.safetensors"
    assert (tmp_path / "swap" / weights).read_bytes() == (real_base / weights).read_bytes()
    assert isinstance(SanaPipeline.from_pretrained(tmp_path / "swap"), SanaPipeline)


def test_an_autoencoder_that_cannot_reconstruct_stops_the_swap(real_base, tmp_path):
    tiny_vae().save_pretrained(tmp_path / "vae")
    with pytest.raises(ValueError, match=r"stage \(a\).*dB worse than the old one.*train it further"):
        swap(tmp_path, base=real_base, vae=tmp_path / "vae", size_px=64, swap_psnr_drop_db=3.0)
    assert not (tmp_path / "swap").exists() and not (tmp_path / "swap-short").exists()
    report = json.loads((tmp_path / "swap-plan" / "report.json").read_text())
    assert report["autoencoder"]["old"]["psnr_db"] > 20 > report["autoencoder"]["new"]["psnr_db"]


def test_another_latent_of_as_many_channels_is_not_taken_for_the_same(tmp_path):
    """Its decoder cannot read the old latents; its own scaling factor is kept where it is near, and a shift is said."""
    tiny_vae(0).save_pretrained(tmp_path / "old")
    pixels, plans = pixel_cache("assets/sample", "val", 32, tmp_path / "cache"), []
    for name, factor, shift in (("near", 1.0, 0.0), ("far", 0.01, 0.0), ("shifted", 1.0, 20.0)):
        new = tiny_vae(7)
        torch.nn.init.constant_(new.encoder.conv_out.bias, shift)
        new.save_pretrained(tmp_path / name)
        first = Plan()
        examine_autoencoder(first, tmp_path / "old", tmp_path / name, pixels, CONFIG)
        new.register_to_config(scaling_factor=factor * first.numbers["autoencoder"]["suggested_scaling_factor"])
        new.save_pretrained(tmp_path / name)
        plans.append(Plan())
        examine_autoencoder(plans[-1], tmp_path / "old", tmp_path / name, pixels, CONFIG)
    near, far, shifted = plans
    suggested = near.numbers["autoencoder"]["suggested_scaling_factor"]
    assert [p.vae for p in plans] == ["new latent"] * 3
    assert near.scaling_factor == pytest.approx(suggested) and far.scaling_factor == pytest.approx(suggested)
    assert not any("MISMATCH" in line or "shift:" in line for line in near.findings)
    assert any("MISMATCH" in line for line in far.findings) and any(line.startswith("shift:") for line in shifted.findings)


def test_a_text_encoder_that_tells_nothing_apart_is_unfit(tmp_path):
    base, collapsed = build_base(tmp_path / "base"), other_text(tmp_path / "text")
    model = BertModel.from_pretrained(collapsed / "text_encoder")
    torch.nn.init.zeros_(model.encoder.layer[-1].output.LayerNorm.weight)
    torch.nn.init.ones_(model.encoder.layer[-1].output.LayerNorm.bias)
    model.save_pretrained(collapsed / "text_encoder")
    with pytest.raises(ValueError, match="hardly tells captions apart"):
        swap(tmp_path, base=base, text_encoder=collapsed)


def test_text_statistics_are_those_of_the_states(tmp_path):
    folder, captions = other_text(tmp_path), ["a red apple", "cat", "the green house of a dog"]
    found = measure_text_encoder(str(folder), captions, CONFIG)
    tokenizer, model = tiny_bert()[0], BertModel.from_pretrained(folder / "text_encoder").eval()
    text = encode_text(tokenizer, model, captions, TextSettings(32, ""))
    states = text.embeds[text.mask > 0]
    assert found["channels"] == 40 and found["tokens_max"] == int(text.mask.sum(1).max()) and found["cut_share"] == 0
    assert found["norm_mean"] == pytest.approx(float(states.norm(dim=1).mean()), rel=1e-4)
    assert found["std"] == pytest.approx(float(states.std()), rel=1e-4)
    assert measure_text_encoder(str(folder), captions, dataclasses.replace(CONFIG, max_tokens=4))["cut_share"] == pytest.approx(2 / 3)
    plan = Plan()
    examine_text_encoder(plan, str(folder), str(folder), captions, CONFIG)
    assert plan.text and not plan.unfit and plan.numbers["text_encoder"]["old"] == plan.numbers["text_encoder"]["new"]


@pytest.mark.parametrize("fields, message", [
    (dict(), "nothing to swap"),
    (dict(base="/nowhere"), "lacks transformer, vae, text_encoder, tokenizer"),
    (dict(vae="base"), "is a None, wanted an AutoencoderDC|no config|missing"),
    (dict(size_px=36, vae="vae"), "no multiple of the autoencoder's compression 8"),
])
def test_bad_requests_are_refused_with_words(tmp_path, fields, message):
    base = build_base(tmp_path / "base")
    if fields.get("vae") == "base":
        fields["vae"] = base / "scheduler"
    elif "vae" in fields:
        fields["vae"] = base / "vae"
    with pytest.raises(ValueError, match=message):
        swap(tmp_path, **{"base": base, **fields})


def test_a_sprint_model_is_sent_to_its_teacher(tmp_path):
    other_vae().save_pretrained(tmp_path / "vae")
    with pytest.raises(ValueError, match="finished Sprint model.*swap under its teacher"):
        swap(tmp_path, base=build_base(tmp_path / "base", sprint=True), vae=tmp_path / "vae")


# ---- (b) and (c) -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def swapped(tmp_path_factory):
    """Both parts exchanged under a teacher with a ControlNet, the text encoder tuned: (base, out, report)."""
    out = tmp_path_factory.mktemp("out")
    base = build_base(out / "base", controlnet=True)
    other_vae().save_pretrained(out / "new" / "vae")
    report = swap(out, base=base, vae=out / "new", text_encoder=other_text(out / "text"), text_encoder_lr=1e-3, swap_full=True)
    return base, out, report


def test_mismatches_are_found_and_named(swapped):
    _, _, report = swapped
    found = " ".join(report["findings"])
    assert "latent channels 8 -> 4" in found and "compression 8 -> 16: 16 -> 4 tokens" in found and "caption channels 24 -> 40" in found
    assert "scaling_factor 25; suggested from the measured std" in found and "MISMATCH" in found
    layers = ("patch_embed.proj", "caption_projection.linear_1", "caption_projection.linear_2")
    assert set(report["short"]["new_layers"]) == {f"{n}.{x}" for n in ("transformer", "controlnet") for x in layers} | {"transformer.proj_out"}


def test_the_suggested_scale_gives_the_new_latents_the_std_the_transformer_knows(swapped):
    base, out, report = swapped
    sizes = {name: report["autoencoder"][name] for name in ("old", "new")}
    written = json.loads((out / "swap" / "vae" / "config.json").read_text())["scaling_factor"]
    assert written == report["autoencoder"]["suggested_scaling_factor"] != 25.0
    assert written * sizes["new"]["std"] == pytest.approx(sizes["old"]["scaling_factor"] * sizes["old"]["std"], rel=1e-3)
    for name, tensor in load_file(out / "new" / "vae" / "diffusion_pytorch_model.safetensors").items():
        assert torch.equal(tensor, load_file(out / "swap" / "vae" / "diffusion_pytorch_model.safetensors")[name])


def test_the_short_run_lowers_the_loss_and_shows_it(swapped):
    _, out, report = swapped
    assert report["short"]["val_loss_after"] < 0.95 * report["short"]["val_loss_swapped"]
    assert (out / "swap-short" / "report.png").exists() and (out / "swap-short" / "latents.json").exists()


def test_the_result_draws_in_stock_diffusers_and_has_the_tuned_parts(swapped):
    base, out, report = swapped
    pipe = SanaPipeline.from_pretrained(out / "swap")
    assert pipe.transformer.config.in_channels == 4 and pipe.transformer.config.sample_size == 2 and pipe.transformer.config.caption_channels == 40
    picture = pipe("a red apple", height=32, width=32, num_inference_steps=2, complex_human_instruction=None, max_sequence_length=32,
                   use_resolution_binning=False, output_type="pt").images
    assert picture.shape == (1, 3, 32, 32) and torch.isfinite(picture).all()
    ours = SanaSprintControlNetPipeline.from_pretrained(out / "swap", scheduler=SCMScheduler())  # checks every tensor, and that the parts fit each other
    assert ours.controlnet.config.in_channels == 4 and ours.text_settings == TextSettings(32, "")
    start = BertModel.from_pretrained(out / "text" / "text_encoder")
    moved = [n for (n, p), q in zip(start.named_parameters(), pipe.text_encoder.parameters()) if not torch.equal(p, q)]
    assert any("word_embeddings" in n for n in moved) and any("layer.1" in n for n in moved), "the tuned encoder was exported"


def test_the_same_command_finds_everything_done(swapped, capsys):
    base, out, report = swapped
    shutil.rmtree(out / "swap" / "transformer")
    again = swap(out, base=base, vae=out / "new", text_encoder=out / "text", text_encoder_lr=1e-3, swap_full=True)
    assert "swap-short: already at step 12" in capsys.readouterr().out
    assert again["full"] == report["full"] and (out / "swap" / "transformer" / "config.json").exists()


def test_without_swap_full_nothing_is_written_but_the_next_command(tmp_path, capsys):
    base = build_base(tmp_path / "base")
    other_vae().save_pretrained(tmp_path / "vae")
    report = swap(tmp_path, base=base, vae=tmp_path / "vae", swap_short_steps=1)
    assert "swap_full=true" in capsys.readouterr().out and "full" not in report
    assert not (tmp_path / "swap").exists()
    shutil.rmtree(tmp_path / "swap-short")
    with pytest.raises(Looked):
        swap(tmp_path, base=base, vae=tmp_path / "vae", dry_run=True)
    out = capsys.readouterr().out
    assert "(a) the new part alone" in out and "start anew: transformer.patch_embed.proj" in out and not (tmp_path / "swap-short").exists()


# ---- the text encoder in the step ------------------------------------------------------------------------------------


@pytest.mark.parametrize("parts, settings", [(tiny_bert, TextSettings(32, "")), (tiny_gemma, TextSettings(40, "Improve the prompt:\nUser Prompt: "))])
def test_gradients_reach_the_text_encoder_and_cached_states_are_the_same(parts, settings):
    tokenizer, model = parts()
    captions = ["a red apple", "cat", ""]
    live, live_mask = prompt_encoder(tokenizer, model, settings, token_states)(captions)
    frozen, mask = prompt_encoder(tokenizer, model, settings)(captions)
    assert torch.equal(live, frozen) and live.requires_grad and not frozen.requires_grad
    whole = encode_text(tokenizer, model, captions, settings)
    for row in range(3):  # shorter padding, the same tokens, the last one after an instruction too
        torch.testing.assert_close(live[row][live_mask[row] > 0], whole.embeds[row][whole.mask[row] > 0], rtol=1e-4, atol=1e-6)
    live.square().sum().backward()
    layers = [p for n, p in model.named_parameters() if "pooler" not in n]
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in layers)
    assert sum(float(p.grad.abs().sum()) > 0 for p in layers) > 0.8 * len(layers)


def test_a_frozen_text_encoder_is_not_loaded_for_training(swapped):
    base, out, _ = swapped
    from training.batches import Corpus
    config = dataclasses.replace(CONFIG, base=str(base), vae=str(base / "vae"), text_encoder=str(base))
    held_out = Corpus(config, out, "val")
    assert "text_encoder" not in start_networks(Plan(), config, held_out)[0]
    networks, names = start_networks(Plan(joint=True), dataclasses.replace(config, text_encoder_lr=1e-5), held_out)
    assert "text_encoder" in networks and names == []
    batch = held_out.draw(4, Draws(0, 0))
    tokenizer = tiny_bert()[0]
    now = live_text(batch, prompt_encoder(tokenizer, networks["text_encoder"], TextSettings(32, "")))
    torch.testing.assert_close(now.text[now.mask > 0], batch.text[batch.mask > 0], rtol=1e-2, atol=1e-3)  # the cache holds float16
    assert now.null_text.shape == now.text.shape

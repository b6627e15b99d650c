"""The pipeline against the stock one, its folders in both layouts, and what it refuses to draw."""

import json

import numpy as np
import pytest
import torch
from diffusers import SanaSprintPipeline
from layouts import PUBLISHED_TRANSFORMER_CONFIG, ListScheduler, build_sprint_folder, tiny_controlnet
from layouts import tiny_transformer
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from PIL import Image
from safetensors.torch import load_file
from torch.testing import assert_close

from sana_app.lines import condition_from_ink
from sana_app.model import trigflow
from sana_app.model.pipeline import SanaSprintControlNetPipeline

SIZE = 32  # pixels; 4x4 latents
EXACT = dict(rtol=0, atol=0)


@pytest.fixture(scope="module")
def sprint(tmp_path_factory):
    return build_sprint_folder(tmp_path_factory.mktemp("sprint") / "model")


@pytest.fixture(scope="module")
def lines():
    ink = np.zeros((SIZE, SIZE), np.uint8)
    ink[8:24, 8] = ink[8, 8:24] = 255
    return condition_from_ink(ink, SIZE)


def picture(pipe, prompt="a red apple", **kwargs):
    return pipe(prompt, **{"seed": 3, "output_type": "pt"} | kwargs).images


# ---- against the stock pipeline ---------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 2, 4])
@pytest.mark.parametrize("layout", ["small", "sprint"])
def test_scale_zero_equals_the_stock_pipeline(layout, steps, lines, request):
    folder = request.getfixturevalue(layout)
    ours = SanaSprintControlNetPipeline.from_pretrained(folder)
    stock = SanaSprintPipeline.from_pretrained(folder, dtype=torch.float32)
    stock.scheduler = ListScheduler()
    stock.set_progress_bar_config(disable=True)
    prompts = ["a red apple", "the blue cat with a dog"]
    latents = torch.randn(2, 8, 4, 4, generator=torch.Generator().manual_seed(0))
    text = {} if layout == "sprint" else dict(complex_human_instruction=None, max_sequence_length=32)
    for output_type in ("latent", "pt"):
        common = dict(
            num_inference_steps=steps, timesteps=trigflow.sprint_timesteps(steps), guidance_scale=4.0, height=SIZE,
            width=SIZE, latents=latents, output_type=output_type,
        )  # fmt: skip
        expected = stock(
            prompts, max_timesteps=None, intermediate_timesteps=None, use_resolution_binning=False,
            generator=torch.Generator().manual_seed(1), **common, **text,
        ).images  # fmt: skip
        control = {} if layout == "sprint" else dict(control_image=lines, controlnet_conditioning_scale=0.0)
        got = ours(prompts, generator=torch.Generator().manual_seed(1), **common, **control).images
        assert_close(got, expected, rtol=0, atol=1e-5)
    assert expected.std() > 1e-3


@pytest.mark.parametrize("steps", [1, 4])
def test_strength_goes_to_the_plain_picture_continuously(pipe, lines, steps):
    """scale 0 skips the ControlNet; a scale near 0 runs it and must come close."""
    plain, off, faint, full = (
        picture(pipe, num_inference_steps=steps, control_image=c, controlnet_conditioning_scale=s)
        for c, s in ((None, 1.0), (lines, 0.0), (lines, 1e-6), (lines, 1.0))
    )
    assert_close(off, plain, **EXACT)
    assert_close(faint, plain, rtol=0, atol=1e-5)
    assert (full - plain).abs().max() > 1e-3


def test_steps_put_together_equal_the_call(pipe, lines):
    """What the live engine does: its own noise, cached text and condition, then decode to [-1, 1]."""
    embeds, mask = pipe.encode_prompt("a red apple")
    cond = pipe.encode_condition(lines)
    noise = pipe.noise(SIZE, SIZE, torch.Generator().manual_seed(3))
    x0 = pipe.denoise(noise, embeds, mask, cond, 0.8, 4.5, trigflow.sprint_timesteps(1))
    assert_close(x0, picture(pipe, control_image=lines, controlnet_conditioning_scale=0.8, output_type="latent"), **EXACT)
    image = pipe.decode(x0)
    assert image.min() >= -1 and image.max() <= 1
    assert_close(image / 2 + 0.5, picture(pipe, control_image=lines, controlnet_conditioning_scale=0.8), **EXACT)


def test_condition_latents_have_the_scale_of_picture_latents(pipe, lines):
    """encode_condition then decode is the autoencoder's own round trip: scaling_factor in, scaling_factor out."""
    with torch.no_grad():
        expected = pipe.vae.decode(pipe.vae.encode(lines).latent).sample.clamp(-1, 1)
    assert_close(pipe.decode(pipe.encode_condition(lines)), expected, rtol=0, atol=1e-5)
    assert pipe.vae.config.scaling_factor != 1


# ---- what a call means ------------------------------------------------------------------------------------------


def test_prompt_embeds_equal_the_prompt(pipe):
    embeds, mask = pipe.encode_prompt(["a red apple"])
    assert_close(picture(pipe, None, prompt_embeds=embeds, prompt_attention_mask=mask), picture(pipe), **EXACT)
    assert (picture(pipe, "the blue car") - picture(pipe)).abs().max() > 1e-4


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_a_seed_decides_the_picture(pipe, steps):
    first = picture(pipe, num_inference_steps=steps)
    assert_close(picture(pipe, num_inference_steps=steps), first, **EXACT)
    generator = torch.Generator().manual_seed(3)
    assert_close(picture(pipe, num_inference_steps=steps, seed=None, generator=generator), first, **EXACT)
    assert (picture(pipe, num_inference_steps=steps, seed=4) - first).abs().max() > 1e-3


def test_guidance_and_step_count_change_the_picture(pipe):
    base = picture(pipe)
    assert (picture(pipe, guidance_scale=1.0) - base).abs().max() > 1e-5
    assert (picture(pipe, num_inference_steps=2) - base).abs().max() > 1e-3


def test_a_batch_equals_its_single_pictures(pipe, lines):
    prompts = ["a red apple", "a cat", ""]
    noise = pipe.noise(SIZE, SIZE, torch.Generator().manual_seed(0), batch_size=3)
    together = picture(pipe, prompts, seed=None, latents=noise, control_image=lines)
    for i, prompt in enumerate(prompts):
        alone = picture(pipe, prompt, seed=None, latents=noise[i : i + 1], control_image=lines)
        assert_close(together[i : i + 1], alone, rtol=0, atol=1e-5)
    two = picture(pipe, ["a cat", "a dog"], num_images_per_prompt=2)
    assert two.shape == (4, 3, SIZE, SIZE)


def test_pil_array_and_tensor_drawings_are_the_same_condition(pipe, lines):
    white_on_black = ((lines[0].permute(1, 2, 0) + 1) * 127.5).round().to(torch.uint8).numpy()
    expected = pipe.encode_condition(lines)
    for drawing in (white_on_black, 255 - white_on_black, white_on_black[..., 0], Image.fromarray(white_on_black)):
        assert_close(pipe.encode_condition(drawing), expected, **EXACT)


def test_other_sizes_than_the_trained_one(pipe):
    image = picture(pipe, height=64, width=32, control_image=torch.full((1, 3, 64, 32), -1.0))
    assert image.shape == (1, 3, 64, 32)
    assert picture(pipe, output_type="pil")[0].size == (pipe.default_size, pipe.default_size) == (SIZE, SIZE)


def test_too_long_prompts_say_what_was_cut(pipe):
    assert pipe.cut_off("a red apple") == ""
    assert pipe.cut_off("a red apple " * 30).endswith("a red apple")


# ---- folders ----------------------------------------------------------------------------------------------------


def test_shipped_layout_loads_in_the_stock_pipeline(small):
    index = json.loads((small / "model_index.json").read_text())
    assert index["_class_name"] == "SanaSprintPipeline" and "controlnet" not in index
    assert all(part[0] in ("diffusers", "transformers") for part in index.values() if isinstance(part, list))
    assert isinstance(SanaSprintPipeline.from_pretrained(small), SanaSprintPipeline)
    assert {t.dtype for t in load_file(small / "controlnet/diffusion_pytorch_model.safetensors").values()} == {torch.half}


def test_published_layout_loads(sprint):
    config = json.loads((sprint / "transformer/config.json").read_text())
    assert config.keys() == PUBLISHED_TRANSFORMER_CONFIG.keys()
    pipe = SanaSprintControlNetPipeline.from_pretrained(sprint)
    assert pipe.controlnet is None and pipe.text_settings.max_tokens == 300
    assert pipe.text_settings.instruction.startswith("Given a user prompt")
    assert {**pipe.transformer.config, **config} == dict(pipe.transformer.config)
    with pytest.raises(ValueError, match="no controlnet"):
        picture(pipe, control_image=torch.zeros(1, 3, SIZE, SIZE))


def test_save_load_gives_the_same_picture(pipe, lines, tmp_path):
    pipe.save_pretrained(tmp_path / "again")
    loaded = SanaSprintControlNetPipeline.from_pretrained(tmp_path / "again")
    assert loaded.text_settings == pipe.text_settings
    for part in ("transformer", "controlnet", "vae", "text_encoder"):
        assert_close(getattr(loaded, part).state_dict(), getattr(pipe, part).state_dict(), **EXACT)
    # the same weights at other addresses may be summed in another order
    assert_close(picture(loaded, control_image=lines), picture(pipe, control_image=lines), rtol=0, atol=1e-6)
    assert [p.name for p in tmp_path.iterdir()] == ["again"], "nothing half-written is left"


def test_saving_over_a_folder_keeps_other_files(pipe, folder, lines):
    (folder / "README.md").write_text("card")
    pipe.save_pretrained(folder)
    assert (folder / "README.md").read_text() == "card"
    loaded = SanaSprintControlNetPipeline.from_pretrained(folder)
    assert_close(picture(loaded, control_image=lines), picture(pipe, control_image=lines), rtol=0, atol=1e-6)


def test_a_passed_controlnet_takes_the_place_of_the_folders(small, sprint, lines):
    assert SanaSprintControlNetPipeline.from_pretrained(small, controlnet=None).controlnet is None
    controlnet = tiny_controlnet(tiny_transformer(), num_layers=3)
    pipe = SanaSprintControlNetPipeline.from_pretrained(sprint, controlnet=controlnet)
    assert (picture(pipe, control_image=lines) - picture(pipe)).abs().max() > 1e-3


def test_loads_in_the_asked_precision(small):
    pipe = SanaSprintControlNetPipeline.from_pretrained(small, torch_dtype=torch.bfloat16)
    parts = (pipe.transformer, pipe.vae, pipe.text_encoder, pipe.controlnet)
    assert {part.dtype for part in parts} == {torch.bfloat16}
    assert picture(pipe, control_image=torch.zeros(1, 3, SIZE, SIZE)).isfinite().all()


@pytest.mark.parametrize("targets", [["to_q", "to_v"], ["to_q", "to_k", "to_v", "to_out.0"]])
def test_lora_changes_the_picture_and_unloading_restores_it(small, tmp_path, targets):
    pipe = SanaSprintControlNetPipeline.from_pretrained(small)
    before, names = picture(pipe), list(pipe.transformer.state_dict())
    torch.manual_seed(0)
    other = tiny_transformer()
    other.add_adapter(LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    SanaSprintPipeline.save_lora_weights(tmp_path, transformer_lora_layers=get_peft_model_state_dict(other))

    pipe.load_lora_weights(tmp_path)
    assert (picture(pipe) - before).abs().max() > 1e-3
    with pytest.raises(ValueError, match="unload_lora_weights"):
        pipe.save_pretrained(tmp_path / "model")
    pipe.unload_lora_weights()
    assert_close(picture(pipe), before, **EXACT)
    assert list(pipe.transformer.state_dict()) == names


# ---- refused ----------------------------------------------------------------------------------------------------


def test_mixed_parts_are_refused(small):
    for overrides, message in ((dict(caption_channels=7), "caption_channels 7"), (dict(in_channels=4), "in_channels 4")):
        with pytest.raises(ValueError, match=message):
            SanaSprintControlNetPipeline.from_pretrained(small, transformer=tiny_transformer(**overrides))
    with pytest.raises(ValueError, match="at most one less"):
        SanaSprintControlNetPipeline.from_pretrained(small, transformer=tiny_transformer(num_layers=2))
    with pytest.raises(ValueError, match="guidance_embeds"):
        teacher = tiny_transformer(guidance_embeds=False)
        SanaSprintControlNetPipeline.from_pretrained(small, controlnet=tiny_controlnet(teacher))


@pytest.mark.parametrize("wrong, message", [
    (dict(control_image=torch.zeros(1, 3, 16, 64)), "the control image is 64x16, the picture 32x32: resize"),
    (dict(control_image=Image.new("RGB", (20, 30))), "20x30, the picture 32x32"),
    (dict(control_image=torch.zeros(1, 1, SIZE, SIZE)), r"wanted a float tensor"),
    (dict(control_image=torch.full((1, 3, SIZE, SIZE), 255.0)), r"outside \[-1, 1\]"),
    (dict(control_image=torch.full((1, 3, SIZE, SIZE), float("nan"))), r"outside \[-1, 1\]"),
    (dict(control_image="lines.png"), "the control image is a str"),
    (dict(control_image=torch.zeros(3, 3, SIZE, SIZE)), "3 control images for 1 pictures"),
    (dict(height=33), "height is 33, wanted a positive multiple of 8"),
    (dict(width=-8), "width is -8"),
    (dict(num_inference_steps=3), "use 1, 2 or 4"),
    (dict(prompt=None), "either prompt or prompt_embeds"),
    (dict(prompt=[]), "wanted a text"),
    (dict(prompt=None, prompt_embeds=torch.zeros(1, 4, 5), prompt_attention_mask=torch.ones(1, 4)), "wanted .B, L, 24"),
    (dict(prompt=None, prompt_embeds=torch.zeros(1, 4, 24)), "prompt_attention_mask is None"),
    (dict(latents=torch.zeros(1, 8, 5, 5)), "latents are"),
    (dict(generator=torch.Generator()), "either seed or generator"),
    (dict(seed=-1), "seed is -1"),
    (dict(guidance_scale=float("nan")), "guidance_scale is nan"),
    (dict(controlnet_conditioning_scale=float("inf")), "controlnet_conditioning_scale is inf"),
    (dict(output_type="jpeg"), "output_type is 'jpeg'"),
])  # fmt: skip
def test_bad_input_is_refused_with_what_came_and_what_was_wanted(pipe, wrong, message):
    with pytest.raises(ValueError, match=message):
        pipe(**{"prompt": "a cat", "seed": 0} | wrong)

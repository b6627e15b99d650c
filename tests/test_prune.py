"""Depth: importance finds planted blocks, pruned and grown folders load everywhere, growth changes nothing, tuning repairs."""

import json
import sys

import pytest
import torch
from diffusers import SanaSprintPipeline, SanaTransformer2DModel
from PIL import Image
from safetensors.torch import load_file

from layouts import CAPTION_CHANNELS, build_small_folder, build_sprint_folder, tiny_controlnet, tiny_transformer
from sana_app.model.controlnet import SanaSprintControlNetModel
from sana_app.model.network import predict_flow
from sana_app.model.pipeline import SanaSprintControlNetPipeline
from sana_app.model.text import TextSettings
from training.flow import flow_loss, flow_path, shifted_time
from training.importance import block_importance, importance_of_batch, importance_plot, importance_table, turn
from training.prune import choose_blocks, grow, grow_blocks, keep_blocks, keep_controlnet_blocks, load_stored, main, prune

TEACHER = dict(guidance_embeds=False)
BASE = dict(guidance_embeds=False, timestep_scale=1.0, qk_norm=None)


def encode(prompts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """States that depend on each prompt alone."""
    states = [torch.randn(5, CAPTION_CHANNELS, generator=torch.Generator().manual_seed(sum(p.encode()))) for p in prompts]
    return torch.stack(states), torch.ones(len(prompts), 5)


def inputs(batch: int = 2) -> dict:
    g = torch.Generator().manual_seed(5)
    text, mask = encode(["a cat", "a dog"] * (batch // 2))
    return dict(x_s=torch.randn(batch, 8, 4, 4, generator=g), s=torch.linspace(0.3, 0.9, batch), prompt_embeds=text, prompt_attention_mask=mask, guidance=4.5)


def silence(block: torch.nn.Module, factor: float = 0.0) -> None:
    """The block's output projections times `factor`: 0 makes it the identity, a large one makes it matter."""
    with torch.no_grad():
        for output in (block.attn1.to_out[0], block.attn2.to_out[0], block.ff.conv_point):
            for weight in output.parameters():
                weight *= factor


# ---- importance -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [{}, TEACHER, BASE], ids=["sprint", "teacher", "base"])
def test_importance_finds_the_planted_useless_and_the_planted_important_block(kind):
    model = tiny_transformer(num_layers=6, **kind)
    silence(model.transformer_blocks[2])
    silence(model.transformer_blocks[4], 30.0)
    found = block_importance(model, encode, ["a cat", "a red house", "a boat"], steps=3, batch=2)
    values = found["importance"]
    assert abs(values[2]) < 1e-5 and min(range(6), key=values.__getitem__) == 2
    assert max(range(6), key=values.__getitem__) == 4
    assert 2 not in choose_blocks(values, 5) and 4 in choose_blocks(values, 3)


def test_importance_is_a_mean_over_prompts_and_times_whatever_the_batch():
    model, prompts = tiny_transformer(), ["a cat", "a red house", "a boat"]
    together, alone = (block_importance(model, encode, prompts, steps=1, batch=b) for b in (3, 1))
    torch.testing.assert_close(together["importance"], alone["importance"], rtol=1e-4, atol=1e-7)
    several = block_importance(model, encode, prompts, steps=4)
    means = torch.tensor(several["by_time"]).mean(dim=0)
    torch.testing.assert_close(torch.tensor(several["importance"]), means)
    assert len(several["times"]) == 4 and several["times"][0] == pytest.approx(torch.pi / 2) and several["times"][-1] > 0


def test_turn_of_known_vectors():
    before = torch.tensor([[[1.0, 0.0], [1.0, 0.0]]])
    after = torch.tensor([[[0.0, 2.0], [-3.0, 0.0]]])
    torch.testing.assert_close(turn(before, after), torch.tensor([1.5]))
    torch.testing.assert_close(turn(before, 7 * before), torch.tensor([0.0]))


def test_no_hook_is_left_on_the_model():
    model = tiny_transformer(**TEACHER)
    importance_of_batch(model, *encode(["a cat"]), [torch.randn(1, 8, 4, 4)] * 2)
    assert not any(block._forward_hooks for block in model.transformer_blocks)


def test_table_and_plot_name_every_block(tmp_path):
    found = {"importance": [0.5, 0.1, 0.3], "times": [1.5, 0.7], "by_time": [[0.6, 0.1, 0.2], [0.4, 0.1, 0.4]], "prompts": 9}
    table = importance_table(found, [0, 2]).splitlines()
    assert len(table) == 4 and "dropped" in table[2] and "dropped" not in table[1] + table[3]
    importance_plot(found, tmp_path / "plot.png", [0, 2])
    importance_plot(found, tmp_path / "all.png")
    kept, everything = (Image.open(tmp_path / n).convert("RGB") for n in ("plot.png", "all.png"))
    dark = lambda picture: sum(count for count, colour in picture.getcolors(1 << 20) if colour == (0x2B, 0x5D, 0x9B))
    # bars are as high as the numbers: block 1 has 0.1 of 0.9, and it is pale in the first plot only
    assert dark(kept) / dark(everything) == pytest.approx(8 / 9, abs=0.02)


# ---- pruning ----------------------------------------------------------------------------------------------------


def test_choice_keeps_the_order_and_protects_both_ends():
    importance = [0.0, 0.5, 0.1, 0.9, 0.2, 0.0]
    assert choose_blocks(importance, 4) == [0, 1, 3, 5]
    assert choose_blocks(importance, 2) == [0, 5]
    assert choose_blocks(importance, 5, protect=2) == [0, 1, 3, 4, 5]
    for keep in (6, 1, 9):
        with pytest.raises(ValueError, match="can stay"):
            choose_blocks(importance, keep)


def test_pruning_blocks_that_do_nothing_changes_nothing():
    model = tiny_transformer(num_layers=6)
    for b in (1, 3):
        silence(model.transformer_blocks[b])
    with torch.no_grad():
        before = predict_flow(model, **inputs())
        keep_blocks(model, [0, 2, 4, 5])
        after = predict_flow(model, **inputs())
    assert torch.equal(before, after)


@pytest.mark.parametrize("build", [build_small_folder, build_sprint_folder])
def test_a_pruned_folder_loads_in_stock_diffusers_and_in_ours(build, tmp_path):
    old, new = build(tmp_path / "old"), tmp_path / "new"
    kept = prune(old, new, 3, [0.5, 0.4, 0.1, 0.3])
    assert kept == [0, 1, 3]
    noise = torch.randn(1, 8, 4, 4, generator=torch.Generator().manual_seed(0))
    stock, ours = SanaSprintPipeline.from_pretrained(new), SanaSprintControlNetPipeline.from_pretrained(new)
    ours.text_settings = TextSettings(max_tokens=32, instruction="")
    for loaded in (stock, ours):
        assert loaded.transformer.config.num_layers == len(loaded.transformer.transformer_blocks) == 3
    theirs = stock("a cat", num_inference_steps=1, intermediate_timesteps=None, max_timesteps=torch.pi / 2, complex_human_instruction=None, max_sequence_length=32,
                   latents=noise, height=32, width=32, use_resolution_binning=False, output_type="pt").images
    torch.testing.assert_close(theirs, ours("a cat", latents=noise, output_type="pt").images, rtol=0, atol=1e-3)  # a quarter of a grey level
    before, after = (load_file(f / "transformer" / "diffusion_pytorch_model.safetensors") for f in (old, new))
    for position, block in enumerate(kept):
        for key, value in before.items():
            if key.startswith(f"transformer_blocks.{block}."):
                copy = after.pop(key.replace(f"blocks.{block}.", f"blocks.{position}.", 1))
                assert copy.dtype == value.dtype and torch.equal(copy, value)
    assert all(torch.equal(value, before[key]) for key, value in after.items())  # the embeddings and the last layer
    assert after.keys() == {k for k in before if not k.startswith("transformer_blocks.")}
    others = {p.relative_to(old) for p in old.rglob("*") if p.is_file() and p.relative_to(old).parts[0] not in ("transformer", "controlnet")}
    assert others and all((old / p).read_bytes() == (new / p).read_bytes() for p in others)
    config = [json.loads((f / "transformer" / "config.json").read_text()) for f in (old, new)]
    assert {k for k in config[0] if config[0][k] != config[1][k]} - {"_diffusers_version", "_name_or_path"} == {"num_layers"}


def test_folders_of_a_run_and_of_a_transformer_alone_keep_their_layout(tmp_path):
    run = tmp_path / "teacher"
    tiny_transformer(**TEACHER).save_pretrained(run / "transformer")
    (run / "checkpoints").mkdir()
    (run / "run.json").write_text("{}")
    prune(run, tmp_path / "pruned", 2, [0.1] * 4)
    assert {p.name for p in (tmp_path / "pruned").iterdir()} == {"transformer", "depth.json"}
    assert SanaTransformer2DModel.from_pretrained(tmp_path / "pruned" / "transformer").config.num_layers == 2
    prune(run / "transformer", tmp_path / "alone", 3, [0.1] * 4)
    assert SanaTransformer2DModel.from_pretrained(tmp_path / "alone").config.num_layers == 3


def test_what_is_wrong_is_said_and_nothing_is_written(tmp_path):
    model = build_small_folder(tmp_path / "model")
    with pytest.raises(ValueError, match="has 4: measure this model"):
        prune(model, tmp_path / "new", 3, [0.1] * 9)
    with pytest.raises(ValueError, match="there already"):
        prune(model, model, 3, [0.1] * 4)
    with pytest.raises(ValueError, match="outside it"):
        grow(model, model / "new", 6)
    with pytest.raises(ValueError, match="no transformer at"):
        prune(tmp_path / "nowhere", tmp_path / "new", 3, [0.1] * 4)
    with pytest.raises(ValueError, match="the model has 4 blocks"):
        grow(model, tmp_path / "new", 4)
    with pytest.raises(ValueError, match="the ControlNet copies 2 blocks"):
        grow(model, tmp_path / "new", 6, drop_last=3)
    assert not (tmp_path / "new").exists()


def test_half_precision_and_variants_stay_what_they_are(tmp_path):
    tiny_transformer(**TEACHER).to(torch.bfloat16).save_pretrained(tmp_path / "old" / "transformer", variant="bf16")
    prune(tmp_path / "old", tmp_path / "new", 3, [0.1] * 4)
    assert {v.dtype for v in load_file(tmp_path / "new" / "transformer" / "diffusion_pytorch_model.safetensors").values()} == {torch.bfloat16}


# ---- ControlNet -------------------------------------------------------------------------------------------------


def residuals(controlnet: SanaSprintControlNetModel, cond: torch.Tensor) -> tuple[torch.Tensor, ...]:
    given = inputs()
    with torch.no_grad():
        return controlnet(given["x_s"], given["prompt_embeds"], given["s"], cond, guidance=torch.full((2,), 0.45), encoder_attention_mask=given["prompt_attention_mask"],
                          return_dict=False)[0]


def test_the_controlnet_stays_as_it_is_when_the_blocks_it_meets_stay(tmp_path):
    old = build_small_folder(tmp_path / "old", num_layers=6)  # its ControlNet copies blocks 0 and 1; residual 2 enters after block 2
    prune(old, tmp_path / "new", 5, [0.9, 0.8, 0.7, 0.1, 0.6, 0.5])
    for file in ("config.json", "diffusion_pytorch_model.safetensors"):
        assert (old / "controlnet" / file).read_bytes() == (tmp_path / "new" / "controlnet" / file).read_bytes()


def test_the_controlnet_loses_the_copies_of_dropped_blocks(tmp_path):
    old = build_small_folder(tmp_path / "old", num_layers=6)
    kept = prune(old, tmp_path / "new", 4, [0.9, 0.1, 0.7, 0.2, 0.6, 0.5])
    assert kept == [0, 2, 4, 5]
    controlnet = load_stored(tmp_path / "new" / "controlnet")
    assert controlnet.config.num_layers == 1
    before = load_file(old / "controlnet" / "diffusion_pytorch_model.safetensors")
    assert torch.equal(controlnet.transformer_blocks[0].attn1.to_q.weight, before["transformer_blocks.0.attn1.to_q.weight"])
    pipe = SanaSprintControlNetPipeline.from_pretrained(tmp_path / "new")
    lines = torch.where(torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)) < 0.2, 1.0, -1.0)
    with_lines, without = (pipe("a cat", lines, scale, seed=0, output_type="latent").images for scale in (1.0, 0.0))
    assert torch.isfinite(with_lines).all() and not torch.allclose(with_lines, without)


def test_a_dropped_copy_that_did_nothing_leaves_the_sum_of_the_residuals():
    transformer = tiny_transformer(num_layers=6)
    controlnet = tiny_controlnet(transformer, 4)
    silence(controlnet.transformer_blocks[1])
    silence(controlnet.transformer_blocks[2])
    cond = torch.randn(2, 8, 4, 4, generator=torch.Generator().manual_seed(3))
    before = residuals(controlnet, cond)
    assert keep_controlnet_blocks(controlnet, [0, 3, 4, 5]) == [0, 3]
    after = residuals(controlnet, cond)
    assert len(after) == 2
    torch.testing.assert_close(sum(after), sum(before), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(after[1], before[3])  # and the copy that stays says what it said


# ---- growth -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [{}, TEACHER, BASE], ids=["sprint", "teacher", "base"])
def test_a_grown_model_answers_bit_for_bit_as_before_and_its_new_blocks_learn(kind):
    model = tiny_transformer(**kind)
    with torch.no_grad():
        before = predict_flow(model, **inputs())
    grow_blocks(model, 9)
    assert len(model.transformer_blocks) == model.config.num_layers == 9
    after = predict_flow(model, **inputs())
    assert torch.equal(before, after)
    after.square().mean().backward()
    for block in model.transformer_blocks[4:]:
        for output in (block.attn1.to_out[0], block.attn2.to_out[0], block.ff.conv_point):
            assert output.weight.grad.abs().max() > 0
    assert not torch.equal(model.transformer_blocks[4].attn1.to_q.weight, model.transformer_blocks[5].attn1.to_q.weight)


def test_a_grown_folder_draws_the_same_pictures_with_lines(tmp_path):
    old, new = build_small_folder(tmp_path / "old"), tmp_path / "new"
    grow(old, new, 7)
    lines = torch.where(torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)) < 0.2, 1.0, -1.0)
    a, b = (SanaSprintControlNetPipeline.from_pretrained(f)("a cat", lines, seed=1, output_type="pt").images for f in (old, new))
    assert torch.equal(a, b)
    stock = SanaSprintPipeline.from_pretrained(new)
    assert stock.transformer.config.num_layers == 7


def test_the_papers_growth_drops_the_last_old_blocks():
    model = tiny_transformer(num_layers=5)
    first, last = (model.transformer_blocks[b].attn1.to_q.weight.clone() for b in (0, 4))
    grow_blocks(model, 8, drop_last=2)
    assert len(model.transformer_blocks) == 8
    assert torch.equal(model.transformer_blocks[0].attn1.to_q.weight, first)
    assert not any(torch.equal(b.attn1.to_q.weight, last) for b in model.transformer_blocks)


# ---- tuning -----------------------------------------------------------------------------------------------------


def tune(model: SanaTransformer2DModel, steps: int, lr: float, seed: int) -> float:
    """Flow training on eight fixed pictures, each with a caption of its own; returns the loss on fixed noise and times."""
    g = torch.Generator().manual_seed(0)
    pictures = torch.nn.functional.interpolate(torch.randn(8, 8, 2, 2, generator=g), size=(4, 4))
    text, mask = encode([f"picture {i}" for i in range(8)])

    def loss(rows: torch.Tensor, g: torch.Generator) -> torch.Tensor:
        x0, z = pictures[rows], torch.randn(len(rows), 8, 4, 4, generator=g)
        s = shifted_time(torch.randn(len(rows), generator=g), 1.0)
        return flow_loss(predict_flow(model, flow_path(x0, z, s), s, text[rows], mask[rows]), x0, z).mean()

    opt, g = torch.optim.AdamW(model.parameters(), lr=lr), torch.Generator().manual_seed(seed)
    for _ in range(steps):
        loss(torch.arange(8), g).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
        opt.zero_grad()
    with torch.no_grad():
        return float(loss(torch.arange(64) % 8, torch.Generator().manual_seed(99)))


def test_a_short_tune_repairs_what_pruning_broke(tmp_path):
    model = tiny_transformer(num_layers=4, interpolation_scale=1.0, **TEACHER).train()
    start = tune(model, 0, 0, 0)
    trained = tune(model, 60, 5e-3, 1)
    model.save_pretrained(tmp_path / "whole" / "transformer")
    found = block_importance(model.eval(), encode, [f"picture {i}" for i in range(8)], steps=3)
    prune(tmp_path / "whole", tmp_path / "pruned", 2, found["importance"])
    pruned = load_stored(tmp_path / "pruned" / "transformer").train()
    untuned = tune(pruned, 0, 0, 0)
    tuned = tune(pruned, 15, 1e-3, 2)
    assert trained < 0.8 * start, "the whole model has learnt something to lose"
    assert untuned > trained, "pruning costs something"
    assert tuned < untuned, (start, trained, untuned, tuned)


# ---- the command ------------------------------------------------------------------------------------------------


def test_the_commands_work_one_after_the_other(tmp_path, monkeypatch, capsys):
    build_small_folder(tmp_path / "model")
    (tmp_path / "prompts.txt").write_text("a red cat\n\na green house\na dog\n")

    def call(*args: object) -> str:
        monkeypatch.setattr(sys, "argv", ["training.prune", *map(str, args)])
        capsys.readouterr()
        main()
        return capsys.readouterr().out

    said = call("importance", tmp_path / "model", "--prompts", tmp_path / "prompts.txt", "--steps", 2, "--out", tmp_path / "importance.json", "--keep", 3)
    written = json.loads((tmp_path / "importance.json").read_text())
    assert written["prompts"] == 3 and len(written["importance"]) == 4 and said.count("dropped") == 1
    assert Image.open(tmp_path / "importance.png").width > 100
    looked = call("prune", tmp_path / "model", tmp_path / "small", "--keep", 3, "--importance", tmp_path / "importance.json", "--dry-run")
    assert "kept 3 of 4 blocks" in looked and "is not written" in looked and not (tmp_path / "small").exists()
    assert "is not written" in call("grow", tmp_path / "model", tmp_path / "large", "--layers", 6, "--dry-run") and not (tmp_path / "large").exists()
    assert "kept 3 of 4 blocks" in call("prune", tmp_path / "model", tmp_path / "small", "--keep", 3, "--importance", tmp_path / "importance.json")
    assert "3 -> 5 blocks" in call("grow", tmp_path / "small", tmp_path / "large", "--layers", 5)
    for wrong in (["prune", tmp_path / "model", tmp_path / "small", "--keep", 3, "--importance", tmp_path / "importance.json"],
                  ["prune", tmp_path / "model", tmp_path / "other", "--keep", 3, "--importance", tmp_path / "model" / "model_index.json"],
                  ["importance", tmp_path / "model"]):
        with pytest.raises(SystemExit, match="^error: "):
            call(*wrong)

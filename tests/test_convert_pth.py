"""NVlabs' .pth <-> diffusers: names written out by hand, a forward pass in native names, round trips, and files that are wrong."""

import json
import math
import os
import pickle
import re
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import SanaControlNetModel, SanaTransformer2DModel
from safetensors import safe_open
from layouts import PUBLISHED_TRANSFORMER_CONFIG, tiny_controlnet, tiny_transformer

from sana_app.model.controlnet import SanaSprintControlNetModel
from sana_app.model.network import predict_flow
from training.convert.__main__ import main
from training.convert.describe import INTERPOLATION
from training.convert.keymap import native_name
from training.convert.pth import SIDE_FILE, build_model, convert, load_pth, to_diffusers, to_pth, transformer_from_pth

WIDTH, DEPTH, HEADS = 32, 3, 2
SMALL = dict(cross_heads=HEADS, head_dim=16)


# ---- the published layout, spelled out ------------------------------------------------------------------------------


def block_shapes(prefix, width, qk_norm):
    hidden = int(2.5 * width)
    shapes = {
        "scale_shift_table": (6, width),
        "attn.qkv.weight": (3 * width, width), "attn.proj.weight": (width, width), "attn.proj.bias": (width,),
        "cross_attn.q_linear.weight": (width, width), "cross_attn.q_linear.bias": (width,),
        "cross_attn.kv_linear.weight": (2 * width, width), "cross_attn.kv_linear.bias": (2 * width,),
        "cross_attn.proj.weight": (width, width), "cross_attn.proj.bias": (width,),
        "mlp.inverted_conv.conv.weight": (2 * hidden, width, 1, 1), "mlp.inverted_conv.conv.bias": (2 * hidden,),
        "mlp.depth_conv.conv.weight": (2 * hidden, 1, 3, 3), "mlp.depth_conv.conv.bias": (2 * hidden,),
        "mlp.point_conv.conv.weight": (width, hidden, 1, 1),
    }  # fmt: skip
    if qk_norm:
        shapes |= {f"{attn}.{norm}.weight": (width,) for attn in ("attn", "cross_attn") for norm in ("q_norm", "k_norm")}
    return {f"{prefix}.{k}": v for k, v in shapes.items()}


def native_shapes(kind, width=WIDTH, depth=DEPTH, channels=8, caption=24, copied=0, base=True, qk_norm=None):
    qk_norm = kind in ("teacher", "sprint") if qk_norm is None else qk_norm
    shapes = {
        "x_embedder.proj.weight": (width, channels, 1, 1), "x_embedder.proj.bias": (width,),
        "y_embedder.y_embedding": (300, caption),
        "y_embedder.y_proj.fc1.weight": (width, caption), "y_embedder.y_proj.fc1.bias": (width,),
        "y_embedder.y_proj.fc2.weight": (width, width), "y_embedder.y_proj.fc2.bias": (width,),
        "attention_y_norm.weight": (width,),
        "t_embedder.mlp.0.weight": (width, 256), "t_embedder.mlp.0.bias": (width,),
        "t_embedder.mlp.2.weight": (width, width), "t_embedder.mlp.2.bias": (width,),
        "t_block.1.weight": (6 * width, width), "t_block.1.bias": (6 * width,),
    }  # fmt: skip
    if base:
        shapes |= {"final_layer.linear.weight": (channels, width), "final_layer.linear.bias": (channels,), "final_layer.scale_shift_table": (2, width)}
        for i in range(depth):
            shapes |= block_shapes(f"blocks.{i}", width, qk_norm)
    if kind == "sprint":
        shapes |= {"cfg_embedder.mlp.0.weight": (width, 256), "cfg_embedder.mlp.0.bias": (width,), "cfg_embedder.mlp.2.weight": (width, width),
                   "cfg_embedder.mlp.2.bias": (width,), "logvar_linear.weight": (1, width), "logvar_linear.bias": (1,)}
    for i in range(copied):
        shapes |= block_shapes(f"controlnet.{i}.copied_block", width, qk_norm)
        shapes |= {f"controlnet.{i}.after_proj.weight": (width, width), f"controlnet.{i}.after_proj.bias": (width,)}
    if copied:
        shapes |= {"controlnet.0.before_proj.weight": (width, width), "controlnet.0.before_proj.bias": (width,)}
    return shapes


def native_weights(kind, seed=0, dtype=torch.float32, **options):
    g = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in native_shapes(kind, **options).items():
        value = torch.randn(shape, generator=g) * (0.3 / math.sqrt(math.prod(shape[1:])) if len(shape) > 1 else 0.1)
        weights[name] = (value + 1 if "norm" in name else value).to(dtype)
    return weights | {"pos_embed": torch.zeros(1, 16, options.get("width", WIDTH), dtype=dtype)}


def saved(path, weights, wrapper="state_dict", **more):
    torch.save({wrapper: weights} | more if wrapper else weights, path)
    return path


def same(a, b):
    assert a.keys() == b.keys(), a.keys() ^ b.keys()
    for k in a:
        assert a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]), k


# ---- what the native weights compute ----------------------------------------------------------------------------------


def rms(x, weight):
    return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-5) * weight


def native_forward(w, x, time, text, cfg=None):
    """SANA on native weights, from NVlabs' description: x [B, C, h, w], time [B] as the embedding sees it, text [B, L, D]."""
    linear = lambda name, v: F.linear(v, w[f"{name}.weight"], w.get(f"{name}.bias"))
    norm = lambda v: F.layer_norm(v, (WIDTH,), eps=1e-6)
    maybe = lambda v, name: rms(v, w[name]) if name in w else v
    heads = lambda v: v.unflatten(-1, (HEADS, WIDTH // HEADS)).transpose(1, 2)             # [B, H, N, d]

    def embed(name, value):
        angle = value[:, None] * torch.exp(-math.log(10000) * torch.arange(128) / 128)
        return linear(f"{name}.mlp.2", F.silu(linear(f"{name}.mlp.0", torch.cat([angle.cos(), angle.sin()], -1))))

    side = x.shape[-1]
    h = F.conv2d(x, w["x_embedder.proj.weight"], w["x_embedder.proj.bias"]).flatten(2).transpose(1, 2)
    t = embed("t_embedder", time) + (embed("cfg_embedder", cfg) if cfg is not None else 0)
    t0 = linear("t_block.1", F.silu(t)).unflatten(-1, (6, WIDTH))
    y = rms(linear("y_embedder.y_proj.fc2", F.gelu(linear("y_embedder.y_proj.fc1", text), approximate="tanh")), w["attention_y_norm.weight"])
    for i in range(DEPTH):
        b = f"blocks.{i}"
        shift, scale, gate, shift2, scale2, gate2 = (w[f"{b}.scale_shift_table"] + t0).chunk(6, 1)
        q, k, v = linear(f"{b}.attn.qkv", norm(h) * (1 + scale) + shift).unflatten(-1, (3, WIDTH)).unbind(2)
        q, k, v = (heads(u) for u in (maybe(q, f"{b}.attn.q_norm.weight"), maybe(k, f"{b}.attn.k_norm.weight"), v))
        attention = q.relu() @ k.relu().transpose(-1, -2)                                  # linear attention, written quadratically
        a = attention @ v / (attention.sum(-1, keepdim=True) + 1e-15)
        h = h + gate * linear(f"{b}.attn.proj", a.transpose(1, 2).flatten(2))
        k, v = linear(f"{b}.cross_attn.kv_linear", y).unflatten(-1, (2, WIDTH)).unbind(2)
        q, k = maybe(linear(f"{b}.cross_attn.q_linear", h), f"{b}.cross_attn.q_norm.weight"), maybe(k, f"{b}.cross_attn.k_norm.weight")
        a = (heads(q) @ heads(k).transpose(-1, -2) / math.sqrt(WIDTH // HEADS)).softmax(-1) @ heads(v)
        h = h + linear(f"{b}.cross_attn.proj", a.transpose(1, 2).flatten(2))
        m = (norm(h) * (1 + scale2) + shift2).transpose(1, 2).unflatten(-1, (side, side))
        m = F.silu(F.conv2d(m, w[f"{b}.mlp.inverted_conv.conv.weight"], w[f"{b}.mlp.inverted_conv.conv.bias"]))
        m, g = F.conv2d(m, w[f"{b}.mlp.depth_conv.conv.weight"], w[f"{b}.mlp.depth_conv.conv.bias"], padding=1, groups=m.shape[1]).chunk(2, 1)
        h = h + gate2 * F.conv2d(m * F.silu(g), w[f"{b}.mlp.point_conv.conv.weight"]).flatten(2).transpose(1, 2)
    shift, scale = (w["final_layer.scale_shift_table"] + t[:, None]).chunk(2, 1)
    return linear("final_layer.linear", norm(h) * (1 + scale) + shift).transpose(1, 2).unflatten(-1, (side, side))


@pytest.mark.parametrize("kind, fed", [("base", 1000.0), ("teacher", 1.0), ("sprint", 1.0)])
def test_the_converted_model_computes_what_the_native_weights_compute(kind, fed, tmp_path):
    """Also shows that a teacher keeps its timestep_scale: a public converter drops it, and the time comes 1000 times too large."""
    w = native_weights(kind)
    model = transformer_from_pth(saved(tmp_path / "m.pth", w), kind=kind, **SMALL).eval()
    g = torch.Generator().manual_seed(1)
    x, s, text = torch.randn(2, 8, 4, 4, generator=g), torch.rand(2, generator=g), torch.randn(2, 5, 24, generator=g)
    cfg = torch.full((2,), 0.45) if kind == "sprint" else None
    with torch.no_grad():
        ours = predict_flow(model, x, s, text, torch.ones(2, 5), guidance=4.5)
        torch.testing.assert_close(ours, native_forward(w, x, fed * s, text, cfg), atol=1e-4, rtol=1e-4)


# ---- round trips --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["base", "teacher", "sprint"])
@pytest.mark.parametrize("wrapper, dtype", [("state_dict", torch.float32), ("state_dict_ema", torch.float16), ("", torch.bfloat16)])
def test_a_round_trip_restores_every_tensor(kind, wrapper, dtype, tmp_path):
    w = native_weights(kind, dtype=dtype)
    loaded = to_diffusers(saved(tmp_path / "in.pth", w, wrapper), tmp_path / "out", kind=kind, **SMALL)
    assert loaded.kind == kind
    side = {"y_embedder.y_embedding", "pos_embed"} | ({"logvar_linear.weight", "logvar_linear.bias"} if kind == "sprint" else set())
    assert loaded.side.keys() == side
    to_pth(tmp_path / "out", tmp_path / "back.pth")
    back = torch.load(tmp_path / "back.pth", weights_only=True)
    same(back[wrapper] if wrapper else back, w)
    assert not wrapper or list(back) == [wrapper]


@pytest.mark.parametrize("kind, options", [("base", {}), ("teacher", {}), ("sprint", {}), ("base", dict(qk_norm=True))])
def test_the_folder_loads_in_stock_diffusers_with_every_weight(kind, options, tmp_path):
    w = native_weights(kind, **options)
    to_diffusers(saved(tmp_path / "in.pth", w), tmp_path / "out", kind=kind, **SMALL)
    model, info = SanaTransformer2DModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info
    assert model.config.timestep_scale == (1.0 if kind == "base" else 0.001)
    assert model.config.guidance_embeds == (kind == "sprint") and bool(model.config.qk_norm) == (kind != "base" or bool(options))
    if model.config.qk_norm:  # by name: swapped norms would compute the same as long as they are positive
        for name, norm in {"q": "norm_q", "k": "norm_k"}.items():
            for attn, native in {"attn1": "attn", "attn2": "cross_attn"}.items():
                assert torch.equal(model.get_submodule(f"transformer_blocks.1.{attn}.{norm}").weight, w[f"blocks.1.{native}.{name}_norm.weight"])


@pytest.mark.parametrize("base, sprint", [(True, False), (False, False), (True, True)])
def test_a_controlnet_keeps_its_base_model_in_the_side_file(base, sprint, tmp_path):
    w = native_weights("sprint" if sprint else "base", copied=2, base=base)
    loaded = to_diffusers(saved(tmp_path / "in.pth", w), tmp_path / "out", **SMALL)
    assert loaded.kind == "controlnet" and loaded.config["num_layers"] == 2 and loaded.config["timestep_scale"] == (0.001 if sprint else 1.0)
    assert ("blocks.2.attn.qkv.weight" in loaded.side) == base
    assert any("feeds the copied blocks" in note for note in loaded.notes)
    with safe_open(tmp_path / "out" / SIDE_FILE, "pt") as side:
        assert "fine-tune after converting" in side.metadata()["note"]
    model = SanaSprintControlNetModel.from_pretrained(tmp_path / "out")
    assert model.config.guidance_embeds == sprint
    assert torch.equal(model.input_block.weight, w["controlnet.0.before_proj.weight"])
    assert torch.equal(model.controlnet_blocks[1].bias, w["controlnet.1.after_proj.bias"])
    assert torch.equal(model.transformer_blocks[1].attn1.to_v.weight, w["controlnet.1.copied_block.attn.qkv.weight"][2 * WIDTH :])
    if not sprint:
        stock, info = SanaControlNetModel.from_pretrained(tmp_path / "out", output_loading_info=True)
        assert not any(info.values()) and torch.equal(stock.controlnet_blocks[0].weight, w["controlnet.0.after_proj.weight"])
    assert any("feeds the copied blocks" in note for note in to_pth(tmp_path / "out", tmp_path / "back.pth"))
    same(torch.load(tmp_path / "back.pth", weights_only=True)["state_dict"], w)


def test_the_base_model_comes_out_of_a_controlnets_file_too(tmp_path):
    w = native_weights("base", copied=2)
    to_diffusers(saved(tmp_path / "in.pth", w), tmp_path / "out", kind="base", **SMALL)
    model = SanaTransformer2DModel.from_pretrained(tmp_path / "out")
    assert torch.equal(model.transformer_blocks[2].attn2.to_k.bias, w["blocks.2.cross_attn.kv_linear.bias"][:WIDTH])
    to_pth(tmp_path / "out", tmp_path / "back.pth")
    same(torch.load(tmp_path / "back.pth", weights_only=True)["state_dict"], w)


@pytest.mark.parametrize("make", [tiny_transformer, lambda: tiny_transformer(guidance_embeds=False), lambda: tiny_controlnet(tiny_transformer())])
def test_our_own_models_go_to_pth_and_back(make, tmp_path):
    model = make()
    model.save_pretrained(tmp_path / "model")
    notes = to_pth(tmp_path / "model", tmp_path / "m.pth")
    assert any("without y_embedder.y_embedding" in note for note in notes)
    kind = "auto" if model.config.guidance_embeds else "teacher"
    loaded = load_pth(tmp_path / "m.pth", kind=kind, image_px=128, **SMALL)
    for key, value in loaded.config.items():
        assert key == "_class_name" or model.config[key] == value, key
    same(build_model(loaded).state_dict(), model.state_dict())


def test_a_fine_tuned_model_takes_the_side_file_of_the_one_it_came_from(tmp_path):
    w = native_weights("base")
    to_diffusers(saved(tmp_path / "in.pth", w), tmp_path / "first", **SMALL)
    SanaTransformer2DModel.from_pretrained(tmp_path / "first").save_pretrained(tmp_path / "tuned")
    to_pth(tmp_path / "tuned", tmp_path / "back.pth", side=tmp_path / "first")
    same(torch.load(tmp_path / "back.pth", weights_only=True)["state_dict"], w)
    with pytest.raises(ValueError, match="is missing"):
        to_pth(tmp_path / "tuned", tmp_path / "back.pth", side=tmp_path)


def test_the_command_does_both_ways_and_says_what_it_found(tmp_path, monkeypatch, capsys):
    w = native_weights("sprint")
    saved(tmp_path / "in.pth", w, epoch=3)

    def command(*args):
        monkeypatch.setattr(sys, "argv", ["training.convert", *map(str, args)])
        main()
        return capsys.readouterr().out

    there = ("to-diffusers", tmp_path / "in.pth", tmp_path / "out", "--cross-heads", HEADS, "--head-dim", 16)
    found = command(*there)
    assert "sprint: width 32, 3 blocks" in found and "not converted: epoch" in found
    with pytest.raises(SystemExit, match="error: .* is not empty"):
        command(*there)
    command("to-pth", tmp_path / "out", tmp_path / "back.pth")
    same(torch.load(tmp_path / "back.pth", weights_only=True)["state_dict"], w)


# ---- published sizes, names and shapes only -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind, width, depth, heads, size", [
    ("base", 1152, 28, 16, "0.6B"), ("base", 2240, 20, 20, "1.6B"), ("teacher", 2240, 20, 20, "1.6B"),
    ("sprint", 1152, 28, 16, "0.6B"), ("sprint", 2240, 20, 20, "1.6B"), ("base", 2240, 60, 20, "4.8B"),
])  # fmt: skip
def test_published_sizes_are_recognised_whole(kind, width, depth, heads, size):
    """The 4.8B model among them: a public converter misspells its name and raises."""
    shapes = native_shapes(kind, width, depth, 32, 2304, qk_norm=True if depth == 60 else None)
    native = {k: torch.empty(v, device="meta") for k, v in shapes.items()} | {"pos_embed": torch.zeros(1, 1024, 1)}
    found, config, state, side, notes = convert(native, kind="teacher" if kind == "teacher" else "auto")
    assert found == kind and f"({size})" in notes[0]
    wanted = PUBLISHED_TRANSFORMER_CONFIG | dict(
        num_attention_heads=width // 32, num_layers=depth, num_cross_attention_heads=heads, cross_attention_head_dim=width // heads,
        cross_attention_dim=width, guidance_embeds=kind == "sprint", timestep_scale=1.0 if kind == "base" else 0.001,
        qk_norm=None if kind == "base" and depth != 60 else "rms_norm_across_heads",
    )  # fmt: skip
    assert config == {k: v for k, v in wanted.items() if k != "_diffusers_version"}
    with torch.device("meta"):
        stock = SanaTransformer2DModel(**{k: v for k, v in config.items() if not k.startswith("_")})
    assert {k: v.shape for k, v in state.items()} == {k: v.shape for k, v in stock.state_dict().items()}
    if kind == "base":
        assert sum(v.numel() for v in state.values()) / 1e9 == pytest.approx(float(size[:-1]), abs=0.1)


def test_a_published_controlnet_is_recognised(tmp_path):
    native = {k: torch.empty(v, device="meta") for k, v in native_shapes("base", 2240, 20, 32, 2304, copied=7).items()}
    kind, config, state, side, notes = convert(native, image_px=1024)
    assert kind == "controlnet" and config["num_layers"] == 7 and config["_class_name"] == "SanaControlNetModel"
    with torch.device("meta"):
        stock = SanaControlNetModel(**{k: v for k, v in config.items() if k in SanaControlNetModel._get_init_keys(SanaControlNetModel)})
    assert {k: v.shape for k, v in state.items()} == {k: v.shape for k, v in stock.state_dict().items()}
    assert sum(k.startswith("blocks.") for k in side) == 20 * 15


@pytest.mark.parametrize("px", [512, 1024, 2048, 4096])
def test_the_picture_size_is_read_off_the_position_embedding(px, tmp_path):
    """It is all zero where it is not used; at 2048 and 4096 px the model adds it, scaled by 1 and 2."""
    w = native_weights("base")
    w["pos_embed"] = torch.full((1, (px // 32) ** 2, WIDTH), 0.5 if INTERPOLATION[px] else 0.0)
    config = load_pth(saved(tmp_path / "in.pth", w), **SMALL).config
    assert (config["sample_size"], config["interpolation_scale"]) == (px // 32, INTERPOLATION[px])
    assert json.loads(json.dumps(config)) == config
    w["pos_embed"] = 0.5 - w["pos_embed"]
    with pytest.raises(ValueError, match="interpolation-scale"):
        load_pth(saved(tmp_path / "in.pth", w), **SMALL)
    if px == 2048:
        to_diffusers(saved(tmp_path / "in.pth", w), tmp_path / "out", interpolation=1.5, **SMALL)
        assert SanaTransformer2DModel.from_pretrained(tmp_path / "out").patch_embed.pos_embed.shape == (1, 4096, WIDTH)


# ---- what the tensors cannot tell, and what is wrong ------------------------------------------------------------------------


def test_a_teacher_and_sana_15_look_alike_so_the_kind_is_asked_for(tmp_path):
    path = saved(tmp_path / "in.pth", native_weights("teacher"))
    with pytest.raises(ValueError, match="--kind base or --kind teacher"):
        load_pth(path, **SMALL)
    assert load_pth(path, kind="teacher", **SMALL).config["timestep_scale"] == 0.001
    assert load_pth(path, timestep_scale=0.001, **SMALL).kind == "teacher"
    assert load_pth(path, kind="base", **SMALL).config["timestep_scale"] == 1.0
    saved(tmp_path / "control.pth", native_weights("teacher", copied=2))
    with pytest.raises(ValueError, match="--timestep-scale"):
        load_pth(tmp_path / "control.pth", **SMALL)


def test_cross_heads_of_an_unpublished_width_are_asked_for(tmp_path):
    with pytest.raises(ValueError, match="--cross-heads"):
        load_pth(saved(tmp_path / "in.pth", native_weights("base")))


def test_missing_qk_norms_are_all_named(tmp_path):
    """strict=False in a public loader leaves them at 1: garbage pictures."""
    w = native_weights("sprint")
    gone = [k for k in w if "_norm.weight" in k and k.startswith("blocks.1.")]
    assert len(gone) == 4
    path = saved(tmp_path / "in.pth", {k: v for k, v in w.items() if k not in gone})
    with pytest.raises(ValueError) as error:
        load_pth(path, **SMALL)
    assert all(f"{k} [32] is missing" in str(error.value) for k in gone)
    with pytest.raises(ValueError, match="blocks.2.cross_attn.k_norm.weight .* is missing"):
        load_pth(saved(tmp_path / "in.pth", native_weights("base")), kind="teacher", **SMALL)


def test_every_missing_unexpected_and_misshapen_weight_is_named(tmp_path):
    w = native_weights("base")
    del w["t_block.1.bias"], w["blocks.0.attn.proj.bias"]
    w |= {"blocks.1.extra.weight": torch.zeros(2), "head.bias": torch.zeros(3), "attention_y_norm.weight": torch.ones(31)}
    w["blocks.2.attn.qkv.weight"] = w["blocks.2.attn.qkv.weight"][:-1]
    with pytest.raises(ValueError) as error:
        load_pth(saved(tmp_path / "in.pth", w), **SMALL)
    lines = [line.strip() for line in str(error.value).splitlines()[1:]]
    assert set(lines) == {
        "t_block.1.bias [192] is missing", "blocks.0.attn.proj.bias [32] is missing", "blocks.1.extra.weight [2] has no place in this model",
        "head.bias [3] has no place in this model", "attention_y_norm.weight is [31], wanted [32]", "blocks.2.attn.qkv.weight is [95, 32], wanted [96, 32]",
    }  # fmt: skip
    with pytest.raises(ValueError, match="x_embedder.proj.weight"):
        load_pth(saved(tmp_path / "in.pth", {"a": torch.zeros(2)}), **SMALL)


@pytest.mark.parametrize("dropped", ["y_embedder.y_embedding", "pos_embed", "logvar_linear.weight"])
def test_one_absent_side_tensor_does_not_stop_the_others(dropped, tmp_path):
    """A public converter drops them in one try block: the first that is absent leaves the others in the way."""
    w = {k: v for k, v in native_weights("sprint").items() if k != dropped}
    loaded = load_pth(saved(tmp_path / "in.pth", w), **SMALL)
    assert loaded.side.keys() == {"y_embedder.y_embedding", "pos_embed", "logvar_linear.weight", "logvar_linear.bias"} - {dropped}


def test_nan_weights_are_refused_by_name(tmp_path):
    w = native_weights("base")
    w["blocks.1.cross_attn.proj.weight"][3, 4] = float("nan")
    with pytest.raises(ValueError, match="NaN or infinite values in blocks.1.cross_attn.proj.weight"):
        load_pth(saved(tmp_path / "in.pth", w), **SMALL)


class Evil:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("place", ["top", "state", "bare pickle"])
def test_code_in_a_pth_is_not_run(place, tmp_path):
    marker, path = tmp_path / "ran", tmp_path / "in.pth"
    w = native_weights("base")
    if place == "bare pickle":
        path.write_bytes(pickle.dumps({"state_dict": Evil(marker)}))
    else:
        torch.save({"state_dict": w, "args": Evil(marker)} if place == "top" else {"state_dict": w | {"x": Evil(marker)}}, path)
    with pytest.raises(ValueError, match="cannot be read" if place == "bare pickle" else r"holds Python objects \(\w+\.mkdir\)") as error:
        load_pth(path, **SMALL)
    assert not marker.exists()
    assert "weights_only" not in str(error.value)       # torch's advice, to read it unsafely, is not passed on


def test_a_training_checkpoint_with_numpy_state_says_how_to_save_the_weights_alone(tmp_path):
    path = saved(tmp_path / "in.pth", native_weights("base"), rng_state=np.random.get_state())
    with pytest.raises(ValueError, match=r"Python objects \(numpy.*save it again as torch.save"):
        load_pth(path, **SMALL)


def test_wrong_and_cut_files_are_refused_with_a_reason(tmp_path):
    path = saved(tmp_path / "good.pth", native_weights("base"))
    whole = path.read_bytes()
    bad = tmp_path / "bad.pth"
    for content in (b"", b"hello", whole[:100], whole[: len(whole) // 2], whole[:-30], b"<html>" * 99):
        bad.write_bytes(content)
        with pytest.raises(ValueError, match="cut short, damaged or something else") as error:
            load_pth(bad, **SMALL)
        assert "weights_only" not in str(error.value)
    bad.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(ValueError, match="Git LFS pointer"):
        load_pth(bad, **SMALL)
    for content, message in [([torch.zeros(2)], "a list"), ({"epoch": 3}, "its keys are epoch"), ({"state_dict": {"x": 3}}, "something else: x"),
                             ({"state_dict": {"x": torch.zeros(1).expand(10**9)}}, "larger than the whole file: x")]:  # fmt: skip
        torch.save(content, bad)
        with pytest.raises(ValueError, match=message):
            load_pth(bad, **SMALL)
    with pytest.raises(ValueError, match="is not a file"):
        load_pth(tmp_path / "none.pth", **SMALL)
    with pytest.raises(ValueError, match="no state_dict_ema"):
        load_pth(path, ema=True, **SMALL)


def test_a_file_of_the_old_torch_format_loads_and_ema_can_be_chosen(tmp_path):
    w, ema = native_weights("base"), native_weights("base", seed=5)
    torch.save({"state_dict": w, "state_dict_ema": ema, "epoch": 1}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    key = "transformer_blocks.0.attn1.to_out.0.weight"
    loaded = load_pth(tmp_path / "old.pth", **SMALL)
    assert torch.equal(loaded.state[key], w["blocks.0.attn.proj.weight"]) and "not converted: state_dict_ema, epoch" in loaded.notes[-1]
    assert torch.equal(load_pth(tmp_path / "old.pth", ema=True, **SMALL).state[key], ema["blocks.0.attn.proj.weight"])


@pytest.mark.parametrize("harm, message", [("cut", "damaged or cut short"), ("config", "is \\[.*\\], wanted"), ("gone", "config.json"), ("class", "wanted SanaTransformer2DModel")])
def test_a_damaged_folder_is_refused(harm, message, tmp_path):
    folder = tmp_path / "m" / "transformer"
    to_diffusers(saved(tmp_path / "in.pth", native_weights("base")), folder, **SMALL)
    weights, config = folder / "diffusion_pytorch_model.safetensors", folder / "config.json"
    if harm == "cut":
        weights.write_bytes(weights.read_bytes()[:-99])
    elif harm == "gone":
        folder = tmp_path / "m"                       # the model's folder in place of the transformer's
    else:
        change = {"caption_channels": 25} if harm == "config" else {"_class_name": "FluxTransformer2DModel"}
        config.write_text(json.dumps(json.loads(config.read_text()) | change))
    with pytest.raises(ValueError, match=message):
        to_pth(folder, tmp_path / "back.pth")
    assert not (tmp_path / "back.pth").exists()


# ---- big files ------------------------------------------------------------------------------------------------------------


def test_q_k_v_are_views_of_the_file_and_nothing_is_written_twice(tmp_path):
    path = saved(tmp_path / "in.pth", native_weights("base", width=64))
    loaded = load_pth(path, cross_heads=2)
    storages = {loaded.state[f"transformer_blocks.0.attn1.to_{n}.weight"].untyped_storage().data_ptr() for n in "qkv"}
    assert len(storages) == 1
    to_diffusers(path, tmp_path / "out", cross_heads=2, shard_size="200KB")
    assert len(list((tmp_path / "out").glob("diffusion_pytorch_model-*.safetensors"))) > 2
    assert SanaTransformer2DModel.from_pretrained(tmp_path / "out").config.num_layers == DEPTH
    to_pth(tmp_path / "out", tmp_path / "back.pth")
    assert abs((tmp_path / "back.pth").stat().st_size / path.stat().st_size - 1) < 0.05
    same(torch.load(tmp_path / "back.pth", weights_only=True)["state_dict"], torch.load(path, weights_only=True)["state_dict"])


def test_a_name_without_a_counterpart_is_refused():
    for name in ("transformer_blocks.0.norm9.weight", "text_encoder.layer.weight", "transformer_blocks.0.attn1.to_q2"):
        with pytest.raises(ValueError, match=re.escape(name)):
            native_name(name)

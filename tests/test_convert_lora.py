"""LoRA for ComfyUI: the fused pairs add what the parts add, on the native weights what diffusers adds on its own; and back."""

import json
import sys

import pytest
import torch
from diffusers import SanaPipeline, SanaTransformer2DModel
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from diffusers.training_utils import _collate_lora_metadata
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from layouts import tiny_transformer

from training.convert.__main__ import main
from training.convert.comfy import PARTS_KEY, Pair, fuse, lora_from_comfy, lora_to_comfy, split, unfuse
from training.convert.keymap import from_native, to_native

FILE = "pytorch_lora_weights.safetensors"
RANK = 3


def adapted(seed=0, dtype=torch.float32, **config) -> SanaTransformer2DModel:
    """A transformer with a random adapter (B as well: a fresh one is zero)."""
    model = tiny_transformer(seed=0, num_layers=2).to(dtype)
    model.add_adapter(LoraConfig(**dict(r=RANK, lora_alpha=5.0, target_modules=["to_q", "to_k", "to_v", "to_out.0"]) | config))
    g = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        if ".lora_" in name:
            p.data = (torch.randn(p.shape, generator=g) * 0.2).to(dtype)
    return model


def saved(model, folder):
    """As diffusers' training scripts save it: weights, and peft's settings in the header."""
    SanaPipeline.save_lora_weights(folder, transformer_lora_layers=get_peft_model_state_dict(model), **_collate_lora_metadata({"transformer": model}))
    return folder / FILE


def contents(file):
    with safe_open(file, "pt") as f:
        return {k: f.get_tensor(k) for k in f.keys()}, f.metadata()


def same(a, b):
    assert a.keys() == b.keys(), a.keys() ^ b.keys()
    for k in a:
        assert a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]), k


def comfy_applied(native, lora):
    """What ComfyUI does: weight + alpha/rank · up · down under diffusion_model.NAME."""
    native, used = dict(native), set()
    for key in lora:
        if key.endswith(".lora_up.weight"):
            name = key.removeprefix("diffusion_model.").removesuffix(".lora_up.weight")
            up, down, alpha = (lora[f"diffusion_model.{name}.{part}"] for part in ("lora_up.weight", "lora_down.weight", "alpha"))
            delta = alpha.item() / down.shape[0] * (up.double().flatten(1) @ down.double().flatten(1))
            weight = native[f"{name}.weight"]
            native[f"{name}.weight"] = (weight.double() + delta.reshape(weight.shape)).to(weight.dtype)
            used |= {f"diffusion_model.{name}.{part}" for part in ("lora_up.weight", "lora_down.weight", "alpha")}
    assert used == set(lora), set(lora) - used
    return native


def fused_by_diffusers(file):
    """The stock way: load the adapter, add it to the weights, drop it."""
    model = tiny_transformer(seed=0, num_layers=2)
    model.load_lora_adapter(str(file.parent), weight_name=file.name, prefix="transformer")
    model.fuse_lora()
    model.unload_lora()
    return model.state_dict()


CONFIGS = {
    "q, k, v, out": {},
    "q, v": dict(target_modules=["to_q", "to_v"]),
    "k alone": dict(target_modules=["to_k"]),
    "own ranks and alphas": dict(rank_pattern={"to_k": 2, "transformer_blocks.1.attn1.to_v": 4}, alpha_pattern={"attn1.to_q": 1.7, "attn2.to_v": 9.0}),
    "rsLoRA": dict(use_rslora=True),
    "feed-forward, time, text and last layer": dict(target_modules=["conv_inverted", "conv_point", "time_embed.linear", "caption_projection.linear_1", "proj_out", "to_v"]),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_on_the_native_weights_the_export_does_what_diffusers_does_with_the_adapter(config, tmp_path):
    file = saved(adapted(**config), tmp_path)
    lora_to_comfy(file, tmp_path / "comfy.safetensors")
    base = tiny_transformer(seed=0, num_layers=2).state_dict()
    ours = from_native(comfy_applied(to_native(base), load_file(tmp_path / "comfy.safetensors")), list(base))
    wanted = fused_by_diffusers(file)
    assert wanted.keys() == ours.keys() and any(not torch.equal(wanted[k], base[k]) for k in base)
    for k in wanted:
        torch.testing.assert_close(ours[k], wanted[k], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_there_and_back_is_the_identity(config, dtype, tmp_path):
    """Weights to the bit, ranks, alphas and every other entry of the header."""
    file = saved(adapted(dtype=dtype, **config), tmp_path)
    lora_to_comfy(file, tmp_path / "comfy.safetensors")
    lora_from_comfy(tmp_path / "comfy.safetensors", tmp_path / "back.safetensors")
    (tensors, header), (back, back_header) = contents(file), contents(tmp_path / "back.safetensors")
    same(back, tensors)
    assert back_header == header and json.loads(header[LORA_ADAPTER_METADATA_KEY])["transformer.lora_alpha"] == 5.0


def test_names_ranks_and_alphas_are_those_comfyui_looks_for(tmp_path):
    lora_to_comfy(saved(adapted(), tmp_path), tmp_path / "comfy.safetensors")
    found, _ = contents(tmp_path / "comfy.safetensors")
    shapes = {k: tuple(v.shape) for k, v in found.items() if "blocks.1." in k}
    width, wanted = 32, {}
    for name, parts in {"attn.qkv": 3, "attn.proj": 1, "cross_attn.q_linear": 1, "cross_attn.kv_linear": 2, "cross_attn.proj": 1}.items():
        key = f"diffusion_model.blocks.1.{name}"
        wanted |= {f"{key}.lora_up.weight": (parts * width, parts * RANK), f"{key}.lora_down.weight": (parts * RANK, width), f"{key}.alpha": ()}
        assert found[f"{key}.alpha"].item() == 5.0 * parts
    assert shapes == wanted


def test_a_plain_peft_folder_exports_like_the_diffusers_file(tmp_path):
    from peft import get_peft_model

    model = adapted()
    wrapped = get_peft_model(tiny_transformer(seed=0, num_layers=2), model.peft_config["default"])
    wrapped.load_state_dict({f"base_model.model.{k}": v for k, v in model.state_dict().items()})
    wrapped.save_pretrained(tmp_path / "peft")
    lora_to_comfy(tmp_path / "peft", tmp_path / "a.safetensors")
    lora_to_comfy(saved(model, tmp_path / "diffusers").parent, tmp_path / "b.safetensors")
    same(load_file(tmp_path / "a.safetensors"), load_file(tmp_path / "b.safetensors"))
    lora_from_comfy(tmp_path / "a.safetensors", tmp_path / "back.safetensors")
    same(load_file(tmp_path / "back.safetensors"), load_file(tmp_path / "diffusers" / FILE))
    assert json.loads(contents(tmp_path / "back.safetensors")[1][LORA_ADAPTER_METADATA_KEY])["transformer.lora_alpha"] == 5.0


@pytest.mark.parametrize("config", [CONFIGS["q, k, v, out"], CONFIGS["q, v"], CONFIGS["own ranks and alphas"]], ids=["qkvo", "qv", "own"])
@pytest.mark.parametrize("change", ["no header", "alpha changed"])
def test_a_file_of_another_tool_imports_with_the_same_delta(config, change, tmp_path):
    """Without our header, or with alphas that another tool has changed since, diffusers still adds what ComfyUI adds."""
    lora_to_comfy(saved(adapted(**config), tmp_path), tmp_path / "comfy.safetensors")
    tensors, header = contents(tmp_path / "comfy.safetensors")
    if change == "alpha changed":
        tensors = {k: v * 0.5 if k.endswith(".alpha") else v for k, v in tensors.items()}
    save_file(tensors, tmp_path / "comfy.safetensors", metadata=header if change == "alpha changed" else None)
    lora_from_comfy(tmp_path / "comfy.safetensors", tmp_path / "back.safetensors")
    base = tiny_transformer(seed=0, num_layers=2).state_dict()
    wanted = from_native(comfy_applied(to_native(base), tensors), list(base))
    got = fused_by_diffusers(tmp_path / "back.safetensors")
    for k in wanted:
        torch.testing.assert_close(got[k], wanted[k], atol=1e-6, rtol=1e-6)


def test_a_dense_native_adapter_splits_into_parts_of_the_same_delta(tmp_path):
    """Trained on the fused weights: every column reaches q, k and v; no alpha means scale 1, as in ComfyUI."""
    g = torch.Generator().manual_seed(3)
    down, up = torch.randn(4, 32, generator=g), torch.randn(96, 4, generator=g)
    key = "diffusion_model.blocks.0.attn.qkv"
    save_file({f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up}, tmp_path / "comfy.safetensors")
    lora_from_comfy(tmp_path / "comfy.safetensors", tmp_path / "back.safetensors")
    base, got = tiny_transformer(seed=0, num_layers=2).state_dict(), fused_by_diffusers(tmp_path / "back.safetensors")
    for i, n in enumerate("qkv"):
        name = f"transformer_blocks.0.attn1.to_{n}.weight"
        torch.testing.assert_close(got[name] - base[name], (up @ down)[32 * i : 32 * (i + 1)], atol=1e-5, rtol=1e-5)


def random_pair(g, rank, alpha, dtype=torch.float32):
    return Pair(torch.randn(rank, 6, generator=g).to(dtype), torch.randn(5, rank, generator=g).to(dtype), alpha)


def delta(pair):
    return pair.alpha / pair.rank * (pair.up.double() @ pair.down.double())


@pytest.mark.parametrize("present", [(1, 1, 1), (1, 0, 1), (0, 1, 0), (1, 1), (0, 1)])
@pytest.mark.parametrize("alphas", [(4.0, 4.0, 4.0), (4.0, 0.3, 11.0)])
def test_the_fused_pair_adds_what_its_parts_add(present, alphas):
    g = torch.Generator().manual_seed(1)
    parts = [random_pair(g, 4, alpha) if there else None for there, alpha in zip(present, alphas)]
    fused = fuse(parts)
    wanted = torch.cat([torch.zeros(5, 6, dtype=torch.float64) if p is None else delta(p) for p in parts])
    torch.testing.assert_close(delta(fused), wanted, atol=1e-6, rtol=1e-6)
    assert fused.rank == 4 * sum(present)
    found = split(fused, len(parts))
    assert [p is not None for p in found] == [bool(p) for p in present]
    torch.testing.assert_close(torch.cat([torch.zeros(5, 6, dtype=torch.float64) if p is None else delta(p) for p in found]), wanted, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_parts_with_their_own_ranks_and_alphas_come_back_to_the_bit(dtype):
    g = torch.Generator().manual_seed(2)
    parts = [random_pair(g, rank, alpha, dtype) for rank, alpha in ((4, 4.0), (2, 0.7), (5, 3.3))]
    fused = fuse(parts)
    assert fused.up.dtype != dtype                  # scaled, so one precision wider
    back = unfuse(fused, [p.rank for p in parts], [p.scale for p in parts], [p.up.dtype for p in parts])
    for a, b in zip(back, parts):
        assert torch.equal(a.up, b.up) and torch.equal(a.down, b.down) and a.alpha == pytest.approx(b.alpha, rel=1e-12)


def test_an_untrained_adapter_keeps_its_parts(tmp_path):
    model = adapted()
    for name, p in model.named_parameters():
        if ".lora_B." in name:
            p.data.zero_()
    file = saved(model, tmp_path)
    lora_to_comfy(file, tmp_path / "comfy.safetensors")
    lora_from_comfy(tmp_path / "comfy.safetensors", tmp_path / "back.safetensors")
    same(load_file(tmp_path / "back.safetensors"), load_file(file))
    save_file(load_file(tmp_path / "comfy.safetensors"), tmp_path / "bare.safetensors")
    lora_from_comfy(tmp_path / "bare.safetensors", tmp_path / "back.safetensors")
    assert load_file(tmp_path / "back.safetensors").keys() == load_file(file).keys()


def test_what_is_no_adapter_of_sana_is_refused_by_name(tmp_path):
    good = load_file(saved(adapted(), tmp_path))
    key = "transformer.transformer_blocks.0.attn1.to_q.lora_A.weight"
    bad, out = tmp_path / "bad.safetensors", tmp_path / "out.safetensors"
    nan = good[key].clone()
    nan[0, 0] = float("nan")
    for tensors, message in [
        ({k: v for k, v in good.items() if k != key}, "transformer_blocks.0.attn1.to_q has no lora_down"),
        (good | {key: good[key][:2].contiguous()}, "are not a pair"),
        (good | {"transformer.transformer_blocks.0.attn1.to_q.lora_magnitude_vector": torch.ones(32)}, "to_q.lora_magnitude_vector"),
        (good | {"text_encoder.q.lora_A.weight": torch.ones(2, 2), "text_encoder.q.lora_B.weight": torch.ones(2, 2)}, "text_encoder.q has no counterpart"),
        (good | {key: nan}, "NaN or infinite values in .*to_q"),
        ({}, "no tensors"),
        ({"diffusion_model.blocks.0.attn.qkv.lora_up.weight": torch.ones(2, 2)}, "use lora-from-comfy"),
    ]:
        save_file(tensors, bad)
        with pytest.raises(ValueError, match=message):
            lora_to_comfy(bad, out)
    save_file(good, bad)
    bad.write_bytes(bad.read_bytes()[:-50])
    with pytest.raises(ValueError, match="damaged or cut short"):
        lora_to_comfy(bad, out)
    for source in (tmp_path / "none", tmp_path / "none.safetensors"):
        with pytest.raises(ValueError, match="no LoRA at"):
            lora_to_comfy(source, out)
    assert not out.exists()


def test_a_changed_or_foreign_comfyui_file_is_refused_by_name(tmp_path):
    lora_to_comfy(saved(adapted(), tmp_path), tmp_path / "comfy.safetensors")
    tensors, header = contents(tmp_path / "comfy.safetensors")
    qkv, bad, out = "diffusion_model.blocks.0.attn.qkv", tmp_path / "bad.safetensors", tmp_path / "out.safetensors"
    smaller = {f"{qkv}.lora_down.weight": torch.ones(2, 32), f"{qkv}.lora_up.weight": torch.ones(96, 2)}
    for change, metadata, message in [
        (smaller, header, "blocks.0.attn.qkv has rank 2, its header says"),
        ({}, header | {PARTS_KEY: "[1"}, "not readable JSON"),
        ({}, header | {PARTS_KEY: '{"blocks.0.attn.qkv": [[1, 2]]}'}, "not as lora-to-comfy writes it"),
        (smaller | {f"{qkv}.lora_up.weight": torch.ones(95, 2)}, None, "does not divide into 3 parts"),
        ({"diffusion_model.double_blocks.0.img_attn.qkv.lora_up.weight": torch.ones(4, 2), "diffusion_model.double_blocks.0.img_attn.qkv.lora_down.weight": torch.ones(2, 4)},
         None, "double_blocks.0.img_attn.qkv is not a module of SANA"),
        ({f"{qkv}.dora_scale": torch.ones(96, 1)}, None, "dora_scale"),
        ({f"{qkv}.alpha": torch.ones(2)}, None, "wanted one number"),
    ]:  # fmt: skip
        save_file(tensors | change, bad, metadata=metadata)
        with pytest.raises(ValueError, match=message):
            lora_from_comfy(bad, out)
    assert not out.exists()


def test_the_command_goes_both_ways(tmp_path, monkeypatch, capsys):
    file = saved(adapted(), tmp_path / "lora")
    for args in (["lora-to-comfy", file.parent, tmp_path / "c.safetensors"], ["lora-from-comfy", tmp_path / "c.safetensors", tmp_path / "b.safetensors"]):
        monkeypatch.setattr(sys, "argv", ["training.convert", *map(str, args)])
        main()
    assert "16 pairs -> 10 for ComfyUI" in capsys.readouterr().out
    same(load_file(tmp_path / "b.safetensors"), load_file(file))

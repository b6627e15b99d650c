"""Model folders that are damaged, half-written, unknown or of another kind: refused by name, before anything is drawn."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from layouts import build_base_folder
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from sana_app.model.pipeline import SanaSprintControlNetPipeline


def picture(pipe):
    return pipe("a red apple", seed=3, output_type="pt").images


def cut_file(path):
    path.write_bytes(path.read_bytes()[:-100])


def edit_tensors(path, change):
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def edit_json(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
NAME = "transformer_blocks.1.attn1.to_q.weight"
DAMAGE = {
    "no folder": (shutil.rmtree, "no model folder at"),
    "no index": (lambda f: (f / "model_index.json").unlink(), "model_index.json is missing"),
    "cut index": (lambda f: cut_file(f / "model_index.json"), "not readable JSON"),
    "no component": (lambda f: shutil.rmtree(f / "vae"), "vae has no config"),
    "another pipeline": (lambda f: (f / "model_index.json").write_text("{}"), "not a SANA-Sprint folder"),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), "transformer has no safetensors weights"),
    "cut weights": (lambda f: cut_file(f / WEIGHTS), "damaged or cut short"),
    "cut controlnet": (lambda f: cut_file(f / "controlnet/diffusion_pytorch_model.safetensors"), "controlnet.*damaged"),
    "cut text encoder": (lambda f: cut_file(f / "text_encoder/model.safetensors"), "text_encoder.*damaged"),
    "missing tensor": (lambda f: edit_tensors(f / WEIGHTS, lambda t: t.pop(NAME)), f"{NAME} is missing"),
    "extra tensor": (lambda f: edit_tensors(f / WEIGHTS, lambda t: t.update(odd=torch.ones(1))), "odd is not part"),
    "wrong shape": (
        lambda f: edit_tensors(f / WEIGHTS, lambda t: t.update({NAME: torch.ones(3, 3)})),
        rf"{NAME} is \(3, 3\), wanted \(32, 32\)",
    ),
    "NaN": (lambda f: edit_tensors(f / WEIGHTS, lambda t: t[NAME].fill_(float("nan"))), f"transformer: {NAME} holds NaN"),
    "NaN in controlnet": (
        lambda f: edit_tensors(f / "controlnet/diffusion_pytorch_model.safetensors", lambda t: t[NAME].fill_(np.inf)),
        f"controlnet: {NAME} holds NaN",
    ),
    "other text encoder": (lambda f: edit_json(f / "prompt.json", max_tokens="x"), "prompt.json"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_folders_are_refused_by_name(folder, damage):
    spoil, message = DAMAGE[damage]
    spoil(folder)
    with pytest.raises(ValueError, match=message):
        SanaSprintControlNetPipeline.from_pretrained(folder)


def test_pickled_weights_are_never_loaded(folder):
    weights = folder / WEIGHTS
    torch.save(load_file(weights), weights.with_suffix(".bin"))
    weights.unlink()
    with pytest.raises(ValueError, match="pickled weights are not loaded"):
        SanaSprintControlNetPipeline.from_pretrained(folder)


def test_an_interrupted_save_is_not_a_model(pipe, tmp_path, monkeypatch):
    def fail(folder):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(pipe.vae, "save_pretrained", lambda *a, **k: fail(a), raising=True)
        with pytest.raises(OSError):
            pipe.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()
    pipe.save_pretrained(tmp_path / "model")
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_an_interrupted_overwrite_is_refused_until_saved_again(pipe, folder, monkeypatch):
    move = Path.replace

    def stop_at_the_vae(self, target):
        if self.name == "vae":
            raise KeyboardInterrupt
        return move(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", stop_at_the_vae)
        with pytest.raises(KeyboardInterrupt):
            pipe.save_pretrained(folder)
    with pytest.raises(ValueError, match="model_index.json is missing"):
        SanaSprintControlNetPipeline.from_pretrained(folder)
    pipe.save_pretrained(folder)
    assert_close(picture(SanaSprintControlNetPipeline.from_pretrained(folder)), picture(pipe), rtol=0, atol=1e-6)


def test_unknown_names_are_refused():
    for name in ("assets/models/no-such-model", "no-such-owner/no-such-model"):
        with pytest.raises(ValueError, match=name):
            SanaSprintControlNetPipeline.from_pretrained(name)


def test_a_flow_model_is_refused_with_what_to_do(tmp_path):
    folder = build_base_folder(tmp_path / "base")
    with pytest.raises(ValueError, match="it is a flow model .* Distil it first"):
        SanaSprintControlNetPipeline.from_pretrained(folder)

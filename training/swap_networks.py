"""The networks of a swap: which layers of the base start anew, how they start, and who learns how fast."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import SanaTransformer2DModel
from torch import nn

from sana_app.model.controlnet import SanaSprintControlNetModel
from sana_app.model.folder import read_json
from training.base import components, load_part, refuse_sprint, set_latent_size
from training.batches import Corpus
from training.config import Config
from training.loop import device
from training.optim import layer_groups
from training.swap_plan import Plan
from training.text import load_text_encoder

LATENT_LAYERS = ("patch_embed.proj", "proj_out")
CAPTION_LAYERS = ("caption_projection.linear_1", "caption_projection.linear_2")  # caption_norm is kept: its width is the transformer's


def affected_layers(model: nn.Module, channels: int, caption_channels: int, plan: Plan, forced: bool) -> list[str]:
    """Names of the layers of a transformer or ControlNet that start anew: those whose channels do not fit, or all at a swapped
    part where `forced`."""
    found = []
    if model.config.in_channels != channels or forced and plan.vae == "new latent":
        found += [name for name in LATENT_LAYERS if hasattr(model, name.split(".")[0])]  # a ControlNet has no proj_out
    if model.config.caption_channels != caption_channels or forced and plan.text:
        found += CAPTION_LAYERS
    return found


def refit(model: nn.Module, plan: Plan, config: Config, channels: int, caption_channels: int, latent_side: int, start: nn.Module | None = None) -> list[str]:
    """Makes a transformer or ControlNet one for the swapped parts, in place; -> the names of the layers that start anew.

    New layers start as in NVlabs' initialize_weights: Xavier-uniform embeddings, the last layer at zero. The first caption
    layer is divided by the states' rms, so that its input has unit scale. Everything else keeps its bits. `start`: where the
    layers are taken from instead (a ControlNet takes its transformer's, of which it is a copy).
    """
    names, patch = affected_layers(model, channels, caption_channels, plan, config.swap_reinit), model.config.patch_size
    made = {"patch_embed.proj": lambda old: nn.Conv2d(channels, old.out_channels, patch, patch, bias=old.bias is not None),
            "proj_out": lambda old: nn.Linear(old.in_features, patch * patch * channels),
            "caption_projection.linear_1": lambda old: nn.Linear(caption_channels, old.out_features),
            "caption_projection.linear_2": lambda old: nn.Linear(old.in_features, old.out_features)}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        for name in names:
            old = model.get_submodule(name)
            new = made[name](old)
            if start is None:
                _initialise(name, new, plan)
            else:
                new.load_state_dict(start.get_submodule(name).state_dict())
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, new.to(old.weight.device, old.weight.dtype))
    model.register_to_config(in_channels=channels, out_channels=channels, caption_channels=caption_channels)
    set_latent_size(model, latent_side)
    return names


@torch.no_grad()
def _initialise(name: str, layer: nn.Module, plan: Plan) -> None:
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    if name == "proj_out":
        nn.init.zeros_(layer.weight)
        return
    nn.init.xavier_uniform_(layer.weight.flatten(1))
    if name == "caption_projection.linear_1":
        layer.weight /= plan.text_rms


def load_networks(base: Path) -> nn.ModuleDict:
    """transformer, and controlnet where the folder has one, in float32."""
    networks = nn.ModuleDict({"transformer": load_part(base / "transformer", SanaTransformer2DModel)})
    refuse_sprint(networks["transformer"], "swap")
    if "controlnet" in components(base):
        networks["controlnet"] = load_part(base / "controlnet", SanaSprintControlNetModel)
    return networks.to(device())


def refit_networks(networks: nn.ModuleDict, plan: Plan, config: Config, corpus: Corpus, old_compression: int) -> list[str]:
    """`networks` for the swapped parts, in place; -> names of the layers that start anew, "transformer.proj_out" and so on."""
    transformer = networks["transformer"]
    channels, caption_channels = corpus.latents.images.shape[1], corpus.texts.states.shape[1]
    side, rest = divmod(transformer.config.sample_size * old_compression, corpus.vae.spatial_compression_ratio * transformer.config.patch_size)
    if rest:
        raise ValueError(f"the base draws {transformer.config.sample_size * old_compression} px, which is no multiple of the new compression "
                         f"{corpus.vae.spatial_compression_ratio} times the patch size {transformer.config.patch_size}: choose another autoencoder")
    found = []
    for name, network in networks.items():
        start = None if name == "transformer" else transformer
        found += [f"{name}.{layer}" for layer in refit(network, plan, config, channels, caption_channels, side * transformer.config.patch_size, start)]
    return found


def learning_groups(networks: nn.ModuleDict, new_layers: list[str], config: Config) -> list[tuple[list, float]]:
    """(parameters, peak learning rate): kept layers at swap_lr, new ones at swap_new_lr, the text encoder at its own; 0 freezes."""
    groups, new = [], [p for name in new_layers for p in networks.get_submodule(name).parameters()]
    for name, network in networks.items():
        lr = config.text_encoder_lr if name == "text_encoder" else config.swap_lr
        network.requires_grad_(lr > 0)
        for p in new:
            p.requires_grad_(False)
        groups += [([p for p in network.parameters() if p.requires_grad], lr)] if name == "text_encoder" else layer_groups(network, lr, config)
    for p in new:
        p.requires_grad_(config.swap_new_lr > 0)
    groups = [(params, lr) for params, lr in [*groups, (new, config.swap_new_lr)] if params and lr > 0]
    if not groups:
        raise ValueError("nothing to train: every layer fits and swap_lr and text_encoder_lr are 0")
    return groups


def start_networks(plan: Plan, config: Config, held_out: Corpus) -> tuple[nn.ModuleDict, list[str]]:
    """The base's networks made fit for the swapped parts, and the text encoder where it is tuned; the names of the new layers."""
    networks = load_networks(Path(config.base))
    old_compression = 2 ** (len(read_json(Path(config.base) / "vae" / "config.json")["encoder_block_out_channels"]) - 1)
    new_layers = refit_networks(networks, plan, config, held_out, old_compression)
    if plan.joint:
        networks["text_encoder"] = load_text_encoder(config.text_encoder, config.max_tokens)[1]
    return networks.to(device()), new_layers

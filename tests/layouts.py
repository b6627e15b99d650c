"""Random-weight models and model folders of both layouts, small enough for every test.

tiny_transformer, tiny_controlnet, tiny_vae: single parts. build_small_folder: the layout we ship (BERT, 32 tokens,
controlnet/). build_sprint_folder: the published Sprint layout (Gemma-2, the exact published config keys).
"""

import json
from pathlib import Path

import torch
from diffusers import AutoencoderDC, SanaSprintPipeline, SanaTransformer2DModel, SCMScheduler

from sana_app.model.controlnet import SanaSprintControlNetModel

CAPTION_CHANNELS = 24


def randomised(module: torch.nn.Module, seed: int = 0, std: float = 0.05) -> torch.nn.Module:
    """Small noise on every weight: zero layers and norms of 1 would hide a wrong use of them."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p += std * torch.randn(p.shape, generator=g, dtype=torch.float32).to(p.dtype)
    return module.eval()


def tiny_transformer(seed: int = 0, **overrides) -> SanaTransformer2DModel:
    """Sprint shape by default (guidance, qk-norm); teacher: guidance_embeds=False."""
    torch.manual_seed(seed)
    config = dict(
        in_channels=8, out_channels=8, num_attention_heads=2, attention_head_dim=16, num_layers=4,
        num_cross_attention_heads=2, cross_attention_head_dim=16, cross_attention_dim=32,
        caption_channels=CAPTION_CHANNELS, mlp_ratio=2.5, sample_size=4, patch_size=1, guidance_embeds=True,
        guidance_embeds_scale=0.1, qk_norm="rms_norm_across_heads", timestep_scale=0.001,
    )  # fmt: skip
    return randomised(SanaTransformer2DModel(**config | overrides), seed)


def tiny_controlnet(transformer: SanaTransformer2DModel, num_layers: int = 2, seed: int = 1):
    """Copied from the transformer and then moved off zero, so that it does something."""
    return randomised(SanaSprintControlNetModel.from_transformer(transformer, num_layers), seed)


def tiny_vae(seed: int = 0) -> AutoencoderDC:
    """f8 c8: 32 px <-> 4x4 latents; separate encoder and decoder widths, as a shipped one may have."""
    torch.manual_seed(seed)
    return AutoencoderDC(
        latent_channels=8, attention_head_dim=8, scaling_factor=0.7,
        encoder_block_types="ResBlock", decoder_block_types="ResBlock",
        encoder_block_out_channels=(8, 8, 16, 16), decoder_block_out_channels=(8, 16, 16, 16),
        encoder_layers_per_block=(0, 1, 1, 1), decoder_layers_per_block=(0, 1, 1, 1),
        encoder_qkv_multiscales=((), (), (), ()), decoder_qkv_multiscales=((), (), (), ()),
    ).eval()  # fmt: skip


def tiny_bert(seed: int = 0):
    """A BertModel with 512 positions and a WordPiece tokenizer of whole words and letters."""
    from transformers import BertConfig, BertModel, BertTokenizerFast

    torch.manual_seed(seed)
    words = "a an the red blue green yellow apple cat dog face car house of with and in on flat 3d".split()
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)] + list("0123456789.,:;!?'\"-()")
    vocab = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"] + letters + ["##" + c for c in letters] + words
    vocab = {token: i for i, token in enumerate(dict.fromkeys(vocab))}
    tokenizer = BertTokenizerFast(vocab=vocab, do_lower_case=True, model_max_length=512)
    config = BertConfig(
        vocab_size=len(vocab), hidden_size=CAPTION_CHANNELS, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=512, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return tokenizer, BertModel(config).eval()


def tiny_gemma(seed: int = 0):
    """A Gemma2Model and a GemmaTokenizer whose pieces are the letters."""
    from transformers import Gemma2Config, Gemma2Model, GemmaTokenizer

    torch.manual_seed(seed)
    letters = [chr(c) for c in range(33, 127)] + ["\u2581", "\n"]
    vocab = {token: i for i, token in enumerate(["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"] + letters)}
    tokenizer = GemmaTokenizer(vocab=vocab, merges=[])
    config = Gemma2Config(
        vocab_size=len(vocab), hidden_size=CAPTION_CHANNELS, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=8, max_position_embeddings=8192, sliding_window=4096,
    )  # fmt: skip
    return tokenizer, Gemma2Model(config).eval()


class ListScheduler(SCMScheduler):
    """The stock pipeline hands over a list of times without num_inference_steps, which the stock scheduler requires."""

    def set_timesteps(self, num_inference_steps=None, timesteps=None, **kwargs):
        super().set_timesteps(num_inference_steps or len(timesteps) - 1, timesteps=timesteps, **kwargs)


def build_small_folder(folder: Path | str, seed: int = 0, controlnet: bool = True, **transformer_overrides) -> Path:
    """The layout we ship: a BERT text encoder, prompt.json (32 tokens, no instruction), half-precision weights, controlnet/."""
    from sana_app.model.pipeline import SanaSprintControlNetPipeline
    from sana_app.model.text import TextSettings

    tokenizer, text_encoder = tiny_bert(seed)
    transformer = tiny_transformer(seed, **transformer_overrides)
    pipe = SanaSprintControlNetPipeline(
        tokenizer, text_encoder, tiny_vae(seed), transformer, SCMScheduler(),
        tiny_controlnet(transformer) if controlnet else None,
    )  # fmt: skip
    pipe.text_settings = TextSettings(max_tokens=32, instruction="")
    for part in ("text_encoder", "vae", "transformer", "controlnet"):
        if getattr(pipe, part) is not None:
            getattr(pipe, part).half()
    pipe.save_pretrained(folder)
    return Path(folder)


# The keys of transformer/config.json as published (values: the 1.6B model's, some made small below).
PUBLISHED_TRANSFORMER_CONFIG = {
    "_class_name": "SanaTransformer2DModel",
    "_diffusers_version": "0.33.0.dev0",
    "attention_bias": False,
    "attention_head_dim": 32,
    "caption_channels": 2304,
    "cross_attention_dim": 2240,
    "cross_attention_head_dim": 112,
    "dropout": 0.0,
    "guidance_embeds": True,
    "guidance_embeds_scale": 0.1,
    "in_channels": 32,
    "interpolation_scale": None,
    "mlp_ratio": 2.5,
    "norm_elementwise_affine": False,
    "norm_eps": 1e-06,
    "num_attention_heads": 70,
    "num_cross_attention_heads": 20,
    "num_layers": 20,
    "out_channels": 32,
    "patch_size": 1,
    "qk_norm": "rms_norm_across_heads",
    "sample_size": 32,
    "timestep_scale": 0.001,
}


def build_base_folder(folder: Path | str, seed: int = 0, gemma: bool = True, **transformer_overrides) -> Path:
    """The published layout of base SANA, written by the stock SanaPipeline: no qk-norm, times 0..1000, no positions, flow scheduler.

    gemma=False: a BERT text encoder instead, whose prompts are short, for tests that train.
    """
    from diffusers import DPMSolverMultistepScheduler, SanaPipeline

    tokenizer, text_encoder = tiny_gemma(seed) if gemma else tiny_bert(seed)
    transformer = tiny_transformer(seed, **dict(guidance_embeds=False, qk_norm=None, timestep_scale=1.0) | transformer_overrides)
    scheduler = DPMSolverMultistepScheduler(flow_shift=3.0, prediction_type="flow_prediction", use_flow_sigmas=True)
    SanaPipeline(tokenizer, text_encoder, tiny_vae(seed), transformer, scheduler).save_pretrained(folder)
    return Path(folder)


def build_sprint_folder(folder: Path | str, seed: int = 0) -> Path:
    """The published Sprint layout, written by the stock pipeline: Gemma-2, no prompt.json, no controlnet/."""
    small = dict(
        in_channels=8, out_channels=8, num_attention_heads=2, attention_head_dim=16, num_layers=4, sample_size=4,
        num_cross_attention_heads=2, cross_attention_head_dim=16, cross_attention_dim=32,
        caption_channels=CAPTION_CHANNELS,
    )  # fmt: skip
    assert small.keys() <= PUBLISHED_TRANSFORMER_CONFIG.keys()
    tokenizer, text_encoder = tiny_gemma(seed)
    transformer = tiny_transformer(seed, **small)
    SanaSprintPipeline(tokenizer, text_encoder, tiny_vae(seed), transformer, SCMScheduler()).save_pretrained(folder)
    config = PUBLISHED_TRANSFORMER_CONFIG | small
    (Path(folder) / "transformer" / "config.json").write_text(json.dumps(config, indent=2))
    return Path(folder)

"""One flat configuration for the whole chain; the named recipes are in recipes.py."""

from __future__ import annotations

import dataclasses
import difflib
import math
from dataclasses import dataclass

from training.recipes import RECIPES

OPTIMIZERS = ("adamw", "adamw8bit", "came")


@dataclass(frozen=True)
class Config:
    """Everything that shapes a run. Steps are optimiser steps; sizes are px; learning rates are peak values."""

    # data
    data: str = ""                     # folder of shards or of loose pictures, tar files, URLs, pipe:COMMAND, or a mixture A*0.7,B*0.3 (data/sources.py)
    base: str = ""                     # model folder (diffusers layout) a stage starts from; "" = what the stage before left in OUT
    vae: str = ""                      # folder of a ready AutoencoderDC; "" = OUT/autoencoder/vae
    size_px: int = 128                 # side of the pictures
    toned_weight: float = 0.25         # sampling weight of a skin-toned variant against 1 for any other picture
    caption_dropout: float = 0.1       # share of samples trained with the empty prompt
    condition: str = "lines"           # what the ControlNet follows: lines, canny, hed, depth, or own (NAME.cond.png beside the picture)
    condition_weights: str = ""        # folder with the HED or depth network's weights; "" = fetched from the hub
    # data: shapes, weights, augmentation, large sets
    buckets: bool = False              # pictures keep about their aspect ratio (the published shapes of about size_px²); False = square
    balance: str = ""                  # file with a weight for each picture, from `python -m training.balance`; "" = none
    region_weight: float = 2.0         # loss weight inside a box (NAME.json: regions) that brings none of its own, against 1 outside
    region_detector: str = ""          # module:function that finds boxes where a picture brings none, as training.regions:faces; "" = none
    augment: int = 0                   # cropped and mirrored variants of each training picture, cached as further ones
    augment_crop: float = 0.85         # the smallest such crop, in parts of the side
    encode_batch: int = 64             # pictures encoded at once while caching; of captions 4 times as many
    cache_part_mb: int = 512           # decoded pictures held in memory while caching
    keep_pixels: bool = True           # False: drop the decoded training pictures once encoded (large sets; not for the autoencoder and decoder stages)
    # machine
    precision: str = "bf16"            # autocast type: bf16 or fp32; master weights are always fp32
    compile: bool = False              # torch.compile the autoencoder: 3 times as fast on two cores (needs a C++ compiler there)
    compile_denoiser: bool = False     # the same for the transformers: no gain on two cores (55 against 52-57 pictures/s), for GPUs
    micro_batches: int = 1             # gradient accumulation: each batch is split into this many parts
    checkpointing: bool = False        # gradient checkpointing in the transformer and the ControlNet
    seed: int = 0
    save_minutes: float = 5.0          # time between checkpoints
    preview_steps: int = 250           # steps between contact sheets and validation; 0 = only at the end
    # processes, optimiser, tracker
    fsdp: bool = False                 # with several processes: shard weights, gradients and optimiser (FSDP2; not the student, whose JVP cannot)
    optimizer: str = "adamw"           # adamw, adamw8bit (a quarter of its memory) or came (half of it)
    lr_cross_attention: float = 1.0    # multiplier of the stage's learning rate for cross attention
    lr_norms: float = 1.0              # the same for norms (q, k and caption norms)
    lr_rest: float = 1.0               # the same for everything else
    tracker: str = "tensorboard"       # where curves go: a tracker of accelerate's (tensorboard, wandb, mlflow, ...), or "none"
    dry_run: bool = False              # look only: sizes, memory, first batch; set by --dry-run
    # autoencoder
    ae_channels: tuple = (32, 32, 64, 128, 256)
    ae_encoder_layers: tuple = (0, 1, 1, 1, 1)
    ae_decoder_layers: tuple = (0, 1, 2, 2, 2)
    ae_latent_channels: int = 32
    ae_steps: int = 1000
    ae_batch: int = 16
    ae_lr: float = 1e-3
    ae_crop_px: int = 64               # side of the crops in the first part of the training
    ae_crop_share: float = 0.5         # part of the steps that train on crops (4 times as many of them a batch)
    ae_lines_share: float = 0.2        # share of line drawings among the pictures: they are encoded too
    ae_latent_noise: float = 0.05      # noise on the latent, in latent std: the decoder must forgive the denoiser
    ae_adv_weight: float = 0.0         # weight of the adversarial term; 0 = off
    ae_adv_start: float = 0.7          # part of the steps after which it joins
    decoder_steps: int = 0             # steps of the decoder alone, on frozen latents, at the end; 0 = none
    decoder_lr: float = 4e-4
    # transformer
    heads: int = 8                     # width = 32 * heads
    cross_heads: int = 8
    layers: int = 8
    text_encoder: str = "minilm"       # "minilm", or a folder with text_encoder/ and tokenizer/
    max_tokens: int = 32
    # teacher (flow matching)
    teacher_steps: int = 1000
    teacher_batch: int = 48
    teacher_lr: float = 1e-3
    teacher_shift: float = 1.0         # flow shift: 1 at 128 px, 3 at 1024 px; 0 = by size_px, as published (flow.resolution_shift)
    teacher_clip: float = 1.0          # gradient norm
    # ControlNet (flow matching with lines)
    controlnet_layers: int = 3
    controlnet_steps: int = 1000
    controlnet_batch: int = 48
    controlnet_lr: float = 1e-3
    controlnet_base_lr: float = 0.0    # learning rate of the teacher beneath it; 0 = frozen, as published
    controlnet_no_lines: float = 0.15  # share of samples without lines when the base learns too, so that it does not forget
    controlnet_weak_share: float = 0.0 # part of the steps after which the averaged weights are kept as the weak teacher of autoguidance; 0 = never
    # base: published checkpoints, fine-tuning, large pictures
    frozen_bf16: bool = False          # frozen networks (teacher, base under a ControlNet) held in bf16: half their memory
    interpolation_scale: float = 0.0   # sine-cosine positions of this scale (published: 1 at 2048 px, 2 at 4096 px); 0 = as the base has it
    vae_tiling: int = 0                # side of the tiles in px in which large pictures are encoded and decoded; 0 = whole
    finetune_steps: int = 1000
    finetune_batch: int = 48
    finetune_lr: float = 2e-5
    flow_teacher: str = ""             # student stage: folder of its flow teacher; "" = base, if that is one, else what the stage before left in OUT
    student_controlnet: bool = True    # False: distil the text-to-image teacher (base, or OUT/teacher) alone, as published
    # lora
    lora_prompt: str = ""              # caption of the pictures that have none, with a word of its own: "a photo of sks dog"
    lora_rank: int = 0                 # 0 = suggested from the number of pictures
    lora_alpha: float = 0.0            # the adapter's scale is alpha / rank; 0 = the rank
    lora_targets: tuple = ("q", "v")   # what carries it in self and cross attention: some of q, k, v, out
    lora_steps: int = 0                # 0 = suggested
    lora_batch: int = 4                # pictures a step, and as many of the class
    lora_lr: float = 0.0               # 0 = suggested
    lora_clip: float = 1.0             # gradient norm
    lora_lines: float = 0.0            # share of samples trained with their lines, where the base has a ControlNet (which stays as it is)
    lora_teacher: str = ""             # folder with the flow teacher's transformer/ (and controlnet/) of a Sprint base; "" = train without one
    lora_prior_prompt: str = ""        # what the class is called, "a photo of a dog": prior preservation; "" = none
    lora_prior_data: str = ""          # folder with pictures of the class; "" = the model draws them itself, before the training
    lora_prior_images: int = 0         # how many it draws; 0 = 100
    lora_prior_weight: float = 1.0     # weight of the loss on them
    # swap: another autoencoder or text encoder under a finished teacher
    swap_short_steps: int = 200        # steps of the short run, stage b
    swap_steps: int = 2000             # steps of the full run, stage c
    swap_full: bool = False            # go on to stage c
    swap_batch: int = 48
    swap_lr: float = 2e-5              # learning rate of the layers that were kept; 0 = frozen
    swap_new_lr: float = 1e-3          # learning rate of the layers that were re-initialised
    swap_reinit: bool = False          # re-initialise the layers at the swapped part even where their channels fit
    swap_psnr_drop_db: float = 3.0     # how far a new autoencoder may reconstruct below the old one before the swap stops
    text_encoder_lr: float = 0.0       # learning rate of the text encoder, tuned jointly in the swap stage; 0 = frozen, states cached
    latent_band: float = 4.0           # half width of the monitor's band, in standard errors of the reference statistics
    # jump: the student's first lesson (trajectories.py)
    jump_paths: int = 0                # paths that the teacher walks once, for the student to learn jumps to their ends; 0 = no such stage
    jump_path_steps: int = 6           # steps of a path
    jump_steps: int = 2000
    jump_batch: int = 48
    jump_lr: float = 5e-4
    # student (sCM + LADD)
    student_steps: int = 1000          # alternating: every other step trains the discriminator
    student_batch: int = 32
    student_lr: float = 1e-4
    student_disc_lr: float = 2e-4
    student_clip: float = 1.0
    student_base: bool = True          # train the student's transformer; False: its ControlNet only, on a finished student
    scm_mean: float = 0.0              # training times: tau = exp(N(mean, std)), t = arctan(tau / sigma_data)
    scm_std: float = 1.6
    scm_warmup: int = 200              # steps over which the tangent's second part is ramped up
    scm_weight: float = 1.0
    ladd_weight: float = 0.5
    ladd_t_max_share: float = 0.5      # share of adversarial samples whose student time is t_max
    jump_weight: float = 0.0           # weight of the jumps beside the two, where there are paths
    ladd_misaligned: bool = False      # real pictures under another sample's caption as further fakes (half as much work again in those steps)
    guidance: tuple = (4.0, 4.5, 5.0)  # guidance scales the student is trained for
    guidance_gain: float = 1.0         # the teacher's scale is 1 + gain * (w - 1): below 1 for a small teacher, which saturates early,
                                       # while the student keeps the published range of w, and with it stock pipelines' default
    autoguidance: float = 0.0          # weight of (teacher - weak teacher) in the field the student learns; 0 = none
    disc_blocks: tuple = (2, 4, 6, 7)  # teacher blocks whose output the discriminator reads
    evaluate_count: int = 128          # held-out pictures that the numbers are made on
    noise_scale: float = 1.0           # export: std of the noise a picture starts from; below 1 cleaner and less varied pictures
    ema: float = 0.999                 # decay of the averaged weights that are saved; ramped up from 0
    lr_warmup_steps: int = 50
    lr_final: float = 0.05             # cosine decay down to this part of the peak; 1 = constant


def parse_value(text: str, default: object) -> object:
    """`text` in the type of `default`. ValueError says what was wanted."""
    kind = type(default)
    try:
        if kind is bool:
            return {"true": True, "1": True, "false": False, "0": False}[text.lower()]
        if kind is tuple:
            element = type(default[0])
            return tuple(element(p) for p in text.strip("()").split(",") if p.strip())
        return kind(text)
    except (KeyError, ValueError) as error:
        raise ValueError(f"{text!r} is not a {kind.__name__} like {default!r}") from error


def load_config(recipe: str, overrides: list[str] = ()) -> Config:
    """The named recipe with `key=value` overrides. ValueError names the unknown recipe or key and the known ones."""
    if recipe not in RECIPES:
        raise ValueError(f"unknown recipe {recipe!r}; known: {', '.join(RECIPES)}")
    values = dict(RECIPES[recipe])
    defaults = {f.name: f.default for f in dataclasses.fields(Config)}
    for item in overrides:
        key, equals, text = item.partition("=")
        if not equals or key not in defaults:
            near = difflib.get_close_matches(key, defaults, n=1)
            raise ValueError(f"--set {item!r}: wanted key=value{f'; did you mean {near[0]}?' if near else ''} The keys are {', '.join(defaults)}")
        try:
            values[key] = parse_value(text, defaults[key])
        except ValueError as error:
            raise ValueError(f"--set {key}: {error}") from error
    config = Config(**values)
    check_ranges(config)
    return config


# lowest and highest value of fields whose names do not say it (check_ranges)
SHARES = ("caption_dropout", "augment_crop", "ae_crop_share", "ae_lines_share", "ae_adv_start", "controlnet_no_lines", "controlnet_weak_share", "lora_lines",
          "ladd_t_max_share", "ema", "lr_final")
RANGES = {key: (0, 1) for key in SHARES} | {"seed": (0, 2 ** 63 - 1), "save_minutes": (0, math.inf)} | {
    key: (1, math.inf) for key in ("micro_batches", "size_px", "max_tokens", "jump_path_steps", "cache_part_mb", "heads", "cross_heads", "layers", "controlnet_layers",
                                   "ae_latent_channels", "evaluate_count")} | {
    key: (0, math.inf) for key in ("augment", "vae_tiling", "lora_rank", "lora_prior_images", "jump_paths", "scm_warmup", "scm_std", "ae_latent_noise")}


def limits(key: str) -> tuple[float, float]:
    """(lowest, highest) value of field `key`."""
    if key in RANGES:
        return RANGES[key]
    if key.endswith("_batch"):
        return 1, math.inf
    if key.endswith(("_steps", "_lr", "_weight", "_clip")) or key.startswith("lr_"):
        return 0, math.inf
    return -math.inf, math.inf


def check_ranges(config: Config) -> None:
    """ValueError names a value that no run can have: said at once, not when the pictures have been encoded for hours."""
    for key, known in (("precision", ("bf16", "fp32")), ("optimizer", OPTIMIZERS), ("tracker", known_trackers(config.tracker))):
        if getattr(config, key) not in known:
            raise ValueError(f"{key}={getattr(config, key)!r}: wanted {', '.join(known[:-1])} or {known[-1]}")
    for key, value in dataclasses.asdict(config).items():
        if isinstance(value, tuple) and not value:
            raise ValueError(f"{key}: wanted at least one value")
        low, high = limits(key)
        for number in value if isinstance(value, tuple) else [value]:
            if not isinstance(number, (int, float)):
                continue
            # only a time between checkpoints, and a norm that is never reached, can be without end
            if not math.isfinite(number) and not (number == math.inf and (key == "save_minutes" or key.endswith("_clip"))):
                raise ValueError(f"{key}={number}: wanted a finite number")
            if not low <= number <= high or key.endswith("_clip") and number == 0:
                raise ValueError(f"{key}={number}: wanted {'more than 0' if key.endswith('_clip') else f'{low} or more' if high == math.inf else f'{low} to {high}'}")


def known_trackers(wanted: str) -> tuple[str, ...]:
    """Names that `tracker` can have. accelerate, which knows them, is slow to import: it is asked about unusual ones only."""
    usual = ("tensorboard", "none")
    if wanted in usual:
        return usual
    from accelerate.utils import LoggerType
    return tuple(dict.fromkeys((*(str(name) for name in LoggerType), *usual)))

"""The table of named recipes: what differs from the defaults of `training.config.Config`, and what each one reached."""

from __future__ import annotations

# ---- published sizes: base = a model folder (diffusers layout), data = your pictures; values from NVlabs' public configurations unless said ----
# the transformer of SANA 0.6B, 1.6B and SANA-1.5 4.8B; latents of DC-AE f32c32, Gemma-2's 300 tokens
WIDTH_06, WIDTH_16 = dict(heads=36, cross_heads=16, layers=28), dict(heads=70, cross_heads=20, layers=20)
WIDTH_48 = WIDTH_16 | dict(layers=60)
PUBLISHED = dict(data="runs/data/mine", size_px=1024, ae_latent_channels=32, max_tokens=300,
                 caption_dropout=0.1,               # class_dropout_prob
                 teacher_shift=3.0,                 # flow_shift: 3 from 512 to 2048 px, 6 at 4096 px
                 teacher_clip=0.1, student_clip=0.1,  # gradient_clip
                 optimizer="came",                  # CAMEWrapper
                 encode_batch=8,                    # ours: what the autoencoder and Gemma-2 (4 times as many prompts) take at once
                 lr_final=1.0,                      # lr_schedule: constant
                 lr_warmup_steps=2000,
                 checkpointing=True, frozen_bf16=True, save_minutes=30.0, preview_steps=500)
# paper §3.1: all weights, learning rate 2e-5, 5,000 iterations of 1,024 pictures. The warm-up is ours: 2,000 of 5,000 would be too long
TEACHER = PUBLISHED | dict(teacher_lr=2e-5, teacher_steps=5000, teacher_batch=1024, micro_batches=64, lr_warmup_steps=100)
# 7 copied blocks on a frozen base, 1e-4, warm-up 30; batch 16 a GPU, no number of steps is public: batch and steps are ours
CONTROLNET = PUBLISHED | dict(controlnet_layers=7, controlnet_base_lr=0.0, controlnet_lr=1e-4, controlnet_steps=20000, controlnet_batch=64, micro_batches=4, lr_warmup_steps=30)
# times N(0.2, 1.6), tangent warm-up 4,000, lr 2e-6 for both sides, warm-up 5,000, blocks 2, 8, 14, 19 for either depth; batch and steps are
# ours (public: 16 a GPU); every other step is the discriminator's. student_controlnet=False: text to image, as published
STUDENT = PUBLISHED | dict(student_controlnet=False, scm_mean=0.2, scm_std=1.6, scm_warmup=4000, scm_weight=1.0, ladd_weight=0.5, ladd_t_max_share=0.5, guidance=(4.0, 4.5, 5.0),
                           disc_blocks=(2, 8, 14, 19), ladd_misaligned=True, student_lr=2e-6, student_disc_lr=2e-6, student_steps=40000, student_batch=512, micro_batches=32,
                           lr_warmup_steps=5000, checkpointing=False)  # the JVP cannot be checkpointed
# the same losses, the student's transformer frozen: nothing of this is public, all ours. The ControlNet starts from its teacher's, so it may learn faster
ONE_STEP_CONTROLNET = STUDENT | dict(student_controlnet=True, student_base=False, controlnet_layers=7, student_lr=1e-5, student_disc_lr=1e-5, student_steps=10000, student_batch=128,
                                     micro_batches=8, scm_warmup=1000, lr_warmup_steps=500)
# SANA-1.5's fine-tuning rate, 2e-5; steps and batches are ours (public: 64 a GPU at 512 px, 4 at 2048 px). Positions are turned on at 2048 px only;
# the buckets are the published tables of each size
FINETUNE = PUBLISHED | dict(buckets=True, finetune_lr=2e-5, finetune_steps=10000, lr_warmup_steps=500)
AT_512 = FINETUNE | dict(size_px=512, finetune_batch=256, micro_batches=4)
AT_1024 = FINETUNE | dict(finetune_batch=128, micro_batches=8)
AT_2048 = FINETUNE | dict(size_px=2048, interpolation_scale=1.0, vae_tiling=1024, encode_batch=2, finetune_batch=32, micro_batches=8)
# diffusers' README_sana.md: 1 picture with 4 accumulated, constant 1e-4, rank 4; lora_rank, lora_steps and lora_lr are suggested from the pictures
LORA = PUBLISHED | dict(caption_dropout=0.0, optimizer="adamw", lora_batch=4, micro_batches=4, frozen_bf16=True, lr_warmup_steps=10, lr_final=1.0, preview_steps=0)
# on a Sprint model, with its flow teacher (--set lora_teacher=FOLDER) or without
LORA_SPRINT = LORA | dict(guidance=(4.0, 4.5, 5.0), scm_warmup=1, disc_blocks=(2, 8, 14, 19), checkpointing=False, frozen_bf16=False)
# the guided swap: every value is ours (nothing of this is public)
SWAP = PUBLISHED | dict(swap_batch=64, micro_batches=4, swap_short_steps=200, swap_steps=10000, lr_warmup_steps=100)
SHARDED = dict(fsdp=True, ema=0.0)  # 4.8B: 58 GB of weights, gradients and optimiser, over the processes; averages off

RECIPES: dict[str, dict] = {
    # the whole chain in under two minutes on two cores, for the tests and for a first look
    "tiny-cpu": dict(data="assets/sample", size_px=64, precision="fp32", preview_steps=0, save_minutes=1.0,
                     ae_channels=(16, 16, 32, 32, 64), ae_decoder_layers=(0, 1, 1, 1, 1), ae_latent_channels=16, ae_steps=60, ae_batch=8, ae_crop_px=32,
                     heads=4, cross_heads=4, layers=4, teacher_steps=40, teacher_batch=16, controlnet_layers=2, controlnet_steps=40, controlnet_batch=16,
                     controlnet_base_lr=5e-4, controlnet_weak_share=0.5, autoguidance=0.5,
                     jump_paths=64, jump_steps=20, jump_batch=16, jump_weight=1.0, student_steps=20, student_batch=8, decoder_steps=20, evaluate_count=10, scm_warmup=5, disc_blocks=(1, 2, 3), ema=0.9, lr_warmup_steps=5),
    # two CPU cores, 4 h 30 min: 30.7 dB, validation loss 0.283, line F1 0.80 at one step (assets/models/emoji/README.md)
    "emoji-128": dict(data="runs/data/emoji-128", size_px=128, compile=True, ae_steps=2500, teacher_steps=500, preview_steps=500, controlnet_steps=7400,
                      controlnet_base_lr=8e-4, controlnet_no_lines=0.12, controlnet_weak_share=0.3, autoguidance=1.0, jump_paths=12800, jump_steps=2000, jump_weight=100.0, student_steps=400,
                      student_batch=16, student_lr=1e-4, student_disc_lr=2e-3, scm_warmup=100, guidance=(3.0, 4.5, 6.0), guidance_gain=0.35, noise_scale=0.85, decoder_steps=4000),
    # one GPU, meant for under an hour, in slices: timeout -s TERM 570 make train RECIPE=emoji-256, again and again. Not run by us at this size
    "emoji-256": dict(data="runs/data/emoji-256", size_px=256, compile=True, compile_denoiser=True, ae_channels=(32, 64, 128, 256, 256, 256), ae_encoder_layers=(0, 1, 1, 1, 1, 1),
                      ae_decoder_layers=(0, 1, 2, 2, 2, 2), ae_steps=12000, ae_batch=64, ae_crop_px=128, ae_adv_weight=0.05,
                      heads=12, cross_heads=12, layers=12, teacher_steps=20000, teacher_batch=256, teacher_lr=5e-4, controlnet_layers=4, controlnet_steps=15000,
                      controlnet_batch=256, controlnet_lr=5e-4, controlnet_base_lr=2e-4, controlnet_no_lines=0.12,
                      controlnet_weak_share=0.3, autoguidance=1.0, guidance=(3.0, 4.5, 6.0), guidance_gain=0.35, noise_scale=0.85, jump_paths=40960, jump_steps=6000, jump_batch=128,
                      jump_weight=100.0, student_steps=6000, student_batch=128, decoder_steps=4000, disc_blocks=(2, 5, 8, 11)),
    # a LoRA on the shipped model from a handful of pictures, on two cores: --set data=my/pictures (--set lora_prompt="...")
    "emoji-lora": dict(base="assets/models/emoji", size_px=128, caption_dropout=0.0, guidance=(3.0, 4.5, 6.0), guidance_gain=0.35, lora_batch=8, lora_lr=2e-3,
                       scm_warmup=1, lr_warmup_steps=10, preview_steps=0),
    # published sizes, not run by us: the arithmetic says one 80 GB GPU for each of them, many for the published batch in the published time
    "sana-0.6b-teacher": TEACHER | WIDTH_06,
    "sana-1.6b-teacher": TEACHER | WIDTH_16,
    "sana-0.6b-controlnet": CONTROLNET | WIDTH_06,
    "sana-1.6b-controlnet": CONTROLNET | WIDTH_16,
    "sana-0.6b-student": STUDENT | WIDTH_06,
    "sana-1.6b-student": STUDENT | WIDTH_16,
    "sana-0.6b-controlnet-student": ONE_STEP_CONTROLNET | WIDTH_06,
    "sana-1.6b-controlnet-student": ONE_STEP_CONTROLNET | WIDTH_16,
    "sana-0.6b-lora": LORA | WIDTH_06,
    "sana-1.6b-lora": LORA | WIDTH_16,
    "sana-0.6b-sprint-lora": LORA_SPRINT | WIDTH_06,
    "sana-1.6b-sprint-lora": LORA_SPRINT | WIDTH_16,
    "sana-0.6b-512": AT_512 | WIDTH_06,
    "sana-0.6b-1024": AT_1024 | WIDTH_06,
    "sana-0.6b-2048": AT_2048 | WIDTH_06,
    "sana-1.6b-512": AT_512 | WIDTH_16,
    "sana-1.6b-1024": AT_1024 | WIDTH_16,
    "sana-1.6b-2048": AT_2048 | WIDTH_16,
    "sana-0.6b-swap": SWAP | WIDTH_06,
    "sana-1.6b-swap": SWAP | WIDTH_16,
    # 8-bit CAME in public; CAME here
    "sana-4.8b-teacher": TEACHER | WIDTH_48 | SHARDED,
    "sana-4.8b-controlnet": CONTROLNET | WIDTH_48 | SHARDED,
    "sana-4.8b-1024": AT_1024 | WIDTH_48 | SHARDED,
    "sana-4.8b-lora": LORA | WIDTH_48,
    "sana-4.8b-swap": SWAP | WIDTH_48 | SHARDED,
}

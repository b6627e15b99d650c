"""The table of named recipes: what differs from the defaults of `training.config.Config`, and what each one reached."""

from __future__ import annotations

RECIPES: dict[str, dict] = {
    # the whole chain in under two minutes on two cores, for the tests and for a first look
    "tiny-cpu": dict(data="assets/sample", size_px=64, precision="fp32", preview_steps=0, save_minutes=1.0,
                     ae_channels=(16, 16, 32, 32, 64), ae_decoder_layers=(0, 1, 1, 1, 1), ae_latent_channels=16, ae_steps=60, ae_batch=8, ae_crop_px=32,
                     heads=4, cross_heads=4, layers=4, teacher_steps=40, teacher_batch=16, controlnet_layers=2, controlnet_steps=40, controlnet_batch=16,
                     controlnet_base_lr=5e-4, student_steps=20, student_batch=8, decoder_steps=20, scm_warmup=5, disc_blocks=(1, 2, 3), ema=0.9, lr_warmup_steps=5),
    # two CPU cores, an evening
    "emoji-128": dict(data="runs/data/emoji-128", size_px=128, compile=True, ae_steps=2500, teacher_steps=500, preview_steps=500, controlnet_steps=2300,
                      controlnet_base_lr=8e-4, controlnet_no_lines=0.12, student_steps=700, student_batch=16, student_lr=2e-4, student_disc_lr=5e-4,
                      scm_warmup=200, guidance=(3.0, 4.5, 6.0), guidance_gain=0.35, decoder_steps=800),
    # one GPU, under an hour, in resumable slices
    "emoji-256": dict(data="runs/data/emoji-256", size_px=256, compile=True, compile_denoiser=True, ae_channels=(32, 64, 128, 256, 256, 256), ae_encoder_layers=(0, 1, 1, 1, 1, 1),
                      ae_decoder_layers=(0, 1, 2, 2, 2, 2), ae_steps=12000, ae_batch=64, ae_crop_px=128, ae_adv_weight=0.05,
                      heads=12, cross_heads=12, layers=12, teacher_steps=20000, teacher_batch=256, teacher_lr=5e-4, controlnet_layers=4, controlnet_steps=15000,
                      controlnet_batch=256, controlnet_lr=5e-4, controlnet_base_lr=2e-4, student_steps=6000, student_batch=128, decoder_steps=4000, disc_blocks=(2, 5, 8, 11)),
    # a LoRA on the shipped model from a handful of pictures, on two cores: --set data=my/pictures (--set lora_prompt="...")
    "emoji-lora": dict(base="assets/models/emoji", size_px=128, caption_dropout=0.0, guidance=(3.0, 4.5, 6.0), guidance_gain=0.35, lora_batch=8, lora_lr=2e-3,
                       scm_warmup=1, lr_warmup_steps=10, preview_steps=0),
}

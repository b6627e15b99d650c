"""Checkpoints and LoRA files in other people's names: NVlabs' .pth and ComfyUI, from and to the diffusers layout."""

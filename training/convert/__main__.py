"""`python -m training.convert to-diffusers | to-pth | lora-to-comfy | lora-from-comfy`."""

from __future__ import annotations

import sana_app  # noqa: F401  (repairs torchvision before diffusers is imported)

import argparse
import sys
from pathlib import Path

from training.convert.comfy import lora_from_comfy, lora_to_comfy
from training.convert.describe import KINDS
from training.convert.pth import to_diffusers, to_pth


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m training.convert", description="Checkpoints and LoRA files in other people's names.")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("to-diffusers", help="NVlabs' .pth -> folder for from_pretrained")
    command.add_argument("source", type=Path, metavar="IN.pth")
    command.add_argument("out", type=Path, metavar="OUT_FOLDER")
    command.add_argument("--kind", choices=("auto", *KINDS), default="auto", help="needed where SANA-1.5 and a Sprint teacher look alike")
    command.add_argument("--cross-heads", type=int, help="cross-attention heads; needed for a width that is not published")
    command.add_argument("--head-dim", type=int, default=32, help="channels of a self-attention head (default 32)")
    command.add_argument("--image-size", dest="image_px", type=int, help="px; default: read off pos_embed, else 1024")
    command.add_argument("--interpolation-scale", dest="interpolation", type=float, help="of the position embedding; 0 = none; default: by image size")
    command.add_argument("--timestep-scale", type=float, help="1.0: the model sees times 0..1000; 0.001: [0, 1]; default: by kind")
    command.add_argument("--ema", action="store_true", help="take state_dict_ema")
    command = commands.add_parser("to-pth", help="folder of a transformer or ControlNet -> NVlabs' .pth")
    command.add_argument("source", type=Path, metavar="FOLDER")
    command.add_argument("out", type=Path, metavar="OUT.pth")
    command.add_argument("--side", type=Path, help="native_side.safetensors, or its folder, if it is not in FOLDER")
    command = commands.add_parser("lora-to-comfy", help="LoRA of diffusers or peft -> ComfyUI (NVlabs' names, fused)")
    command.add_argument("source", type=Path, metavar="IN", help=".safetensors file, or folder of diffusers or peft")
    command.add_argument("out", type=Path, metavar="OUT.safetensors")
    command = commands.add_parser("lora-from-comfy", help="ComfyUI's LoRA of SANA -> diffusers")
    command.add_argument("source", type=Path, metavar="IN.safetensors")
    command.add_argument("out", type=Path, metavar="OUT.safetensors")
    return parser.parse_args()


def main() -> None:
    args = vars(parse())
    command, source, out = args.pop("command"), args.pop("source"), args.pop("out")
    try:
        if command == "to-diffusers":
            notes = to_diffusers(source, out, **args).notes
        else:
            notes = {"to-pth": to_pth, "lora-to-comfy": lora_to_comfy, "lora-from-comfy": lora_from_comfy}[command](source, out, **args)
    except ValueError as error:
        sys.exit(f"error: {error}")
    print(*notes, f"wrote {out}", sep="\n")


if __name__ == "__main__":
    main()

"""The torchvision repair: importing sana_app is enough, it is idempotent, and it stays away where it is not needed."""

import subprocess
import sys

import torch

from sana_app import compat


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)


def test_torchvision_and_diffusers_import_after_sana_app():
    result = run("import sana_app, torchvision, diffusers; from diffusers import SanaSprintPipeline; print('imported')")
    assert result.stdout.strip() == "imported", result.stderr


def test_declares_exactly_when_torchvision_alone_fails():
    plain = run("import torchvision")
    needed = "torchvision::nms does not exist" in plain.stderr
    declared = run("from sana_app import compat; print(bool(getattr(compat, 'SCHEMAS')) and not compat.operators_load())")
    assert declared.stdout.strip() == str(needed), declared.stderr


def test_second_call_declares_nothing():
    assert compat.declare_torchvision_schemas() == []
    assert hasattr(torch.ops.torchvision, "nms")


def test_nothing_is_declared_where_the_operators_load(monkeypatch):
    monkeypatch.setattr(compat, "operators_load", lambda: True)
    monkeypatch.setattr(torch.library, "define", lambda *a: (_ for _ in ()).throw(AssertionError("declared")))
    assert compat.declare_torchvision_schemas() == []

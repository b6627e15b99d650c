"""Every test runs offline and on two threads; sana_app comes first, so that its repair precedes diffusers. The shipped layout, for who asks."""

import os
import shutil

os.environ.update(
    HF_HUB_OFFLINE="1",
    TRANSFORMERS_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    GRADIO_ANALYTICS_ENABLED="False",
    # waiting threads sleep: spinning ones make tiny models several times slower beside any other process
    OMP_WAIT_POLICY="PASSIVE",
    GOMP_SPINCOUNT="0",
)

import pytest  # noqa: E402
import torch  # noqa: E402

import sana_app  # noqa: E402, F401

torch.set_num_threads(2)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A model folder in the layout we ship, with random weights."""
    from layouts import build_small_folder
    return build_small_folder(tmp_path_factory.mktemp("small") / "model")


@pytest.fixture
def folder(small, tmp_path):
    """A copy that a test may damage."""
    return shutil.copytree(small, tmp_path / "model")


@pytest.fixture(scope="module")
def pipe(small):
    from sana_app.model.pipeline import SanaSprintControlNetPipeline
    return SanaSprintControlNetPipeline.from_pretrained(small)

"""Every test runs offline and on two threads; sana_app comes first, so that its repair precedes diffusers."""

import os

os.environ.update(
    HF_HUB_OFFLINE="1",
    TRANSFORMERS_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    GRADIO_ANALYTICS_ENABLED="False",
    # waiting threads sleep: spinning ones make tiny models several times slower beside any other process
    OMP_WAIT_POLICY="PASSIVE",
    GOMP_SPINCOUNT="0",
)

import torch  # noqa: E402

import sana_app  # noqa: E402, F401

torch.set_num_threads(2)

"""Sana Sketch: a drawing becomes a picture in one denoising step.

Importing the package prepares the environment (see compat.py); it must happen before diffusers is imported.
"""

from sana_app.compat import declare_torchvision_schemas

declare_torchvision_schemas()

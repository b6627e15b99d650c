"""Sana Sketch: a drawing becomes a picture in one denoising step.

Importing the package prepares the environment (see compat.py); it must happen before diffusers is imported.
"""

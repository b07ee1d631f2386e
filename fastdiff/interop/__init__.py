"""Drop-in replacements for classes of other libraries; `diffusers` and `denoising_diffusion` need their extras."""

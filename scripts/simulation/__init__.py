"""A simulator of the denoiser: the engine's own decisions over measured costs, without a UNet."""

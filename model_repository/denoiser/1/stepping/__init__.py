"""What one denoising step is, of any mixture of waveforms."""

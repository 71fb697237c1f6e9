"""One denoising step, for any mixture of waveforms: its inputs, its schedule, its batch."""

"""Vocoders of random weights, whose reach is long and heard."""

import torch
from transformers import SpeechT5HifiGan, SpeechT5HifiGanConfig

CONFIGS = {
    "audioldm2": {"upsample_rates": [5, 4, 2, 2, 2], "upsample_kernel_sizes": [16, 16, 8, 4, 4]},
    "speecht5": {"upsample_rates": [4, 4, 4, 4], "upsample_kernel_sizes": [8, 8, 8, 8], "normalize_before": True},
    "one": {"upsample_rates": [3], "upsample_kernel_sizes": [3], "resblock_kernel_sizes": [5]},
    "odd": {"upsample_rates": [3, 2], "upsample_kernel_sizes": [9, 7], "resblock_dilation_sizes": [[2, 7]] * 3},
}


def random_vocoder(name: str) -> SpeechT5HifiGan:
    torch.manual_seed(0)
    config = {"normalize_before": False, **CONFIGS[name]}
    vocoder = SpeechT5HifiGan(SpeechT5HifiGanConfig(model_in_dim=8, upsample_initial_channel=64, **config))
    with torch.no_grad():
        for parameter in vocoder.parameters():
            # So large that what is far away is still heard.
            parameter.normal_(0, 1.5 * parameter[0].numel() ** -0.5)
        vocoder.mean.normal_()
        vocoder.scale.uniform_(0.5, 2)
    return vocoder.double().eval()

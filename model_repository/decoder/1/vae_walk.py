"""Walks through the layers of an `AutoencoderKL`'s decoder in order, for several ways to execute them."""

from typing import Any, Final, Protocol, TypeVar

_FOLLOWED: Final = {"act_fn": "silu", "mid_block_add_attention": True, "use_post_quant_conv": True}
_FOLLOWED_BLOCK: Final = "UpDecoderBlock2D"

A = TypeVar("A")


class Layers(Protocol[A]):
    """Executes one kind of VAE layer per method.

    `A` is the implementation's activation type; each method receives the diffusers module.
    """

    def convolve(self, convolution: Any, hidden: A) -> A:
        """A convolution, of one position or wider."""

    def resnet(self, resnet: Any, hidden: A) -> A:
        """A `ResnetBlock2D` without a time embedding."""

    def attend(self, attention: Any, hidden: A) -> A:
        """An `Attention` over all positions, with a residual connection."""

    def upsample(self, upsampler: Any, hidden: A) -> A:
        """An `Upsample2D`: twice the size, then a convolution."""

    def finish(self, norm: Any, activation: Any, convolution: Any, hidden: A) -> A:
        """The last normalisation and the convolution behind it."""


def check_followed(vae: Any) -> None:
    """Raises ValueError for a decoder with options that `walk` does not follow; AudioLDM 2 has none."""
    for option, followed in _FOLLOWED.items():
        if vae.config[option] != followed:
            raise ValueError(f"{option} of the VAE: got {vae.config[option]!r} but expected {followed!r}")
    if set(vae.config.up_block_types) != {_FOLLOWED_BLOCK}:
        raise ValueError(f"up_block_types of the VAE: got {vae.config.up_block_types} but expected {_FOLLOWED_BLOCK}s")


def walk(layers: Layers[A], vae: Any, latents: A) -> A:
    """Computes `vae.decode` for latents that are divided by the scaling factor.

    Args:
        vae: an `AutoencoderKL` that `check_followed` accepts.
    """
    decoder = vae.decoder
    hidden = layers.convolve(decoder.conv_in, layers.convolve(vae.post_quant_conv, latents))
    first, *others = decoder.mid_block.resnets
    hidden = layers.resnet(first, hidden)
    for attention, resnet in zip(decoder.mid_block.attentions, others, strict=True):
        hidden = layers.resnet(resnet, layers.attend(attention, hidden))
    for block in decoder.up_blocks:
        for resnet in block.resnets:
            hidden = layers.resnet(resnet, hidden)
        for upsampler in block.upsamplers or ():
            hidden = layers.upsample(upsampler, hidden)
    return layers.finish(decoder.conv_norm_out, decoder.conv_act, decoder.conv_out, hidden)

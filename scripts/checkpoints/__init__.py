"""Checkpoints in the layout of diffusers' `AudioLDM2Pipeline`: build one of random weights, fetch one, verify one."""

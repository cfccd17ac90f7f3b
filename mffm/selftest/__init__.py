"""Checks of the machine at hand: what must hold of a training on its ranks, device and network, measured there."""

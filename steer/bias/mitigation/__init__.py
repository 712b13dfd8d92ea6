"""Debiasing methods, one a file. See `steer.bias.debiasing`."""

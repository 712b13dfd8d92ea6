"""Lenses, one a file: from the residual stream at some depth to that behind the last block. See `steer.lens.lens`."""

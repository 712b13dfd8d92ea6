"""Operators, one a file: what an intervention does to an activation. See `steer.intervene.operator`."""

"""Hydra configuration groups, found as `pkg://steer.conf`."""

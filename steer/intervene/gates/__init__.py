"""Gates that read one site, one a file. See `steer.intervene.gate`."""

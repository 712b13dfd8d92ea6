"""The commands of `steer`, one file each."""

"""The commands of `steer`: `<name>.py` has `run(config)` of the command of that name, the other modules are parts of them."""

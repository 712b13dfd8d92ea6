"""Only the list of packages; everything else is declared in pyproject.toml, which cannot search for packages and map folders at once."""

from setuptools import find_packages, setup

MAPPED = ("callbacks", "kernels", "conf")  # folders of the top level, imported as steer.<folder>

found = find_packages(include=["steer", "steer.*", *MAPPED, *(f"{room}.*" for room in MAPPED)])
setup(packages=[name if name.split(".")[0] == "steer" else f"steer.{name}" for name in found])

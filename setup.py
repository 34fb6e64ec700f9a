"""Packages for pip: densenet_jax, and configs/ as its recipes; everything else stands in pyproject.toml."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["densenet_jax*"]), "densenet_jax.configs"],
    package_dir={"densenet_jax.configs": "configs"},
)

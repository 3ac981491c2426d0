"""The packages to install, which pyproject.toml cannot say: those of ipr_fast/, and kernels/ as ipr_fast.kernels.

A top-level module named `kernels` would shadow the Hugging Face package of that name.
"""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["ipr_fast", "ipr_fast.*"]), "ipr_fast.kernels"],
    package_dir={"ipr_fast": "ipr_fast", "ipr_fast.kernels": "kernels"},
)

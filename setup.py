"""What pyproject.toml cannot say: the card's template lies at the top; and a checkout's own folders are no packages of
a wheel, though importable where the checkout is installed with `pip install -e .`."""

import sys
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py


class WithTemplate(build_py):
    def run(self):
        super().run()
        if not self.editable_mode:
            self.copy_file("model_card_template.md", str(Path(self.build_lib) / "model_card_template.md"))


checkout = ["benchmarks", "experiments", "tests", "tests.*"] if "editable_wheel" in sys.argv else []
setup(
    packages=find_packages(include=["diff_instruct", "diff_instruct.*", "pocket", "pocket.*", *checkout]),
    cmdclass={"build_py": WithTemplate},
)

"""Everything is declared in setup.cfg, but for one thing: a wheel holds the repository's configs/ as flax_switch.configs."""

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithRecipes(build_py):
    """Adds configs/ as a package inside ours; an editable install finds it beside the package (flax_switch.config.shipped)."""

    def finalize_options(self) -> None:
        super().finalize_options()
        if not self.editable_mode:
            self.packages = [*self.packages, "flax_switch.configs"]
            self.package_dir = {**(self.package_dir or {}), "flax_switch.configs": "configs"}
            self.package_data = {**self.package_data, "flax_switch.configs": ["gin/*.gin"]}


setup(cmdclass={"build_py": BuildWithRecipes})

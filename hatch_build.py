"""Compiles the inner loops into the wheel (also an editable one) where there is a C compiler; without one the wheel is pure."""

import runpy
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class CustomBuildHook(BuildHookInterface):
    """See https://hatch.pypa.io/latest/plugins/build-hook/custom/."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        native = Path(self.root) / "src" / "geomerge" / "methods" / "native"
        reason = runpy.run_path(str(native / "build.py"))["build_all"]()
        if reason is not None:
            self.app.display_warning(f"geomerge without compiled loops: {reason}")
            return
        platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{platform}"
        build_data.setdefault("artifacts", []).append("src/geomerge/methods/native/kernels*.so")

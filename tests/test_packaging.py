"""What is installed is what the repository holds."""

import pathlib
import tomllib

ROOT = pathlib.Path(__file__).parent.parent


def test_every_package_is_installed():
    """The built-in configs are a package of the wheel, `scalelab.configs`; no folder of code is left out."""
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    folders = [path.parent for top in ("scalelab", "pallas_kernels") for path in (ROOT / top).rglob("*.py")]
    expected = {".".join(folder.relative_to(ROOT).parts) for folder in folders} | {"scalelab.configs"}
    assert set(listed["packages"]) == expected
    assert listed["package-dir"] == {"scalelab.configs": "configs"}
    data = [path for path in (ROOT / "scalelab").rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")]
    assert {path.suffix for path in data} == {".css"}
    assert listed["package-data"] == {"scalelab": ["*.css"]}

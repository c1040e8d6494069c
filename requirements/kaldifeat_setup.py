"""setup.py for kaldifeat 1.24's source archive: torch's extension helper in place of its CMake build.

setup.sh copies it over the archive's own setup.py. Only a C++ compiler is needed: no CMake, no CUDA toolkit
(features on a GPU go through torch's own kernels), nothing downloaded. All sources are compiled as one file,
because nearly the whole time goes into parsing torch's headers, once for each file compiled.
"""

from pathlib import Path

import torch
from setuptools import setup
from torch.utils.cpp_extension import BuildExtension, CppExtension

ROOT = Path(__file__).resolve().parent
TORCH_VERSION = torch.__version__.split("+")[0]
MAJOR, MINOR = TORCH_VERSION.split(".")[:2]

sources = [f for f in sorted(ROOT.glob("kaldifeat/csrc/*.cc")) if "test" not in f.name]
sources += sorted(ROOT.glob("kaldifeat/python/csrc/*.cc"))
(ROOT / "all.cc").write_text("".join(f'#include "{f.relative_to(ROOT)}"\n' for f in sources))

# kaldifeat compares this with the torch it finds when it is imported
package = ROOT / "kaldifeat/python/kaldifeat"
(package / "torch_version.py").write_text(f'kaldifeat_torch_version = "{torch.__version__}"\n')

setup(
    name="kaldifeat",
    version=f"1.24+torch{TORCH_VERSION}",
    packages=["kaldifeat"],
    package_dir={"kaldifeat": str(package.relative_to(ROOT))},
    ext_modules=[
        CppExtension(
            "_kaldifeat",
            ["all.cc"],
            include_dirs=[str(ROOT)],
            extra_compile_args=[
                "-O2",
                "-g0",
                f"-DKALDIFEAT_TORCH_VERSION_MAJOR={MAJOR}",
                f"-DKALDIFEAT_TORCH_VERSION_MINOR={MINOR}",
            ],
        )
    ],
    cmdclass={"build_ext": BuildExtension.with_options(use_ninja=False)},
)

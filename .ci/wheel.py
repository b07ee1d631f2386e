"""Install the wheel of a folder into a fresh virtual environment, import it there and draw one sample on the CPU.

python .ci/wheel.py dist

The fresh environment borrows torch and numpy from the environment that runs this file, by one .pth file: a second copy
of torch would take minutes. The borrowed folder comes last on the path and must not hold fastdiff itself, so that what
is imported is the wheel's.
"""

import subprocess
import sys
import sysconfig
import tempfile
import venv
import zipfile
from pathlib import Path

# Top folders and files of the checkout that a user of the package has no need of.
ONLY_IN_THE_CHECKOUT = ("benchmarks", "tests", "docs", "examples", "kernels")
SMOKE = """
import sys
import fastdiff, torch
assert sys.argv[1] in fastdiff.__file__, f"imported {fastdiff.__file__}, not the wheel"
assert "triton" not in sys.modules, "import fastdiff imports Triton"
unet = fastdiff.UNet(sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8, 16), norm_num_groups=4,
                     down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2)
image = fastdiff.DDPM(unet, objective="v").sample(1, steps=4, sampler="ddim", seed=0)
assert image.shape == (1, 1, 8, 8) and bool(image.isfinite().all())
import fastdiff.kernels
print(f"fastdiff {fastdiff.__version__}: one sample of {tuple(image.shape)}")
"""


def check_contents(wheel: Path) -> None:
    """Print the files of the wheel; SystemExit if it holds something that belongs to the checkout only."""
    names = sorted(zipfile.ZipFile(wheel).namelist())
    print("\n".join(names))
    wrong = [name for name in names if name.split("/")[0] in ONLY_IN_THE_CHECKOUT or "bench" in name.lower()]
    wrong += [name for name in ("fastdiff/py.typed", "fastdiff/kernels/update.py") if name not in names]
    if wrong:
        sys.exit(f"{wheel.name}: these files should not be there, or are missing: {', '.join(wrong)}")


def main(folder: str) -> None:
    """Check the one wheel of the folder."""
    (wheel,) = Path(folder).glob("*.whl")
    check_contents(wheel)
    with tempfile.TemporaryDirectory() as place:
        venv.create(place, with_pip=False)
        python = Path(place, "bin", "python")
        site = Path(
            subprocess.check_output(
                [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], text=True
            ).strip()
        )
        # Our own pip, told to install for the other Python: installing pip there would take longer than the test.
        pip = [sys.executable, "-m", "pip", f"--python={python}", "install", "--quiet", "--no-deps", wheel]
        subprocess.run(pip, check=True)
        # Only the folder itself is added: the .pth files in it, which may point to a checkout, are not read.
        (site / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
        subprocess.run([python, "-c", SMOKE, str(site)], check=True, cwd=place)


if __name__ == "__main__":
    main(sys.argv[1])

"""Everything that is measured of the data path, one after the other; each part says in its own
docstring what is compared.

python benchmarks/data_path.py            text_path, image_path, record_path, audit_path
                                          -> benchmarks/results/*.json
python benchmarks/data_path.py --quick    the same with few samples, nothing written
"""

import argparse, subprocess, sys
from pathlib import Path

def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="few samples, nothing written")
    args = parser.parse_args()
    for name in ("text_path", "image_path", "record_path", "audit_path"):
        print(f"== {name}", flush=True)
        words = [sys.executable, Path(__file__).with_name(f"{name}.py")]
        subprocess.run([*words, *["--quick"] * args.quick], check=True)

if __name__ == "__main__": main()

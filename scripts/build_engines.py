"""Build TensorRT-RTX engines of an artifact's graphs, for a GPU that need not be here.

    python scripts/build_engines.py artifacts/gpt-oss-20b/16gb/tensorrt-mxfp4-embed8-sm120 --sm 120

Writes decode.SM120.engine and prefill.SM120.engine into the folder, or to --out; a failed build leaves nothing. Needs
`pip install 'exporter[tensorrt]'`. The same engines by command line: see the folder's README.md.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import psutil

from exporter.errors import ExporterError
from exporter.types.sizes import format_size
from exporter.validate import tensorrt
from exporter.validate.tensorrt_prove import GRAPHS, read_profiles


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--sm", type=int, action="append", help="compute capability; default: all that it is for")
    parser.add_argument("--graph", choices=GRAPHS, action="append", help="default: both")
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    try:
        sms, shapes = read_profiles(asked.folder)
        (asked.out or asked.folder).mkdir(parents=True, exist_ok=True)
        failed = 0
        for graph in asked.graph or GRAPHS:
            for sm in asked.sm or sms:
                engine = (asked.out or asked.folder) / f"{graph}.SM{sm}.engine"
                path = asked.folder / f"{graph}.onnx"
                memory = psutil.virtual_memory().available
                made = tensorrt.build(
                    path, shapes[graph], sm, time_limit=3600, memory_limit=memory, keep=engine.absolute()
                )
                failed += not made["built"]
                if made["built"]:
                    print(f"{engine}: {format_size(made['engine_bytes'])}, {made['build_seconds']:.1f} s")
                else:
                    print(f"{graph} for SM{sm}: {made['error']}", file=sys.stderr)
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except ExporterError as error:
        print(f"error: {error.message}" + (f"\n  hint: {error.hint}" if error.hint else ""), file=sys.stderr)
        return error.exit_code
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

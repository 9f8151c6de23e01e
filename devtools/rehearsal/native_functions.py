"""Print the overloads that torch's generator makes MPS kernels for, as JSON.

usage: native_functions.py WHEEL

WHEEL is an unpacked torch wheel; its own ``torchgen`` reads its own ``native_functions.yaml``.
It is a process of its own because every torch brings another ``torchgen``.
"""

import json
import sys
from pathlib import Path


def main() -> None:
    wheel = Path(sys.argv[1])
    sys.path.insert(0, str(wheel))
    from torchgen.gen import parse_native_yaml
    from torchgen.model import DispatchKey

    folder = wheel / "torchgen" / "packaged" / "ATen" / "native"
    parsed = parse_native_yaml(str(folder / "native_functions.yaml"), str(folder / "tags.yaml"))
    mps = parsed.backend_indices[DispatchKey.MPS]
    by_name = {function.func.name: function for function in parsed.native_functions}
    # A structured operator's kernel is that of its out variant, which all its variants share.
    found = [
        str(function.func.name)
        for function in parsed.native_functions
        if mps.has_kernel(by_name[function.structured_delegate] if function.structured_delegate else function)
    ]
    print(json.dumps(sorted(found)))


if __name__ == "__main__":
    main()

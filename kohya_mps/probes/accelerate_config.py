"""Write the accelerate configuration with accelerate's own helper, correct it, and read it back.

usage: accelerate_config.py FILE FIELDS

FIELDS is a JSON object of fields to set. Prints what accelerate reads back, as JSON.
"""

import json
import sys
from pathlib import Path

import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import write_basic_config


def main() -> None:
    target, fields = Path(sys.argv[1]), json.loads(sys.argv[2])
    # Always the same name, so that what a killed run left is replaced. It has to be removed
    # first: the helper does not overwrite a file.
    written = target.with_name(f".{target.name}.new.yaml")
    written.unlink(missing_ok=True)
    # Without CUDA the helper writes use_cpu: true, on a Mac too, and the launcher obeys it
    # (accelerate 1.3.0, commands/config/default.py). FIELDS corrects that.
    write_basic_config(mixed_precision=fields["mixed_precision"], save_location=str(written))
    values = {**json.loads(written.read_text(encoding="utf-8")), **fields}
    written.write_text(yaml.safe_dump(values), encoding="utf-8")
    print(json.dumps(load_config_from_file(str(written)).to_dict(), default=str))
    written.chmod(0o644)
    written.replace(target)


if __name__ == "__main__":
    main()

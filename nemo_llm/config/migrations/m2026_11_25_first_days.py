"""Keys of the first three days, before any run was recorded: what they switch on was not there."""

from pathlib import Path

import yaml

ADDED = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))

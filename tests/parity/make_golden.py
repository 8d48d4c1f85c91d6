"""Write tests/golden/*.json anew: ``python -m tests.parity.make_golden``. Only when the numbers are meant to change."""

import json
from pathlib import Path

from tests.parity.layouts import train_losses
from tests.ranks import RankPool

GOLDEN = Path(__file__).parent.parent / "golden"


def main() -> None:
    """Train both models for ten steps on one CPU process and keep the figures."""
    pool = RankPool(1)
    for model in ("gpt_tiny", "moe_tiny"):
        steps = pool.run(train_losses, 1, model, ())[0]
        content = {"what": "loss and gradient norm of each step: one CPU process, fp32", "steps": steps}
        (GOLDEN / f"{model}_fp32.json").write_text(json.dumps(content, indent=1) + "\n")
    pool.close()


if __name__ == "__main__":
    main()

"""Training that is interrupted right after a checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from sbir_ray import checkpoint


def interrupted(train: Callable[[], Any]) -> None:
    """Run ``train`` until it has saved its first checkpoint, and no further."""
    save = checkpoint.save

    def killed_after(*args: Any, **named: Any) -> None:
        save(*args, **named)
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "save", killed_after)
        with pytest.raises(KeyboardInterrupt):
            train()

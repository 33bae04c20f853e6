"""The pseudo pairs of a PSEUDO folder by other thresholds than its own: nothing is drawn."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from sbir_ray.config import ChoiceConfig, FilterConfig, RetrievalTraining
from sbir_ray.stream.pseudo_store import choice_of, read_header


def choice_for(folder: Path, config: RetrievalTraining) -> ChoiceConfig | None:
    """The choice among a folder's drawings that a training asks for; None for the folder's own.

    Raises:
        UserError, DamagedError: as ``read_header``.
    """
    choice = choice_of(read_header(folder))
    if config.filters != FilterConfig():
        choice = dataclasses.replace(choice, filters=config.filters)
    if config.samples:
        choice = dataclasses.replace(choice, samples=config.samples)
    return choice if config.samples or config.filters != FilterConfig() else None

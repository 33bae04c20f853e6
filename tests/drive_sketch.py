"""Sketches with the fake sketcher in a process of its own, to be killed.

python -m tests.drive_sketch STORE OUT SECONDS
"""

import sys
from pathlib import Path

from ray import cloudpickle

from sbir_ray.config import SketchConfig
from sbir_ray.stream.cluster import connect
from sbir_ray.stream.sketching import sketch
from tests import fake_sketcher

if __name__ == "__main__":
    store, out, seconds = sys.argv[1:]
    cloudpickle.register_pickle_by_value(fake_sketcher)
    with connect():
        config = SketchConfig(samples=2, temperature=1.0, batch_size=4)
        sketch(Path(store), Path(out), fake_sketcher.FakeSpec(seconds=float(seconds)), config)

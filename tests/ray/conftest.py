"""One Ray for all tests of this folder: it takes longer to start than most of them to run."""

import pytest
import ray

from sbir_ray.stream.cluster import connect


def pytest_configure(config):
    for line in (
        # Ray 2.60 sets deprecated fields of its own when it copies its settings for a pipeline.
        "ignore:.use_:DeprecationWarning:ray.data.context",
    ):
        config.addinivalue_line("filterwarnings", line)


@pytest.fixture(scope="session")
def cluster():
    """A Ray of 4 logical CPUs, whatever cluster the environment names."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)
        # Ray Train's controller looks every so often; its default of 2 s is for long runs.
        patch.setenv("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
        with connect(num_cpus=4):
            yield ray

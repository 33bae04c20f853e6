"""One Ray for all tests of this folder: it takes longer to start than most of them to run."""

import gc

import pytest
import ray

from sbir_ray.stream.cluster import connect
from tests.faults.kit import assert_no_orphans
from tests.object_store import make_bucket, object_store


def pytest_configure(config):
    for line in (
        # Ray 2.60 sets deprecated fields of its own when it copies its settings for a pipeline.
        "ignore:.use_:DeprecationWarning:ray.data.context",
    ):
        config.addinivalue_line("filterwarnings", line)


@pytest.fixture(scope="session")
def cluster(tmp_path_factory):
    """A Ray of 4 logical CPUs, whatever cluster the environment names.

    Its processes know the way to an object store, since they keep the environment they began with.
    """
    log = tmp_path_factory.mktemp("objects") / "log"
    with object_store(str(log)) as environment, pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        patch.delenv("RAY_ADDRESS", raising=False)
        # Ray Train's controller looks every so often; its default of 2 s is for long runs.
        patch.setenv("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
        with connect(num_cpus=4):
            yield ray


@pytest.fixture(scope="session")
def bucket(cluster):
    """The URI of a bucket that this process and those of the cluster reach."""
    return make_bucket("tests")


@pytest.fixture(autouse=True)
def no_orphans():
    """No actor and no placement group of the cluster is left behind by a test."""
    yield
    if ray.is_initialized():
        # Errors that were caught may hold actors.
        gc.collect()
        assert_no_orphans()

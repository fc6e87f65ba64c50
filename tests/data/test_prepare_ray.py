"""A Ray cluster makes the very corpus that local processes make."""

import os

import pytest
from small_text import contents, no_progress, preparation, prepared_in, source, write_documents

from dsv3_jax.data import assembly, prepare
from dsv3_jax.data.runner import open_runner

pytest.importorskip("ray", reason="Ray is not installed (the `ray` extra)")


@pytest.fixture(scope="module")
def cluster_address():
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "object_store_memory": 100_000_000})
    cluster.add_node(num_cpus=1, object_store_memory=100_000_000)
    yield cluster.address
    cluster.shutdown()


def test_two_ray_workers_make_the_local_corpus_byte_for_byte(tmp_path, monkeypatch, cluster_address):
    monkeypatch.setattr(assembly, "SHARD_BYTES", 5_000)
    for number, name in enumerate(("one", "two")):
        write_documents(tmp_path / name, num_documents=40, words_per_document=60, seed=number)
    given = [source(name, tmp_path / name) for name in ("one", "two")]
    prepared_in(tmp_path / "local", *given)
    with open_runner("ray", num_workers=2, ray_address=cluster_address) as runner:
        prepare.prepare(preparation(*given), tmp_path / "ray", runner=runner, on_progress=no_progress)
        paths = [tmp_path / "one" / f"document_{number}.txt" for number in (0, 1, 2, 10**6, 3)]
        sizes = []
        with pytest.raises(FileNotFoundError, match=r"document_1000000\.txt"):  # errors arrive as they were raised
            for size in runner.map(os.path.getsize, paths):
                sizes.append(size)
        assert sizes == [path.stat().st_size for path in paths[:3]]
    assert contents(tmp_path / "ray") == contents(tmp_path / "local")


def test_an_address_without_a_cluster_is_refused():
    with (
        pytest.raises(ValueError, match=r"ray_address='127\.0\.0\.1:9': no cluster answers"),
        open_runner("ray", num_workers=1, ray_address="127.0.0.1:9"),
    ):
        pass

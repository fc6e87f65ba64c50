"""Times from work and hardware."""

import pytest

from dsv3_jax.plan import hardware, roofline
from dsv3_jax.plan.traffic import Collective

H200 = hardware.HARDWARE["h200"]


def collective(kind: str, sent: int, size: int, hosts: int) -> Collective:
    return Collective(kind, ("gpu",), 1, sent, size, hosts)


def test_every_resource_is_busy_for_its_work_over_its_peak():
    busy = roofline.seconds(
        {"bf16": 989.4e12, "fp8": 2 * 1978.9e12}, 9_600_000_000_000, [collective("all-gather", 45 * 10**10, 8, 1)], H200
    )
    assert busy == pytest.approx(
        {"bf16 products": 1.0, "fp8 products": 2.0, "memory": 2.0, "nvlink": 1.0, "network": 0.0}
    )


def test_least_time_is_that_of_the_busiest_resource_products_taken_together():
    busy = {"bf16 products": 1.0, "fp8 products": 1.5, "memory": 2.0, "nvlink": 0.1, "network": 2.4}
    assert roofline.least_seconds(busy) == (2.5, "products")
    assert roofline.least_seconds(busy | {"network": 3.0}) == (3.0, "network")


@pytest.mark.parametrize(
    ("kind", "size", "hosts", "near", "far"),
    [
        ("all-to-all", 8, 1, 700, 0),
        ("all-to-all", 8, 8, 0, 700),
        ("all-to-all", 8, 2, 300, 400),  # 7 peers, 4 of them on the other host
        ("all-gather", 16, 2, 700, 700 / 8),  # the 8 network cards of a host share what enters it
        ("reduce-scatter", 4, 4, 0, 700),
        ("collective-permute", 2, 2, 0, 700),
    ],
)
def test_bytes_leave_the_host_as_far_as_the_group_does(kind, size, hosts, near, far):
    assert roofline.link_bytes(collective(kind, 700, size, hosts)) == pytest.approx((near, far))


def test_every_hardware_says_where_its_numbers_come_from():
    for described in hardware.HARDWARE.values():
        assert described.source and described.memory_gb > described.reserved_gb > 0


def test_overridden_number_replaces_the_published_one_and_is_told():
    changed = hardware.find("h800", {"nvlink_gb_per_s": 200.0, "devices_per_host": 4})
    assert (changed.nvlink_gb_per_s, changed.devices_per_host, changed.name) == (200.0, 4, "H800")
    assert "nvlink_gb_per_s=200" in changed.source


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("a100", {}, "h100, h200, h800"),
        ("h200", {"speed": 1.0}, "memory_gb_per_s"),
        ("h200", {"bf16_tflops": 0.0}, "must be positive"),
        ("h200", {"reserved_gb": -1.0}, "must be positive"),
        ("h200", {"memory_gb": float("inf")}, "must be positive"),
        ("h200", {"reserved_gb": float("nan")}, "must be positive"),
        ("h200", {"devices_per_host": 0.5}, "must be a whole number"),
    ],
)
def test_unknown_hardware_or_number_is_refused_with_those_there_are(name, changes, message):
    with pytest.raises(ValueError, match=message):
        hardware.find(name, changes)

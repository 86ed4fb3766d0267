"""Links between cards: what was measured is reproduced, what a card cannot have is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest

from wanvram.errors import InputError
from wanvram.sharing import LINKS
from wanvram.simulate import links
from wanvram.simulate.gpus import GPUS
from wanvram.simulate.links import communication_bytes, exchanged, link_of, linked, links_of
from wanvram.units import MIB

H200 = GPUS["h200"]


@pytest.mark.parametrize(
    ("name", "sent", "measured"),
    [("nvlink", 194e6, 1.40e-3), ("nvlink", 5.2e6, 0.12e-3), ("host", 194e6, 8.4e-3), ("host", 5.2e6, 0.29e-3)],
)
def test_exchanges_take_as_long_as_on_two_h200s(name: str, sent: float, measured: float) -> None:
    assert link_of(H200, name, 2).seconds(sent) == pytest.approx(measured, rel=0.03)


def test_a_ring_takes_what_it_took_within_ten_per_cent() -> None:
    assert link_of(H200, "nvlink", 2).seconds(774e6) == pytest.approx(4.92e-3, rel=0.1)
    assert link_of(H200, "host", 2).seconds(774e6) == pytest.approx(33.3e-3, rel=0.1)


def test_what_nccl_takes_is_what_was_measured_with_three_numbers_of_channels() -> None:
    nvlink = link_of(H200, "nvlink", 2)
    assert communication_bytes(nvlink, 2) == (222 + 344) * MIB
    assert communication_bytes(link_of(H200, "host", 2), 2) == (198 + 248) * MIB
    by_default = communication_bytes(replace(nvlink, channels=32), 2)
    assert by_default - links._INIT * MIB == 632 * MIB
    assert communication_bytes(nvlink, 1) == 0


def test_further_peers_take_their_channels_and_nothing_else() -> None:
    nvlink = link_of(H200, "nvlink", 2)
    grown = [communication_bytes(nvlink, n + 1) - communication_bytes(nvlink, n) for n in range(2, 8)]
    assert set(grown) == {8 * 12 * MIB}


@pytest.mark.parametrize(
    ("key", "usual"),
    [
        ("h200", "nvlink"),
        ("a100-80gb", "nvlink"),
        ("rtx4090", "host"),
        ("rtx3090", "host"),
        ("l40s", "pcie4"),
        ("rtxpro6000", "pcie5"),
        ("t4", "pcie3"),
    ],
)
def test_every_card_has_its_usual_link(key: str, usual: str) -> None:
    assert link_of(GPUS[key], None, 2).name == usual


def test_every_card_says_of_every_link_what_it_rests_on() -> None:
    for card in GPUS.values():
        found = list(links_of(card))
        assert len({link.name for link in found}) == len(found) >= len(LINKS) - 1
        assert all(link.source and 1e9 < link.bytes <= 450e9 for link in found)


def test_a_geforce_goes_through_the_hosts_ram_whatever_the_bus() -> None:
    link = link_of(GPUS["rtx4090"], "pcie4", 2)
    assert link.channels == 0
    assert "no peer access" in link.source
    assert link.bytes == link_of(GPUS["rtx4090"], None, 2).bytes == pytest.approx(10.5e9, rel=0.01)
    assert link_of(GPUS["rtx4090"], "pcie3", 2).bytes == pytest.approx(link.bytes / 2)


@pytest.mark.parametrize(
    ("key", "name", "count", "said"),
    [
        ("rtx4090", "nvlink", 2, "the NVIDIA GeForce RTX 4090 has no NVLink"),
        ("rtx3090", "nvlink", 4, "in pairs, not 4"),
        ("h200", "ethernet", 2, "'ethernet'; choose one of nvlink"),
    ],
)
def test_a_link_that_cards_cannot_have_is_refused(key: str, name: str, count: int, said: str) -> None:
    with pytest.raises(InputError, match=said):
        link_of(GPUS[key], name, count)


def test_cards_with_nvlink_are_in_the_table() -> None:
    assert {*links._SWITCHED, *links._BRIDGED} <= set(GPUS)
    assert not {*links._SWITCHED} & {*links._BRIDGED}


def test_a_card_among_others_has_less_memory_left_and_no_faster_bus_than_is_stated() -> None:
    link = link_of(GPUS["rtx4090"], "pcie3", 2)
    one, two = GPUS["rtx4090"], linked(GPUS["rtx4090"], link, 446 * MIB)
    assert two.context_bytes - one.context_bytes == 446 * MIB
    assert (one.pcie_bytes, two.pcie_bytes) == (25e9, 12.5e9)
    assert linked(H200, link_of(H200, None, 2), 0) == H200


def test_copies_out_of_each_others_memory_are_faster_than_nccl_where_cards_reach_it() -> None:
    nvlink, host = link_of(H200, "nvlink", 2), link_of(H200, "host", 2)
    copies = exchanged(nvlink, H200, "auto")
    assert copies == exchanged(nvlink, H200, "copies")
    # 0.525 ms of the link, 0.1 of a copy into the buffer, and a barrier
    assert copies.seconds(194e6) == pytest.approx(0.525e-3 + 2 * 194e6 / H200.bandwidth_bytes + 12e-6, rel=0.01)
    assert copies.seconds(194e6) < nvlink.seconds(194e6) / 2
    assert copies.gather_seconds(141e6) == copies.seconds(141e6)
    assert exchanged(nvlink, H200, "nccl") == nvlink
    assert exchanged(host, H200, "auto") == host
    with pytest.raises(InputError, match="exchange_by: copies need access to each other's memory"):
        exchanged(host, H200, "copies")
